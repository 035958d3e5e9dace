"""What people type by habit of other libraries: an error with the line to write here."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
)

from insitu import (
    BlockError,
    IndexOutOfRangeError,
    InsituError,
    LanguageModel,
    NotCachedError,
    NoValueError,
    OperationError,
    OptionError,
    PathError,
    ShapeError,
)
from insitu.graph.errors import nearest
from insitu.methods import Probe, logit_lens, probe

TEXT = "The Louvre is in the city of"
BERT = BertConfig(
    vocab_size=131,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


OF_MODELS = {
    "run_with_hooks": "model.hook(name)",
    "add_hook": "model.hook(name)",
    "add_perma_hook": "model.edit()",
    "to_tokens": "model.tokenizer(prompt)",
    "to_str_tokens": "model.tokenizer.decode(one) for one in",
    "to_string": "model.tokenizer.decode(ids)",
    "cfg": "model.n_layers",
    "hook_points": "model.hook(name)",
    "invoke": "with tracer.invoke(prompt):",
    "forward": "model.module(...)",
    "next": "generator.step",
    "source": "module.ops",
    "dispatched": "model.loaded",
}


@pytest.mark.parametrize(("name", "line"), OF_MODELS.items())
def test_a_method_of_another_library_names_the_line_to_write(
    model: LanguageModel, name: str, line: str
) -> None:
    assert not hasattr(model, name)
    for handle in (model, model.transformer.h[1]):
        with pytest.raises(PathError) as caught:
            getattr(handle, name)
        assert line in str(caught.value)
        assert os.path.basename(__file__) in str(caught.value)


OF_BLOCKS = {
    "all": "every_step",
    "iter": "generator.steps",
    "result": "tracer.output",
    "cache": "run_with_cache",
    "stop": "module.stop()",
    "barrier": "one invocation in another",
    "apply": "insitu.apply",
    "outptu": "nearest: 'output'",
}


@pytest.mark.parametrize(("name", "line"), OF_BLOCKS.items())
def test_a_method_that_blocks_do_not_have_names_the_line_to_write(
    model: LanguageModel, name: str, line: str
) -> None:
    with model.trace() as tracer, tracer.invoke(TEXT) as invoker:
        model.lm_head.output.save()
        for one in (tracer,) if name in ("result", "stop") else (tracer, invoker):
            assert not hasattr(one, name)
            with pytest.raises(PathError) as caught:
                getattr(one, name)
            assert line in str(caught.value)


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (lambda block: block.output, "never entered"),
        (lambda block: block.logits, "never entered"),
        (lambda block: block[0], "generator.output"),
        (lambda block: list(block), "generator.output"),
    ],
)
def test_a_block_that_was_not_entered_says_so(
    model: LanguageModel, use: Callable[[Any], Any], line: str
) -> None:
    with pytest.raises((NoValueError, BlockError)) as caught:
        use(model.generate(TEXT, max_new_tokens=2))
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "option", ["dispatch", "fold_ln", "center_unembed", "default_prepend_bos", "n_devices"]
)
def test_options_of_loading_elsewhere_are_named_where_the_model_is_made(option: str) -> None:
    with pytest.raises(OptionError, match=f"no option `{option}` here"):
        LanguageModel("insitu/eiffel", **{option: True})
    with pytest.raises(OptionError, match=f"no option `{option}` here"):
        LanguageModel.from_pretrained("insitu/eiffel", **{option: False})


def test_a_cache_tells_how_many_blocks_there_are(model: LanguageModel) -> None:
    cache = model.run_with_cache(TEXT, ["z", "blocks.*.ln1.hook_scale"])
    for layer in (6, 9, -7):
        with pytest.raises(NotCachedError, match=f"no block {layer}: the model has 6, 0 to 5"):
            cache["z", layer]
        assert ("z", layer) not in cache
    assert torch.equal(cache["z", -1], cache["z", 5])
    assert torch.equal(cache["scale", 0, "ln1"], cache["blocks.0.ln1.hook_scale"])
    assert torch.equal(cache["z", 2, "a"], cache["blocks.2.attn.hook_z"])
    for key in ((), ("z",), ("z", "3"), (3, "z"), ("z", 1.0), ("z", 0, "a", "b")):
        with pytest.raises(NotCachedError, match=r"no name with the number"):
            cache[key]


def test_a_model_without_logits_says_that_it_has_none() -> None:
    with pytest.raises(OptionError, match="it gives no logits"):
        logit_lens(LanguageModel(BertModel(BERT).eval()), [11, 22, 33])


def test_what_is_refused_is_not_offered() -> None:
    assert nearest("norm_2.output", ["norm_2.output", "norm_1.output"]) == (
        " (nearest: 'norm_1.output')"
    )
    assert nearest("logits", ["logits"]) == ""


def test_a_norm_is_a_site_of_methods() -> None:
    bert = LanguageModel(BertForMaskedLM(BERT).eval())
    found = probe(bert, [[11, 22, 33], [44, 55, 66]] * 8, ["x", "y"] * 8, sites="norm_2.output")
    assert isinstance(found, Probe)
    assert found.site == "norm_2.output"


def test_a_backward_for_the_models_own_weights_names_inputs(model: LanguageModel) -> None:
    with pytest.raises(InsituError, match=r"loss\.backward\(inputs="), model.trace(TEXT):
        model.logits[0, -1].logsumexp(-1).backward()
    weight = model.module.lm_head.weight
    with model.trace(TEXT):
        (grad,) = model.logits[0, -1].logsumexp(-1).backward(inputs=[weight])
        grad.save()
    logits = model.module(**model.tokenizer(TEXT, return_tensors="pt")).logits
    (expected,) = torch.autograd.grad(logits[0, -1].logsumexp(-1), weight)
    assert torch.allclose(grad.value, expected, atol=1e-6) and weight.grad is None


@pytest.mark.parametrize("function", [np.mean, np.sum, np.argmax])
def test_the_line_is_the_users_where_numpy_calls(
    model: LanguageModel, function: Callable[[Any], Any]
) -> None:
    with pytest.raises(InsituError) as caught, model.trace(TEXT):
        function(model.lm_head.output)
    assert caught.value.location is not None
    assert caught.value.location.file == __file__


def test_a_tokenizer_in_a_block_is_told_that_there_is_no_value_yet(model: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="no value while the block is open: save it"):
        with model.trace(TEXT):
            model.tokenizer.decode(model.logits[0, -1].argmax())


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (lambda m: LanguageModel(None), OptionError),
        (lambda m: LanguageModel(3), OptionError),
        (lambda m: LanguageModel(["insitu/eiffel"]), OptionError),
        (lambda m: m.trace(TEXT, max_tokens_per_pass="3"), OptionError),
        (lambda m: m.trace(TEXT, max_tokens_per_pass=2.5), OptionError),
        (lambda m: m.tree("deep"), OptionError),
        (lambda m: m.hook(3), PathError),
        (lambda m: m.hook(None), PathError),
        (lambda m: m.run_with_cache(TEXT, 7), OptionError),
        (lambda m: m.run_with_cache(TEXT, [None]), OptionError),
        (lambda m: m.blocks[6], IndexOutOfRangeError),
        (lambda m: m.blocks[-7], IndexOutOfRangeError),
        (lambda m: m.transformer.h[1.5], PathError),
        (lambda m: m.transformer.h[None], PathError),
    ],
)
def test_arguments_of_a_wrong_kind_are_errors_of_ours(
    model: LanguageModel, use: Callable[[LanguageModel], Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        use(model)
    assert isinstance(caught.value, InsituError)
    assert os.path.basename(__file__) in str(caught.value)


OPTIONS = {
    "device": "write `to='cpu'`",
    "pos_slice": "cache['residual_out', 3][:, -1]",
    "clear_contexts": "leave it out",
    "add_special_tokens": "model.tokenizer(prompt, add_special_tokens=False).input_ids",
    "incl_bwd": "hook(name).output.grad.save()",
    "dispatch": "loaded by the first run",
    "nonsense": "uses none of this name",
}


@pytest.mark.parametrize(("name", "line"), OPTIONS.items())
def test_options_of_a_cached_run_are_refused_by_its_name(
    model: LanguageModel, name: str, line: str
) -> None:
    with pytest.raises(OptionError) as caught:
        model.run_with_cache(TEXT, **{name: -1})
    assert "`run_with_cache` takes no option" in str(caught.value)
    assert line in str(caught.value) and "`trace`" not in str(caught.value).splitlines()[0]


def test_what_the_errors_say_of_devices_and_ends_can_be_written(model: LanguageModel) -> None:
    cache = model.run_with_cache(TEXT, to="cpu", max_tokens_per_pass=100)
    assert cache.logits.device.type == "cpu"
    assert LanguageModel("insitu/eiffel", device_map="cpu").device.type == "cpu"
    ids = model.tokenizer(TEXT, add_special_tokens=False).input_ids
    assert torch.equal(model.run_with_cache(ids).logits, cache.logits)
    with pytest.raises(OptionError, match="`eos_token_id=None` goes on"):
        model.generate(TEXT, stop_at_eos=True)
    with model.generate(TEXT, max_new_tokens=3, eos_token_id=None) as generator:
        pass
    assert generator.output.shape == (1, len(ids) + 3)


def test_the_gradient_of_a_hook_is_named_and_is_that_of_torch(model: LanguageModel) -> None:
    with pytest.raises(PathError, match=r"hook\.output\.grad"):
        model.add_hook("blocks.2.hook_resid_post", print, dir="bwd")
    hook = model.hook("blocks.2.hook_resid_post")
    with model.trace(TEXT):
        gradient = hook.output.grad.save()
        model.logits[0, -1].logsumexp(-1).backward()
    found: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.register_hook(found.append)

    handle = model.module.transformer.h[2].register_forward_hook(keep)
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids
    model.module(ids).logits[0, -1].logsumexp(-1).backward()
    handle.remove()
    model.module.zero_grad()
    assert torch.allclose(gradient.value, found[0], atol=1e-6)


@pytest.mark.parametrize(
    ("package", "name", "line"),
    [
        ("insitu.methods", "get_act_patch_resid_pre", "`activation_patching` of"),
        ("insitu.methods", "path_patch", "`from insitu.methods import path_patching`"),
        ("insitu.methods", "logit_attrs", "import direct_logit_attribution"),
        ("insitu.methods", "detect_head", "`head_scores`"),
        ("insitu.methods", "LanguageModel", "`from insitu import LanguageModel`"),
        ("insitu", "FactoredMatrix", "torch.linalg.svd(attention.W_V[3] @ attention.W_O[3])"),
        ("insitu", "head_detector", "`head_scores`"),
        ("insitu", "HookedTransformerConfig", "AutoModelForCausalLM.from_config(config)"),
        ("insitu", "test_prompt", "softmax(-1).topk(10)"),
    ],
)
def test_an_import_of_another_librarys_name_leads_on(package: str, name: str, line: str) -> None:
    with pytest.raises(ImportError) as caught:
        exec(f"from {package} import {name}")
    assert isinstance(caught.value, InsituError) and line in str(caught.value)
    with pytest.raises(PathError) as asked:
        getattr(importlib.import_module(package), name)
    assert line in str(asked.value) and __file__ in str(asked.value)


def test_the_methods_list_what_they_are_and_not_their_files() -> None:
    methods = importlib.import_module("insitu.methods")
    assert {name for name in dir(methods) if not name.startswith("__")} == {*methods.__all__}


def test_a_block_lists_the_names_that_it_has(model: LanguageModel) -> None:
    listed = dir(model.blocks[0])
    assert {*model.blocks[0].role, "attn", "ln_1"} <= {*listed}
    assert not {"experts", "mixer_out", "cross_attention", "extra_out"} & {*listed}
    assert {"W_Q", "pattern", "z"} <= {*dir(model.blocks[0].attention)}


def test_a_config_is_told_how_to_become_a_model() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    with pytest.raises(OptionError) as caught:
        LanguageModel(config)  # pyright: ignore[reportArgumentType]
    line = str(caught.value).partition("write `")[2].partition("`")[0]
    names = {"LanguageModel": LanguageModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    assert eval(line, {**names, "config": config}).n_layers == 1


def test_a_tensor_of_before_takes_no_values_of_a_run(model: LanguageModel) -> None:
    store = torch.zeros(6, 128)
    with pytest.raises(OperationError, match=r"values\.append\(x\.save\(\)\)"):
        with model.trace(TEXT):
            for layer in range(6):
                store[layer] = model.blocks[layer].residual_out[0, -1]
    with pytest.raises(OperationError, match=r"values\.append\(x\.save\(\)\)"):
        with model.trace(TEXT):
            store[0].copy_(model.blocks[0].residual_out[0, -1])
    values = []
    with model.trace(TEXT):
        for block in model.blocks:
            values.append(block.residual_out[0, -1].save())
    stacked = eval("torch.stack([v.value for v in values])", {"torch": torch, "values": values})
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids
    states = model.module(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(stacked[2], states[3][0, -1], atol=1e-5)


def test_a_warning_is_at_the_users_line() -> None:
    model = LanguageModel("insitu/eiffel")
    with pytest.warns(UserWarning, match="eager attention only") as caught:
        with model.trace(TEXT):
            model.blocks[1].attention.pattern.save()
    assert [one.filename for one in caught] == [__file__]
