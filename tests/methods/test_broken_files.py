"""Files that are broken or hostile: each is refused with a reason that names it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from insitu import InsituError, LoadError
from insitu.methods import (
    Alignment,
    Axis,
    Circuit,
    Edge,
    Probe,
    Result,
    SparseAutoencoder,
    SteeringVector,
    TunedLens,
)
from tests.methods.test_sae import written

pytestmark = pytest.mark.no_wire

SCORES = Result(
    "Logistic probe of residual_out",
    "accuracy",
    torch.tensor([0.5, 1.0]),
    (Axis.of("layer", (1, 2)),),
)
AXES = Axis.of("layer", range(2)), Axis("position", ("a", "b", "c"))
KINDS: dict[str, Any] = {
    "result": Result(
        "Patching", "logit", torch.rand(2, 3), AXES, (("a", "b", "c"),), ("x",) * 6,
        {"se": torch.rand(2, 3)}, 0.0,
    ),
    "vector": SteeringVector("residual_out", (1, 3), torch.rand(2, 4), "given", -1, 4),
    "lens": TunedLens(torch.rand(2, 3, 3), torch.rand(2, 3), torch.rand(7, 2)),
    "probe": Probe(
        "logistic", "residual_out", (1, 2), -1, (0, "b"), torch.rand(2, 1, 4), torch.rand(2, 1),
        SCORES,
    ),
    "circuit": Circuit("By hand", "logit", (Edge("m0", "logits", 1.0), Edge("a0.h1", "m0", 0.5))),
    "alignment": Alignment(
        "residual_out", 2, -1, -1, torch.eye(3)[:2], 0.5, 1.0,
        Result("Search", "cross-entropy", torch.rand(3), (Axis.of("step", range(3)),)),
    ),
}  # fmt: skip

DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = [
    *(None, True, -1, 0, 1, 10**18, 10**30, 1.5, float("nan"), 1e308, "", "x", "\ud800", "mean"),
    *([], {}, [[]], [None], ["x"], [1, 2, 3], {"x": 1}, [["a", "b"]], DEEP),
]


def used(loaded: Any) -> None:
    """What a session does with what it has loaded."""
    repr(loaded)
    if isinstance(loaded, Circuit | Result):
        loaded.to_dict()
    if isinstance(loaded, Circuit):
        assert loaded.top(1).nodes is not None
    if isinstance(loaded, Result):
        from rich.console import Console

        Console(file=StringIO(), width=80).print(loaded)


def told_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a file, the description in it, and the tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["insitu"]), data[8 + size :]


def with_told(data: bytes, about: Any) -> bytes:
    header, _, tensors = told_of(data)
    header["__metadata__"]["insitu"] = about if isinstance(about, str) else json.dumps(about)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + tensors


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(tree))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


def tried(load: Callable[[Path], Any], path: Path, data: bytes) -> bool:
    """Whether a file is taken; if not, the error is Insitu's and names the file."""
    path.write_bytes(data)
    try:
        loaded = load(path)
    except LoadError as error:
        assert str(path) in str(error)
        return False
    used(loaded)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_comes_back(kind: str, tmp_path: Path) -> None:
    found = KINDS[kind]
    found.save(tmp_path / "file")
    again = type(found).load(tmp_path / "file")
    again.save(tmp_path / "second")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "second").read_bytes()
    assert repr(again) == repr(found)
    used(again)


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_of_other_types_are_refused(kind: str, tmp_path: Path) -> None:
    KINDS[kind].save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    about = told_of(data)[1]
    load = type(KINDS[kind]).load
    assert tried(load, tmp_path / "f", with_told(data, about))
    for path in places(about):
        for value in HOSTILE:
            tried(load, tmp_path / "f", with_told(data, put(about, path, value)))
    if about["told"]:
        for name in [name for name in about["told"] if name != "centre"]:
            told = {key: value for key, value in about["told"].items() if key != name}
            assert not tried(load, tmp_path / "f", with_told(data, {**about, "told": told}))
    for text in ("", "{", "nul", "[" * 50_000 + "]" * 50_000, '{"kind":' * 20_000, "\x00", "NaN"):
        assert not tried(load, tmp_path / "f", with_told(data, text))
    deep = json.dumps({**about, "told": 0}).replace("0}", "[" * 50_000 + "]" * 50_000 + "}")
    assert not tried(load, tmp_path / "f", with_told(data, deep))


def other_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        yield {key: value for key, value in tensors.items() if key != name}
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, torch.bfloat16):
            yield {**tensors, name: tensor.to(dtype)}
        for other in (
            tensor[..., :0],
            tensor[None],
            tensor.flatten(),
            tensor.sum(),
            tensor * torch.nan,
        ):
            yield {**tensors, name: other.clone()}
        yield {**tensors, name: torch.cat([tensor, tensor])}


@pytest.mark.parametrize("kind", KINDS)
def test_other_tensors_are_refused_or_used(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load as tensors_of

    KINDS[kind].save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    metadata = told_of(data)[0]["__metadata__"]
    load = type(KINDS[kind]).load
    tensors = tensors_of(data)
    for other in other_tensors(tensors):
        tried(load, tmp_path / "f", save(other, metadata=metadata))
    for name in tensors:
        fewer = {key: value for key, value in tensors.items() if key != name}
        optional = "." in name or name == "rotation"
        assert tried(load, tmp_path / "f", save(fewer, metadata=metadata)) == optional
        doubled = {**tensors, name: torch.cat([tensors[name]] * 2)}
        shapeless = "." in name or (kind, name) in [("alignment", "rotation"), ("lens", "losses")]
        if not shapeless and (kind, name) != ("alignment", "losses"):
            assert not tried(load, tmp_path / "f", save(doubled, metadata=metadata))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_were_changed_are_refused_or_used(kind: str, tmp_path: Path) -> None:
    KINDS[kind].save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    load = type(KINDS[kind]).load
    for mutated in mutations(data, 200, seed=len(kind)):
        tried(load, tmp_path / "f", mutated)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """A file cut off, with bytes that were changed, doubled, dropped, or of a foreign length."""
    draw = random.Random(seed)
    for number in range(count):
        changed, at = bytearray(data), draw.randrange(len(data))
        match number % 5:
            case 0:
                del changed[at:]
            case 1:
                for _ in range(draw.randint(1, 8)):
                    changed[draw.randrange(len(data))] = draw.randrange(256)
            case 2:
                changed[at] ^= 1 << draw.randrange(8)
            case 3:
                changed[at:at] = changed[at : at + draw.randint(1, 20)]
            case _:
                del changed[at : at + draw.randint(1, 20)]
        yield bytes(changed)
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield struct.pack("<Q", size) + data[8:]


CONFIGS = [
    *("[]", "1", '"x"', "null", "", "{", "[" * 50_000 + "]" * 50_000, "1" * 5000),
    '{"hook_name": ' + "[" * 50_000 + "]" * 50_000 + "}",
]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_autoencoders_with_other_configs_and_weights(kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "sae", kind, width=4)
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    told, data = json.loads(config.read_text()), weights.read_bytes()

    def taken() -> bool:
        try:
            loaded = SparseAutoencoder.load(folder)
        except LoadError as error:
            assert str(folder) in str(error)
            return False
        repr(loaded)
        x = torch.ones(2, 4)
        loaded.decode(loaded.encode(x), x)
        return True

    assert taken()
    for text in CONFIGS:
        config.write_text(text)
        assert not taken()
    config.write_bytes(b"\xff\xfe")
    assert not taken()
    for name in [*told, "activation_fn", "activation_fn_kwargs", "hook_point", "k"]:
        for value in HOSTILE:
            config.write_text(json.dumps({**told, name: value}))
            taken()
    for k in (0, -3, 41, "5", 1.5, [5]):
        config.write_text(json.dumps({**told, "k": k}))
        assert not taken()
    config.write_text(json.dumps({**told, "l1": float("inf"), "notes": float("nan")}))
    assert taken()  # as Python's `json` writes them
    for mutated in mutations(data, 60, seed=1):
        weights.write_bytes(mutated)
        taken()


def test_errors_are_of_the_line_that_loads(tmp_path: Path) -> None:
    with pytest.raises(InsituError) as caught:
        Result.load(tmp_path / "none")
    assert caught.value.location is not None and caught.value.location.file == __file__
