import collections
import enum
import linecache
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import InsituError, LanguageModel, Model, WireError, apply, cond, fold
from insitu.graph.context import Context
from insitu.graph.encoding import add_node
from insitu.graph.location import mark
from insitu.graph.node import Graph, Ref, ref
from insitu.graph.operations import BY_NAME, FOLD, PUT, READ, Operation
from insitu.graph.proxy import Proxy
from insitu.graph.recorded import Recorded
from insitu.graph.recording import Recording
from insitu.graph.wire import from_bytes, to_bytes
from insitu.graph.wire_reader import FIELDS, _operation
from tests.round_trip import same

ADDRESS = (0, "block", "output", 0, 0)
OPERATION = BY_NAME["torch.full_like"]
FLOATS = torch.tensor([1.0, -0.0, math.inf, math.nan])
FLOAT8 = [dtype for name, dtype in vars(torch).items() if name.startswith("float8_")]


def graph_of(*args: Any, **kwargs: Any) -> Graph:
    """A graph that reads a site and does one operation with these arguments to it."""
    recording = Recording()
    value = Recorded(recording, recording.read(ADDRESS, mark()))
    add_node(recording, OPERATION, (value, *args), kwargs, mark())
    return recording.graph


def sent(graph: Graph) -> Graph:
    return from_bytes(to_bytes(graph))


def test_the_bytes_are_the_same_however_a_set_was_made() -> None:
    recording = Recording()
    value = Proxy(recording, recording.read(ADDRESS, mark()))
    for _ in range(17):
        value.save(optional=True)
    graph = recording.graph
    graph.optional = frozenset([8, 16])
    data = to_bytes(graph)
    graph.optional = frozenset([16, 8])  # which goes the other way round
    assert to_bytes(graph) == to_bytes(sent(graph)) == data


class Kind(enum.IntEnum):
    ONE = 1


CONSTANTS: dict[str, Any] = {
    "None": None,
    "booleans": (True, False),
    "integers": (0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1),
    "large integers": (2**64, -(2**63) - 1, 10**100, -(10**100), -(2**71), 2**71),
    "floats": (0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 0.1),
    "complex numbers": (1 + 2j, complex(-0.0, math.nan)),
    "strings": ("", "bij,bkj->bik", "\x00 \N{SNOWMAN} \U0001f600"),
    "bytes": (b"", b"\x00\xff"),
    "ellipsis": ...,
    "slices": (slice(None), slice(1, -1, 2), slice("a", (1, 2))),
    "containers": ((), [], {}, ((1,), [2, [3]], {"a": {"b": (4,)}})),
    "keys": {1: 1, "1": 2, 1.5: 3, None: 4, b"1": 5, (1, ("a", 2j)): 6, torch.half: 7, ...: 8},
    "sizes": torch.Size([2, 0, 3]),
    "dtypes": (torch.float32, torch.bfloat16, torch.complex64, torch.bool, *FLOAT8),
    "devices": (torch.device("cpu"), torch.device("cuda"), torch.device("cuda", 3)),
    "layouts": (torch.strided, torch.sparse_coo),
    "memory formats": (torch.channels_last, torch.preserve_format),
    "results": torch.max(torch.tensor([[1.0, 2.0]]), dim=1),
    "a list of results": [torch.sort(torch.tensor([2, 1])), 1],
}
TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "floats": lambda: FLOATS,
    "half": lambda: FLOATS.half(),
    "bfloat16": lambda: FLOATS.bfloat16(),
    "float64": lambda: FLOATS.double(),
    "integers": lambda: torch.tensor([[-1, 2**62]]),
    "unsigned": lambda: torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
    "booleans": lambda: FLOATS > 0,
    "complex64": lambda: torch.complex(FLOATS, FLOATS),
    "complex128": lambda: torch.complex(FLOATS, FLOATS).to(torch.complex128),
    "no axes": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(2, 0, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "strided": lambda: torch.arange(24).reshape(2, 3, 4)[:, ::2, 1],
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "one of a column": lambda: torch.arange(14).reshape(2, 7)[:1, 3],
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugated": lambda: torch.tensor([1 + 2j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j]).conj().imag,
    "detached": lambda: nn.Parameter(torch.ones(2)).detach(),
    **{str(dtype): lambda dtype=dtype: torch.ones(3).to(dtype) for dtype in FLOAT8},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_travel_exactly(name: str) -> None:
    value = CONSTANTS[name]
    graph = sent(graph_of(value, keyword=value))
    assert same(graph[1].args, (ref(0), value))
    assert same(graph[1].kwargs, {"keyword": value})
    assert repr(graph[1].args[1]) == repr(value)  # which tells 0.0 from -0.0


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_travel_bit_for_bit(name: str) -> None:
    tensor = TENSORS[name]()
    received = sent(graph_of([tensor]))[1].args[1][0]
    assert same(received, tensor)
    assert received.is_contiguous() and not received.requires_grad
    received.zero_() if received.dtype not in FLOAT8 else None  # it is memory of its own


def test_a_frozen_parameter_travels_as_a_plain_tensor() -> None:
    frozen = nn.Parameter(torch.rand(2), False)
    received = sent(graph_of([frozen]))[1].args[1][0]
    assert type(received) is torch.Tensor and same(received, frozen.detach())


def test_numbers_of_other_classes_travel_as_plain_numbers() -> None:
    received = sent(graph_of([Kind.ONE]))[1].args[1]
    assert received == [1] and type(received[0]) is int


def test_a_tensor_that_is_used_often_is_stored_once() -> None:
    tensor = torch.zeros(1000)
    graph = graph_of(tensor, [tensor], keyword=tensor)
    assert len(to_bytes(graph)) < 5000
    node = sent(graph)[1]
    assert node.args[1] is node.args[2][0] and node.args[1] is node.kwargs["keyword"]


def test_tensors_that_share_memory_travel_as_copies() -> None:
    memory = torch.arange(6.0)
    received = sent(graph_of(memory[:4], memory[2:], memory))[1].args[1:]
    assert same(received, (memory[:4], memory[2:], memory))


def test_references_travel_wherever_they_stand() -> None:
    recording = Recording()
    value = Recorded(recording, recording.read(ADDRESS, mark()))
    other = Recorded(recording, recording.read((1, "", "tokens", 2, -1), mark()))
    for args, kwargs in (
        ((value, other), {}),
        (([value, (other, {"a": value})], 1), {}),
        ((value, slice(other, None, value)), {}),
        ((value, 1), {"key": [other]}),
        ((torch.ones(2), value), {}),
    ):
        add_node(recording, OPERATION, args, kwargs, mark())
    graph = sent(recording.graph)
    for sent_node, node in zip(graph, recording.graph, strict=True):
        assert sent_node.operation is node.operation
        assert same(sent_node[1:5], node[1:5])
        assert (sent_node.location.line, sent_node.site) == (node.location.line, node.site)


def test_every_operation_and_every_field_of_a_graph_travels() -> None:
    # `picture` is of the class.
    assert set(Graph.__annotations__) == {"rows", "picture", *FIELDS}
    for operation in BY_NAME.values():
        assert _operation(operation.name) is operation


def test_fields_travel() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Identity()))
    with pytest.raises(KeyboardInterrupt), model.trace(torch.ones(1, 2)) as tracer:
        model[0].output = model[0].output * 2
        model[1].skip(model[0].output)
        model[0].output[0] += 1
        model[2].output.save(optional=True)
        model[2].output.sum().backward()
        model[2].stop()
        raise KeyboardInterrupt
    graph = tracer.graph
    graph.repeats = ((2, 5),)
    graph.scopes = [(0, 1, 3), (1, 3, 5)]
    graph.after = {next(iter(graph.writes)): next(iter(graph.stops))}
    graph.unfused = frozenset(graph.stops)
    graph.contexts = {
        1: Context(grad=False),
        2: Context(casts=(("cpu", torch.bfloat16), ("cuda", None))),
        3: Context(False, (("cuda", torch.float16),)),
    }
    received = sent(graph)
    for field in FIELDS:
        if field not in ("rows", "stops"):
            assert getattr(graph, field)
            assert getattr(received, field) == getattr(graph, field)
    assert list(received.stops) == list(graph.stops)
    assert to_bytes(received) == to_bytes(graph)


def test_functions_that_were_recorded_travel_and_others_do_not() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Identity()))
    held = torch.ones(2)
    with model.trace(torch.ones(1, 2)) as tracer:
        x = model[0].output

        def inner(carry: Any, item: Any) -> Any:
            carry = carry.clone()
            carry += item * held
            return cond(carry.sum() > 3, lambda a: model[1](a) + x[0], lambda a: (a, x)[0], carry)

        fold(inner, x[0], [x[0], held]).save()
    received = sent(tracer.graph)
    node, sent_node = (next(n for n in g if n.operation is FOLD) for g in (tracer.graph, received))
    assert sent_node.inputs == node.inputs and sent_node.nested
    body, sent_body = node.args[0].graph, sent_node.args[0].graph
    assert [n.operation for n in sent_body] == [n.operation for n in body]
    assert any(n.operation is PUT for n in body)
    with pytest.raises(WireError, match=r"a Python function \(.*<lambda>\)"):
        with model.trace(torch.ones(1, 2)) as tracer:
            cond(model[0].output.sum() > 0, lambda a: apply(lambda b: b, a), abs, model[0].output)
        to_bytes(tracer.graph)


def test_an_error_in_another_process_names_the_line_without_the_folder() -> None:
    graph = graph_of(1)
    received = sent(graph)
    here, there = graph[1].location, received[1].location
    assert (there.line, there.text) == (here.line, here.text) and here.text
    assert (there.file, here.file) == ("test_wire.py", __file__)
    assert str(there) == str(here).replace(__file__, "test_wire.py")
    assert str(Path(__file__).parent).encode() not in to_bytes(graph)


def test_a_long_line_is_cut_and_no_line_can_break_out_of_its_place() -> None:
    # Of a long line the expression that runs is shown, here as long as the line.
    source = f"add_node(recording, OPERATION, (value, 1), {{}}, mark(len('{'x' * 1000}') // 1000))"
    name = "C:\\home\\somebody\\a\nb.py"
    linecache.cache[name] = (len(source), None, [source], name)
    recording = Recording()
    value = Recorded(recording, recording.read(ADDRESS, mark()))
    exec(compile(source, name, "exec"), globals() | locals())
    location = sent(recording.graph)[1].location
    assert location.file == "a b.py"
    assert location.text == source[source.index("mark(") :][:200]


def test_an_experiment_of_twelve_saves_takes_less_than_four_kilobytes() -> None:
    config = GPT2Config(n_embd=8, n_layer=12, n_head=2, vocab_size=50, n_positions=16)
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    with model.trace([[1, 2, 3]]) as tracer:
        for i in range(12):
            model.transformer.h[i].output[0].save()
    assert len(tracer.job.to_bytes()) < 4096
    written = 12 * (len("model.transformer.h[10].output[0].save()") + 10)  # a line for each
    assert len(tracer.job.to_bytes()) + written < 4096


# What stays at home

Pair = collections.namedtuple("Pair", ["a", "b"])


class Marked(torch.Tensor):
    pass


def quantized() -> torch.Tensor:
    return torch.empty(2, dtype=torch.qint8)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a parameter": (lambda: nn.Parameter(torch.ones(2)), "Parameter.*detach"),
    "a tensor with a gradient": (lambda: torch.ones(2, requires_grad=True), "grad.*detach"),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), "to_dense"),
    "a meta tensor": (lambda: torch.ones(2, device="meta"), "meta"),
    "a tensor subclass": (lambda: torch.ones(2).as_subclass(Marked), "Marked.*plain"),
    "a named tuple": (lambda: Pair(1, 2), "Pair.*plain tuple"),
    "a mapping": (lambda: collections.OrderedDict(a=1), "OrderedDict.*plain dict"),
    "an integer of thousands of digits": (lambda: 10**4000, "13288 bits"),
    "an invalid string": (lambda: "\ud800", "Unicode"),
    "a key of another kind": (lambda: {frozenset(): 1}, "keys"),
    "a large dictionary": (lambda: dict.fromkeys(range(2000)), "1024 entries"),
    "deep nesting": (lambda: deep(40), "nested"),
}


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_refused_at_its_line(name: str) -> None:
    make, match = REFUSED[name]
    graph = graph_of([make()])
    with pytest.raises(WireError, match=match) as caught:
        to_bytes(graph)
    message = str(caught.value)
    assert (
        "cannot be sent to another process" in message and "graph = graph_of([make()])" in message
    )
    assert isinstance(caught.value, InsituError) and isinstance(caught.value, ValueError)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_a_quantized_tensor_is_refused() -> None:
    with pytest.raises(WireError, match="dequantize"):
        to_bytes(graph_of([quantized()]))


def test_functions_and_unknown_operations_are_refused() -> None:
    def double(x: Any) -> Any:
        return x * 2

    graph = graph_of(1)
    last = graph.rows[1]
    graph.rows[1] = (last[0], (ref(0), double), *last[2:])
    with pytest.raises(WireError, match=r"a Python function \(.*double\)"):
        to_bytes(graph)
    graph.rows[1] = (Operation("apply", double), *last[1:])
    with pytest.raises(WireError, match="apply is not in the registry"):
        to_bytes(graph)


# Hostile bytes


def framed(message: Any, tensors: bytes = b"", version: int = 1) -> bytes:
    encoded = msgspec.msgpack.encode(message)
    body = struct.pack("<Q", len(encoded)) + encoded + tensors
    return struct.pack("<6sBI", b"insitu", version, zlib.crc32(body)) + body


def opened(data: bytes) -> tuple[list[Any], bytes]:
    end = 19 + struct.unpack_from("<Q", data, 11)[0]
    return msgspec.msgpack.decode(data[19:end]), data[end:]


GRAPH = graph_of([torch.ones(2), 1], key=slice(1, None))


def row(operation: int, *args: Any, **kwargs: Any) -> list[Any]:
    return [operation, 0, list(args), kwargs]


READ_ROW = row(0, *ADDRESS)
REF = ["ref", 0]
WEIGHT = ["weight", "0.weight"]


def function(*rows: Any, output: Any = None) -> list[Any]:
    return ["function", list(rows), output, {}]


def message(*rows: Any, operation: str = "torch.mean", **fields: Any) -> list[Any]:
    names = ["read", operation, "save", "write"]
    return [names, ["a.py"], [[0, 1, "x"]], [], [READ_ROW, *rows], fields]


def with_tensor(dtype: str, shape: list[int], **rows: torch.Tensor) -> bytes:
    made = message(row(1, REF, ["tensor", 0]))
    made[3] = [[dtype, shape, "cpu"]]
    return framed(made, safetensors.torch.save(rows))


def put_row(*args: Any) -> bytes:
    return framed(message(row(1, *args), operation="put"))


def step(name: str) -> list[Any]:
    return ["tuple", [name, 0, ["tuple", []], ["dict", [], []]]]


BYTES = torch.zeros(8, dtype=torch.uint8)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no graph"),
    "something else": (b"\x80\x04\x95 a pickle", "no graph"),
    "the beginning": (b"insitu\x01", "too early"),
    "another version": (framed(message(), version=2), "version 2"),
    "no message": (framed(None), "cannot be read"),
    "a number": (framed(3), "cannot be read"),
    "a dictionary": (framed({"rows": []}), "cannot be read"),
    "too few parts": (framed(message()[:4]), "cannot be read"),
    "too many parts": (framed([*message(), 1]), "cannot be read"),
    "an unknown operation": (framed(message(operation="os.system")), "no operation 'os.system'"),
    "an operation that is not there": (framed(message(row(9, REF))), "is not there"),
    "a line that is not there": (framed(message([1, 7, [REF], {}])), "is not there"),
    "a reference to itself": (framed(message(row(1, ["ref", 1]))), "not before it"),
    "a later reference": (framed(message(row(1, [*REF[:1], 2]), row(1, REF))), "not before it"),
    "a negative reference": (framed(message(row(1, ["ref", -1]))), "cannot be read"),
    "a long reference": (framed(message(row(1, ["ref", 0, 0]))), "cannot be read"),
    "an unknown tag": (framed(message(row(1, ["object", 0]))), "cannot be read"),
    "an untagged list": (framed(message(row(1, REF, [1, 2]))), "cannot be read"),
    "an extension": (framed(message(row(1, REF, msgspec.msgpack.Ext(1, b"")))), "cannot be read"),
    "a tensor that is not there": (framed(message(row(1, REF, ["tensor", 0]))), "no tensor 0"),
    "no dtype": (framed(message(row(1, REF, ["named", "torch.load"]))), "torch.load"),
    "no device": (framed(message(row(1, REF, ["device", "disk"]))), "no device"),
    "no result": (framed(message(row(1, REF, ["result", "len", []]))), "return_types.len"),
    "a short result": (framed(message(row(1, REF, ["result", "max", [1]]))), "return_types.max"),
    "an output of a model": (
        framed(message(row(1, REF, ["output", "transformers.utils.ModelOutput", ["a"], [1], []]))),
        "plain dictionary",
    ),
    "what stands for a cache": (
        framed(message(row(1, REF, ["left out", "DynamicCache"]))),
        "plain dictionary",
    ),
    "a list as a key": (framed(message(row(1, REF, ["dict", [["list", []]], [1]]))), "key"),
    "a reference as a key": (framed(message(row(1, REF, ["dict", [REF], [1]]))), "key"),
    "two equal keys": (framed(message(row(1, REF, ["dict", [1, True], [1, 2]]))), "one key"),
    "keys without values": (framed(message(row(1, REF, ["dict", [1], []]))), "key"),
    "many keys": (framed(message(row(1, REF, ["dict", [1] * 5000, []]))), "cannot be read"),
    "an address of a string": (framed([*message()[:4], [row(0, "x")], {}]), "no site"),
    "an address of numbers": (framed(message(row(0, 0, 1, "output", 0, 0))), "no site"),
    "an unknown kind": (framed(message(row(0, 0, "a", "weights", 0, 0))), "no site"),
    "a negative call": (framed(message(row(0, 0, "a", "output", -1, 0))), "no site"),
    "a negative step": (framed(message(row(0, 0, "a", "output", 0, -2))), "no site"),
    "a truth value": (framed(message(row(0, True, "a", "output", 0, 0))), "no site"),
    "a site read twice": (framed(message(READ_ROW)), "twice"),
    "a read with keywords": (framed(message(row(0, 0, "a", "output", 0, 0, x=1))), "keywords"),
    "an integer of thousands of digits": (
        framed(message(row(1, REF, ["int", b"\x01" * 600]))),
        "cannot be read",
    ),
    "a property for a method": (framed(message(row(1, REF), operation="Tensor.real")), "no opera"),
    "a method of nothing": (framed(message(row(1), operation="Tensor.sin")), "to anything"),
    "an operator of nothing": (framed(message(row(1), operation="operator.neg")), "to anything"),
    "a save of nothing": (framed(message(row(2))), "value of the run"),
    "a save of a constant": (framed(message(row(2, 1))), "value of the run"),
    "a save of two": (framed(message(row(2, REF, REF))), "cannot be called so"),
    "a save to nowhere": (framed(message(row(2, REF, "nowhere"))), "no device"),
    "a write to a copy": (
        framed(message(row(2, REF), row(3, ["ref", 1], 1, True))),
        "what save gives",
    ),
    "out": (framed(message(row(1, REF, out=REF))), "write into"),
    "in place": (framed(message(row(1, REF, True), operation="functional.relu")), "write into"),
    "in place by itself": (framed(message(row(1, REF, 1), operation="Tensor.add_")), "in place"),
    "in place into a constant": (put_row(1, ["tuple", []], "Tensor.add_", 1), "value of the run"),
    "in place with what does not": (put_row(REF, ["tuple", []], "torch.add", 1), "put cannot be"),
    "in place through no view": (put_row(REF, ["tuple", [1]], "Tensor.add_", 1), "put cannot be"),
    "in place through a write in place": (
        put_row(REF, ["tuple", [step("Tensor.zero_")]], "Tensor.add_", 1),
        "put cannot be",
    ),
    "in place through a save": (
        put_row(REF, ["tuple", [step("save")]], "Tensor.add_", 1),
        "put cannot be",
    ),
    "in place into another site": (
        framed(
            message(
                row(0, 0, "b", "output", 0, 0),
                row(1, REF, ["tuple", []], "Tensor.zero_"),
                operation="put",
                writes=[[1, 2]],
            )
        ),
        "another site",
    ),
    "a weight elsewhere": (framed(message(row(1, REF, WEIGHT))), "not given weights"),
    "a backward pass of no value": (framed(message(row(1, 3), operation="backward")), "not done"),
    "a backward pass of two": (
        framed(message(row(1, REF, 3), operation="backward")),
        "backward cannot be called so",
    ),
    "a backward pass of a value's parameter": (
        framed(message(row(1, REF, inputs=["list", [REF]]), operation="backward")),
        "backward cannot be called so",
    ),
    "a backward pass of a number's gradient": (
        framed(message(row(1, REF, inputs=["list", [3]]), operation="backward")),
        "backward cannot be called so",
    ),
    "a backward pass with a number": (
        framed(message(row(1, REF, create_graph=3), operation="backward")),
        "backward cannot be called so",
    ),
    "a backward pass with more": (
        framed(message(row(1, REF, is_grads_batched=True), operation="backward")),
        "unexpected keyword",
    ),
    "a gradient of no backward pass": (
        framed(message(row(1, REF, REF), operation="grad")),
        "grad cannot be called so",
    ),
    "a gradient, unannounced": (framed(message(row(1, REF), operation="grad")), "gradients"),
    "an unknown field": (framed(message(hooks=[[0, 0]])), "Invalid enum value 'hooks'"),
    "a write that is a save": (framed(message(row(2, REF), writes=[[0, 1]])), "node 1 does save"),
    "a write of no node": (framed(message(row(2, REF), writes=[[0, 5]])), "no node 5"),
    "a write of one number": (framed(message(row(2, REF), writes=[[0]])), "1 numbers"),
    "a stop twice": (framed(message(stops=[[0, 0], [0, 0]])), "two entries"),
    "a stop at no line": (framed(message(stops=[[0, 4]])), "no line 4"),
    "an optional read": (framed(message(optional=[[0]])), "node 0 does read"),
    "a repeat past the end": (framed(message(repeats=[[0, 9]])), "no node 9"),
    "a file that is not there": (
        framed([[], [], [[0, 1, ""]], [], [], {}]),
        "no file",
    ),
    "a tensor of no bytes": (with_tensor("torch.float32", [2]), "tensors"),
    "a tensor of another name": (with_tensor("torch.float32", [2], a=BYTES), "tensors"),
    "too many tensors": (
        with_tensor("torch.float32", [2], **{"0": BYTES, "1": BYTES + 1}),
        "tensors",
    ),
    "a longer tensor": (with_tensor("torch.float32", [3], **{"0": BYTES}), "8 bytes"),
    "a tensor of floats": (with_tensor("torch.float32", [8], **{"0": BYTES.float()}), "bytes"),
    "an endless tensor": (
        with_tensor("torch.int8", [0, 2**63], **{"0": BYTES[:0]}),
        "cannot be read",
    ),
    "a quantized tensor": (with_tensor("torch.qint8", [8], **{"0": BYTES}), "qint8"),
    "a layout for a dtype": (with_tensor("torch.strided", [8], **{"0": BYTES}), "no dtype"),
    "booleans of two": (with_tensor("torch.bool", [8], **{"0": BYTES + 2}), "boolean"),
    "a module elsewhere": (framed(message(row(1, REF, ["module", "h"]))), "functions"),
    "a module in a list": (framed(message(row(1, REF, ["list", [["module", ""]]]))), "be read"),
    "a value that is called": (framed(message(row(1, REF, 1), operation="apply")), "functions"),
    "a function that is called": (
        framed(message(row(1, function(), REF), operation="apply")),
        "functions",
    ),
    "a module that folds": (
        framed(message(row(1, ["module", "h"], 0, REF), operation="fold")),
        "functions",
    ),
    "a fold without items": (framed(message(row(1, function()), operation="fold")), "called so"),
    "an input outside": (framed(message(row(1, 0), operation="input")), "not belong"),
    "a read inside": (
        framed(message(row(1, function(READ_ROW), REF, REF), operation="fold")),
        "not belong",
    ),
    "an output from outside": (
        framed(message(row(1, function(output=REF), REF, REF), operation="fold")),
        "not before it",
    ),
    "no tensors": (framed(message(), b"a"), "tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    data, match = HOSTILE[name]
    with pytest.raises(WireError, match=match):
        from_bytes(data)


def test_the_messages_above_are_refused_for_what_is_wrong_with_them_only() -> None:
    from_bytes(framed(message(row(1, REF), row(2, REF), optional=[[2]])))
    from_bytes(with_tensor("torch.float32", [2], **{"0": BYTES}))


def test_a_tensor_that_is_not_used_is_refused() -> None:
    made, tensors = opened(to_bytes(GRAPH))
    made[4][1][2] = [REF]
    with pytest.raises(WireError, match="does not use"):
        from_bytes(framed(made, tensors))


@pytest.mark.parametrize("levels", [33, 200])
def test_deep_functions_are_refused(levels: int) -> None:
    made = row(1, function(), 0, 0)
    for _ in range(levels):
        made = row(1, function(made), 0, 0)
    with pytest.raises(WireError, match="nested|recursion"):
        from_bytes(framed(message(made, operation="fold")))


@pytest.mark.parametrize("levels", [33, 500, 100_000])
def test_deep_nesting_is_refused(levels: int) -> None:
    encoded = msgspec.msgpack.encode(message(row(1, REF, "here")))
    lists = b"\x92\xa4list\x91" * levels + b"\xc0"
    encoded = encoded.replace(b"\xa4here", lists)
    body = struct.pack("<Q", len(encoded)) + encoded
    with pytest.raises(WireError, match="nested|recursion"):
        from_bytes(struct.pack("<6sBI", b"insitu", 1, zlib.crc32(body)) + body)


def test_a_size_that_is_claimed_is_not_allocated() -> None:
    for claimed in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        body = struct.pack("<Q", 6) + b"\x96" + claimed
        with pytest.raises(WireError):
            from_bytes(struct.pack("<6sBI", b"insitu", 1, zlib.crc32(body)) + body)


# Properties

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.just(...),
    st.sampled_from([torch.float32, torch.float8_e5m2, torch.device("cpu"), torch.channels_last]),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
    st.booleans().map(torch.tensor),
)
KEYS = st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.tuples(st.text()))


def containers(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(values, max_size=4),
        st.lists(values, max_size=4).map(tuple),
        st.dictionaries(KEYS, values, max_size=4),
        st.builds(slice, values, values, values),
    )


@settings(deadline=None)
@given(st.recursive(LEAVES, containers, max_leaves=12))
def test_any_arguments_travel(value: Any) -> None:
    graph = graph_of(value, keyword=[value])
    data = to_bytes(graph)
    received = from_bytes(data)
    assert same(received[1].args, graph[1].args) and same(received[1].kwargs, graph[1].kwargs)
    assert received[1][3:5] == graph[1][3:5]
    assert to_bytes(received) == data


def larger() -> bytes:
    model = Model(nn.Sequential(nn.Identity(), nn.Identity()))
    with model.trace(torch.ones(1, 3)) as tracer:
        value = model[0].output
        model[0].output = torch.cat([value[:, :1], value[:, 1:] * torch.arange(2.0)], -1)
        torch.full_like(value, 1j * 2**70, dtype=torch.complex64)
        value[0, 1:].max(dim=-1, keepdim=True).values.save(optional=True)
        model[1].output[..., 0] += 2
        model[1].output.to(torch.float64).clamp(min=0.5, max=None).save()
    return to_bytes(tracer.graph)


VALID = larger()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_change_of_any_byte_is_noticed(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(VALID) - 1))
    flipped = bytearray(VALID)
    flipped[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        from_bytes(bytes(flipped))
    with pytest.raises(WireError):
        from_bytes(VALID[:at])


@pytest.mark.thorough
@settings(deadline=None, max_examples=1000)
@given(st.data())
def test_a_change_that_the_checksum_admits_is_an_error_or_a_graph(data: st.DataObject) -> None:
    body = bytearray(VALID[11:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    received = None
    try:
        received = from_bytes(VALID[:7] + struct.pack("<I", zlib.crc32(body)) + bytes(body))
    except WireError:
        return
    for node in received:  # what was read can be shown, and sent on
        assert all(source < len(received) for source in node.inputs) and str(node.location)
        assert type(node.args[0]) is not Ref or node.operation is not READ
    to_bytes(received)
