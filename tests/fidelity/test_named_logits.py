"""What is at a model's ends by name, on every architecture: embeddings, unembeddings and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu import PathError
from tests.fidelity.named import close, kept, opened, plain_forward, tapped
from tests.fidelity.zoo import VOCABULARY, ZOO
from tests.fidelity.zoo.absent import having, lacking

pytestmark = pytest.mark.no_wire  # what is sent does not depend on the architecture

GENERATING = [name for name, one in ZOO.items() if one.generates]


@pytest.mark.parametrize("name", having("W_E"))
def test_tokens_are_embedded_and_unembedded_with_these_weights(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(4, 7)
    embedding = model.module.get_input_embeddings()
    assert torch.equal(model.W_E, embedding.weight)
    assert model.W_E.shape == (VOCABULARY, 16) and model.W_U.shape == (16, VOCABULARY)
    head = model.module.get_output_embeddings()
    with tapped({"head": head}) as seen, torch.no_grad():
        model.module(**inputs)
    (given,), (made,) = seen["head", "input"], seen["head", "output"]
    bias: Any = 0 if head.bias is None else head.bias.detach()
    close(given @ model.W_U + bias, made, name)


@pytest.mark.parametrize("name", lacking("W_E"))
def test_without_tokens_there_are_no_weights_of_their_embedding(name: str) -> None:
    for key, match in (("W_E", "no embedding of tokens"), ("W_U", "no unembedding")):
        with pytest.raises(PathError, match=f"has no `{key}`: this model has {match}"):
            getattr(kept(name), key)


@pytest.mark.parametrize("name", lacking("logits"))
def test_a_model_that_gives_no_logits_says_so(name: str) -> None:
    with pytest.raises(PathError, match="has no `logits`: a .* gives no logits"):
        with opened(kept(name), name, ZOO[name].inputs()):
            kept(name).logits.save()


@pytest.mark.parametrize("name", having("logits"))
def test_logits_are_read_and_written(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    with torch.no_grad():
        expected = plain_forward(name, inputs)
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    for form in ("assigned", "in place", "a part"):
        changed = expected.clone()
        with opened(model, name, inputs):
            before = model.logits.clone().save()
            if form == "assigned":
                model.logits = noise
                changed = noise
            elif form == "in place":
                model.logits[:] += noise
                changed += noise
            else:
                model.logits[:, -1] = 3
                changed[:, -1] = 3
            after, returned = model.logits.save(), model.output["logits"].save()
        assert torch.equal(before.value, expected), form
        assert torch.equal(after.value, changed), form
        assert torch.equal(returned.value, changed), form


@pytest.mark.parametrize("name", GENERATING)
def test_a_token_that_is_written_into_logits_is_the_next(name: str) -> None:
    model, ids = kept(name), ZOO[name].inputs(1, 7)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = iter((None, 42, None, 17))

    def choose(logits: torch.Tensor) -> torch.Tensor:
        token = next(tokens)
        if token is None:
            return logits
        changed = logits.clone()
        changed[:, -1, token] = 1e6
        return changed

    head = model.module.get_output_embeddings()
    with tapped({"head": head}, after={"head": choose}):
        expected = model.module.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **options
        )
    with model.generate(ids, **options) as generator:
        for step in generator.steps:
            if step in (1, 3):
                model.logits[:, -1, {1: 42, 3: 17}[step]] = 1e6
    assert torch.equal(generator.output, expected)
    assert generator.output[0, -3] == 42 and generator.output[0, -1] == 17
