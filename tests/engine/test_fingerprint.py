"""Fingerprints: which models run a job, and what is said of those that do not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from insitu import Job, JobError, LanguageModel, Model
from tests.conftest import tiny_gpt2
from tests.engine.test_job import IDS, a_job, another, received


def seen(*parts: nn.Module) -> Model:
    return Model(nn.Sequential(*parts).eval())


def an_encoder(heads: int, eps: float = 1e-5) -> Model:
    layer = nn.TransformerEncoderLayer(8, heads, batch_first=True, layer_norm_eps=eps)
    return Model(layer.eval())


@pytest.mark.parametrize(
    ("model", "other", "said"),
    [
        (
            lambda: seen(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
            lambda: seen(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.ReLU()),
            "in another order",
        ),
        (
            lambda: seen(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8))),
            lambda: seen(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
            "in another order",
        ),
        (
            lambda: seen(nn.LeakyReLU(0.1)),
            lambda: seen(nn.LeakyReLU(0.2)),
            "slope` is 0.2",
        ),
        (lambda: seen(nn.Softmax(-1)), lambda: seen(nn.Softmax(-2)), "`#.dim` is -2, and not -1"),
        (
            lambda: seen(nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
            lambda: seen(nn.LeakyReLU(0.2), nn.LeakyReLU(0.1)),
            "negative_slope` is '[0.2, 0.1]'",
        ),
        (
            lambda: an_encoder(2),
            lambda: an_encoder(4),
            "num_heads` is 4",
        ),
        (
            lambda: an_encoder(2),
            lambda: an_encoder(2, 0.1),
            "eps` is 0.1",
        ),
        (
            lambda: seen(nn.AvgPool1d(2, padding=1)),
            lambda: seen(nn.AvgPool1d(2)),
            "`#.padding` is '[0]'",
        ),
    ],
)
def test_plain_modules_that_compute_something_else_are_refused(
    model: Callable[[], Model], other: Callable[[], Model], said: str
) -> None:
    made = model()
    with made.trace(torch.ones(1, 4, 8)) as tracer:
        made.output.save("out")
    job = received(tracer.job)
    assert model().run(job)["out"].numel()
    with pytest.raises(JobError, match=re.escape(said)):
        other().run(job)


def test_what_matters_in_training_only_is_no_other_structure() -> None:
    one, other = (seen(nn.Linear(8, 8), nn.Dropout(p)) for p in (0.1, 0.5))
    with one.trace(torch.ones(1, 8)) as tracer:
        one.output.save("out")
    assert not other.run(received(tracer.job)).differences


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**30, -(2**63) - 1, "\ud800", [1, 10**30]])
def test_settings_that_no_message_holds_travel_as_texts(value: Any) -> None:
    model = another(unusual=value)
    assert model.run(a_job(model))["logits"].shape == (1, 4, 100)
    with pytest.raises(JobError, match="`unusual` is 3, and not "):
        another(unusual=3).run(a_job(model))


def test_what_differs_is_said_in_few_characters_that_show(gpt2: LanguageModel) -> None:
    job = a_job(gpt2)
    was = job.model.fingerprint
    long = "\x1b[2J" + "x" * 3000
    kinds = replace(was, kind=long)
    trees = replace(was, tree={**was.tree, "lm_head": long, long: long})
    for found in (kinds, trees, replace(was, dtypes=[long])):
        made = Job(replace(job.model, fingerprint=found), job.blocks)
        try:
            said = "".join(gpt2.run(made).differences)
        except JobError as error:
            said = str(error).partition("\n")[0]
        assert said.isprintable() and 200 < len(said) < 1200, said


def a_classifier(pad: int) -> Model:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, pad_token_id=pad)
    return Model(GPT2ForSequenceClassification(config).eval())


def test_another_token_for_padding_is_reported() -> None:
    model, other = a_classifier(0), a_classifier(5)
    with model.trace(input_ids=torch.tensor([[1, 2, 5, 5]])) as tracer:
        model.output.logits.save("scores")
    job = received(tracer.job)
    assert not a_classifier(0).run(job).differences
    results = other.run(job)
    assert list(results.differences) == ["its `pad_token_id` is 5, and not 0"]
    assert not torch.equal(results["scores"], model.run(job)["scores"])
    assert list(other.check(job).differences) == list(results.differences)


def test_other_defaults_of_generations_are_reported_unless_the_job_says_them() -> None:
    model, other = LanguageModel(tiny_gpt2()), LanguageModel(tiny_gpt2())
    model.module.generation_config.repetition_penalty = 5.0
    other.module.generation_config.min_new_tokens = 1

    def differences(**options: Any) -> list[str]:
        with model.scan(IDS, generate=True, max_new_tokens=2, **options) as tracer:
            model.lm_head.output.save("logits")
        return [*other.run(received(tracer.job)).differences]

    length = "its `generation_config.min_new_tokens` is 1, and not None"
    penalty = "its `generation_config.repetition_penalty` is None, and not 5.0"
    assert sorted(differences()) == [length, penalty]
    assert differences(repetition_penalty=2.0) == [length]
    assert not other.run(a_job(model)).differences  # a trace generates nothing


class OwnTokenizer:
    """A tokenizer of a user's own, that is no key of a dictionary."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]
    vocabulary: Mapping[str, int] = {"a": 0, "b": 1}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> Mapping[str, int]:
        return self.vocabulary

    def __call__(self, text: str) -> Mapping[str, Any]:
        return {"input_ids": [self.vocabulary[letter] for letter in text]}


class NoVocabulary(OwnTokenizer):
    def get_vocab(self) -> Mapping[str, int]:
        raise NotImplementedError


def test_tokenizers_of_ones_own_may_have_a_vocabulary() -> None:
    def a_model(tokenizer: Any) -> LanguageModel:
        return LanguageModel(tiny_gpt2(), tokenizer=tokenizer)

    model, other = a_model(OwnTokenizer()), OwnTokenizer()
    other.vocabulary = {"b": 0, "a": 1}
    with model.trace("ab") as tracer:
        model.lm_head.output.save("logits")
    job = received(tracer.job)
    assert a_model(OwnTokenizer()).run(job)["logits"].shape == (1, 2, 100)
    assert a_model(NoVocabulary()).run(job)["logits"].shape == (1, 2, 100)
    with pytest.raises(JobError, match="tokenizer has another vocabulary"):
        a_model(other).run(job)
