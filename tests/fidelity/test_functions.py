"""Modules as functions, Python functions, and control flow, against plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from insitu import (
    InsituError,
    LanguageModel,
    Model,
    OperationError,
    ShapeError,
    apply,
    cond,
    fold,
)
from tests.conftest import hooked_hidden
from tests.fidelity.test_writing import IDS, OTHER, block_paths, blocks, logits


def norm_of(model: LanguageModel) -> tuple[Any, nn.Module]:
    """The handle and the module of the last norm."""
    if "transformer" in dir(model):
        return model.transformer.ln_f, model.module.transformer.ln_f
    return model.model.norm, model.module.model.norm


def test_modules_of_the_model_are_functions(language_model: LanguageModel) -> None:
    model, (norm, norm_module) = language_model, norm_of(language_model)
    with model.trace(IDS):
        lens = model.lm_head(norm(blocks(model)[1].output[0])).save()
        own = model.lm_head.output.save()
        with_sites = norm.output.save()
    hidden = hooked_hidden(model.module, block_paths(model)[1], IDS)
    with torch.no_grad():
        assert torch.equal(lens, model.module.lm_head(norm_module(hidden)))
        last = hooked_hidden(model.module, block_paths(model)[-1], IDS)
        assert torch.equal(with_sites, norm_module(last))  # and not what it was applied to
    assert torch.equal(own, logits(model, {}, IDS))


def test_what_a_module_returns_has_a_shape_and_can_be_written(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        mlp = gpt2.transformer.h[1].mlp(gpt2.transformer.h[0].output[0])
        assert mlp.shape == (1, 6, 16)
        gpt2.transformer.h[2].output = mlp
        result = gpt2.lm_head.output.save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.0", IDS)
    with torch.no_grad():
        expected = gpt2.module.transformer.h[1].mlp(hidden)
    assert torch.equal(result, logits(gpt2, {"transformer.h.2": lambda _: expected}, IDS))
    assert not any("forward" in vars(part) for part in gpt2.module.modules())


def test_a_module_before_its_weights_are_there(eiffel: LanguageModel) -> None:
    with eiffel.trace("The Eiffel Tower"):
        lens = eiffel.lm_head(eiffel.transformer.ln_f(eiffel.transformer.h[0].output[0]))
        assert lens.shape[-1] == eiffel.config.vocab_size and not eiffel.loaded
        value = lens.save()
    module = eiffel.load()
    ids = eiffel.tokenizer("The Eiffel Tower", return_tensors="pt").input_ids
    hidden = hooked_hidden(module, "transformer.h.0", ids)
    with torch.no_grad():
        assert torch.equal(value, module.lm_head(module.transformer.ln_f(hidden)))


def test_modules_of_the_users_own(gpt2: LanguageModel) -> None:
    torch.manual_seed(0)
    probe = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))

    class AutoEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(16, 32)
            self.decode = nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = F.relu(self.encode(x - self.decode.bias))
            return self.decode(features), features

    sae = AutoEncoder()
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        scores = probe(hidden).save()
        rebuilt, features = sae(hidden)
        features = features.save()
        gpt2.transformer.h[1].output = rebuilt
        result = gpt2.lm_head.output.save()
    before = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    with torch.no_grad():
        assert torch.equal(scores, probe(before))
        expected, expected_features = sae(before)
    assert torch.equal(features, expected_features)
    assert torch.equal(result, logits(gpt2, {"transformer.h.1": lambda _: expected}, IDS))


def test_any_function_can_be_applied(gpt2: LanguageModel) -> None:
    def ranks(x: torch.Tensor, *, places: int) -> list[list[int]]:
        return [[int(i) for i in row.argsort()[:places]] for row in x]

    module = nn.GRU(16, 4, batch_first=True)
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[2].output[0]
        found = apply(ranks, hidden[0], places=3).save()
        states = apply(module, hidden)[0].save()
        whole = apply(len, gpt2.transformer.h[2].output).save()
    value = hooked_hidden(gpt2.module, "transformer.h.2", IDS)
    assert found.value == ranks(value[0], places=3) and whole.value == 1
    with torch.no_grad():
        assert torch.equal(states, module(value)[0])


def test_a_function_that_fails_is_reported_at_its_line(gpt2: LanguageModel) -> None:
    def fails(x: torch.Tensor) -> None:
        raise KeyError("nothing there")

    with pytest.raises(InsituError, match=r"fails\(lm_head.output\).*nothing there") as caught:
        with gpt2.trace(IDS):
            apply(fails, gpt2.lm_head.output)  # the line to find
    assert "the line to find" in str(caught.value)
    with pytest.raises(ShapeError, match="Python function"), gpt2.trace(IDS):
        print(apply(fails, gpt2.lm_head.output).shape)
    with pytest.raises(OperationError, match="No argument of"):
        apply(len, [1])
    with pytest.raises(OperationError, match="No argument of"), gpt2.trace(IDS):
        gpt2.lm_head(torch.zeros(1, 6, 16))


@pytest.mark.parametrize("ids", [IDS, OTHER])
def test_a_value_decides_between_two_functions(gpt2: LanguageModel, ids: torch.Tensor) -> None:
    with gpt2.trace(ids):
        hidden, other = gpt2.transformer.h[1].output[0], gpt2.transformer.h[0].output[0]
        pred = hidden[0, 0, 0] > hidden[0, 0, 1]
        changed = cond(pred, lambda h: h * 2, lambda h: h - other, hidden)
        assert changed.shape == (1, 6, 16)
        gpt2.transformer.h[1].output = changed
        result = gpt2.lm_head.output.save()
    before = hooked_hidden(gpt2.module, "transformer.h.0", ids)

    def edit(h: torch.Tensor) -> torch.Tensor:
        return h * 2 if h[0, 0, 0] > h[0, 0, 1] else h - before

    assert torch.equal(result, logits(gpt2, {"transformer.h.1": edit}, ids))


def test_decisions_inside_decisions_and_containers() -> None:
    model = Model(nn.Identity())

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        if x[0] > 0:
            return (x * 2, {"sign": 1}) if x[1] > 0 else (x * 3, {"sign": 2})
        return x, {"sign": 3}

    def recorded(y: Any) -> Any:
        three = y * 3

        def positive(a: Any) -> Any:
            both = (lambda b: (b * 2, {"sign": 1}), lambda b: (three, {"sign": 2}))
            return cond(y[1] > 0, *both, a)

        return cond(y[0] > 0, positive, lambda a: (a, {"sign": 3}), y)

    for values in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0)):
        x = torch.tensor(values)
        with model.trace(x) as tracer:
            found = recorded(tracer.output)
            value, sign = found[0].save(), found[1]["sign"].save()
        expected, info = plain(x)
        assert torch.equal(value, expected) and sign.value == info["sign"]


def test_a_loop_over_values(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden, scale = gpt2.transformer.h[1].output[0], gpt2.transformer.h[0].output[0].mean()
        total = fold(lambda carry, x: carry * 0.5 + x * scale, torch.zeros(16), hidden[0])
        assert total.shape == (16,)
        pair = fold(
            lambda carry, x: {"sum": carry["sum"] + x, "count": carry["count"] + 1},
            {"sum": 0.0, "count": 0},
            [hidden.sum(), hidden.mean(), 2.0],
        )
        value, count, summed = total.save(), pair["count"].save(), pair["sum"].save()
    h = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    factor = hooked_hidden(gpt2.module, "transformer.h.0", IDS).mean()
    expected = torch.zeros(16)
    for x in h[0]:
        expected = expected * 0.5 + x * factor
    assert torch.equal(value, expected) and count.value == 3
    assert torch.equal(summed.value, 0.0 + h.sum() + h.mean() + 2.0)


def test_writes_in_place_inside_a_function_stay_inside() -> None:
    model, x = Model(nn.Identity()), torch.tensor([1.0, 2.0])

    def zeroed(h: Any) -> Any:
        h[0] = 0
        return h

    with model.trace(x) as tracer:
        inside = cond(tracer.output.sum() > 0, zeroed, lambda h: h, tracer.output).save()
        outside = tracer.output.save()
    assert inside.value.tolist() == [0.0, 2.0] and outside.value.tolist() == [1.0, 2.0]
    assert x.tolist() == [1.0, 2.0]


def test_gradients_go_through_control_flow(gpt2: LanguageModel) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        loss = cond(hidden.sum() > -1e9, lambda h: (h * scale).sum(), lambda h: h.sum(), hidden)
        grad = hidden.grad.save()
        loss.backward()
    assert torch.equal(grad, torch.full((1, 6, 16), 2.0))
    value = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    assert scale.grad is not None and torch.allclose(scale.grad, value.sum(), atol=1e-4)


def test_what_control_flow_cannot_do_is_refused_at_its_line(gpt2: LanguageModel) -> None:
    with pytest.raises(OperationError, match="nothing is written") as caught, gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]

        def write(h: Any) -> Any:
            gpt2.transformer.h[1].output = h  # the line to find
            return h

        cond(hidden.sum() > 0, write, lambda h: h, hidden)
    assert "the line to find" in str(caught.value)
    with pytest.raises(OperationError, match=r"insitu\.cond"), gpt2.trace(IDS):
        if gpt2.lm_head.output.sum() > 0:
            pass
    with pytest.raises(ShapeError, match="depends on values"), gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        print(cond(hidden.sum() > 0, lambda h: h, lambda h: h[0], hidden).shape)
    with gpt2.trace(IDS):
        after = gpt2.lm_head.output.save()
    assert torch.equal(after, logits(gpt2, {}, IDS))


def _lines_that_change_what_is_around(model: LanguageModel) -> dict[str, Any]:
    layer = model.transformer.h[2]

    def part_of_a_site(h: Any) -> Any:
        layer.output[0][:] = 0
        return h

    def site_in_place(h: Any) -> Any:
        layer.mlp.output.zero_()
        return h

    def by_operator(h: Any) -> Any:
        value = layer.mlp.output
        value += 1  # of `layer.`
        return h

    def site(h: Any) -> Any:
        layer.output = h
        return h

    def entry(h: Any) -> Any:
        layer.output[0] = h
        return h

    def skipped(h: Any) -> Any:
        layer.mlp.skip(h)
        return h

    def stopped(h: Any) -> Any:
        layer.stop()
        return h

    def saved(h: Any) -> Any:
        layer.mlp.output.save()
        return h

    def asked(h: Any) -> Any:
        return h * float(layer.mlp.output.value.sum())

    return {
        name: function
        for name, function in locals().items()
        if callable(function) and function is not model and name not in ("layer", "model")
    }


NAMES = (
    *("part_of_a_site", "site_in_place", "by_operator", "site", "entry", "skipped", "stopped"),
    *("saved", "asked"),
)


@pytest.mark.parametrize("name", NAMES)
def test_functions_change_nothing_around_them(gpt2: LanguageModel, name: str) -> None:
    function = _lines_that_change_what_is_around(gpt2)[name]
    for decide in (
        lambda h: cond(h.sum() > 0, function, lambda h: h, h),
        lambda h: fold(lambda carry, _: function(carry), h, [1, 2]),
    ):
        with pytest.raises(OperationError, match=r"Functions of `cond`.*outside") as caught:
            with gpt2.trace(IDS):
                decide(gpt2.transformer.h[1].output[0]).save()
        location = caught.value.location
        assert location is not None and location.file == __file__
        assert "layer." in location.text


def test_values_around_a_function_are_not_written_in_place(gpt2: LanguageModel) -> None:
    with pytest.raises(OperationError, match="nothing is written") as caught, gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]

        def zeroed() -> Any:
            hidden[:, 0] = 0  # the line to find
            return hidden

        cond(hidden.sum() > 0, zeroed, lambda: hidden).save()
    assert "the line to find" in str(caught.value)
    with pytest.raises(OperationError, match="nothing is written") as caught, gpt2.trace(IDS):
        values = [gpt2.transformer.h[1].output[0]]

        def added() -> Any:
            values[0] += 1  # the line to find
            return values[0]

        cond(values[0].sum() > 0, added, lambda: values[0]).save()
    assert "the line to find" in str(caught.value)


def test_the_line_that_writes_by_a_decision_does_so(gpt2: LanguageModel) -> None:
    def doubled(h: Any) -> Any:
        own = h.clone()
        own *= 2  # a copy can be changed inside
        return own

    for sign in (1, -1):
        with gpt2.trace(IDS):
            module = gpt2.transformer.h[1].mlp
            pred = gpt2.transformer.h[0].output[0].sum() * sign > 0
            module.output = cond(pred, doubled, lambda h: h * 3, module.output)
            result = gpt2.lm_head.output.save()
        total = hooked_hidden(gpt2.module, "transformer.h.0", IDS).sum() * sign
        factor = 2 if total > 0 else 3
        expected = logits(gpt2, {"transformer.h.1.mlp": lambda h, by=factor: h * by}, IDS)
        assert torch.equal(result, expected)
