"""Writes the proofs of names that the package ships: `python -m tests.fidelity.proofs FOLDER`.

There is one of each documented architecture, small as in the tests and as its config is by
default, for the version of Transformers that is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
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


def proof_of(model: Model) -> tuple[str, dict[str, Any]]:
    """The key of a model's proof, and the proof as it is made now."""
    before = os.environ.get("INSITU_PROOFS")
    os.environ["INSITU_PROOFS"] = "off"
    try:
        body: Any = model.vocabulary.body  # type: ignore[attr-defined]
        proofs = Proofs(body, recalling=False)
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


def models() -> Iterator[tuple[str, Model]]:
    """Models of the documented architectures, and the bundled one."""
    yield "insitu/eiffel", LanguageModel("insitu/eiffel")
    for name in ZOO:
        yield name, Model(module_of(name))
    for name, one in ZOO.items():
        kind = getattr(transformers, one.model)
        try:
            with torch.device("meta"):
                module: nn.Module = kind(kind.config_class()).eval()
            yield f"{name} by default", Model(module)
        except Exception as error:  # a config that is none without arguments
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)


def main(folder: str) -> None:
    """Writes the file of the installed version of Transformers."""
    found: dict[str, Any] = {}
    path = Path(folder) / f"{version('transformers')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, model in models():
        try:
            key, data = proof_of(model)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        found.setdefault(key, data)
        print(name, key, len(data["blocks"]), flush=True)
        path.write_text(json.dumps({"proofs": found}, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
