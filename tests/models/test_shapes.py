"""Shapes before the run against what arrives in the run, at every site of every module."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from insitu import LanguageModel, Model, NeverRanError, ShapeError
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65], [1, 2, 3, 4, 5]])


def handles(model: LanguageModel):
    for path in model.modules:
        handle = model
        for part in path.split(".") if path else []:
            handle = handle[int(part)] if part.isdigit() else handle[part]
        yield handle


def sizes(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, dict):
        return {key: sizes(item) for key, item in value.items()}
    return tuple(map(sizes, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": True}, {"output_hidden_states": True}, {"max_new_tokens": 2}]
)
def test_inferred_shapes_are_those_of_the_run(language_model: LanguageModel, options) -> None:
    run = language_model.generate if "max_new_tokens" in options else language_model.trace
    inferred, saved = {}, {}

    class AbandonedError(Exception):
        """Leaves a block whose reads are not all of modules that run."""

    with pytest.raises(AbandonedError), run(IDS, **options):
        for handle in handles(language_model):
            try:
                inferred[handle.path] = handle.output.shape, handle.input.shape, handle.output.dtype
            except NeverRanError:
                continue
        raise AbandonedError
    with run(IDS, **options):
        for handle in handles(language_model):
            if handle.path in inferred:
                saved[handle.path] = handle.output.save(), handle.input.save()
    assert len(saved) > 20
    for path, (output, first) in saved.items():
        assert inferred[path][0] == sizes(output.value), path
        assert inferred[path][1] == sizes(first.value), path


def test_nothing_is_inferred_when_nobody_asks(gpt2: LanguageModel, monkeypatch) -> None:
    monkeypatch.setattr("insitu.models.own_runs.probe", lambda *_: pytest.fail("inferred"))
    with gpt2.trace(IDS):
        (gpt2.transformer.h[0].output[0] + 1).save()


def test_shapes_are_inferred_once_for_a_signature(gpt2: LanguageModel, monkeypatch) -> None:
    import insitu.models.own_runs as module

    calls, probe = [], module.probe
    monkeypatch.setattr(module, "probe", lambda *args: calls.append(1) or probe(*args))
    for _ in range(3):
        with gpt2.trace(IDS):
            for block in gpt2.transformer.h:
                assert block.output[0].shape == (2, 5, 16)
    assert len(calls) == 1
    with gpt2.trace(IDS[:, :3]):
        assert gpt2.lm_head.output.shape == (2, 3, 100)
    assert len(calls) == 2


def test_shapes_need_no_weights(tmp_path) -> None:
    GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=100).save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with pytest.raises(OSError, match="weights"), model.trace([1, 2, 3]):
        hidden = model.transformer.h[-1].output[0]
        assert hidden.shape == (1, 3, 16) and hidden.dtype == torch.float32
        assert (hidden @ hidden.mT).shape == (1, 3, 3)
        assert not model.loaded
        hidden.save()


def test_a_model_that_cannot_run_without_data_says_so() -> None:
    from insitu import Model

    class Decides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    model = Model(torch.nn.Sequential(Decides()))
    with model.trace(torch.ones(2)):
        with pytest.raises(ShapeError, match="cannot be found without running it") as caught:
            _ = model[0].output.shape
        assert __file__ in str(caught.value)
        saved = model[0].output.save()
    assert torch.equal(saved, torch.ones(2))


def test_inference_leaves_a_module_with_two_names_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first
            self.third = nn.Linear(3, 3)
            self.third.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)))

    model = Model(Tied())
    weight, x = model.module.first.weight, torch.randn(2, 3)
    expected = model.module(x)
    with model.trace(x):
        output = model.output.save()
        assert output.shape == (2, 3)
    assert model.module.first.weight is weight
    assert model.module.third.weight is weight
    assert torch.equal(output.value, expected)
