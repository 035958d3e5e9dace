"""Standard names of a model whose weights are not loaded yet."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, DistilBertForMaskedLM, RobertaForMaskedLM

from insitu import LanguageModel
from insitu.engine.dataflow import watch
from insitu.engine.probe import Call
from tests.thinning import sampled

SIZES = {"vocab_size": 100, "max_position_embeddings": 40}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MADE = {
    "bert": (BertForMaskedLM, {**WIDE, "intermediate_size": 40}),
    "roberta": (RobertaForMaskedLM, {**WIDE, "intermediate_size": 40}),
    "distilbert": (
        DistilBertForMaskedLM,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    ),
}


@pytest.mark.parametrize("name", sampled(MADE, ["bert"]))
def test_encoders_have_their_names(name: str, tmp_path: Path) -> None:
    """Some ask in their forward whether there is padding among the tokens."""
    kind, sizes = MADE[name]
    torch.manual_seed(0)
    module = kind(kind.config_class(**SIZES, **sizes)).eval()
    module.save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    assert (model.n_layers, model.n_heads, model.d_model) == (2, 4, 32)
    with model.trace([5, 6, 7]):
        assert model.logits.shape == (1, 3, 100)
        assert not model.loaded
        logits = model.logits.save()
    with torch.no_grad():
        expected = module(torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(logits.value, expected)


class Asking(nn.Module):
    """Wants to know what its tokens say before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids) * (2 if 0 in input_ids else 1)


def test_a_dataflow_on_tensors_without_data_can_follow_tokens() -> None:
    module = Asking()
    call = Call((), {"input_ids": torch.tensor([[1, 2]])})
    parts = dict(module.named_modules())
    with pytest.raises(Exception, match="data-dependent|local_scalar"):
        watch(module, parts, call, fake=True)
    flow = watch(module, parts, call, fake=True, contents=True)
    assert any(event.path == "embedding" for event in flow.events)
