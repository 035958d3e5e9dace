"""Jobs that are made to do harm to a server, as bytes, by name: for the small language model.

Most are those that the tests beside this file try on a model without a server, about a value of
the language model. Others are only of interest where somebody else uses the same model.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from insitu import Job, LanguageModel, cond, fold
from tests.attack.jobs import (
    BLOCKS,
    HEAD,
    IDS,
    MAGIC,
    OPTIONS,
    READ,
    ROWS,
    framed,
    job_bytes,
    opened,
    plain_job,
    ref,
    row,
    small,
)
from tests.attack.test_limits import HUGE, MANY_AXES
from tests.attack.test_received import NOWHERE
from tests.attack.test_values import GROWING

BLOCK = "transformer.h.1"
SITE = "transformer.h.0.mlp"
BIG = 10**12
_PATHS = {"0": "transformer.ln_f", "1": SITE, "3": "transformer.h.1.mlp", "1>zzz": f"{SITE}>zzz"}


@dataclass(frozen=True)
class Hostile:
    """A job, and what has to become of it.

    Attributes:
        name: what it tries.
        data: its bytes.
        codes: the codes of which its problem has one; "" where it may be done as well.
        lined: whether the problem names a line.
        path: where it is sent.
    """

    name: str
    data: bytes
    codes: frozenset[str]
    lined: bool = True
    path: str = "/v1/jobs"


REFUSED = frozenset(("limit", "operation", "shape", "wire", "never_fits", "unknown_shape"))
"""What is said of most that takes too much, or does not work."""

DONE = frozenset(("", *REFUSED))


def hand_made(model: LanguageModel) -> list[Hostile]:
    """Returns jobs that were thought of.

    Args:
        model: the model that the server has.
    """
    return [
        *_on_values(model),
        *_of_python(model),
        *_of_options(model),
        *_on_results(model),
        *_of_frames(model),
        *_of_neighbours(model),
    ]


def shifted(rows: Sequence[Any]) -> list[Any]:
    """Rows about the small model's first value, about a part of a value of the language model.

    It is node 1 there, of the same shape: node 0 reads, and node 1 takes the part.
    """
    return [[one[0], one[1], _moved(one[2]), _moved(one[3])] for one in rows]


def _moved(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _moved(one) for name, one in part.items()}
    if not isinstance(part, list):
        return part
    if part[:1] == ["function"]:  # its nodes count for themselves
        return [*part[:4], *map(_moved, part[4:])]
    if part[:1] == ["ref"] and len(part) == 2 and isinstance(part[1], int):
        return ["ref", part[1] + 1]
    return [_moved(one) for one in part]


def about_a_value(
    model: LanguageModel, names: Sequence[str], rows: Sequence[Any], save: bool = True
) -> bytes:
    """A job whose lines take a value of shape (3, 4), which is node 1."""
    names = ["read", *names, "operator.getitem", "save"]
    cut = ["tuple", [0, ["slice", None, 3, None], ["slice", None, 4, None]]]
    first = [row(0, 0, SITE, "output", 0, 0), row(len(names) - 2, ref(0), cut)]
    made = [*first, *shifted(rows)]
    if save:
        made.append(row(len(names) - 1, ref(len(made) - 1)))
    return job_bytes(model, names, made, prompts=[IDS])


def _on_values(model: LanguageModel) -> Iterator[Hostile]:
    """Values of sizes that nobody has the memory for, and operations that never end."""
    for table in (HUGE, MANY_AXES):
        for name, (names, rows) in table.items():
            yield Hostile(f"value: {name}", about_a_value(model, names, rows), REFUSED)
    for name, (names, rows) in _SLOW.items():
        yield Hostile(f"slow: {name}", about_a_value(model, names, rows), DONE, lined=False)
    whole = ["slice", 0, BIG, BIG]
    slices = [row(1, ref(0), whole), row(1, ref(1), ["tuple", [None, whole, whole]])]
    yield Hostile("slice of 1e12", about_a_value(model, ["operator.getitem"], slices), DONE)
    for size in (BIG, 2**63 - 1, -(2**63)):
        rows = [row(1, ref(0), ["list", [size]])]
        data = about_a_value(model, ["Tensor.new_zeros"], rows)
        yield Hostile(f"zeros of {size}", data, REFUSED)
        rows = [row(1, ref(0), ["tuple", [0, size]])]
        data = about_a_value(model, ["operator.getitem"], rows)
        yield Hostile(f"item {size}", data, REFUSED)


MOST = 2**16
# What takes long or much although its size is small: what each may take is priced, or bounded.
_SLOW: dict[str, tuple[list[str], list[Any]]] = {
    "power of a matrix": (
        ["Tensor.repeat", "linalg.matrix_power", "Tensor.sum"],
        [row(1, ref(0), 4, 3), row(2, ref(1), 2**62), row(3, ref(2))],
    ),
    "exponential": (
        ["Tensor.repeat", "torch.matrix_exp"],
        [row(1, ref(0), 400, 300), row(2, ref(1))],
    ),
    "sort": (["Tensor.repeat", "Tensor.sort"], [row(1, ref(0), 2000, 200), row(2, ref(1))]),
    "distances": (
        ["Tensor.repeat", "torch.cdist", "Tensor.sum"],
        [row(1, ref(0), 1000, 1), row(2, ref(1), ref(1)), row(3, ref(2))],
    ),
    "inverse": (["Tensor.repeat", "linalg.pinv"], [row(1, ref(0), 60, 50), row(2, ref(1))]),
    "indices": (["torch.tril_indices"], [row(1, 10**7, 10**7)]),
    "combinations": (
        ["Tensor.flatten", "torch.combinations"],
        [row(1, ref(0)), row(2, ref(1), 12, True)],
    ),
    "product of lists": (
        ["Tensor.flatten", "torch.cartesian_prod"],
        [row(1, ref(0)), row(2, *[ref(1)] * 12)],
    ),
    "blocks": (["torch.block_diag"], [row(1, *[ref(0)] * 2000)]),
    "einsum": (
        ["torch.einsum"],
        [row(1, "ab,cd,ef,gh,ij,kl,mn,op,qr,st->acegikmoqsbdfhjlnprt", *[ref(0)] * 10)],
    ),
}


def nested_folds(depth: int, items: int) -> list[Any]:
    body = ["function", [row(2, 0), row(2, 1), row(3, ref(0), 1)], ref(2), {}]
    xs = ["list", [0] * items]
    for _ in range(depth):
        body = ["function", [row(2, 0), row(2, 1), row(4, body, ref(0), xs)], ref(2), {}]
    return [row(1, ref(0)), row(4, body, ref(1), xs)]


def _of_python(model: LanguageModel) -> Iterator[Hostile]:
    """Python's own numbers, lists and functions, and names of what is not there."""
    for name, (operation, args) in GROWING.items():
        if name == "string":
            continue
        rows = [row(1, ref(0)), row(2, *args)]
        yield Hostile(
            f"python: {name}", about_a_value(model, ["torch.numel", operation], rows), DONE
        )
    names = ["Tensor.abs", "input", "operator.add", "fold"]
    for depth, items in ((30, 2), (6, 20), (3, 200), (2, 300)):
        data = about_a_value(model, names, nested_folds(depth, items))
        yield Hostile(f"folds {depth} deep over {items}", data, DONE, lined=False)
    body = ["function", [row(2, 0), row(2, 1), row(3, ref(0), 1)], ref(2), {}]
    rows = [row(5, ref(0), 10**9, 3, 4), row(4, body, ref(0), ref(1))]
    data = about_a_value(model, [*names, "Tensor.expand"], rows)
    yield Hostile("fold over 1e9", data, REFUSED)
    tower = [row(1, ref(0)), *[row(2, ref(at), ref(at)) for at in range(1, 40)]]
    data = about_a_value(model, ["torch.numel", "operator.mul"], tower)
    yield Hostile("tower of integers", data, REFUSED)
    for count in (3_000, 30_000):
        chain = [row(1, ref(at)) for at in range(count)]
        data = about_a_value(model, ["torch.sin"], chain)
        yield Hostile(f"chain of {count} nodes", data, DONE, lined=False)
    deep = msgspec.Raw(b"\x92\xa4list\x91" * 5_000 + b"\x92\xa4list\x90")
    yield Hostile("deep list", about_a_value(model, ["torch.cat"], [row(1, deep)]), REFUSED, False)
    plain: Any = ["function", [row(2, 0)], ref(0), {}]
    inner = plain
    for _ in range(100):
        inner = ["function", [row(2, 0), row(1, True, inner, plain, ref(0))], ref(1), {}]
    rows = [row(1, True, inner, inner, ref(0))]
    data = about_a_value(model, ["cond", "input"], rows)
    yield Hostile("functions in functions", data, DONE, lined=False)
    for name, (operations, rows, fields) in NOWHERE.items():
        mapped = [[one[0], one[1], [_path_of(arg) for arg in one[2]], one[3]] for one in rows]
        data = job_bytes(model, operations, mapped, fields, prompts=[IDS])
        yield Hostile(f"nowhere: {name}", data, _ANY)
    for name in (
        "os.system",
        "builtins.eval",
        "Tensor.to",
        "Tensor.cuda",
        "torch.load",
        "x" * MOST,
    ):
        data = about_a_value(model, [name], [row(1, ref(0), "cuda:0")])
        yield Hostile(f"operation {name:.20}", data, frozenset((*_ANY, "")), lined=False)
    long = about_a_value(model, ["Tensor.abs"], [row(1, ref(0))])
    for kind in ("name", "file", "text", "path"):
        yield Hostile(f"long {kind}", _with_long(long, kind), frozenset((*_ANY, "")), lined=False)


_ANY = REFUSED | frozenset(
    (
        *("path", "missing_value", "gradient", "call", "step", "job", "option", "causality"),
        *("prompt", "never_ran", "execution"),
    )
)


def _path_of(arg: Any) -> Any:
    return _PATHS.get(arg, arg) if isinstance(arg, str) else arg


def _with_long(data: bytes, kind: str) -> bytes:
    """A job with a text of 100,000 letters somewhere."""
    message, tensors = opened(data)
    long = "/etc/passwd\u202e<script>%s{0}\n" * 4_000
    if kind == "name":
        message[BLOCKS][0][5] = [[message[BLOCKS][0][5][0][0], long]]
    elif kind == "file":
        message[1] = [long]
    elif kind == "text":
        message[2] = [[0, 1, long]]
    else:
        message[BLOCKS][0][ROWS][0][2][1] = long
    return framed(message, tensors)


def _of_options(model: LanguageModel) -> Iterator[Hostile]:
    """Options that ask for much, for code, or for what is not of the run alone."""
    for options in (
        {"max_new_tokens": 10**9},
        {"max_new_tokens": 2, "num_beams": 10**6},
        {"max_new_tokens": 2, "num_return_sequences": 10**6, "do_sample": True},
        {"max_new_tokens": 2, "max_time": 1e9, "min_new_tokens": 10**9},
        {"max_new_tokens": 2, "cache_implementation": "quantized"},
        {"max_new_tokens": 2, "cache_implementation": "static"},
        {"max_new_tokens": 2, "cache_implementation": "offloaded"},
        {"max_new_tokens": 2, "attn_implementation": "flash_attention_2"},
        {"max_new_tokens": 2, "attn_implementation": "eager"},
        {"max_new_tokens": 2, "stop_strings": ["x" * 10_000]},
        {"max_new_tokens": 2, "bad_words_ids": [[5] * 10_000]},
        {"max_new_tokens": 2, "eos_token_id": -7, "pad_token_id": 10**9},
        {"max_new_tokens": 2, "forced_bos_token_id": 10**9},
        {"max_new_tokens": 2, "suppress_tokens": [10**9]},
        {"max_new_tokens": 2, "penalty_alpha": 0.5, "top_k": 10**9},
        {"max_new_tokens": 2, "prompt_lookup_num_tokens": 10**9},
        {"max_new_tokens": 2, "custom_generate": "somebody/code"},
        {"max_new_tokens": 2, "trust_remote_code": True},
        {"max_new_tokens": 2, "no_repeat_ngram_size": 10**9},
    ):
        data = _with_options(plain_job(model, IDS, generate=2), options)
        shown = " ".join(f"{name}={one!r:.20}" for name, one in options.items())
        yield Hostile(f"generate {shown}", data, frozenset((*_ANY, "")), lined=False)
    for options in (
        {"attn_implementation": "flash_attention_2"},
        {"max_tokens_per_pass": 1},
        {"max_tokens_per_pass": -(2**63)},
        {"labels": 5},
        {"past_key_values": [1, 2]},
        {"use_cache": True, "output_attentions": True},
        {"self": 1},
        {"forward": 1},
        {"__class__": "x"},
    ):
        data = _with_options(plain_job(model, IDS), options)
        yield Hostile(f"trace {options}", data, frozenset((*_ANY, "")), lined=False)
    for ids in ([[10**9]], [[-1]], [[5] * 3_000], [[5]] * 3_000):
        for generate in (0, 2):
            data = _with_ids(plain_job(model, IDS, generate=generate), torch.tensor(ids))
            codes = frozenset((*_ANY, ""))
            yield Hostile(f"ids {ids!s:.20} {generate}", data, codes, lined=False)


def _with_options(data: bytes, options: Mapping[str, Any]) -> bytes:
    message, tensors = opened(data)
    parts = {name: _part_of(one) for name, one in options.items()}
    message[BLOCKS][0][OPTIONS] = {**message[BLOCKS][0][OPTIONS], **parts}
    return framed(message, tensors)


def _part_of(value: Any) -> Any:
    if isinstance(value, list):
        return ["list", [_part_of(one) for one in value]]
    return value


def _with_ids(data: bytes, ids: torch.Tensor) -> bytes:
    """A job with other token ids, which no recording lets through."""
    job = Job.from_bytes(data)
    (block,) = job.blocks
    prompt = replace(block.prompts[0], ids=ids, mask=None)
    return Job(job.model, [replace(block, prompts=[prompt])]).to_bytes()


def _on_results(model: LanguageModel) -> Iterator[Hostile]:
    """Results of sizes that nobody has the space for."""
    for name, count in (("a terabyte", 10**11), ("a petabyte", 10**14)):
        data = about_a_value(model, ["Tensor.expand"], [row(1, ref(0), count, 3, 4)])
        yield Hostile(f"results of {name}", data, frozenset((*REFUSED, "storage")), lined=False)
    names, rows = ["Tensor.expand", "save"], [row(1, ref(0), 10**6, 3, 4)]
    saves = [row(2, ref(1)) for _ in range(2_000)]
    data = about_a_value(model, names, [*rows, *saves], save=False)
    codes = frozenset((*REFUSED, "storage", "missing_value"))
    yield Hostile("a large result 2,000 times", data, codes, lined=False)


def _of_frames(model: LanguageModel) -> Iterator[Hostile]:
    """Bytes that are no job, or one of another model."""
    good = plain_job(model, IDS)
    wire = frozenset(("wire",))
    for name, data in (
        ("nothing", b""),
        ("text", b"GET / HTTP/1.1"),
        ("a pickle", b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system"),
        ("half of a job", good[: len(good) // 2]),
        ("a job and more", good + b"more"),
        ("another version", framed([], version=200)),
        ("a length of 2**63", MAGIC + b"\1" + bytes(4) + struct.pack("<Q", 2**63)),
        ("another checksum", good[:HEAD] + bytes(8) + good[HEAD + 8 :]),
        ("zeros", bytes(2**20)),
    ):
        yield Hostile(f"bytes: {name}", data, wire, lined=False)
    other = small()
    data = job_bytes(other, ["read", "save"], [READ, row(1, ref(0))])
    yield Hostile("another model", data, frozenset(("job",)), lined=False)
    message, tensors = opened(good)
    message[3] = [*message[3], [["torch.float32", [4, 4], "cpu"], "f" * 64]]
    blob = framed(message, tensors)
    yield Hostile(
        "a blob of somebody else", blob, frozenset(("missing_blobs", "wire")), lined=False
    )
    for place in ("cuda:0", "cuda:99", "mps", "meta", "xla:0", "privateuseone:0", "no such"):
        message, tensors = opened(good)
        for described in message[3]:
            described[0][2] = place
        codes = frozenset(("", "wire", "device"))
        yield Hostile(f"tensors on {place}", framed(message, tensors), codes, lined=False)


def _of_neighbours(model: LanguageModel) -> Iterator[Hostile]:
    """What would spoil the rows of others in the same pass, if anything could."""
    makers: dict[str, Callable[[Any], Any]] = {
        "nan": lambda x: x * float("nan"),
        "infinity": lambda x: x + float("inf"),
        "huge": lambda x: x * 1e38 * 10,
    }
    for name, make in makers.items():
        with model.scan(IDS) as tracer:
            for layer in range(len(model.transformer.h)):
                model.transformer.h[layer].attn.output[0][:] = make(
                    model.transformer.h[layer].attn.output[0]
                )
            model.lm_head.output.save("logits")
        yield Hostile(f"{name} in all rows", tracer.job.to_bytes(), frozenset(("",)))
    with model.scan(IDS) as tracer:
        wrong = model.transformer.h[0].mlp.output
        (wrong > 1e9).nonzero()[3].save("wrong")
        model.lm_head.output.save("logits")
    yield Hostile("a line that fails in the run", tracer.job.to_bytes(), DONE)
    with model.scan(IDS) as tracer:
        hidden = model.transformer.h[1].mlp.output
        total = fold(lambda carry, one: carry * one, hidden[0, 0], hidden[0].repeat(50, 1))
        cond(total.sum() > 0, lambda x: x * 0, lambda x: x - 1, total).save("total")
        model.transformer.h[1].mlp.output = hidden * 0 + total
        model.lm_head.output.sum().backward()
        hidden.grad.save("grad")
    yield Hostile("gradients through a fold", tracer.job.to_bytes(), frozenset(("",)))
    with model.scan(IDS) as tracer:
        model.transformer.h[0].output[0][:] = 0
        model.transformer.wte.output[:] = float("nan")
        model.transformer.h[2].skip(model.transformer.h[0].output)
        model.lm_head.output.save("logits")
    yield Hostile("writes and a skip", tracer.job.to_bytes(), frozenset(("", *_ANY)), lined=False)
