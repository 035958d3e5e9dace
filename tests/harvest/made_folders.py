"""Folders of activations for the tests of readers, written as `insitu.harvest.layout` says.

This is no writer: all is made in memory, and nothing is committed in steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save

from insitu.harvest.layout import Line, Place, Skipped, shard_name
from insitu.harvest.specification import DataSpecification, SiteSpecification, Specification

LABEL = "residual_out:1"


def dense(label: str = LABEL, shape: tuple[int, ...] = (4,), dtype: str = "float32") -> Any:
    return SiteSpecification(label=label, shape=shape, dtype=dtype, model_dtype="float32")


def sparse(label: str, k: int, features: int, dtype: str = "float32") -> SiteSpecification:
    return SiteSpecification(
        label=label, shape=(k,), dtype=dtype, model_dtype="float32", features=features
    )


def specification(sites: Sequence[SiteSpecification], **changed: Any) -> Specification:
    told: dict[str, Any] = {
        "model": "insitu/eiffel",
        "model_fingerprint": "f" * 64,
        "tokenizer": "t" * 64,
        "data": DataSpecification(name="texts"),
        "sites": tuple(sites),
        "context": 8,
        "pack": False,
        "bos": False,
        "separator": None,
        "reduce": None,
        "tokens": None,
        "batch_tokens": 64,
        "shard_tokens": 32,
        "insitu": "0.1.0",
        "torch": str(torch.__version__),
        "transformers": "5",
        "device": "cpu",
    }
    return Specification(**{**told, **changed})


def drawn(site: SiteSpecification, rows: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Random values of a site, under the names of a shard's tensors."""
    dtype = getattr(torch, site.dtype)
    if site.features is None:
        return {site.label: torch.randn(rows, *site.shape, generator=draw).to(dtype)}
    (k,) = site.shape
    values, indices = torch.randn(rows, site.features, generator=draw).topk(k)
    return {f"{site.label}/values": values.to(dtype), f"{site.label}/indices": indices.int()}


def sums(label: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sums of a dense site."""
    wide = values.double()
    norms = wide.flatten(1).norm(dim=1) if wide.ndim > 1 else wide.abs()
    return {
        f"{label}/sum": wide.sum(0),
        f"{label}/norm_sum": norms.sum(),
        f"{label}/square_sum": norms.square().sum(),
    }


def write_folder(
    folder: Path,
    shards: Sequence[Sequence[int]],
    sites: Sequence[SiteSpecification] = (),
    *,
    values: Mapping[str, torch.Tensor] | None = None,
    token_ids: torch.Tensor | None = None,
    last: bool = True,
    skipped: Mapping[int, Sequence[Skipped]] | None = None,
    seed: int = 0,
    **changed: Any,
) -> dict[str, torch.Tensor]:
    """Writes a folder, and returns all of its rows by the names of the tensors.

    Args:
        folder: where to.
        shards: the lengths of the sequences of each shard.
        sites: the sites; none for one dense site of width 4.
        values: tensors of sites, where they are not random.
        token_ids: the tokens, where they are not random.
        last: whether the harvest is at its end.
        skipped: of some shards, what was skipped.
        seed: of what is random.
        changed: fields of the specification.
    """
    told = specification(sites or [dense()], **changed)
    draw = torch.Generator().manual_seed(seed)
    lengths = [length for shard in shards for length in shard]
    rows = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    position = [torch.arange(length, dtype=torch.int32) for length in lengths]
    whole = {
        "token_ids": torch.randint(0, 500, (rows,), generator=draw, dtype=torch.int32),
        "sequence": sequence,
        "position": torch.cat([*position, torch.empty(0, dtype=torch.int32)]),
        "document": sequence * 2,
    }
    if token_ids is not None:
        whole["token_ids"] = token_ids.int()
    for site in told.sites:
        whole.update(drawn(site, rows, draw))
    whole.update(values or {})
    (folder / "shards").mkdir(parents=True)
    (folder / "harvest.json").write_bytes(msgspec.json.encode(told))
    lines, row, first = [], 0, 0
    for number, shard in enumerate(shards):
        stop = row + sum(shard)
        tensors = {name: value[row:stop].contiguous() for name, value in whole.items()}
        for site in told.sites:
            if site.features is None:
                tensors.update(sums(site.label, tensors[site.label]))
        data = save(tensors)
        (folder / shard_name(number)).write_bytes(data)
        line = Line(
            shard=number,
            rows=stop - row,
            tokens=stop - row,
            first_sequence=first,
            sequences=len(shard),
            start=Place(2 * first),
            stop=Place(2 * (first + len(shard))),
            source="s" * 64,
            skipped=tuple((skipped or {}).get(number, ())),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            last=last and number == len(shards) - 1,
        )
        lines.append(msgspec.json.encode(line) + b"\n")
        row, first = stop, first + len(shard)
    (folder / "manifest.jsonl").write_bytes(b"".join(lines))
    return whole
