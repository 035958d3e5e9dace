"""Options that mean nothing are errors, and those that the model documents pass."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from insitu import LanguageModel, Model, OptionError
from insitu.graph.errors import PromptTypeError
from insitu.models.options import forward_options
from tests.conftest import tiny_gpt2, tiny_llama
from tests.models.kinds import bert, t5, vit

IDS = torch.tensor([[5, 6, 7]])


def mamba() -> Any:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config).eval()


CAUSAL = {"gpt2": tiny_gpt2, "llama": tiny_llama, "mamba": mamba}
OTHERS = {"bert": bert, "t5": t5}


def traced(model: LanguageModel, **options: Any) -> None:
    with model.trace(IDS, **options):
        pass


def by_invocations(model: LanguageModel, **options: Any) -> None:
    with model.trace(**options) as tracer:
        tracer.invoke(IDS)


def invoked(model: LanguageModel, **options: Any) -> None:
    with model.trace() as tracer:
        try:
            tracer.invoke(IDS, **options)
        finally:
            tracer.invoke(IDS)


def scanned(model: LanguageModel, **options: Any) -> None:
    with model.scan(IDS, **options):
        pass


def cached(model: LanguageModel, **options: Any) -> None:
    model.run_with_cache(IDS, "logits", **options)


def in_a_session(model: LanguageModel, **options: Any) -> None:
    with model.session(), model.trace(IDS, **options):
        pass


def generated(model: LanguageModel, **options: Any) -> None:
    with model.generate(IDS, max_new_tokens=1, **options):
        pass


WAYS = (traced, by_invocations, invoked, scanned, cached, in_a_session)


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
@pytest.mark.parametrize("way", [*WAYS, generated])
def test_what_means_nothing_is_an_error_at_the_line(way: Any, name: str) -> None:
    model = LanguageModel({**CAUSAL, **OTHERS}[name]())
    if way is generated and name == "bert":
        return
    for option, meant in (
        ("remote", ""),
        ("stop_at_layer", ""),
        ("prepend_bos", ""),
        ("share_prefixs", "'share_prefixes'"),
        ("max_token_per_pass", "'max_tokens_per_pass'"),
        ("attention_msk", "'attention_mask'"),
        ("output_hidden_state", "'output_hidden_states'"),
        ("hidden_states", ""),  # an argument of layers, which their callers give them
        ("device_map", "where the model is made"),
    ):
        with pytest.raises(OptionError, match=f"`{option}`") as caught:
            way(model, **{option: 1})
        assert meant in str(caught.value) and __file__ in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", ["max_new_tokens", "temperature", "num_beams"])
def test_what_belongs_to_a_generation_says_so(way: Any, option: str) -> None:
    with pytest.raises(OptionError, match="is an option of `generate`"):
        way(LanguageModel(tiny_llama()), **{option: 2})


@pytest.mark.parametrize("option", ["share_prefixes"])
def test_what_belongs_to_a_trace_says_so(option: str) -> None:
    with pytest.raises(OptionError, match="is an option of `trace`"):
        generated(LanguageModel(tiny_gpt2()), **{option: 2})


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True},
        {"labels": IDS}, {"attention_mask": torch.ones_like(IDS)}, {"share_prefixes": False},
        {"max_tokens_per_pass": 100}, {"attn_implementation": "eager"},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_forward_documents_passes(name: str, options: dict[str, Any]) -> None:
    traced(LanguageModel(CAUSAL[name]()), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}, {"num_beams": 2},
        {"eos_token_id": None}, {"repetition_penalty": 1.2}, {"min_new_tokens": 1},
        {"output_scores": True, "return_dict_in_generate": True}, {"bad_words_ids": [[3]]},
        {"logits_processor": []}, {"output_attentions": True}, {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True}, {"attention_mask": torch.ones_like(IDS)},
        {"max_length": 10}, {"suppress_tokens": [4]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_generate_documents_passes(options: dict[str, Any]) -> None:
    model = LanguageModel(tiny_llama())
    with model.generate(IDS, **{"max_new_tokens": 1, **options}):
        pass


def test_an_option_does_what_it_does_in_a_plain_forward() -> None:
    model = LanguageModel(tiny_llama())
    with model.trace(IDS, labels=IDS, logits_to_keep=0, output_hidden_states=True) as tracer:
        loss = tracer.output["loss"].save()
        hidden = tracer.output["hidden_states"][-1].save()
    with torch.no_grad():
        expected = model.module(IDS, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(loss.value, expected.loss)
    torch.testing.assert_close(hidden.value, expected.hidden_states[-1])


class Plain(nn.Module):
    """Takes what it names and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return self.layer(x) * scale + shift


class Ignoring(Plain):
    """Takes anything and drops it."""

    def forward(self, x: torch.Tensor, scale: float = 1.0, **kwargs: Any) -> torch.Tensor:
        return self.layer(x) * scale


class Passing(Plain):
    """Passes on what it does not name."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(x, **kwargs)


@pytest.mark.parametrize("kind", [Plain, Ignoring])
def test_a_plain_module_takes_what_its_forward_uses(kind: Any) -> None:
    model, x = Model(kind()), torch.ones(2, 3)
    with model.trace(x, scale=2.0):
        found = model.layer.output.save()
    torch.testing.assert_close(found.value, model.module.layer(x).detach())
    for block in (model.trace, model.scan):
        with pytest.raises(OptionError, match=r"takes no `scal` \(nearest: 'scale'\)"):
            with block(x, scal=2.0):
                pass
    with model.trace() as tracer:
        with pytest.raises(OptionError, match="takes no `max_tokens_per_pass`"):
            tracer.invoke(x, max_tokens_per_pass=2)
        tracer.invoke(x=x)


def test_a_plain_module_that_passes_on_what_it_is_given_decides_by_itself() -> None:
    model, x = Model(Passing()), torch.ones(2, 3)
    with model.trace(x, shift=3.0):
        found = model.output.save()
    torch.testing.assert_close(found.value, model.module(x, shift=3.0).detach())


def test_a_wrapped_transformers_module_takes_what_it_documents() -> None:
    model = Model(vit())
    pixels = torch.zeros(1, 3, 8, 8)
    with model.trace(pixel_values=pixels, output_hidden_states=True):
        pass
    with pytest.raises(OptionError, match="takes no `pixel_value` .nearest: 'pixel_values'"):
        with model.trace(pixel_value=pixels):
            pass


def test_nothing_is_known_of_a_module_that_may_do_anything_with_its_arguments() -> None:
    assert forward_options(Passing()) is None
    assert forward_options(Ignoring()) == {"x", "scale"}


@pytest.mark.parametrize("option", ["remote", "share_prefixes", "max_new_tokens", "foo"])
def test_a_session_and_an_edit_take_no_such_options(option: str) -> None:
    model = LanguageModel(tiny_gpt2())
    for method in (model.session, model.edit):
        asks = option == "remote" and method == model.session
        said = "`remote` is the URL" if asks else f"has no option `{option}`"
        with pytest.raises(OptionError, match=said) as caught:
            method(**{option: True})
        assert "test_options.py" in str(caught.value)


@pytest.mark.parametrize("seed", [True, 1.5, "1", 2**63])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(PromptTypeError, match="`seed` is an integer"):
        traced(LanguageModel(tiny_gpt2()), seed=seed)
