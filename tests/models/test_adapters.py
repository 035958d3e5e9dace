"""Adapters of PEFT, in folders and in memory, against PEFT itself."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM

from insitu import LanguageModel, LoadError, Model
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import tiny_mixtral, tiny_opt
from tests.models.kinds import outputs_of, ready, vit
from tests.thinning import sampled

# PEFT's own: of a name that Transformers has changed, of what a learnt prompt makes of positions,
# and of a model that PEFT cannot look up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

IDS = torch.tensor([[3, 14, 15, 92, 65]])
TASK = {"task_type": "CAUSAL_LM"}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, **TASK)
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK)
PROMPT = PromptTuningConfig(num_virtual_tokens=3, **TASK)
PREFIX = PrefixTuningConfig(num_virtual_tokens=3, **TASK)
LAYER = "base_model.model.model.layers.1"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    module = tiny_llama()
    module.config.eos_token_id = module.generation_config.eos_token_id = None
    module.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, config: PeftConfig = LORA) -> Any:
    """A model of PEFT whose adapter does something."""
    config = copy.deepcopy(config)  # PEFT writes into it
    module = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(kind in name for kind in ("lora", "ia3", "prompt_encoder")):
                parameter.normal_()
    return module


def run(module: Callable[..., Any], **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(**kwargs)


def logits_of(module: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return run(module, input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("config", sampled([LORA, IA3], [IA3]), ids=["lora", "ia3"])
def test_a_folder_with_an_adapter_is_its_model_with_the_adapter(
    tmp_path: Path, base: Path, config: PeftConfig
) -> None:
    peft = adapted(base, config)
    peft.save_pretrained(tmp_path / "adapter")
    model = LanguageModel(tmp_path / "adapter")
    assert not model.loaded
    paths = list(model.modules)
    with model.trace(IDS):
        assert model.model.layers[1].output[0].shape == (1, 5, 16)
        hidden, logits = model.model.layers[1].output[0].save(), model.lm_head.output.save()
    assert list(model.modules) == paths and not model.is_training
    assert torch.equal(logits.value, logits_of(peft))
    assert not torch.allclose(logits.value, logits_of(AutoModelForCausalLM.from_pretrained(base)))
    assert torch.equal(hidden.value, outputs_of(peft, LAYER, peft, input_ids=IDS)[0])
    with model.generate(IDS, max_new_tokens=4) as generator:
        pass
    assert torch.equal(generator.output, run(peft.generate, input_ids=IDS, max_new_tokens=4))


def test_the_layers_of_an_adapter_are_read_and_written(tmp_path: Path, base: Path) -> None:
    peft = adapted(base)
    peft.save_pretrained(tmp_path / "adapter")
    model = LanguageModel(tmp_path / "adapter")
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default"
    with model.trace(IDS):
        added = model.model.layers[0].self_attn.q_proj.lora_B.default.output
        assert added.shape == (1, 5, 16)
        added = added.save()
    assert torch.equal(added.value, outputs_of(peft, path, peft, input_ids=IDS)[0])
    with model.generate(IDS, max_new_tokens=4) as generator:
        with generator.every_step():
            for layer in model.model.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                    part.lora_B.default.output[:] = 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(generator.output, run(plain.generate, input_ids=IDS, max_new_tokens=4))


# From a folder Transformers itself puts what is no prompt into the layers: that is tested above.
AS_PEFT_SHOWS = [
    *[("memory", config) for config in (LORA, IA3, PROMPT, PREFIX)],
    *[("folder", config) for config in (PROMPT, PREFIX)],
]


@pytest.mark.parametrize(
    ("place", "config"), AS_PEFT_SHOWS, ids=lambda one: getattr(one, "peft_type", one)
)
def test_a_model_of_peft_is_as_peft_shows_it(
    tmp_path: Path, base: Path, config: PeftConfig, place: str
) -> None:
    peft = adapted(base, config)
    if place == "folder":
        peft.save_pretrained(tmp_path / "adapter")
        model = LanguageModel(tmp_path / "adapter")
        paths = [path for path, _ in peft.named_modules(remove_duplicate=False)]
        assert not model.loaded and list(model.modules) == paths
    else:
        model = LanguageModel(peft)
        assert model.module is peft
    with model.trace(IDS):
        logits = model.output.logits
        shape = logits.shape
        logits = logits.save()
    assert torch.equal(logits.value, logits_of(peft)) and shape == logits.shape
    kwargs = {"input_ids": IDS, "max_new_tokens": 4}
    with model.generate(IDS, max_new_tokens=4) as generator:
        with generator.every_step():
            tokens, logits = generator.tokens().save(), generator.logits().save()
    plain = run(peft.generate, attention_mask=torch.ones_like(IDS), **kwargs)
    assert torch.equal(generator.output, plain)
    assert torch.equal(torch.stack(tokens.value, 1), plain[:, 5:])
    path = "base_model.lm_head" if config.is_prompt_learning else "base_model.model.lm_head"
    head = outputs_of(peft, path, peft.generate, **kwargs)
    assert all(torch.equal(own, seen[:, -1]) for own, seen in zip(logits.value, head, strict=True))


@pytest.mark.parametrize(
    "config", sampled([LORA, PROMPT, PREFIX], [LORA, PREFIX]), ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("mode", sampled(["trace", "generate"], ["trace"]))
def test_invocations_see_nothing_of_each_other(base: Path, config: PeftConfig, mode: str) -> None:
    peft = adapted(base, config)
    model = LanguageModel(peft)
    prompts = [IDS, IDS[:, :3], torch.tensor([[7, 8, 9, 10, 11, 12, 13]])]
    block = model.base_model if config.is_prompt_learning else model.base_model.model
    options = {} if mode == "trace" else {"max_new_tokens": 3}
    saved, invokers = [], []
    with getattr(model, mode)(**options) as tracer:
        for ids in prompts:
            with tracer.invoke(ids) as invoker:
                saved.append(block.model.layers[1].output[0].save())
                invokers.append(invoker)
    for ids, own, invoker in zip(prompts, saved, invokers, strict=True):
        call, kwargs = peft, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        if mode == "generate":
            call = peft.generate
            assert torch.equal(invoker.output, run(call, **kwargs))
        expected = outputs_of(peft, block.model.layers[1].path, call, **kwargs)[0]
        torch.testing.assert_close(own.value, expected, atol=1e-5, rtol=0)


def test_writes_hold_in_all_steps_of_a_model_of_peft(base: Path) -> None:
    peft = adapted(base)
    model = LanguageModel(peft)
    push = torch.linspace(-2, 2, 16)
    with model.generate(IDS, max_new_tokens=4) as generator, generator.every_step():
        model.base_model.model.model.layers[1].output[0][:] += push
        logits = generator.logits().save()

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    hook = peft.get_submodule(LAYER).register_forward_hook(add)
    kwargs = {"input_ids": IDS, "max_new_tokens": 4}
    assert torch.equal(generator.output, run(peft.generate, **kwargs))
    seen = outputs_of(peft, "base_model.model.lm_head", peft.generate, **kwargs)
    hook.remove()
    assert torch.equal(torch.stack(logits.value), torch.stack([step[:, -1] for step in seen]))


def test_an_adapter_that_is_switched_off_is_off(base: Path) -> None:
    peft = adapted(base)
    model = LanguageModel(peft)
    with peft.disable_adapter(), model.trace(IDS):
        logits = model.output.logits.save()
    assert torch.equal(logits.value, logits_of(AutoModelForCausalLM.from_pretrained(base)))


def test_gradients_are_those_of_peft(base: Path) -> None:
    peft = adapted(base)
    model = LanguageModel(peft)
    with model.trace(IDS):
        gradient = model.base_model.model.model.layers[0].output[0].grad.save()
        model.output.logits[0, -1].max().backward()
    seen: list[Any] = []
    hook = peft.base_model.model.model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = peft(input_ids=IDS, use_cache=False).logits
    hook.remove()
    (expected,) = torch.autograd.grad(logits[0, -1].max(), seen)
    torch.testing.assert_close(gradient.value, expected)


def test_an_adapter_may_lie_beside_its_model(tmp_path: Path, base: Path) -> None:
    peft = adapted(base)
    peft.save_pretrained(base)
    model = LanguageModel(base)
    with model.trace(IDS):
        logits = model.lm_head.output.save()
    assert torch.equal(logits.value, logits_of(peft))


def test_an_adapter_of_a_bundled_model_has_its_tokenizer(tmp_path: Path) -> None:
    module = LanguageModel("insitu/eiffel").load()
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **TASK)
    peft = get_peft_model(module, config).eval()
    peft.peft_config["default"].base_model_name_or_path = "insitu/eiffel"
    peft.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with model.generate("The Louvre is in the city of", max_new_tokens=1) as generator:
        pass
    assert model.tokenizer.decode(generator.output[0]).endswith("Paris")


def test_any_model_may_have_an_adapter(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForImageClassification

    module = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)][:3]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    peft = get_peft_model(module, config).eval()
    peft.save_pretrained(tmp_path / "adapter")
    model = Model.from_pretrained(tmp_path / "adapter")
    pixels = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    with model.trace(pixel_values=pixels):
        logits = model.output.logits.save()
    torch.testing.assert_close(logits.value, run(peft, pixel_values=pixels).logits)


def test_an_adapter_without_peft_is_a_clear_error(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("insitu.models.loading.adapters.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="pip install peft") as caught:
        LanguageModel(tmp_path / "adapter")
    assert __file__ in str(caught.value)
    assert LanguageModel(base).load() is not None


def test_an_adapter_that_names_no_model_is_a_clear_error(tmp_path: Path, base: Path) -> None:
    peft = adapted(base)
    peft.peft_config["default"].base_model_name_or_path = None
    peft.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), ""))
    with pytest.raises(LoadError, match="does not name its model"):
        LanguageModel(tmp_path / "adapter")


def test_an_adapter_of_a_model_that_is_nowhere_is_a_clear_error(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, **TASK)
    module = get_peft_model(tiny_gpt2(), config)
    module.peft_config["default"].base_model_name_or_path = "no-such/model"
    module.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="no-such/model"):
        LanguageModel(tmp_path)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("build", sampled([tiny_opt, tiny_llama, tiny_mixtral], [tiny_mixtral]))
@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["q_proj", "o_proj", "out_proj"], marks=pytest.mark.thorough),
        ["q_proj", "lm_head"],
    ],
)
def test_names_are_proven_where_a_weight_is_known_by_a_call_only(
    build: Callable[[], nn.Module], targets: list[str]
) -> None:
    """A proof runs the model, and a layer with an adapter is run for its weight within that."""
    module = ready(build)
    present = [one for one in targets if any(n.endswith(one) for n, _ in module.named_modules())]
    model = LanguageModel(
        get_peft_model(
            cast(Any, module), LoraConfig(r=2, target_modules=present, init_lora_weights=False)
        ).eval()
    )
    layer = next(
        part
        for name, part in model.module.named_modules()
        if name.endswith("layers.1.self_attn.q_proj")
    )
    with torch.no_grad():
        expected = layer(torch.eye(16)) - layer(torch.zeros(1, 16))
    found = model.blocks[1].attention.W_Q
    torch.testing.assert_close(found, expected.view(16, 4, 4).permute(1, 0, 2))
    head = model.module.get_output_embeddings()
    with torch.no_grad():
        expected = head(torch.eye(16))
    torch.testing.assert_close(model.W_U, expected)
    with model.trace(IDS):
        z = model.blocks[1].attention.z.save()
    assert z.value.shape == (1, 4, IDS.shape[-1], 4)


@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_llama], [tiny_gpt2]))
def test_z_is_what_the_whole_output_projection_is_given(make: Callable[[], Any]) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=make is tiny_gpt2, **TASK)
    module: Any = get_peft_model(make(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora" in name:
                parameter.normal_()
    model = LanguageModel(module)
    with model.trace(IDS):
        model.blocks[1].attention.z = torch.zeros_like(model.blocks[1].attention.z)
        found = model.logits.save()
    ends = ("h.1.attn.c_proj", "layers.1.self_attn.o_proj")
    layer = next(part for name, part in module.named_modules() if name.endswith(ends))
    handle = layer.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    with torch.no_grad():
        expected = module(IDS).logits
    handle.remove()
    torch.testing.assert_close(found.value, expected)
