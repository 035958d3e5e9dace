"""What a saved value is after the run, against the plain tensor of a hook."""

import copy
import dataclasses
import gc
import io
import json
import pickle
import re
import time
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import insitu
from insitu import InsituError, LanguageModel, Model, NoValueError, OperationError
from tests.conftest import hooked, tiny_gpt2
from tests.thinning import sampled

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TABLE = torch.arange(16.0 * 3).view(16, 3)


def linear() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(3, 3)))


def saved(read: Callable[[Any], Any], **options: Any) -> tuple[Any, Any]:
    """What a run saves of a value, and the same of the value that a hook sees."""
    model = linear()
    with model.trace(X):
        value = read(model[0].output).save(**options)
    return value, read(hooked(model.module, "0", X))


IDS: dict[str, Callable[[Any], Any]] = {
    "ids": lambda h: h.argmax(-1),
    "one id": lambda h: h.argmax(),
    "ids of one row": lambda h: h[:1].argmax(-1),
    "pairs of ids": lambda h: h.argsort(-1)[:, :2],
}


@pytest.mark.parametrize("read", IDS.values(), ids=IDS)
@pytest.mark.parametrize(
    "use",
    [
        lambda i: TABLE[i],
        lambda i: TABLE[i, 0],
        lambda i: TABLE[0, i],
        lambda i: TABLE[:, i],
        lambda i: TABLE[(i,)],
        lambda i: TABLE[..., None][i],
        lambda i: TABLE.clone().index_put_((i,), torch.tensor(0.0)),
        lambda i: _assigned(TABLE.clone(), i),
        lambda i: nn.functional.embedding(i, TABLE),
        lambda i: TABLE.numpy()[i],
    ],
)
def test_a_saved_index_indexes_as_its_tensor_does(
    read: Callable[[Any], Any], use: Callable[[Any], Any]
) -> None:
    ours, theirs = saved(read)
    assert np.array_equal(np.asarray(use(ours)), np.asarray(use(theirs)))


def _assigned(table: torch.Tensor, index: Any) -> torch.Tensor:
    table[index] = -1
    return table


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_saved_mask_selects_as_its_tensor_does(rows: int) -> None:
    mask, plain = saved(lambda h: h[:rows] > 0)
    assert torch.equal(TABLE[:rows][mask], TABLE[:rows][plain])
    assert torch.equal(
        _assigned(TABLE[:rows].clone(), mask), _assigned(TABLE[:rows].clone(), plain)
    )


@pytest.mark.parametrize("read", IDS.values(), ids=IDS)
def test_a_proxy_whose_save_was_a_statement_indexes_right(read: Callable[[Any], Any]) -> None:
    model = linear()
    with model.trace(X):
        index = read(model[0].output)
        index.save()
    plain = read(hooked(model.module, "0", X))
    assert torch.equal(TABLE[index], TABLE[plain]) and torch.equal(index.value, plain)
    assert torch.equal(_assigned(TABLE.clone(), index), _assigned(TABLE.clone(), plain))
    with pytest.raises(NoValueError, match=re.escape("`x = x.save()`")):
        torch.tensor([index])


def test_saved_indices_index_in_the_block_too() -> None:
    model = linear()
    with model.trace(X):
        index = model[0].output.argmax(-1).save()
        rows = TABLE[index].save()
        mixed = TABLE[index, 0].save()
    plain = hooked(model.module, "0", X).argmax(-1)
    assert torch.equal(rows, TABLE[plain]) and torch.equal(mixed, TABLE[plain, 0])


USES: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + 1,
    "reflected": lambda x: 2 - x,
    "stack": lambda x: torch.stack([x, x]),
    "torch.tensor": lambda x: torch.tensor([x.sum(), x[0, 0]]),
    "as_tensor": torch.as_tensor,
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "np.array": lambda x: np.array([x[0, 0], x[0, 1]]),
    "vmap": torch.vmap(lambda row: row * 2),
    "func.grad": torch.func.grad(lambda value: (value**2).sum()),
    "compile": torch.compile(lambda value: value * 2, backend="eager", fullgraph=True),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "parameter": lambda x: nn.Parameter(x).detach(),
    "buffer": lambda x: nn.Buffer(x),
    "collate": lambda x: next(iter(DataLoader([x, x], batch_size=2))),
    "sum": lambda x: sum(x),
    "list": lambda x: torch.stack([row * 1 for row in x]),
    "transpose": lambda x: x.T,
    "dtype": lambda x: x.to(torch.float64),
    "in place": lambda x: copy.copy(x).add_(1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_saved_tensor_goes_where_its_value_does(use: Callable[[Any], Any]) -> None:
    ours, theirs = saved(lambda h: h)
    found, right = use(ours), use(theirs)
    assert np.allclose(np.asarray(found), np.asarray(right))
    assert isinstance(found, type(right))


def test_a_saved_tensor_is_one_and_shows_as_one() -> None:
    ours, theirs = saved(lambda h: h)
    number, plain = saved(lambda h: h.max())
    assert isinstance(ours, torch.Tensor) and torch.is_tensor(ours)
    assert type(ours.value) is torch.Tensor and ours.value is ours.value
    assert ours.value.data_ptr() == ours.data_ptr()
    assert repr(ours) == repr(theirs) and f"{number:.3f}" == f"{plain:.3f}"
    assert float(number) == float(plain) and torch.equal(ours, theirs)
    assert {ours: 1}[ours] == 1 and (ours == theirs).all() and len(ours) == 4
    ours[0] = 0
    assert not ours.value[0].any()
    ours.data = torch.zeros(2)
    assert ours.value.shape == (2,)


@pytest.mark.parametrize(
    "read",
    [
        lambda h: h.to(torch.bfloat16),
        lambda h: h.argmax(-1),
        lambda h: h > 0,
        lambda h: h.sum(),
        lambda h: h[:0],
        lambda h: h.T,
        lambda h: torch.complex(h, h),
    ],
)
def test_tensors_of_every_kind_are_saved_as_they_are(read: Callable[[Any], Any]) -> None:
    ours, theirs = saved(read)
    assert type(ours.value) is torch.Tensor
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours, theirs) and torch.equal(ours.value, theirs)


class Sparse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().to_sparse()


def test_a_sparse_tensor_is_saved_as_one() -> None:
    model = Model(nn.Sequential(Sparse()))
    with model.trace(X):
        ours = model[0].output.save()
    assert ours.is_sparse and torch.equal(ours.to_dense(), X.relu())
    assert torch.equal(pickle.loads(pickle.dumps(ours)).to_dense(), X.relu())


class Quantised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


@pytest.mark.no_wire  # such values do not travel
@pytest.mark.parametrize("kind", [nn.Identity, Sparse, Quantised])
@pytest.mark.filterwarnings("ignore")  # torch is about to part with quantised tensors
def test_other_memory_is_that_of_the_value_too(kind: type[nn.Module]) -> None:
    """Torch cannot be asked whether a sparse or quantised one still has the memory that it had."""
    model = Model(nn.Sequential(kind()))
    with model.trace(X):
        ours = model[0].output.save()
    other = kind()(torch.full_like(X, 7.0))
    assert ours.value is not None
    ours.data = other
    for found in (ours, ours.value):
        numbers = found.dequantize() if found.is_quantized else found
        assert bool((numbers.to_dense() == 7).all())


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: _stored(x, weights_only=True),
    "queue": lambda x: pickle.loads(ForkingPickler.dumps(x)),
}


def _stored(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["value"]


@pytest.mark.parametrize("through", COPIES.values(), ids=COPIES)
def test_a_saved_tensor_is_stored_as_a_plain_one(through: Callable[[Any], Any]) -> None:
    ours, theirs = saved(lambda h: h)
    found = through(ours)
    assert type(found) is torch.Tensor and torch.equal(found, theirs)


def test_a_copy_of_a_saved_tensor_shares_nothing_and_still_has_its_value() -> None:
    ours, theirs = saved(lambda h: h)
    deep = copy.deepcopy({"a": ours, "same": ours})
    assert deep["a"] is deep["same"]
    deep["a"].zero_()
    assert torch.equal(ours, theirs) and not deep["a"].value.any()
    shallow = copy.copy(ours)
    assert shallow.value.data_ptr() == ours.data_ptr()


@pytest.mark.parametrize(
    "read",
    [
        lambda h: insitu.apply(lambda x: (x, x * 2), h),
        lambda h: h.topk(2),
        lambda h: h.max(-1),
        lambda h: h.unbind(0),
        lambda h: h.sum().item(),
        lambda h: h.tolist(),
        lambda h: insitu.apply(lambda x: {"a": x}, h),
        lambda h: insitu.apply(lambda x: None, h),
    ],
)
def test_what_is_saved_and_no_tensor_is_pickled_as_what_it_is(read: Callable[[Any], Any]) -> None:
    model = linear()
    with model.trace(X):
        ours = read(model[0].output).save()
    for found in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), _stored(ours, False)):
        assert type(found) is type(ours.value) and repr(found) == repr(ours.value)


def test_a_saved_tuple_is_a_tuple_to_python() -> None:
    model = linear()
    with model.trace(X):
        pair = insitu.apply(lambda x: (x, x * 2), model[0].output).save()
        none = insitu.apply(lambda x: None, model[0].output).save()
        where = insitu.apply(lambda x: (x > 0).nonzero(as_tuple=True), model[0].output).save()
    plain = hooked(model.module, "0", X)
    assert isinstance(pair, tuple) and len(pair) == 2
    first, second = pair
    assert torch.equal(first * 2, second) and torch.equal(pair[0], plain)
    assert none.value is None and isinstance(none, type(None))
    assert torch.equal(X[where], X[plain > 0])


def test_every_step_gives_a_list_and_no_tensor() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = torch.tensor([[1, 2, 3]])
    with model.generate(ids, max_new_tokens=2) as generator:
        with generator.every_step():
            steps = model.lm_head.output.save()
        once = model.lm_head.output.save()
    assert isinstance(steps, list) and len(steps) == 2
    assert torch.equal(steps[0], once) and isinstance(once, torch.Tensor)


def test_a_parameter_of_a_saved_value_is_nothing_but_a_parameter() -> None:
    ours, theirs = saved(lambda h: h)
    layer = nn.Module()
    layer.weight = nn.Parameter(ours)
    assert type(layer.weight) is nn.Parameter and layer.weight.data_ptr() == ours.data_ptr()
    assert type(copy.deepcopy(layer).weight) is nn.Parameter
    assert type(ours) is not nn.Parameter and not ours.requires_grad
    (layer.weight**2).sum().backward()
    torch.optim.SGD([layer.weight], lr=0.5).step()
    assert torch.allclose(layer.weight, torch.zeros(4, 3))
    assert type(nn.Parameter(ours, requires_grad=False)) is nn.Parameter


def test_gradients_arrive_at_a_saved_value() -> None:
    ours, theirs = saved(lambda h: h)
    ours.requires_grad_()
    (ours.value**2).sum().backward()
    assert torch.allclose(ours.grad, 2 * theirs)
    kept = copy.deepcopy(ours)
    assert kept.requires_grad and kept.is_leaf


def test_a_value_with_its_history_can_be_differentiated_by() -> None:
    model = linear()
    weight = model.module[0].weight
    with model.trace(X):
        kept = model[0].output.save(keep_graph=True)
    (gradient,) = torch.autograd.grad((kept.value**2).sum(), kept.value, retain_graph=True)
    assert torch.allclose(gradient, 2 * kept.value)
    found = torch.autograd.grad((kept * 3).sum(), weight)[0]
    right = torch.autograd.grad((model.module[0](X) * 3).sum(), weight)[0]
    assert torch.allclose(found, right)


def test_a_saved_value_is_the_constant_that_it_is_in_a_later_block() -> None:
    model = linear()
    with model.trace(X):
        old = model[0].output.save()
        index = model[0].output.argmax(-1).save()
    with model.trace(X) as tracer:
        new = model[0].output
        results = [(old - new).save(), torch.cat([old, new]).save(), new[index].save()]
        model[0].output = old
        results.append((TABLE[index] * new.sum()).save())
    plain = hooked(model.module, "0", X)
    assert torch.equal(results[0], torch.zeros(4, 3))
    assert torch.equal(results[1], torch.cat([plain, plain]))
    assert torch.equal(results[2], plain[plain.argmax(-1)])
    constants = [arg for node in tracer.graph for arg in node.args if torch.is_tensor(arg)]
    assert constants and {type(constant) for constant in constants} == {torch.Tensor}


def test_what_is_saved_in_inference_mode_is_an_ordinary_tensor() -> None:
    model = linear()
    with torch.inference_mode(), model.trace(X):
        ours = model[0].output.save()
    assert not ours.is_inference() and not ours.value.is_inference()
    (ours * torch.ones(3, requires_grad=True)).sum().backward()


def test_what_a_scan_saves_has_a_shape() -> None:
    model = linear()
    with model.scan(X):
        ours = model[0].output.save()
    assert ours.shape == (4, 3) and (ours + 1).shape == (4, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.value,
        lambda x: x + 1,
        lambda x: TABLE[x],
        lambda x: torch.stack([x]),
        lambda x: torch.vmap(lambda row: row)(x),
        lambda x: np.asarray(x),
        lambda x: pickle.dumps(x),
        lambda x: copy.deepcopy(x),
        lambda x: x.shape,
        lambda x: nn.Parameter(x),
    ],
)
def test_a_value_of_a_failed_run_is_used_nowhere(use: Callable[[Any], Any]) -> None:
    model = linear()
    found: Any = None
    with pytest.raises(InsituError), model.trace(X):
        found = model[0].output.save()
        model[0].output.view(7)
    with pytest.raises(NoValueError):
        use(found)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda x: np.mean(x),
        lambda x: np.exp(x),
        lambda x: np.add.reduce(x),
        lambda x: np.asarray(x),
        lambda x: np.concatenate([x, x]),
        lambda x: np.ones((4, 3)) * x,
        lambda x: copy.deepcopy(x),
        lambda x: pickle.dumps(x),
        lambda x: torch.vmap(lambda row: row * 2)(x),
        lambda x: torch.func.grad(lambda value: value.sum())(x),
        lambda x: torch.func.jacrev(lambda value: value * 2)(x),
        lambda x: torch.vmap(lambda row: row * x)(X),
        lambda x: setattr(x, "logits", X),
        lambda x: setattr(x, "data", X),
        lambda x: setattr(x, "requires_grad", True),
    ],
)
def test_what_cannot_be_recorded_names_the_users_file(
    use: Callable[[Any], Any], save: bool
) -> None:
    model = linear()
    with pytest.raises(OperationError) as caught, model.trace(X):
        value = model[0].output
        use(value.save() if save else value)
    assert caught.value.location is not None
    assert caught.value.location.file == __file__
    assert "`" in str(caught.value)


def test_operators_of_numpy_numbers_and_functions_of_their_names_are_recorded() -> None:
    model = linear()
    with model.trace(X):
        value = model[0].output
        results = [
            (np.float64(2) * value).save(),
            np.add(value, 1).save(),
            (np.int64(1) - value).save(),
        ]
    plain = hooked(model.module, "0", X)
    for found, right in zip(results, (2 * plain, plain + 1, 1 - plain), strict=True):
        assert torch.equal(found, right) and found.dtype == torch.float32


def test_torch_vmap_runs_inside_of_apply() -> None:
    model = linear()
    with model.trace(X):
        doubled = insitu.apply(torch.vmap(lambda row: row * 2), model[0].output).save()
    assert torch.equal(doubled, hooked(model.module, "0", X) * 2)


@dataclasses.dataclass
class Pair:
    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenPair:
    a: torch.Tensor
    b: torch.Tensor


class Makes(nn.Module):
    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(x, x * 2)


class Adds(nn.Module):
    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self.made = Makes(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = self.made(x)
        return pair.a + pair.b


@pytest.mark.parametrize("kind", [Pair, FrozenPair])
def test_a_field_of_a_dataclass_is_written_by_its_name(kind: type[Any]) -> None:
    model = Model(Adds(kind))
    with model.trace(X):
        model.made.output["a"] = model.made.output.b * 10
        output = model.output.save()
        pair = model.made.output.save()
    assert torch.allclose(output, X * 22)
    assert isinstance(pair, kind) and torch.allclose(pair.a, X * 20)
    with pytest.raises(InsituError, match="shape there is"), model.trace(X):
        model.made.output["a"] = torch.zeros(2, 2)
    with pytest.raises(InsituError, match="has the fields a, b"), model.trace(X):
        model.made.output["c"] = X
    with pytest.raises(OperationError, match=re.escape('value["a"] = new')), model.trace(X):
        model.made.output.a = X


def test_a_field_of_a_model_output_is_written_by_its_name() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace(torch.tensor([[1, 2, 3]])) as tracer:
        tracer.output["logits"] = tracer.output.logits * 0
        output = tracer.output.save()
    assert not output.logits.any() and isinstance(output, dict)
    with (
        pytest.raises(OperationError, match=re.escape('value["logits"] = new')),
        model.trace(torch.tensor([[1, 2, 3]])) as tracer,
    ):
        tracer.output.logits = 0


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.transformer.h[1].output[0],
        lambda m: m.blocks[1].residual_out,
        pytest.param(lambda m: m.blocks[1].attention.z, marks=pytest.mark.thorough),
        pytest.param(lambda m: m.blocks[1].attention.result, marks=pytest.mark.thorough),
        pytest.param(lambda m: m.logits, marks=pytest.mark.thorough),
        pytest.param(lambda m: m.output, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("statement", [False, True])
def test_a_saved_value_keeps_nothing_of_its_model(
    read: Callable[[Any], Any], statement: bool
) -> None:
    model = LanguageModel(tiny_gpt2())
    module = weakref.ref(model.module)
    with model.trace(torch.tensor([[1, 2, 3]])):
        value = read(model)
        kept = value.save()
        kept = value if statement else kept
    assert kept.value is not None
    del model, value
    gc.collect()
    assert module() is None


def test_a_saved_name_means_its_site_while_its_block_is_open() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = torch.tensor([[1, 2, 3]])
    with model.trace(ids):
        z = model.blocks[1].attention.z.save()
        z[:, 0] = 0
        z[:, 1] *= 2
        logits = model.logits.save()
    with model.trace(ids):
        z = model.blocks[1].attention.z
        z[:, 0] = 0
        z[:, 1] *= 2
        right = model.logits.save()
    assert torch.equal(logits, right)
    with model.trace(ids):
        gradient = model.blocks[1].attention.z.save().grad.save()
        model.logits.sum().backward()
    with model.trace(ids):
        wanted = model.blocks[1].attention.z.grad.save()
        model.logits.sum().backward()
    assert torch.equal(gradient, wanted)


def test_what_was_saved_is_written_to_other_sites_of_the_block() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = torch.tensor([[1, 2, 3]])
    read, written = model.transformer.h[0], model.transformer.h[2]
    with model.trace(ids):
        hidden = read.output[0].save()
        written.output = hidden
        model.transformer.h[3].input = hidden
        logits = model.logits.save()
    with model.trace(ids):
        written.output = read.output[0]
        right = model.logits.save()
    assert torch.equal(logits, right)
    with pytest.raises(InsituError), model.trace(ids) as tracer:
        tracer.invoke(model.logits.save())


def test_every_step_gives_a_list_that_is_one_to_torch() -> None:
    model = LanguageModel(tiny_gpt2())
    prompt = torch.tensor([[1, 2, 3]])
    with model.generate(prompt, max_new_tokens=2) as generator, generator.every_step():
        ids = model.lm_head.output[0, -1].argmax().save()
        tops = model.lm_head.output[0, -1].topk(2).save()
        named = model.blocks[0].residual_out.save()
    plain = ids.value
    row = torch.arange(100.0)
    assert type(plain) is list and ids.value is plain and isinstance(ids, list)
    assert ids == plain and len(tops) == len(named) == 2
    assert torch.equal(row[torch.stack(ids)], row[torch.stack(plain)])
    assert torch.equal(torch.tensor(ids), torch.tensor(plain))
    assert type(pickle.loads(pickle.dumps(ids))) is list and type(copy.deepcopy(ids)) is list
    assert isinstance(tops[0], tuple) and list(reversed(ids)) == plain[::-1]
    with model.trace(prompt):
        again = insitu.apply(lambda x, ids: torch.stack(ids), model.lm_head.output, ids).save()
    assert torch.equal(again, torch.stack(plain))


def test_a_saved_output_is_read_by_key_and_unpacked() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = torch.tensor([[1, 2, 3]])
    with model.trace(ids):
        output: Any = model.output.save()
        entries: Any = insitu.apply(lambda x: {"a": x, "b": [1]}, model.lm_head.output).save()
    logits = model.module(ids).logits
    for found in (output["logits"], output[0], output.logits, dict(**output)["logits"]):
        assert torch.equal(found, logits)
    assert torch.equal(entries["a"], logits) and entries["b"] == [1] and {**entries}.keys()


def test_known_tuples_say_that_they_are_tuples() -> None:
    model = linear()
    with model.trace(X):
        top: Any = model[0].output.topk(2).save()
        inputs: Any = model[0].inputs.save()
        assert not isinstance(top, tuple)  # of which nothing is known yet but that it is none
    assert isinstance(top, tuple) and isinstance(inputs, tuple)
    assert torch.equal(top[0], hooked(model.module, "0", X).topk(2).values)


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "full": lambda n: torch.ones(2).new_full((2,), 0.0).add_(n),
    "round": lambda n: round(n, 2),
    "round to an integer": round,
    "arithmetic": lambda n: (n + 1, 2 - n, n / 2, 3 * n, -n, n**2),
    "with tensors": lambda n: torch.ones(2) * n + n,
    "hash": lambda n: {n: 1},
    "format": lambda n: f"{n:.2f} {n}",
    "array": lambda n: np.array([n, n]),
    "isinstance": lambda n: isinstance(n, float),
    "clamp": lambda n: torch.ones(2).clamp(max=n),
    "tensor of a list": lambda n: torch.tensor([n, n, 1.0]),
    "tensor of lists": lambda n: torch.tensor([[n, n], [n, 2]]),
    "as_tensor of a list": lambda n: torch.as_tensor([n, n], dtype=torch.float64),
    "FloatTensor": lambda n: torch.FloatTensor([n, n]),
    "real": lambda n: n.real + n.imag,
    "own method": lambda n: n.is_integer(),
    "divmod": lambda n: divmod(n, 0.25) + divmod(2.0, n),
    "powers": lambda n: n**2 + 2**n,
    "linspace": lambda n: np.linspace(0, n, 3),
    "numpy on the left": lambda n: np.ones(2) * n + np.float64(2) / n,
    "sum and max": lambda n: max(sum([n, n]), n),
    "a sum that grows": lambda n: _grown(n),
    "double": lambda n: torch.ones(1, dtype=torch.float64) * n,
    "key": lambda n: {n: 1}[float(n)],
    "fill": lambda n: _assigned(torch.ones(2), 0).fill_(n),
}


def _grown(number: Any) -> Any:
    total = 0
    for _ in range(2):
        total += number
    number += 1
    return total + number


@pytest.mark.parametrize("use", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(
    "read",
    [lambda h: h.max().item(), lambda h: insitu.apply(lambda x: float(x.max()), h)],
    ids=["item", "apply"],
)
def test_a_saved_number_is_used_as_a_number(
    read: Callable[[Any], Any], use: Callable[[Any], Any]
) -> None:
    model = linear()
    with model.trace(X):
        number = read(model[0].output).save()
    found, right = use(number), use(hooked(model.module, "0", X).max().item())
    assert np.array_equal(np.asarray(found), np.asarray(right)) and type(found) is type(right)


def test_arrays_and_strings_keep_their_own_methods() -> None:
    model = linear()
    with model.trace(X):
        array = insitu.apply(lambda x: x.detach().numpy(), model[0].output).save()
        text = insitu.apply(lambda x: "a b", model[0].output).save()
        rows = model[0].output.tolist().save()
    plain = hooked(model.module, "0", X).detach().numpy()
    assert array.mean() == plain.mean() and np.array_equal(array.sum(0), plain.sum(0))
    assert text.split() == ["a", "b"]
    rows.sort()
    assert rows.value == sorted(plain.tolist())


def test_saved_integers_and_truths_are_what_they_are() -> None:
    model = linear()
    with model.trace(X):
        row = model[0].output.sum(1).argmax().item().save()
        positive = (model[0].output.max() > -100).item().save()
    assert isinstance(row, int) and isinstance(positive, bool)
    assert torch.equal(torch.tensor([row, row]), torch.tensor([row.value] * 2))
    assert torch.equal(torch.tensor([positive, False]), torch.tensor([True, False]))
    assert list(range(row)) == list(range(row.value)) and [1, 2, 3, 4][row] == row + 1
    assert row.bit_length() == row.value.bit_length() and "a" * row == "a" * row.value
    assert pow(row, 2, 3) == row.value**2 % 3 and pow(5, row) == 5**row.value
    assert positive and (positive & False) is False and int(positive) == 1
    for wrong in (len, iter, lambda number: number[0]):
        with pytest.raises(TypeError):
            wrong(row)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x[0].tolist(), lambda x: x.argmax().item()]
)
@pytest.mark.parametrize("around", [lambda x: x, lambda x: {"a": [x]}])
def test_json_of_a_saved_value_names_the_line_to_write(
    read: Callable[[Any], Any], around: Callable[[Any], Any]
) -> None:
    value, expected = saved(read)
    with pytest.raises(TypeError, match=r"`json\.dumps\(x\.value\)`") as caught:
        json.dumps(around(value))
    assert __file__ in str(caught.value)
    assert json.loads(json.dumps(around(value.value))) == around(expected)


@pytest.mark.no_wire
def test_a_tensor_that_a_run_has_left_is_used_again_only_if_nobody_else_has_it() -> None:
    class Kept(TorchDispatchMode):
        copies: ClassVar[list[Any]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.clone.default:
                self.copies.append(found)
            return found

    model = linear()
    with Kept():
        before = [_run(model) for _ in range(3)]
    after = [_run(model) for _ in range(3)]
    expected = hooked(model.module, "0", X)
    assert len(Kept.copies) == 6  # of each run what it was given, and what it saves
    for value in (*before, *after):
        assert torch.equal(value.value, expected)
        assert not any(value is copied for copied in Kept.copies)


def _run(model: Model) -> Any:
    with model.trace(X):
        value = model[0].output.save()
    return value


@pytest.mark.thorough
@pytest.mark.parametrize("options", sampled(["name", "optional"], ["name"]))
def test_many_saves_take_as_long_each_as_few(options: str) -> None:
    model = Model(nn.Identity())

    def seconds(count: int) -> float:
        gc.collect()
        gc.disable()  # it looks at all that is there, and more so where there is more
        try:
            with model.trace(torch.zeros(3)):
                start = time.process_time()
                for number in range(count):
                    given = {"name": f"value {number}"} if options == "name" else {"optional": True}
                    model.output.save(**given)
                return time.process_time() - start
        finally:
            gc.enable()

    few = min(seconds(500 + more) for more in range(3))
    many = min(seconds(5000 + more) for more in range(2))
    assert many < 20 * few
