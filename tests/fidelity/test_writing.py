"""Writes, against the same experiment done by hand with PyTorch's own hooks."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from insitu import CausalityError, LanguageModel, Model, NeverRanError, OperationError, ShapeError
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.thinning import sampled

IDS = torch.tensor([[5, 17, 3, 42, 8, 1]])
OTHER = torch.tensor([[9, 2, 77, 30, 61, 4]])
SHORT = torch.tensor([[11, 12, 13]])


def blocks(model: LanguageModel) -> Any:
    """The handles of a model's blocks."""
    return model.transformer.h if "transformer" in dir(model) else model.model.layers


def block_paths(model: LanguageModel) -> list[str]:
    return [handle.path for handle in blocks(model)]


def edited(
    module: nn.Module, edits: Mapping[str, Callable[[Any], Any]], *args: Any, **kwargs: Any
) -> Any:
    """The oracle: what the module returns while plain hooks change outputs."""

    def hook(edit: Callable[[Any], Any]) -> Any:
        def changed(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return changed

    handles = [
        module.get_submodule(path).register_forward_hook(hook(edit)) for path, edit in edits.items()
    ]
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def logits(model: LanguageModel, edits: Mapping[str, Callable[[Any], Any]], ids: Any) -> Any:
    return edited(model.module, edits, input_ids=ids, use_cache=False).logits


def test_a_written_output_reaches_the_model(language_model: LanguageModel) -> None:
    model, path = language_model, block_paths(language_model)[1]
    with model.trace(IDS):
        blocks(model)[1].output = blocks(model)[1].output[0] * 2
        result = model.lm_head.output.save()
    assert torch.equal(result, logits(model, {path: lambda h: h * 2}, IDS))
    assert not torch.equal(result, logits(model, {}, IDS))


def test_a_part_of_an_output_can_be_written(language_model: LanguageModel) -> None:
    model, path = language_model, block_paths(language_model)[0]
    with model.trace(IDS):
        block = blocks(model)[0]
        before = block.output[0]
        block.output[0] = before + 1
        after = block.output[0].save()
        before = before.save()
        result = model.lm_head.output.save()
    assert torch.equal(result, logits(model, {path: lambda h: h + 1}, IDS))
    original = hooked_hidden(model.module, path, IDS)
    assert torch.equal(before, original) and torch.equal(after, original + 1)


def test_a_part_of_any_modules_tuple_can_be_written(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        attention = gpt2.transformer.h[1].attn
        attention.output[0] = torch.zeros_like(attention.output[0])
        result = gpt2.lm_head.output.save()
    expected = logits(gpt2, {"transformer.h.1.attn": torch.zeros_like}, IDS)
    assert torch.equal(result, expected)


def test_all_reads_come_from_the_edited_run_whatever_their_order(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        last = gpt2.transformer.h[3].output[0].save()  # written before the lines that change it
        gpt2.transformer.h[2].output = gpt2.transformer.h[1].output[0]
        gpt2.transformer.h[0].output = gpt2.transformer.h[0].output[0] * 3
    seen: dict[str, Any] = {}

    def keep(name: str, h: Any) -> Any:
        seen[name] = h
        return h

    edits = {
        "transformer.h.0": lambda h: h * 3,
        "transformer.h.1": lambda h: keep("1", h),
        "transformer.h.2": lambda h: seen["1"],
        "transformer.h.3": lambda h: keep("3", h),
    }
    logits(gpt2, edits, IDS)
    assert torch.equal(last, seen["3"])


def test_the_last_of_several_writes_counts_and_lines_between_read_what_stands(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS):
        mlp = gpt2.transformer.h[1].mlp
        first = mlp.output.save()
        mlp.output = mlp.output + 1
        second = mlp.output.save()
        mlp.output = mlp.output * 2
        result = gpt2.lm_head.output.save()
    expected = logits(gpt2, {"transformer.h.1.mlp": lambda h: (h + 1) * 2}, IDS)
    assert torch.equal(result, expected)
    assert torch.equal(second, first + 1)


def test_a_written_input_reaches_the_model(language_model: LanguageModel) -> None:
    model = language_model
    constant = torch.randn(1, 6, 16)
    with model.trace(IDS):
        model.lm_head.input = constant
        result = model.lm_head.output.save()
    assert torch.equal(result, model.module.lm_head(constant).detach())


def test_all_arguments_can_be_written(twice: Model) -> None:
    x, other = torch.randn(2, 4), torch.randn(2, 4)
    with twice.trace(x=x, scale=2.0):
        args, kwargs = twice.inputs[0], twice.inputs[1]
        twice.inputs = ((), {"x": kwargs["x"] + other, "scale": 5.0})
        result = twice["output"].output.save()
        whole = twice.output.save()
        del args
    expected = twice.module(x=x + other, scale=5.0)
    assert torch.equal(whole["second"], expected["second"].detach())
    assert torch.equal(result * 5, expected["second"].detach())


def test_a_keyword_input_can_be_written(twice: Model) -> None:
    x = torch.randn(2, 4)
    with twice.trace(x=x):
        twice.input = twice.input * 2
        whole = twice.output.save()
    assert torch.equal(whole["first"], twice.module(x=x * 2)["first"].detach())


def test_only_the_first_call_is_written(twice: Model) -> None:
    x = torch.randn(2, 4)
    with twice.trace(x=x):
        twice.shared.output = torch.ones(2, 4)
        whole = twice.output.save()
    shared = twice.module.shared
    assert torch.equal(whole["first"], torch.ones(2, 4))
    assert torch.equal(whole["second"], torch.relu(shared(torch.ones(2, 4))).detach())


def test_a_dictionary_entry_can_be_written(twice: Model) -> None:
    with twice.trace(x=torch.randn(2, 4)):
        twice.output["first"] = torch.zeros(2, 4)
        whole = twice.output.save()
    assert torch.equal(whole["first"], torch.zeros(2, 4)) and whole["second"].any()


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("source", [IDS, OTHER])
@pytest.mark.parametrize("forward", sampled([True, False], [True]))
def test_a_patch_from_another_prompt(
    language_model: LanguageModel, source: torch.Tensor, forward: bool
) -> None:
    model, path = language_model, block_paths(language_model)[1]
    with model.trace() as tracer:
        if forward:
            with tracer.invoke(source):
                clean = blocks(model)[1].output[0]
        with tracer.invoke(IDS):
            untouched = model.lm_head.output.save()
        with tracer.invoke(OTHER) as invoker:
            if not forward:  # a line of a later invocation may be used by an earlier one
                clean = blocks(model)[1].output[0]
            else:
                blocks(model)[1].output = clean
                result = invoker.output.logits.save()
        if not forward:
            with tracer.invoke(IDS) as invoker:
                blocks(model)[1].output = clean
                result = invoker.output.logits.save()
    donor = hooked_hidden(model.module, path, source if forward else OTHER)
    prompt = OTHER if forward else IDS
    expected = logits(model, {path: lambda h: donor}, prompt)
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.allclose(untouched, logits(model, {}, IDS), atol=1e-5)


def test_a_write_touches_no_neighbour_and_no_padding(language_model: LanguageModel) -> None:
    model, path = language_model, block_paths(language_model)[0]
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            blocks(model)[0].output = blocks(model)[0].output[0] * 5
            short = model.lm_head.output.save()
        with tracer.invoke(IDS):
            long = model.lm_head.output.save()
    expected = logits(model, {path: lambda h: h * 5}, SHORT)
    assert short.shape == (1, 3, 100) and torch.allclose(short, expected, atol=1e-5)
    assert torch.allclose(long, logits(model, {}, IDS), atol=1e-5)


def test_invocations_that_run_apart_run_in_the_order_of_their_values(twice: Model) -> None:
    first, second = torch.randn(2, 4), torch.randn(3, 4)[:2]
    with twice.trace() as tracer:
        with tracer.invoke(x=first):
            later = twice.shared  # the value is read below, in the invocation that comes second
            whole = twice.output.save()
            site = later.output
        with tracer.invoke(x=second):
            donor = twice["output"].output
        with tracer.invoke(x=first):
            twice.shared.output = donor
            result = twice.output.save()
        del site
    expected = torch.relu(twice.module.shared(second))
    expected = torch.relu(twice.module.shared(twice.module.shared(second))).detach()
    assert torch.equal(result["first"], expected)
    assert torch.equal(whole["first"], twice.module.shared(first).detach())


def test_a_write_in_a_generation_is_one_of_the_first_forward(eiffel: LanguageModel) -> None:
    prompt = "The Eiffel Tower is in the city of"
    with eiffel.trace("The Colosseum is in the city of"):
        rome = eiffel.lm_head.output[:, -1:].save()
    with eiffel.generate(prompt, max_new_tokens=1) as generator:
        eiffel.lm_head.output = rome.value
    assert eiffel.tokenizer.decode(generator.output[0, -1]) == " Rome"
    assert generator.output.shape[1] == len(eiffel.tokenizer(prompt)["input_ids"]) + 1


def test_keys_and_values_of_a_block_can_be_written() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace(IDS, use_cache=True):
        hidden, cached = model.transformer.h[1].output[0], model.transformer.h[1].output[1]
        model.transformer.h[1].output = (hidden * 2, (cached[0] * 0, cached[1]))
        kept = model.output.past_key_values.save()
        result = model.lm_head.output.save()
    assert not kept.value.layers[1].keys.any() and kept.value.layers[1].values.any()
    assert torch.equal(result, logits(model, {"transformer.h.1": lambda h: h * 2}, IDS))


def test_the_model_may_write_into_what_it_is_given() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    model, constant = Model(module), torch.tensor([[-1.0, 2.0, -3.0]])
    before = constant.clone()
    with model.trace(torch.ones(1, 3)):
        model[0].output = constant
        kept = model[0].output + 0 * model[2].output  # computed after the ReLU has written
        kept = kept.save()
        result = model[2].output.save()
    assert torch.equal(constant, before) and torch.equal(kept, before)
    assert torch.equal(result, module[2](torch.relu(before)).detach())


def test_what_is_computed_and_written_is_used_later_as_it_was() -> None:
    module = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Identity())
    model, given = Model(module), torch.tensor([[-1.0, 2.0, -3.0]])
    with model.trace(given):
        halved = model[0].output * 0.5
        model[0].output = halved
        kept = (halved + 0 * model[2].output).save()  # computed after the ReLU has written
        result = model[2].output.save()
    assert torch.equal(kept, given / 2) and torch.equal(result, torch.relu(given / 2))
    with model.trace(given):
        model[0].output = model[0].output * 0.5  # this only the model gets
        result = model[2].output.save()
    assert torch.equal(result, torch.relu(given / 2))
    assert torch.equal(given, torch.tensor([[-1.0, 2.0, -3.0]]))


def test_a_value_that_comes_later_is_refused_before_the_model_runs(gpt2: LanguageModel) -> None:
    ran: list[object] = []
    gpt2.transformer.wte.module.register_forward_hook(
        lambda m, a, output: ran.append(output) if type(output) is torch.Tensor else None
    )
    with pytest.raises(CausalityError) as caught, gpt2.trace(IDS):
        late = gpt2.transformer.h[3].output[0]
        gpt2.transformer.h[1].output = late
    assert not ran
    message = str(caught.value)
    assert message.startswith(
        "`transformer.h[1].output` is given a value that depends on `transformer.h[3].output`, "
        "which comes later in the run and is read at\n"
    )
    assert "late = gpt2.transformer.h[3].output[0]" in message
    assert message.endswith("gpt2.transformer.h[1].output = late")


class Unprobed(nn.Module):
    """Looks at values, so that it cannot be run on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if x.sum().item() > 0 else x


def test_a_value_that_comes_later_is_refused_by_the_run_if_need_be() -> None:
    model = Model(Unprobed())
    with (
        pytest.raises(CausalityError, match=r"`a.output` is given .* depends on `b.output`"),
        model.trace(torch.ones(1, 3)),
    ):
        model.a.output = model.b.output + model.a.output
    assert not model.a.module._forward_hooks
    with model.trace(torch.ones(1, 3)):
        model.b.output = model.a.output
        result = model.output.save()
    assert torch.equal(result, model.a.module(torch.ones(1, 3)).detach())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(1, 5, 16), r"shape there is \(1, 6, 16\), and this is \(1, 5, 16\)"),
        (torch.zeros(16), r"shape there is \(1, 6, 16\), and this is \(16,\)"),
        (torch.zeros(1, 6, 16, dtype=torch.float64), "dtype there is torch.float32"),
        (0, "not a value of type int: make one with torch.full_like"),
        ((torch.zeros(1, 6, 16), 1, 2), "a tuple of 1 stands there, not a tuple of 3"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_at_its_line(
    gpt2: LanguageModel, value: Any, words: str
) -> None:
    with pytest.raises(ShapeError, match=words) as caught, gpt2.trace(IDS):
        gpt2.transformer.h[1].output = value
    assert "`transformer.h[1].output` cannot be given this value" in str(caught.value)
    assert str(caught.value).endswith("gpt2.transformer.h[1].output = value")
    with gpt2.trace(IDS):
        after = gpt2.lm_head.output.save()
    assert torch.equal(after, logits(gpt2, {}, IDS))


def test_a_patch_between_prompts_of_different_length_is_explained(gpt2: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="values of another prompt are as long as that prompt"):
        with gpt2.trace() as tracer:
            with tracer.invoke(SHORT):
                short = gpt2.transformer.h[1].output[0]
            with tracer.invoke(IDS):
                gpt2.transformer.h[1].output = short


def test_a_write_to_a_module_that_never_runs_is_an_error(twice: Model) -> None:
    with pytest.raises(NeverRanError, match="`unused` was not called"):
        with twice.trace(x=torch.ones(1, 4)):
            twice.unused.output = torch.ones(1, 4)


def test_the_first_and_all_arguments_of_one_module_are_not_mixed(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        _ = gpt2.lm_head.inputs
        with pytest.raises(OperationError, match=r"do both through `.inputs`"):
            gpt2.lm_head.input = torch.zeros(1, 6, 16)


def test_what_is_written_has_a_shape(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output = torch.zeros(1, 6, 16)
        assert gpt2.transformer.h[1].output[0].shape == (1, 6, 16)
    with pytest.raises(ShapeError, match="cannot be given") as caught, gpt2.trace(IDS):
        gpt2.transformer.h[2].output = torch.zeros(1, 5, 16)
        _ = gpt2.transformer.h[2].output.shape
    assert str(caught.value).endswith("gpt2.transformer.h[2].output = torch.zeros(1, 5, 16)")


def test_lines_after_a_written_argument_read_all_arguments_with_it(gpt2: LanguageModel) -> None:
    constant = torch.randn(1, 6, 16)
    with gpt2.trace(IDS):
        gpt2.lm_head.input = constant
        args = gpt2.lm_head.inputs[0][0].save()
        gpt2.transformer.h[1].ln_1.inputs = ((constant * 2,), {})
        first = gpt2.transformer.h[1].ln_1.input.save()
    assert torch.equal(args, constant) and torch.equal(first, constant * 2)


def test_invocations_of_one_batch_each_write_their_own(language_model: LanguageModel) -> None:
    model, path = language_model, block_paths(language_model)[1]
    results = []
    with model.trace() as tracer:
        for factor, prompt in enumerate((SHORT, IDS, OTHER), start=2):
            with tracer.invoke(prompt):
                block = blocks(model)[1]
                block.output = block.output[0] * factor
                results.append(model.lm_head.output.save())
    for factor, prompt in enumerate((SHORT, IDS, OTHER), start=2):
        expected = logits(model, {path: lambda h, factor=factor: h * factor}, prompt)
        assert torch.allclose(results[factor - 2], expected, atol=1e-5)


def test_each_of_several_writes_reaches_the_model_once(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        for block in gpt2.transformer.h:
            block.output = block.output[0] + 1
            block.mlp.input = block.mlp.input * 2
        result = gpt2.lm_head.output.save()
    module, handles = gpt2.module, []
    for block in module.transformer.h:
        handles.append(block.mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,)))
    paths = [f"transformer.h.{i}" for i in range(4)]
    expected = logits(gpt2, {path: lambda h: h + 1 for path in paths}, IDS)
    for handle in handles:
        handle.remove()
    assert torch.equal(result, expected)


def test_what_a_later_line_replaces_is_not_waited_for(gpt2: LanguageModel) -> None:
    with gpt2.trace([1, 2, 3]):
        before = gpt2.transformer.h[0].input
        gpt2.transformer.h[0].output[0] = gpt2.transformer.h[1].input  # comes later
        gpt2.transformer.h[0].output[0] = before
        found = gpt2.transformer.h[1].input.save()

    seen: list[torch.Tensor] = []
    block = gpt2.module.transformer.h[0]
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    gpt2.module(torch.tensor([[1, 2, 3]]))
    handle.remove()
    assert torch.equal(found, seen[0])


class Noting(nn.Module):
    """Stands for a block of a library, which notes what its blocks return."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_librarys_own_hook_notes_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[torch.Tensor] = []

    def note(module: nn.Module, args: object, output: torch.Tensor) -> None:
        noted.append(output)

    def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    note.__module__ = "torch.noting"  # of an installed package, as the module's class is
    monkeypatch.setattr(Noting, "__module__", "torch.noting")
    model = Model(nn.Sequential(Noting(), nn.Identity()))
    block = model[0].module
    block.register_forward_hook(note)
    block.register_forward_hook(double)
    before = list(block._forward_hooks.items())
    with model.trace(torch.zeros(2)):
        arrived = model[0].output.save()
        model[0].output = model[0].output * 5
        end = model.output.save()
    assert arrived.value.tolist() == [2, 2] and end.value.tolist() == [10, 10]
    assert noted[0].tolist() == [10, 10]
    assert list(block._forward_hooks.items()) == before


class _Entries(nn.Module):
    """Returns two tensors, as what it was told to return."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return {0: x, 1: x + 1} if self.kind is dict else self.kind((x, x + 1))


class _Sum(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.entries = _Entries(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entries = self.entries(x)
        return entries[0] * 10 + entries[1]


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_entry_is_written_beside_what_was_written_through_another_name(
    kind: type, in_place: bool
) -> None:
    model, x = Model(_Sum(kind)), torch.tensor([1.0, 3.0])
    with model.trace(x):
        one, other = model.entries.output, model.entries.output
        before = other[0]
        if in_place:
            one[1][:] = 0.0
        else:
            one[1] = one[1] * 0
        other[0] = before * 2
        result = model.output.save()
    assert torch.equal(result, x * 2 * 10)


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("whole", [False, True])
def test_an_entry_that_was_read_before_a_write_can_be_put_back(kind: type, whole: bool) -> None:
    model, x = Model(_Sum(kind)), torch.tensor([1.0, 3.0])
    with model.trace(x):
        one, other = model.entries.output, model.entries.output
        before = other[0]
        if whole:
            model.entries.output = kind((x, x)) if kind is not dict else {0: x, 1: x}
        else:
            one[0] = before * 0
        other[0] = before
        result = model.output.save()
    assert torch.equal(result, x * 10 + x + 1)


class _Parts(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x + 1, x + 2


@pytest.mark.parametrize("seed", range(20))
def test_entries_are_what_was_last_written_to_each(seed: int) -> None:
    choose = random.Random(seed)
    steps = [
        (choose.choice(["assign", "from another", "in place"]), *choose.sample(range(3), 2), number)
        for number in range(12)
    ]
    model, x = Model(nn.Sequential(_Parts())), torch.arange(6.0).view(2, 3)

    def written(entries: Callable[[], Any], earlier: Any) -> None:
        for kind, entry, other, number in steps:
            target = earlier if number % 3 == 0 else entries()
            if kind == "assign":
                target[entry] = entries()[entry] * 2 - number
            elif kind == "from another":
                target[entry] = entries()[other] + number
            else:
                entries()[entry][:, number % 3] += number

    with model.trace(x):
        written(lambda: model[0].output, model[0].output)
        result = [part.save() for part in model.output]
    parts = [x, x + 1, x + 2]
    parts = [part.clone() for part in parts]
    written(lambda: parts, parts)
    assert all(torch.equal(*pair) for pair in zip(result, parts, strict=True))


@pytest.mark.parametrize("seed", range(80))
def test_what_was_taken_out_of_a_tuple_is_a_part_of_it_until_that_is_replaced(seed: int) -> None:
    choose = random.Random(seed)
    kinds = ["assign", "take", "into taken", "into entry", "read", "put back", "assign all"]
    steps = [
        (choose.choice(kinds), number, choose.randrange(3), choose.randrange(9))
        for number in range(16)
    ]
    model, x = Model(nn.Sequential(_Parts())), torch.arange(6.0).view(2, 3)

    def run(
        entries: Callable[[], Any], assign: Callable[[Any], None], keep: Callable[[Any], Any]
    ) -> list[Any]:
        taken, kept = [entries()[0]], list[Any]()
        for kind, number, entry, which in steps:
            one = taken[which % len(taken)]
            if kind == "assign":
                entries()[entry] = one * 2 - number
            elif kind == "take":
                taken.append(entries()[entry])
            elif kind == "into taken":
                one[:, number % 3] += number
            elif kind == "into entry":
                entries()[entry][:, number % 3] *= -1
            elif kind == "put back":  # which changes nothing, whatever is assigned beside it
                taken.append(entries()[entry])
                entries()[(entry + 1) % 3] = entries()[entry] + number
                entries()[entry] = taken[-1]
            elif kind == "assign all":
                assign((entries()[1], entries()[2] + number, one))
            else:
                kept.extend((keep(entries()[entry]), keep(one)))
        return [*kept, *(keep(entries()[entry]) for entry in range(3)), *map(keep, taken)]

    with model.trace(x):

        def write(values: Any) -> None:
            model[0].output = values

        saved = run(lambda: model[0].output, write, lambda value: value.save())
        result = [part.save() for part in model.output]
    parts = [x.clone(), x + 1, x + 2]

    def replace(values: Any) -> None:  # what is assigned is a value of its own
        parts[:] = [value.clone() for value in values]

    right = run(lambda: parts, replace, lambda value: value.clone())
    assert all(torch.equal(*pair) for pair in zip(saved, right, strict=True))
    assert all(torch.equal(*pair) for pair in zip(result, parts, strict=True))


def test_an_entry_that_is_written_often_makes_as_many_nodes_each_time() -> None:
    model = Model(nn.Sequential(_Parts()))

    def nodes(count: int) -> int:
        with model.trace(torch.zeros(2, 3)) as tracer:
            entries = model[0].output
            for number in range(count):
                entries[1][:, number % 3] += 1.0
                entries[0] = entries[0] + 1.0
            saved = model.output.save()
        assert saved[0].unique().tolist() == [count] and saved[1].sum() == 2 * count + 6
        return len(tracer.graph)

    assert nodes(60) < 2.2 * nodes(30)


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["an older name", "a new name"])
def test_an_entry_that_is_put_back_as_it_is_stays_a_part_of_its_tuple(
    kind: type, in_place: bool, name: str
) -> None:
    model, x = Model(_Sum(kind)), torch.tensor([1.0, 3.0])
    with model.trace(x):
        entries = model.entries.output
        if in_place:
            entries[1].add_(1.0)
        taken = entries[0]
        model.entries.output[1] = taken * 0
        if name == "an older name":
            entries[0] = taken
        else:
            model.entries.output[0] = taken
        taken.mul_(2)
        result = model.output.save()
    parts = [x.clone(), x + 1]
    taken, parts[1] = parts[0], x * 0
    parts[0] = taken
    taken.mul_(2)
    assert torch.equal(result, parts[0] * 10 + parts[1])


@dataclasses.dataclass
class _Fields(ModelOutput):
    one: torch.Tensor | None = None
    other: torch.Tensor | None = None


class _OfFields(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return _Fields(x, x + 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_field_that_is_put_back_as_it_is_stays_a_part_of_its_structure(in_place: bool) -> None:
    model, x = Model(nn.Sequential(_OfFields())), torch.tensor([1.0, 3.0])
    with model.trace(x):
        if in_place:
            model[0].output.other.add_(1.0)
        taken = model[0].output.one
        model[0].output["other"] = taken * 0
        model[0].output["one"] = taken
        taken.mul_(2)
        result = [model.output["one"].save(), model.output["other"].save()]
    assert torch.equal(result[0], x * 2) and torch.equal(result[1], x * 0)


def test_an_entry_of_what_stands_for_a_skipped_module_is_augmented_or_refused() -> None:
    model, x = Model(_Sum(tuple)), torch.tensor([1.0, 3.0])
    with model.trace(x):
        model.entries.skip((model.entries.input * 2, model.entries.input * 3))
        model.entries.output[0] += 1.0
        result = model.output.save()
    assert torch.equal(result, (x * 2 + 1) * 10 + x * 3)
    with pytest.raises(OperationError, match="assign a whole new one"), model.trace(x):
        args = model.entries.inputs[0]
        model.entries.skip((args[0] * 2, args[0] * 3))
        model.entries.output[0].add_(1.0)
        model.entries.output[0] = model.entries.output[1]


class _Counted(list[Any]):
    """A list that counts how often something is looked up in it."""

    count = 0

    def __getitem__(self, index: Any) -> Any:
        self.count += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("way", ["beside", "augmented", "two names"])
def test_lines_that_write_entries_look_at_as_many_nodes_each_time(way: str) -> None:
    model = Model(nn.Sequential(_Parts()))

    def looked_up(count: int) -> int:
        with model.trace(torch.zeros(2, 3)):
            entries = model[0].output
            rows = entries._recording.graph.rows = _Counted(entries._recording.graph.rows)
            for _ in range(count):
                if way == "augmented":
                    model[0].output[0] += 1.0
                else:
                    model[0].output[0].add_(1.0)
                    named = entries if way == "two names" else model[0].output
                    named[1] = model[0].output[1] + 1.0
            seen = rows.count
            saved = model.output[0].save()
        assert saved.unique().tolist() == [count]
        return seen

    looked_up(1)
    assert looked_up(200) < 5 * looked_up(50)
