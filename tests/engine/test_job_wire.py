"""Bytes of jobs that nobody made: refused with a documented error, or run with one."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from insitu import InsituError, Job, LanguageModel, WireError
from insitu.engine.job_wire import VERSION
from insitu.graph import wire_tensors
from tests.conftest import tiny_gpt2
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire

_HEAD = len(b"insitu job") + 5
IDS = torch.tensor([[5, 6, 7, 8]])


def framed(message: Any, tensors: bytes = b"", version: int = VERSION) -> bytes:
    encoded = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    body = struct.pack("<Q", len(encoded)) + encoded + tensors
    return b"insitu job" + struct.pack("<BI", version, zlib.crc32(body)) + body


def opened(data: bytes) -> tuple[list[Any], bytes]:
    end = _HEAD + 8 + struct.unpack_from("<Q", data, _HEAD)[0]
    return msgspec.msgpack.decode(data[_HEAD + 8 : end]), data[end:]


def of_a_session() -> bytes:
    model = LanguageModel(tiny_gpt2())
    with model.session() as session:
        with model.scan() as tracer:
            for number in range(2):
                with tracer.invoke([[number, 6, 7]]):
                    hidden = model.transformer.h[1].output[0]
                    hidden[:, 0] = torch.zeros(16)
                    hidden.max(dim=-1).values.save(f"most.{number}", optional=True)
        with model.scan(IDS, generate=True, max_new_tokens=2, do_sample=False):
            model.transformer.h[2].output[0][:, -1:] = hidden[:, -1:]
            model.lm_head.output.save("logits")
    return session.job.to_bytes()


VALID = of_a_session()
TENSORS, MESSAGE = opened(VALID)[::-1]
_MODEL, _BLOCKS = 4, 5
_PROCEDURE, _OPTIONS, _PROMPTS, _ROWS, _FIELDS, _SAVES, _DEMANDED, _BEGUN = range(8)


def changed(change: Callable[[list[Any]], object]) -> bytes:
    message, tensors = opened(VALID)
    change(message)
    return framed(message, tensors)


def put(*place: int | str) -> Callable[[Any], Callable[[list[Any]], object]]:
    """What sets an entry of the message."""

    def setter(value: Any) -> Callable[[list[Any]], object]:
        def change(message: list[Any]) -> None:
            found: Any = message
            for key in place[:-1]:
                found = found[key]
            found[place[-1]] = value

        return change

    return setter


def with_tensor(
    shape: list[int], content: torch.Tensor, devices: Sequence[str] = ("cpu",)
) -> bytes:
    """A job with a tensor of bytes in the place of its own."""
    digest = hashlib.sha256(f"torch.uint8 {shape} ".encode() + bytes(content.tolist())).hexdigest()
    message, _ = opened(VALID)
    message[3] = [[["torch.uint8", shape, device], digest] for device in devices]
    return framed(message, safetensors.torch.save({digest: content}))


FIRST, SECOND = (_BLOCKS, 0), (_BLOCKS, 1)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no job of Insitu"),
    "a pickle": (b"\x80\x04\x95 a pickle", "no job of Insitu"),
    "a graph": (b"insitu\x01" + b"\x00" * 30, "no job of Insitu"),
    "the beginning": (b"insitu job\x01", "too early"),
    "another version": (framed(MESSAGE, TENSORS, VERSION + 1), f"version {VERSION + 1}"),
    "a number": (framed(3), "cannot be read"),
    "a part too many": (framed([*MESSAGE, 1], TENSORS), "cannot be read"),
    "no blocks": (changed(put(_BLOCKS)([])), "tensors that it does not use|no block"),
    "another procedure": (changed(put(*FIRST, _PROCEDURE)("eval")), "cannot be read"),
    "an unknown option": (changed(put(*SECOND, _OPTIONS, "custom_generate")("a/b")), "may not"),
    "an option of another type": (
        changed(put(*SECOND, _OPTIONS, "max_new_tokens")("many")),
        "`max_new_tokens='many'` may not travel",
    ),
    "a truth value for a number": (
        changed(put(*SECOND, _OPTIONS, "max_new_tokens")(True)),
        "`max_new_tokens=True` may not travel",
    ),
    "an option that is no name": (changed(put(*FIRST, _OPTIONS, "a b")(1)), "no option of"),
    "an option of the run": (
        changed(put(*FIRST, _OPTIONS, "use_cache")(["ref", 0])),
        "not before it",
    ),
    "an implementation of others": (
        changed(put(*FIRST, _OPTIONS, "attn_implementation")("somebody/kernel")),
        "may not travel",
    ),
    "no prompts": (changed(put(*FIRST, _PROMPTS)([])), "no prompt|does not use"),
    "ids that are text": (changed(put(*FIRST, _PROMPTS, 0, 1)("text")), "not whole numbers"),
    "ids of one axis": (changed(put(*FIRST, _PROMPTS, 0, 1)(["size", [1]])), "not whole numbers"),
    "a mask of nothing": (changed(put(*FIRST, _PROMPTS, 0, 2)(["tensor", 2])), "mask"),
    "a large seed": (changed(put(*FIRST, _PROMPTS, 0, 5)(2**63)), "cannot be read"),
    "a line that is not there": (changed(put(*FIRST, _PROMPTS, 0, 0)(999)), "no line 999"),
    "an invocation that is not there": (
        changed(put(*FIRST, _ROWS, 0, 2, 0)(7)),
        "of invocation 7, and there are 2",
    ),
    "a name of what is not saved": (changed(put(*FIRST, _SAVES, 0, 0)(0)), "not saved"),
    "two names of one value": (
        changed(lambda m: m[_BLOCKS][0][_SAVES].append([m[_BLOCKS][0][_SAVES][0][0], "b"])),
        "two names",
    ),
    "one name of two values": (changed(put(*SECOND, _SAVES, 0, 1)("most.0")), "saved as 'most.0'"),
    "a long name": (changed(put(*SECOND, _SAVES, 0, 1)("x" * 300)), "cannot be read"),
    "a name that does not show": (
        changed(put(*SECOND, _SAVES, 0, 1)("\x1b[2J")),
        r"saved as '\\x1b\[2J'",
    ),
    "a weight with a prompt": (
        changed(put(*FIRST, _PROMPTS, 0, 4)({"labels": ["weight", "lm_head.weight"]})),
        "a weight of the model",
    ),
    "an empty tensor of a shape that overflows": (
        with_tensor([0, 2**62, 2**62], torch.zeros(0, dtype=torch.uint8)),
        "no tensor has the shape",
    ),
    "options that no value takes": (
        changed(put(*FIRST, _DEMANDED)([{"attn_implementation": "eager"}, 0, [0]])),
        "options that no value takes",
    ),
    "options of a prompt that is not there": (
        changed(put(*FIRST, _DEMANDED)([{"attn_implementation": "eager"}, 0, [99]])),
        "options",
    ),
    "a context of nothing": (changed(put(*FIRST, _BEGUN)([])), "no block begins"),
    "an unknown context": (changed(put(*FIRST, _BEGUN)([500])), "no block begins"),
    "a block without autograd": (changed(put(*FIRST, _BEGUN)([0, 23])), "no block begins"),
    "a digest that is none": (changed(put(3, 0, 1)("abc")), "did not come|does not name"),
    "a digest of another": (
        changed(lambda m: m[3].__setitem__(0, [m[3][0][0], m[3][1][1]])),
        "names a tensor twice|does not name|bytes",
    ),
    "an edit that is no digest": (changed(put(_MODEL, 2)(["x"])), "cannot be read"),
    "a long text": (changed(put(_MODEL, 0)("x" * 5000)), "cannot be read"),
    "no tensors": (framed(MESSAGE), "did not come with it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    data, said = HOSTILE[name]
    with pytest.raises(WireError, match=said):
        Job.from_bytes(data)


def test_the_bytes_above_are_refused_for_what_is_wrong_with_them_only() -> None:
    assert Job.from_bytes(framed(MESSAGE, TENSORS)).to_bytes() == VALID
    results = LanguageModel(tiny_gpt2()).run(Job.from_bytes(VALID))
    assert list(results) == ["most.0", "most.1", "logits"]


def test_a_tensor_that_is_named_for_many_devices_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = torch.zeros(1000, dtype=torch.uint8)
    data = with_tensor([1000], content, [f"cuda:{number}" for number in range(100)])
    digested: list[torch.Tensor] = []
    digest_of = wire_tensors.digest_of

    def counted(tensor: torch.Tensor) -> str:
        digested.append(tensor)
        return digest_of(tensor)

    monkeypatch.setattr(wire_tensors, "digest_of", counted)
    with pytest.raises(WireError, match="whole numbers"):
        Job.from_bytes(data)
    assert len(digested) == 1


@pytest.mark.parametrize("shape", [[10, 100], [999]])
def test_a_tensor_has_the_shape_that_its_digest_is_of(shape: list[int]) -> None:
    content = torch.zeros(1000, dtype=torch.uint8)
    message, tensors = opened(with_tensor([1000], content))
    again = [["torch.uint8", shape, "cuda:0"], message[3][0][1]]
    message[3].append(again)
    with pytest.raises(WireError, match="not what its digest says"):
        Job.from_bytes(framed(message, tensors))
    message[3] = [again]
    with pytest.raises(WireError, match="not what its digest says|has not 1000 bytes"):
        Job.from_bytes(framed(message, tensors))
    with pytest.raises(WireError, match="not what its digest says"):
        Job.from_bytes(framed(message), tensors={again[1]: content})


KINDS_OF_VALUES: dict[str, Any] = {
    "a slice": ["slice", None, None, None],
    "sizes": ["size", [1, 2]],
    "bytes": ["bytes", b"abc"],
    "a text": "abc",
    "a number": 2.5,
    "no number": ["list", []],
    "a dictionary": ["dict", [1], [2]],
    "a dtype": ["named", "torch.float32"],
}


@pytest.mark.parametrize("place", sampled([FIRST, SECOND], [SECOND]))
@pytest.mark.parametrize("value", KINDS_OF_VALUES)
def test_what_no_forward_takes_with_a_prompt_is_a_documented_error(value: str, place: Any) -> None:
    model = LanguageModel(tiny_gpt2())
    for name in ("token_type_ids", "attention_mask", "position_ids", "inputs_embeds"):
        part = KINDS_OF_VALUES[value]
        job = Job.from_bytes(changed(put(*place, _PROMPTS, 0, 4)({name: part})))
        with pytest.raises(InsituError):
            model.run(job)


def earlier(message: list[Any]) -> list[Any]:
    """The row of the second block that uses a value of the first."""
    rows = message[_BLOCKS][1][_ROWS]
    return next(row for row in rows if any("earlier" in map(str, arg) for arg in lists(row[2])))


def lists(args: list[Any]) -> list[list[Any]]:
    return [arg for arg in args if isinstance(arg, list)]


@pytest.mark.parametrize("place", [[1, 0], [0, 0], [5, 2], [0, 10**6]])
def test_a_value_of_a_block_that_is_not_before_it_is_refused(place: list[int]) -> None:
    def change(message: list[Any]) -> None:
        row = earlier(message)
        row[2] = [["earlier", *place] if arg[:1] == ["earlier"] else arg for arg in row[2]]

    with pytest.raises(WireError, match="there is no value"):
        Job.from_bytes(changed(change))


def test_a_change_of_any_byte_is_noticed() -> None:
    dice = random.Random(1)
    for _ in range(300):
        at = dice.randrange(len(VALID))
        data = bytearray(VALID)
        data[at] ^= dice.randrange(1, 256)
        with pytest.raises(WireError):
            Job.from_bytes(bytes(data))
        with pytest.raises(WireError):
            Job.from_bytes(VALID[:at])
