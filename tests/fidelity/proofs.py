"""Writes the proofs of names that the package ships: `python -m tests.fidelity.proofs FOLDER`.

There is one of each documented architecture, small as in the tests, as its config is by default,
and as those of well-known published models are, for the version of Transformers that is installed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from insitu import LanguageModel, Model
from insitu.graph.errors import UnknownShapeError
from insitu.models.proof.given import Proofs
from insitu.models.proof.remembered import as_data, key_of
from tests.fidelity.zoo import ZOO, module_of

_SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_OF_LLAMA_3: Mapping[str, Any] = (
    {"rope_scaling": _SCALED, "rope_theta": 5e5}
    if version("transformers").startswith("4.")
    else {"rope_parameters": {**_SCALED, "rope_theta": 5e5}}
)
_TIED = {"tie_word_embeddings": True}
PUBLISHED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "llama": (
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 8, **_TIED},
        {"num_key_value_heads": 8, **_OF_LLAMA_3},
        {"num_key_value_heads": 8, **_OF_LLAMA_3, **_TIED},
        {"num_key_value_heads": 1},
        _TIED,
    ),
    "mistral": ({"sliding_window": None},),
    "qwen2": ({"num_key_value_heads": 4}, {"num_key_value_heads": 4, **_TIED}, _TIED),
    "qwen3": ({"num_key_value_heads": 8}, {"num_key_value_heads": 8, **_TIED}),
    "gemma": ({"num_key_value_heads": 1},),
    "gemma3": ({"num_key_value_heads": 1},),
    "phi3": ({"sliding_window": 2047},),
    "roberta": ({"type_vocab_size": 1},),
}
"""Settings of published models, by architecture, in which they differ from the default."""


def proof_of(model: Model) -> tuple[str, dict[str, Any]]:
    """The key of a model's proof, and the proof as it is made now."""
    before = os.environ.get("INSITU_PROOFS")
    os.environ["INSITU_PROOFS"] = "off"
    try:
        body = body_of(model)
        proofs = Proofs(body, Model, recalling=False)
        proofs.of_whole()
        with contextlib.suppress(UnknownShapeError):  # some cannot run without data
            for kind in {*body.kinds({}).values()}:
                proofs.of_block(kind)
        found = proofs.made()
    finally:
        if before is None:
            del os.environ["INSITU_PROOFS"]
        else:
            os.environ["INSITU_PROOFS"] = before
    key = key_of(model.module, model.modules, body.description)
    assert key is not None and found is not None, type(model.module).__name__
    return key, as_data(found)


def body_of(model: Model) -> Any:
    """What is found of a model's parts."""
    return model.vocabulary.body  # type: ignore[attr-defined]


def models() -> Iterator[tuple[str, Model]]:
    """Models of the documented architectures, and the bundled one."""
    yield "insitu/eiffel", LanguageModel("insitu/eiffel")
    for name in ZOO:
        yield name, Model(module_of(name))
    for name, one in ZOO.items():
        for settings in ({}, *PUBLISHED.get(name, ())):
            try:
                module = large(one.model, settings)
            except Exception as error:  # a config that is none without arguments
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            yield f"{name} with {settings}" if settings else f"{name} by default", Model(module)


def large(model: str, settings: Mapping[str, Any]) -> nn.Module:
    """Returns a model of the size that is the default, without weights.

    Args:
        model: the name of its class.
        settings: what its config says beside the default.
    """
    kind = getattr(transformers, model)
    with torch.device("meta"):
        return kind(kind.config_class(**copy.deepcopy(dict(settings)))).eval()


def main(folder: str) -> None:
    """Writes the file of the installed version of Transformers."""
    found: dict[str, Any] = {}
    path = Path(folder) / f"{version('transformers')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, model in models():
        try:
            key = key_of(model.module, model.modules, body_of(model).description)
            if key in found:
                continue
            key, data = proof_of(model)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        found[key] = data
        print(name, key, len(data["blocks"]), flush=True)
        path.write_text(json.dumps({"proofs": found}, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
