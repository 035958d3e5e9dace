"""Models that exchange modules of their own in a forward, and those that pad prompts themselves."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from insitu import InsituError, LanguageModel, Model
from insitu.engine.keeping import undisturbed
from insitu.engine.tree import Tree
from tests.thinning import thinned

pytestmark = pytest.mark.filterwarnings("ignore")


class _Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class _Switching(nn.Module):
    """Has another `inner` from its first forward of few rows on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Identity()
        self.after = nn.Linear(3, 3)
        self.switched = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) < 4 and not self.switched:
            self.inner, self.switched = _Doubling(), True
        return self.after(self.inner(x))


@pytest.fixture(scope="module")
def big_bird() -> Any:
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        block_size=4,
        num_random_blocks=1,
        is_decoder=True,
    )
    return transformers.BigBirdForCausalLM._from_config(config).eval()


def test_a_run_that_leaves_no_trace_tells_that_it_exchanged_modules() -> None:
    module = nn.Sequential(_Switching())
    tree, inner = Tree(module), module[0].inner
    with undisturbed(tree):
        module(torch.ones(5, 3))
    assert not tree.exchanges
    with undisturbed(tree):
        module(torch.ones(2, 3))
    assert tree.exchanges and not tree.has_changed()
    assert module[0].inner is inner and not module[0].switched


SHORT = torch.tensor([[11, 22, 33, 44, 55, 66, 77]])
LONG = torch.arange(4, 65)[None]


def _hooked(module: nn.Module, path: str, ids: torch.Tensor, change: Any = None) -> Any:
    """What a module returns in a plain forward, changed by a hook, and the logits."""
    found: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if change is not None:
            first = change(first.clone())
        found["value"] = first.detach()
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        logits = module(ids).logits
    handle.remove()
    return found["value"], logits


def _zero(value: torch.Tensor) -> torch.Tensor:
    value[:, 2] = 0
    return value


@pytest.mark.no_wire  # after the first run the model has another structure
def test_a_module_that_is_exchanged_in_the_first_run_is_read_and_written_in_it() -> None:
    plain = _Switching()
    x = torch.randn(2, 3)
    model = Model(copy.deepcopy(plain))
    with model.trace(x):
        inner = model.inner.output.save()
        model.inner.output[:, 0] = 0
        out = model.output.save()
    expected = 2 * x
    assert torch.equal(inner.value, expected)
    expected = expected.clone()
    expected[:, 0] = 0
    assert torch.equal(out.value, plain.after(expected))


def test_asking_for_a_shape_leaves_the_modules_as_they_are() -> None:
    module = _Switching()
    before, model = module.inner, Model(module)
    with model.scan(torch.ones(2, 3)):
        assert model.inner.output.shape == (2, 3)
    assert module.inner is before and not module.switched


@pytest.mark.thorough
def test_names_of_exchanged_attention_are_there_in_the_block_of_the_first_prompt(
    big_bird: Any,
) -> None:
    model, plain = LanguageModel(copy.deepcopy(big_bird)), copy.deepcopy(big_bird)
    with model.trace(SHORT):
        pattern = model.blocks[1].attention.pattern.save()
        hidden = model.bert.encoder.layer[1].attention.self.output[0].save()
    with torch.no_grad():
        plain(SHORT)
        plain.set_attn_implementation("eager")
        expected, _ = _hooked(plain, "bert.encoder.layer.1.attention.self", SHORT)
        weights = plain(SHORT, output_attentions=True).attentions[1]
    torch.testing.assert_close(hidden.value, expected)
    torch.testing.assert_close(pattern.value, weights)
    assert pattern.shape == (1, 4, 7, 7)
    assert model.n_heads == 4


def test_looking_for_names_does_not_change_what_long_prompts_pass(big_bird: Any) -> None:
    model, plain = LanguageModel(copy.deepcopy(big_bird)), copy.deepcopy(big_bird)
    with pytest.raises(InsituError, match="exchanges modules"):
        _ = model.n_heads
    with pytest.raises(InsituError, match="exchanges modules"), model.trace(LONG):
        model.blocks[0].attention.pattern.save()
    with model.trace(LONG):
        hidden = model.bert.encoder.layer[0].output[0].save()
        model.bert.encoder.layer[0].output[0][:, 2] = 0
        logits = model.output.logits.save()
    expected, changed = _hooked(plain, "bert.encoder.layer.0", LONG, _zero)
    torch.testing.assert_close(logits.value, changed)
    kept = [at for at in range(64) if at != 2]
    torch.testing.assert_close(hidden.value[:, kept], expected[:, kept])
    assert hidden.shape == (1, 64, 64)  # as many as the model has padded it to


@pytest.mark.parametrize("length", [50, 57])
def test_long_prompts_do_not_share_a_pass_that_short_ones_could(big_bird: Any, length: int) -> None:
    model = LanguageModel(copy.deepcopy(big_bird))
    prompts, found = [LONG, LONG[:, :length]], []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                found.append(model.output.logits.save())
    for ids, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(logits.value, copy.deepcopy(big_bird)(ids).logits)


@pytest.mark.no_wire  # the model stays as the first of two runs leaves it
def test_prompts_that_pass_different_modules_are_refused_in_one_block(big_bird: Any) -> None:
    model = LanguageModel(copy.deepcopy(big_bird))
    with pytest.raises(InsituError, match="block of its own"), model.trace() as tracer:
        for ids in (SHORT, LONG):
            with tracer.invoke(ids):
                model.output.logits.save()


def _longformer() -> tuple[Any, str]:
    config = transformers.LongformerConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_window=[8, 8],
        max_position_embeddings=130,
        pad_token_id=1,
    )
    made = transformers.LongformerForMaskedLM._from_config(config)
    return made, "longformer.encoder.layer.0"


def _led() -> tuple[Any, str]:
    config = transformers.LEDConfig(
        vocab_size=131,
        d_model=64,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        attention_window=[8, 8],
        max_encoder_position_embeddings=128,
    )
    return transformers.LEDForConditionalGeneration._from_config(config), "led.encoder.layers.1"


@pytest.mark.thorough
@pytest.mark.parametrize("make", thinned([_longformer, _led], [_led]))
def test_values_of_a_model_that_pads_prompts_itself_are_those_of_hooks_or_refused(
    make: Any,
) -> None:
    torch.manual_seed(0)
    module, path = make()
    module.eval()
    for lengths in ((13,), (8, 5), (13, 29), (5, 8, 16)):
        prompts = [torch.randint(4, 130, (1, length)) for length in lengths]
        model, found = LanguageModel(module), []
        try:
            with model.trace() as tracer:
                for ids in prompts:
                    with tracer.invoke(ids):
                        site: Any = model
                        for part in path.split("."):
                            site = site[int(part)] if part.isdigit() else getattr(site, part)
                        found.append(site.output[0].save())
        except InsituError as error:
            assert len(lengths) > 1 and "Give each prompt a block of its own" in str(error)
            continue
        for ids, value in zip(prompts, found, strict=True):
            torch.testing.assert_close(value.value, _hooked(module, path, ids)[0])
