"""Results: as bytes and files, with their structure."""

from __future__ import annotations

import collections
import copy
import math
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from insitu import LoadError, NoValueError, Results, ShapeError, WireError
from insitu.engine.job_outcome import Failure, Outputs
from insitu.graph.location import Location, SourceLine
from tests.round_trip import same

pytestmark = pytest.mark.no_wire
FLOAT8 = [kind for name, kind in vars(torch).items() if name.startswith("float8_")]

VALUES: dict[str, Any] = {
    "tensor": torch.randn(2, 3),
    "half": torch.randn(2).bfloat16(),
    "integers": torch.tensor([[2**62, -1]]),
    "unsigned": torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
    "truth": torch.tensor([True, False]),
    "complex": torch.complex(torch.ones(2, 2), torch.tensor([[math.nan, 1.0], [2.0, -0.0]])),
    "double complex": torch.ones(2, dtype=torch.complex128),
    "number": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(24.0).reshape(2, 3, 4)[:, ::2, 1],
    "a list of steps": [torch.ones(1, 4), torch.ones(1, 1), None],
    "nested": (torch.ones(2), (torch.zeros(1), [1, 2.5, "a", {"k": torch.ones(3)}])),
    "missing": None,
    "plain": [1, 2**80, -0.0, math.inf, -math.inf, math.nan, "x", True, 1j, b"\x00", ...],
    "complex numbers": [complex(math.nan, -0.0), complex(-math.inf, 1)],
    "sizes": (torch.Size([2, 3]), torch.float32, torch.device("cpu"), slice(1, None)),
    "a result": torch.max(torch.tensor([[1.0, 2.0]]), dim=1),
    "an output": CausalLMOutputWithPast(logits=torch.ones(1), attentions=(torch.zeros(1), None)),
    "keys": {1: torch.ones(1), "1": torch.zeros(1), (1, "a"): 2, None: 3},
    **{str(kind): torch.ones(3).to(kind) for kind in FLOAT8},
}


def trip(**values: Any) -> Results:
    results = Results(values, dict.fromkeys(values, "expression"))
    received = Results.from_bytes(results.to_bytes())
    assert received.to_bytes() == results.to_bytes() and received.about == results.about
    return received


@pytest.mark.parametrize("name", VALUES)
def test_values_keep_their_structure_and_their_bits(name: str) -> None:
    received = trip(value=VALUES[name])["value"]
    assert same(received, VALUES[name])
    if not isinstance(VALUES[name], torch.Tensor):
        assert repr(received) == repr(VALUES[name])  # which tells 0.0 from -0.0


def test_all_values_go_into_one_file(tmp_path: Path) -> None:
    results = Results(VALUES, {})
    results.save(tmp_path / "results.safetensors")
    received = Results.load(tmp_path / "results.safetensors")
    assert list(received) == list(VALUES) and same(dict(received), VALUES)


def test_any_reader_of_safetensors_finds_the_tensors_by_their_names() -> None:
    tensors = safetensors.torch.load(Results(VALUES, {}).to_bytes())
    assert torch.equal(tensors["tensor"], VALUES["tensor"])
    assert torch.equal(tensors["nested/1/1/3/k"], torch.ones(3))
    assert tensors["half"].dtype is torch.bfloat16
    assert tensors["a list of steps/0"].shape == (1, 4)


def test_two_tensors_with_one_key_are_both_there() -> None:
    received = trip(**{"a/0": torch.ones(1), "a": [torch.zeros(1)]})
    assert received["a/0"].item() == 1 and received["a"][0].item() == 0


def test_a_value_may_be_called_as_the_metadata_of_safetensors_is() -> None:
    assert same(trip(__metadata__=torch.ones(2))["__metadata__"], torch.ones(2))


def test_tensors_that_share_memory_come_back_as_copies() -> None:
    memory = torch.arange(6.0)
    received = trip(a=memory[:4], b=memory[2:], c=[memory, memory])
    assert same(dict(received), {"a": memory[:4], "b": memory[2:], "c": [memory, memory]})
    received["a"].zero_()
    assert received["c"][0].tolist() == memory.tolist()


def test_what_has_a_history_or_a_class_comes_back_plain() -> None:
    Pair = collections.namedtuple("Pair", ["x", "y"])
    leaf = torch.ones(2, requires_grad=True)
    received = trip(
        a=leaf * 2,
        b=torch.nn.Parameter(torch.ones(2)),
        c=collections.OrderedDict(logits=torch.ones(1)),
        d=Pair(torch.ones(1), 2),
    )
    assert type(received["a"]) is torch.Tensor and not received["a"].requires_grad
    assert type(received["b"]) is torch.Tensor
    assert type(received["c"]) is dict and type(received["d"]) is tuple


@dataclass
class OfUser(ModelOutput):
    scores: Any = None
    more: Any = None


OF_PAIRS = CausalLMOutputWithPast()
OF_PAIRS["loss"] = (("logits", 1), ("keys", 2))  # which its class would take for its entries
OUTPUTS = {
    "of a forward": CausalLMOutputWithPast(logits=torch.ones(1), attentions=(torch.zeros(1),)),
    "of a generation": GenerateDecoderOnlyOutput(sequences=torch.tensor([[1, 2]])),
    "of no fields": ModelOutput(logits=torch.ones(1), scores=(torch.zeros(1), [2])),
    "of the user's": OfUser(scores=torch.ones(1)),
    "of pairs": OF_PAIRS,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_models_of_transformers_return_has_attributes_keys_and_places(name: str) -> None:
    value = OUTPUTS[name]
    results = Results({"value": (1, {"a": [value]})}, {})
    received = Results.from_bytes(results.to_bytes())["value"][1]["a"][0]
    assert type(received) is (ModelOutput if type(value) is OfUser else type(value))
    assert list(received) == list(value) and same(received.to_tuple(), value.to_tuple())
    for key, item in value.items():
        assert same(getattr(received, key), item) and same(received[key], item)
    assert same(received[0], value[0])
    fields = getattr(type(value), "__dataclass_fields__", {})
    assert all(getattr(received, key) is None for key in fields if key not in value)


def test_an_output_in_a_file_takes_no_part_in_its_own_making() -> None:
    data = Results({"x": ModelOutput(logits=1, keptback=2)}, {}).to_bytes()
    for old, new in (
        ("keptback", "to_tuple"),
        ("keptback", "__dict__"),
        ("keptback", "logits"),
        ("keptback", "a b"),
        (r"[1,2]", r"[1,]"),
    ):
        with pytest.raises(WireError, match="proper name|cannot be read"):
            Results.from_bytes(exchanged(data, old, new))
    for kind in ("os.path.join", "insitu.Results", "transformers.Trainer", "", "torch.Tensor"):
        name = r"\"transformers.utils.generic.ModelOutput\""
        received = Results.from_bytes(exchanged(data, name, f'\\"{kind}\\"'))["x"]
        assert type(received) is ModelOutput and received.keptback == 2


def exchanged(data: bytes, old: str, new: str) -> bytes:
    """Bytes of results with something else in their metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size]
    assert old.encode() in header
    header = header.replace(old.encode(), new.encode())
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (DynamicCache(), r"results\['value'\]` cannot be stored.*DynamicCache"),
        ([len], "a Python function"),
        (torch.eye(2).to_sparse(), "to_dense"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_what_is_no_data_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(WireError, match=said):
        Results({"fine": torch.ones(1), "value": value}, {}).to_bytes()


def test_what_generations_returned_goes_with_them() -> None:
    ids = torch.tensor([[1, 2, 3]])
    whole = ModelOutput(sequences=ids, scores=(torch.ones(1, 4),))
    results = Results({}, {}, [None, Outputs(whole, [ids])], ["its name is 'a', and not 'b'"])
    received = Results.from_bytes(results.to_bytes())
    assert received.outputs[0] is None and torch.equal(received.output["sequences"], ids)
    assert torch.equal(received.output["scores"][0], torch.ones(1, 4))
    assert received.differences == ["its name is 'a', and not 'b'"]
    with pytest.raises(NoValueError, match="no generations"):
        _ = Results({}, {}, [None]).output
    with pytest.raises(NoValueError, match="2 generations"):
        _ = Results({}, {}, [Outputs(ids, [ids])] * 2).output


def test_what_is_no_data_is_left_out_of_what_generations_returned() -> None:
    ids = torch.tensor([[1, 2, 3]])
    whole = GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cast(Any, DynamicCache()))
    results = Results({"kept": torch.ones(1)}, {}, [Outputs(whole, [ids], {0: DynamicCache()})])
    received = Results.from_bytes(Results.from_bytes(results.to_bytes()).to_bytes())
    output = copy.deepcopy(received.output)
    assert received["kept"].item() == 1 and torch.equal(output.sequences, ids)
    assert list(output) == list(whole) and "DynamicCache" in repr(output.past_key_values)
    received_outputs = received.outputs[0]
    assert received_outputs is not None
    for use in (
        lambda: output.past_key_values.layers,
        lambda: output["past_key_values"][0],
        lambda: len(output[1]),
        lambda: list(received_outputs.parts[0]),
    ):
        with pytest.raises(NoValueError, match=r"DynamicCache.*stayed(.|\n)*test_results\.py"):
            use()
    with pytest.raises(WireError, match="DynamicCache"):
        Results({"asked for": whole}, {}).to_bytes()


def test_results_show_what_they_hold() -> None:
    shown = repr(Results({"x": torch.ones(2, 3), "y": [torch.ones(1)] * 2, "z": 3}, {"x": "h[0]"}))
    assert "x: float32 (2, 3)  # h[0]" in shown and "y: 2 of float32 2 of (1,)" in shown
    assert "z: 3" in shown


# Bytes that nobody made

DATA = Results(VALUES, dict.fromkeys(VALUES, "x"), [Outputs(torch.ones(1), [])]).to_bytes()


def test_files_of_something_else_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="no results of a job: they are no safetensors file"):
        Results.load(tmp_path / "file")
    for data in (safetensors.torch.save({"a": torch.ones(1)}), DATA[:100], b""):
        with pytest.raises(WireError, match="no results of a job"):
            Results.from_bytes(data)
    with pytest.raises(LoadError):
        Results.load(tmp_path / "nowhere")


def test_a_weight_of_a_model_is_no_result() -> None:
    header = DATA[8 : 8 + struct.unpack("<Q", DATA[:8])[0]]
    changed = header.replace(rb"\"missing\":null", rb"\"missing\":[\"weight\",\"lm_head.weight\"]")
    data = struct.pack("<Q", len(changed)) + changed + DATA[8 + len(header) :]
    with pytest.raises(WireError, match="weight of a model"):
        Results.from_bytes(data)


def test_mutated_results_give_documented_errors_only() -> None:
    dice = random.Random(3)
    size = 8 + struct.unpack("<Q", DATA[:8])[0]
    read = 0
    for _ in range(3000):
        data = bytearray(DATA)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(size if dice.random() < 0.9 else len(data))
            if dice.random() < 0.5:
                data[at] = dice.choice(b'0123456789[]{},"abtn')
            else:
                data[at] = dice.randrange(256)
        try:
            results = Results.from_bytes(bytes(data))
        except WireError:
            continue
        read += 1
        assert repr(results) and Results.from_bytes(results.to_bytes()).keys() == results.keys()
    assert read > 30, read


def test_truth_values_are_true_or_false() -> None:
    data = Results({"mask": torch.tensor([True, False])}, {"mask": "expression"}).to_bytes()
    assert data.endswith(b"\1\0")
    with pytest.raises(WireError, match="true and false"):
        Results.from_bytes(data[:-2] + b"\2\0")


def test_what_failures_say_is_shown_without_what_a_terminal_obeys() -> None:
    line = SourceLine("/a/\x1b[2Jfile.py", 3, "x\x1b]0;title")
    failure = Failure(0, [0], [], ShapeError("no \x1b[31m such\nshape", Location(line, 0)))
    (found,) = Results.from_bytes(Results({}, {}, failed=[failure]).to_bytes()).failed
    assert "\x1b" not in str(found.error) and "such\nshape" in str(found.error)
