"""Models that process a prompt in pieces: padding that changes these keeps prompts apart."""

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from insitu import LanguageModel
from insitu.models.pieces import lengths_of
from tests.conftest import tiny_gpt2

PIECE = 16


class InPieces(nn.Module):
    """An MLP whose values depend on how many pieces there are, as a fault may make them."""

    def __init__(self, inner: nn.Module, leaks: bool) -> None:
        super().__init__()
        self.inner, self.leaks, self.chunk_size = inner, leaks, PIECE

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        made = self.inner(hidden)
        count = -(-hidden.shape[1] // self.chunk_size)
        if not self.leaks or count < 2:
            return made
        return made * (1 + count)


def model_of(leaks: bool) -> tuple[GPT2LMHeadModel, LanguageModel]:
    module = tiny_gpt2()
    module.transformer.h[1].mlp = InPieces(module.transformer.h[1].mlp, leaks)
    return module.eval(), LanguageModel(module)


def logits_of(model: LanguageModel, lengths: list[int]) -> tuple[list, int]:
    found = []
    with model.trace() as tracer:
        for length in lengths:
            with tracer.invoke(torch.arange(1, length + 1)[None]):
                found.append(model.lm_head.output.save())
    return found, len(tracer.plan.passes)


@pytest.mark.parametrize(
    ("leaks", "lengths", "passes"),
    [
        (False, [5, 17, 30], 1),
        (True, [5, 16, 3], 1),  # all within a piece
        pytest.param(True, [5, 17, 30, 17], 3, marks=pytest.mark.thorough),
    ],
)
def test_each_prompt_has_what_it_has_alone(leaks: bool, lengths: list[int], passes: int) -> None:
    module, model = model_of(leaks)
    found, count = logits_of(model, lengths)
    assert count == passes
    for length, logits in zip(lengths, found, strict=True):
        with torch.no_grad():
            expected = module(torch.arange(1, length + 1)[None], use_cache=False).logits
        torch.testing.assert_close(logits.value, expected)


def test_a_list_of_prompts_longer_than_a_piece_is_warned_of() -> None:
    _, model = model_of(True)
    model.load()
    with pytest.warns(UserWarning, match="pieces .* depend on the longest row"):
        with model.trace([[*range(1, 6)], [*range(1, 21)]]):
            model.lm_head.output.save()


def test_what_is_tried_leaves_the_model_as_it_was() -> None:
    module, model = model_of(True)
    assert lengths_of(model).pieces == PIECE
    assert module.transformer.h[1].mlp.chunk_size == PIECE


def test_pieces_that_hide_padding_keep_nobody_apart() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, chunk_size=4,
        n_groups=1, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LanguageModel(Mamba2ForCausalLM(config).eval())
    found = []
    with model.trace() as tracer:
        for length in (7, 12, 5):
            with tracer.invoke(torch.arange(3, length + 3)[None]):
                found.append(model.lm_head.output.save())
    assert len(tracer.plan.passes) == 1
    assert lengths_of(model).pieces == 0
