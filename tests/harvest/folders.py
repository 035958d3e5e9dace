"""What is in a folder of activations, read with safetensors alone: the tests' own reader."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

TOKEN_IDS, SEQUENCE, POSITION, DOCUMENT = "token_ids", "sequence", "position", "document"


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    numbers = [line["shard"] for line in manifest(folder)]
    return [load_file(folder / "shards" / f"{number:05}.safetensors") for number in numbers]


def whole(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """The rows of all shards."""
    found = shards(folder)
    own = (TOKEN_IDS, SEQUENCE, POSITION, DOCUMENT, *names)
    return {name: torch.cat([one[name] for one in found]) for name in own}


def each_sequence(folder: Path, *names: str) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of each sequence, in their order."""
    rows = whole(folder, *names)
    for number in rows[SEQUENCE].unique().tolist():
        own = rows[SEQUENCE] == number
        yield {name: value[own] for name, value in rows.items()}


def digests(folder: Path) -> dict[str, str]:
    return {line["shard"]: line["sha256"] for line in manifest(folder)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
