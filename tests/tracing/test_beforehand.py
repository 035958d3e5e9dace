"""Blocks of a model that is not loaded: what does not fit fails before its weights are loaded."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel, ShapeError
from tests.thinning import sampled

TEXT, OTHER = "The Louvre is in the city of", "The Eiffel Tower"


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def whole_output(m: LanguageModel) -> None:
    m.transformer.h[1].mlp.c_fc.output = torch.zeros(1, 7, 511)


def broadcast_that_torch_would_do(m: LanguageModel) -> None:
    m.transformer.ln_f.output = torch.zeros(128)


def hidden_states_alone(m: LanguageModel) -> None:
    m.blocks[2].residual_out = torch.zeros(7, 128)


def one_dimension_less(m: LanguageModel) -> None:
    m.transformer.h[1].mlp.output = m.transformer.h[1].mlp.output[0]


def wrong_dtype(m: LanguageModel) -> None:
    m.blocks[2].residual_out = torch.zeros(1, 7, 128, dtype=torch.float64)


def in_place(m: LanguageModel) -> None:
    m.transformer.h[1].mlp.output[:, -1] = torch.zeros(127)


def added_in_place(m: LanguageModel) -> None:
    m.blocks[3].mlp_out += torch.zeros(2, 7, 128)


def product(m: LanguageModel) -> None:
    (m.transformer.h[1].mlp.output @ torch.zeros(127, 3)).save()


def concatenation(m: LanguageModel) -> None:
    torch.cat([m.blocks[0].residual_out, m.transformer.h[1].mlp.c_fc.output]).save()


def einstein(m: LanguageModel) -> None:
    torch.einsum("btd,de->bte", m.blocks[0].residual_out, torch.zeros(5, 5)).save()


def index_out_of_range(m: LanguageModel) -> None:
    m.logits[0, 7].save()


def axis_out_of_range(m: LanguageModel) -> None:
    m.blocks[0].residual_out.mean(3).save()


def named_in_heads(m: LanguageModel) -> None:
    m.blocks[1].attention.z = torch.zeros(1, 8, 7, 15)


def sum_of_a_view(m: LanguageModel) -> None:
    m.blocks[1].attention.q[:, :, -1] = m.blocks[0].residual_out[:, -1]


def skipped(m: LanguageModel) -> None:
    m.transformer.h[2].skip(torch.zeros(1, 7, 127) + m.transformer.h[1].output[0])


WRONG = [
    *(whole_output, broadcast_that_torch_would_do, hidden_states_alone, one_dimension_less),
    *(wrong_dtype, in_place, added_in_place, product, concatenation, einstein),
    *(index_out_of_range, axis_out_of_range, named_in_heads, sum_of_a_view, skipped),
]


@pytest.mark.parametrize(
    "line", sampled(WRONG, [whole_output, in_place, product, index_out_of_range, named_in_heads])
)
@pytest.mark.parametrize("loaded", sampled([False, True], [False]))
def test_the_line_is_named_and_the_weights_are_not_loaded_for_it(
    model: LanguageModel, line: Callable[[LanguageModel], None], loaded: bool
) -> None:
    if loaded:
        model.load()
    with pytest.raises(ShapeError) as caught, model.trace(TEXT):
        line(model)
        model.logits.save()
    assert model.loaded == loaded
    written = inspect.getsource(line).splitlines()[1].strip()
    assert caught.value.location is not None
    assert caught.value.location.text == written
    with model.trace(TEXT):  # and everything is as it was
        logits = model.logits.save()
    assert torch.equal(logits, model.module(**model.tokenizer(TEXT, return_tensors="pt")).logits)


@pytest.mark.no_wire  # a job runs the other invocation, for which it loads the weights
def test_only_the_line_of_the_invocation_that_is_wrong_is_named(model: LanguageModel) -> None:
    with pytest.raises(ShapeError) as caught, model.trace() as tracer:
        for text, size in ((TEXT, 128), (OTHER, 127), (TEXT, 128)):
            with tracer.invoke(text):
                if size == 128:
                    model.blocks[1].residual_out[:, -1] += torch.zeros(size)
                else:
                    model.blocks[1].residual_out[:, -1] += torch.zeros(size)  # the other
    assert not model.loaded
    assert "# the other" in str(caught.value)


def test_the_first_step_of_a_generation_is_looked_at_too(model: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="# wrong"), model.generate(TEXT, max_new_tokens=3):
        model.transformer.h[1].mlp.output[:, -1] = torch.zeros(127)  # wrong
    assert not model.loaded


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_later_step_fails_at_its_line(model: LanguageModel, step: int) -> None:
    with pytest.raises(ShapeError) as caught, model.generate(TEXT, max_new_tokens=3) as generator:
        with generator.step(step):
            model.blocks[1].residual_out = torch.zeros(1, 7, 128)  # the prompt is seven long
    assert "the prompt is seven long" in str(caught.value)


def fits(m: LanguageModel) -> list[Any]:
    m.blocks[0].residual_out *= 2
    m.blocks[1].residual_out = m.blocks[1].residual_out + torch.ones(128)
    m.blocks[2].attention.z[:, 3] = 0
    m.transformer.h[3].mlp.output[:, -1] = torch.ones(1)
    top = m.logits[0, -1].topk(3)
    chosen = m.blocks[4].residual_out[:, m.logits[0, -1].argmax() % 7]
    large = m.blocks[4].residual_out[m.blocks[4].residual_out > 1].sum()
    return [value.save() for value in (top.values, chosen, large, m.logits.mean((0, 1)))]


def test_what_fits_is_what_it_is_in_a_loaded_model(model: LanguageModel) -> None:
    loaded = LanguageModel("insitu/eiffel")
    loaded.load()
    found = []
    for one in (model, loaded):
        with one.trace(TEXT):
            saved = fits(one)
        found.append(saved)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.value, second.value)


def test_a_dtype_is_left_to_the_run_where_autocast_decides_it(model: LanguageModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), model.trace(TEXT):
        hidden = model.transformer.h[1].mlp.c_fc.output.save()
        model.transformer.h[1].mlp.c_fc.output = torch.zeros(1, 7, 512, dtype=torch.bfloat16)
    assert hidden.value.dtype is torch.bfloat16


@pytest.mark.no_wire
def test_functions_of_the_users_own_are_called_by_the_run_alone(model: LanguageModel) -> None:
    calls = []

    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            calls.append(type(x))
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    with model.trace(TEXT):
        doubled = Mine.apply(model.blocks[1].residual_out)
        (doubled @ torch.ones(128, 3)).save()
    assert calls == [torch.Tensor]


def test_a_module_that_is_called_only_with_data_is_no_mistake(model: LanguageModel) -> None:
    with model.trace(TEXT):
        missing = (model.transformer.ln_f.call(1).output @ torch.zeros(128, 2)).save(optional=True)
        model.logits.save()
    assert missing.value is None


def test_errors_that_are_no_shapes_are_found_as_before(model: LanguageModel) -> None:
    with pytest.raises(InsituError), model.trace(TEXT):
        model.blocks[0].residual_out = model.blocks[1].residual_out * 2
