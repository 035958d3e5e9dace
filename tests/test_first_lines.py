"""What people type first, by habit of other tools: it works, or the error names what to write."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import insitu
from insitu import InsituError, LanguageModel, PathError
from insitu.graph.errors import nearest
from insitu.methods import activation_patching, logit_difference, logit_lens, steering_vector
from tests.conftest import tiny_gpt2, tiny_llama
from tests.thinning import sampled

PROMPT, OTHER = "The Eiffel Tower is in the city of", "The Louvre is in the city of"


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    """One that these tests share and leave as it is."""
    return LanguageModel("insitu/eiffel", device_map="cpu")


def test_a_layer_is_read_and_kept_on_disk(eiffel: LanguageModel, tmp_path: Path) -> None:
    with eiffel.trace(PROMPT):
        hidden = eiffel.transformer.h[3].output[0].save()
    torch.save(hidden, tmp_path / "hidden.pt")
    kept = torch.load(tmp_path / "hidden.pt")
    module: Any = eiffel.module
    ids = eiffel.tokenizer(PROMPT, return_tensors="pt")
    expected = module(**ids, output_hidden_states=True).hidden_states[4]
    torch.testing.assert_close(kept, expected)


def test_a_head_is_ablated(eiffel: LanguageModel) -> None:
    with eiffel.trace(PROMPT):
        eiffel.blocks[1].attention.z[:, 2] = 0
        logits = eiffel.logits.save()

    def off(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., 32:48] = 0
        return (z,)

    module: Any = eiffel.module
    hook = module.transformer.h[1].attn.c_proj.register_forward_pre_hook(off)
    expected = module(**eiffel.tokenizer(PROMPT, return_tensors="pt")).logits
    hook.remove()
    torch.testing.assert_close(logits.value, expected)


def test_text_is_generated_and_steered(eiffel: LanguageModel) -> None:
    with eiffel.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.every_step():
            eiffel.blocks[2].residual_out[:] += 0
    module: Any = eiffel.module
    ids = eiffel.tokenizer(PROMPT, return_tensors="pt")
    expected = module.generate(**ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generator.output, expected)
    assert steering_vector(eiffel, [PROMPT], [OTHER]).site == "residual_out"


def test_a_batch_of_prompts_is_answered_at_its_last_position(eiffel: LanguageModel) -> None:
    with eiffel.trace([PROMPT, OTHER]):
        best = eiffel.logits[:, -1].argmax(-1).save()
    assert [eiffel.tokenizer.decode(token) for token in best] == [" Paris", " Paris"]


def test_a_gradient_a_lens_and_a_patch(eiffel: LanguageModel) -> None:
    with eiffel.trace(PROMPT):
        gradient = eiffel.transformer.h[2].output[0].grad.save()
        eiffel.logits[0, -1, 5].backward()
    assert gradient.shape == (1, 8, 128)
    assert logit_lens(eiffel, PROMPT).sizes == {"layer": 7, "position": 8}
    metric = logit_difference(" Paris", " Moscow")
    found = activation_patching(eiffel, OTHER, "The Kremlin is in the city of", metric)
    assert found.sizes == {"layer": 6, "position": 7}


@pytest.mark.thorough
def test_a_cache_by_name_and_inputs_as_a_tokenizer_gives_them(eiffel: LanguageModel) -> None:
    assert eiffel.run_with_cache(PROMPT)["blocks.3.attn.hook_pattern"].shape == (1, 8, 8, 8)
    with eiffel.trace(**eiffel.tokenizer(PROMPT, return_tensors="pt")):
        logits = eiffel.logits.save()
    assert logits.shape == (1, 8, 1336)


HABITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "run_with_hooks": (lambda m: m.run_with_hooks(PROMPT), r"with model\.trace\(prompt\)"),
    "add_hook": (lambda m: m.add_hook("x", print), r"model\.hook\(name\)"),
    "a hook of torch": (lambda m: m.blocks[0].register_forward_hook(print), r"\.module"),
    "to_tokens": (lambda m: m.to_tokens(PROMPT), r"model\.tokenizer\(prompt\)"),
    "cfg": (lambda m: m.cfg, r"model\.config"),
    "a weight": (lambda m: m.transformer.h[0].mlp.c_fc.weight, r"c_fc\.module\.weight"),
    "no block": (lambda m: m.blocks[0].residual_out, r"with model\.trace\(prompt\)"),
    "remote": (lambda m: m.trace(PROMPT, remote=True), "no option `remote`"),
    "a layer too many": (lambda m: m.blocks[99], "6 entries"),
}


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_is_told_what_to_write(eiffel: LanguageModel, name: str) -> None:
    typed, said = HABITS[name]
    with pytest.raises(InsituError, match=said):
        typed(eiffel)


def small(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    if kind == "eiffel":
        return LanguageModel("insitu/eiffel", attn_implementation="eager")
    sizes = {"attn_implementation": "eager", "vocab_size": 1336, "bos_token_id": 0}
    config: Any
    if kind == "gpt2":
        config = GPT2Config(n_layer=2, n_head=4, n_embd=32, eos_token_id=0, **sizes)
        module: Any = GPT2LMHeadModel(config)
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes["num_attention_heads"] = 4
        if kind == "llama":
            module = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, eos_token_id=0, **sizes))
        else:
            module = BertForMaskedLM(BertConfig(**sizes))
    return LanguageModel(module.eval(), tokenizer=LanguageModel("insitu/eiffel").tokenizer)


BLOCKS = {
    "eiffel": ("transformer.h.1", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt2": ("transformer.h.1", "attn.c_proj", "mlp", "mlp.c_proj"),
    "llama": ("model.layers.1", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    "bert": ("bert.encoder.layer.1", "attention.output.dense", "output.dense", "output.dense"),
}


@pytest.fixture(scope="module", params=[*BLOCKS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> LanguageModel:
    return small(kind)


@pytest.fixture(scope="module")
def plain(kind: str, model: LanguageModel) -> dict[str, torch.Tensor]:
    """Values of block 1 by plain hooks, and weights by their paths."""
    module: Any = model.load()
    path, out, mlp, down = BLOCKS[kind]
    block = module.get_submodule(path)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, of: str, value: int | None) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            given = output if value is None else args[value]
            found[name] = (given[0] if isinstance(given, tuple) else given).detach()

        return (block.get_submodule(of) if of else block).register_forward_hook(hook)

    hooks = [
        keep("out", "", None),
        keep("attention_out", out, None),
        keep("z", out, 0),
        keep("mlp_out", mlp, None),
        keep("post", down, 0),
    ]
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    found["pattern"] = module(input_ids=ids, output_attentions=True).attentions[1].detach()
    for hook in hooks:
        hook.remove()
    found["z"] = found["z"].unflatten(-1, (found["pattern"].shape[1], -1))
    return found


def lines(error: BaseException) -> list[str]:
    """The lines that a message names."""
    return re.findall(r"`([^`]+)`", str(error).partition(": ")[2])


WORDS = {
    "residual stream": ("out", "", "hook_resid_post resid_post block_output hidden_states"),
    "heads": ("z", "attention", "hook_z head_output"),
    "pattern": ("pattern", "attention", "hook_pattern attn_weights attention_probs attn_pattern"),
    "neurons": ("post", "mlp", "hook_post activation neurons acts"),
    "of a block": ("pattern", "", "pattern attention_weights"),
    "MLP": ("mlp_out", "", "hook_mlp_out mlp_output"),
    "attention": ("attention_out", "", "attn_out attention_output hook_attn_out"),
}


@pytest.mark.parametrize("what", WORDS)
def test_another_librarys_word_names_the_line_that_reads_it(
    model: LanguageModel, kind: str, plain: dict[str, torch.Tensor], what: str
) -> None:
    key, part, words = WORDS[what]
    for word in words.split():
        with model.trace(PROMPT):
            block = model.blocks[1]
            with pytest.raises(PathError) as caught:
                getattr(getattr(block, part) if part else block, word)
            named = lines(caught.value)
            read = [eval(line, {"model": model}).save() for line in named]
        expected = plain[key].transpose(1, 2) if key == "z" else plain[key]
        torch.testing.assert_close(read[0].value, expected)
        if word == "hook_z":  # TransformerLens's order of axes
            torch.testing.assert_close(read[1].value, plain[key])


def test_a_word_asked_of_an_encoders_block_names_that_block() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=100, decoder_start_token_id=0, **sizes)
    model = LanguageModel(T5ForConditionalGeneration(config).eval())
    ids = torch.tensor([[5, 6, 7]])
    kept: list[torch.Tensor] = []
    hook = model.module.get_submodule("encoder.block.1").register_forward_hook(
        lambda module, args, output: kept.append(output[0])
    )
    module: Any = model.module
    module(input_ids=ids, decoder_input_ids=torch.tensor([[0]]))
    hook.remove()
    with pytest.raises(PathError) as caught:
        model.encoder_blocks[1].hook_resid_post  # noqa: B018
    with model.trace(ids):
        read = eval(lines(caught.value)[0], {"model": model}).save()
    torch.testing.assert_close(read.value, kept[0])
    with pytest.raises(PathError) as caught:
        model.encoder_blocks[1].W_Q  # noqa: B018
    one, every = (eval(line, {"model": model, "torch": torch}) for line in lines(caught.value))
    weight = module.encoder.block[1].layer[0].SelfAttention.q.weight
    assert torch.equal(one, weight.unflatten(0, (4, 8)).mT)
    assert torch.equal(every[1], one)


def test_words_of_the_whole_model_name_lines_that_run(model: LanguageModel) -> None:
    words = "embed token_embeddings ln_final num_layers hidden_size d_vocab n_head pattern block"
    for word in (*words.split(), "hook_resid_post"):
        if hasattr(model, word) or (word == "ln_final" and hasattr(model, "bert")):
            continue
        with pytest.raises(PathError) as caught:
            getattr(model, word)
        with model.trace(PROMPT):
            model.logits.save()
            for line in lines(caught.value):
                assert eval(line, {"model": model, "torch": torch}) is not None, line
    assert model.n_layers == len(model.blocks)


def test_weights_of_all_blocks_are_named(model: LanguageModel, kind: str) -> None:
    for name in ("W_Q", "W_O", "W_in", "W_out"):
        with pytest.raises(PathError, match="of all blocks") as caught:
            getattr(model, name)
        one, every = (eval(line, {"model": model, "torch": torch}) for line in lines(caught.value))
        assert torch.equal(every[0], one)
        assert len(every) == model.n_layers
        if kind == "gpt2" and name == "W_in":
            assert torch.equal(one, model.load().transformer.h[0].mlp.c_fc.weight)  # pyright: ignore


def test_a_path_of_another_model_names_the_blocks_of_this_one(
    model: LanguageModel, kind: str
) -> None:
    for name in ("transformer", "model", "bert", "gpt_neox", "layers", "layer", "h"):
        if name in dict(model.load().named_children()):
            continue
        with pytest.raises(PathError) as caught:
            getattr(model, name)
        lists = [line for line in lines(caught.value) if line.startswith("model.")]
        lists += re.findall(r"`(model\.[^`]+)`", str(caught.value))
        paths = [[block.path for block in eval(line, {"model": model})] for line in lists]
        assert [block.path for block in model.blocks] in paths, str(caught.value)
        assert len({tuple(each) for each in paths}) == 1


@pytest.mark.thorough
def test_a_cache_is_not_unpacked_into_logits_and_a_cache(eiffel: LanguageModel) -> None:
    with pytest.raises(InsituError, match=r"logits = cache\.logits"):
        logits, cache = eiffel.run_with_cache(PROMPT)
    cache = eiffel.run_with_cache(PROMPT, ["logits", "blocks.0.attention.z"])
    with pytest.raises(InsituError, match="A cache is one value"):
        logits, cache = cache  # two keys, if it were let
    with pytest.raises(InsituError, match="A cache is one value"):
        logits, *others = cache
    module: Any = eiffel.module
    expected = module(**eiffel.tokenizer(PROMPT, return_tensors="pt")).logits
    torch.testing.assert_close(cache.logits, expected)
    assert [*cache] == list(cache) and {*cache} == {"logits", "blocks.0.attention.z"}
    assert {**cache}.keys() == cache.keys() == dict(cache.items()).keys()
    first, second = cache.values()
    assert torch.equal(first, cache[next(iter(cache))])
    assert second.ndim


@pytest.mark.parametrize(
    ("name", "line"),
    [
        pytest.param(
            "stack_head_results",
            "model.run_with_cache(prompt, 'attention.result').stack('attention.result')",
            marks=pytest.mark.thorough,
        ),
        pytest.param("decompose_resid", "cache.stack('mlp_out')", marks=pytest.mark.thorough),
        ("accumulated_resid", "cache.stack('residual_in')"),
        ("cache_dict", "dict(cache)"),
        pytest.param("remove_batch_dim", "cache['z', 3][0]", marks=pytest.mark.thorough),
        pytest.param("to", "model.run_with_cache(prompt, to='cpu')", marks=pytest.mark.thorough),
    ],
)
def test_methods_of_a_cache_elsewhere_name_lines_that_run(
    eiffel: LanguageModel, name: str, line: str
) -> None:
    names = ["residual_in", "attention.z", "attention.result", "mlp_out"]
    cache = eiffel.run_with_cache(PROMPT, names)
    assert not hasattr(cache, name)
    with pytest.raises(PathError, match=re.escape(line)):
        getattr(cache, name)
    assert eval(line, {"cache": cache, "model": eiffel, "prompt": PROMPT}) is not None
    assert pickle.loads(pickle.dumps(cache))["z", 1].shape == (1, 8, 8, 16)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("from insitu import Trace", "with model.trace(prompt):"),
        ("from insitu import TraceDict, LanguageModel", "with model.trace(prompt):"),
        ("from insitu import HookedTransformer", "LanguageModel(name)"),
        ("from insitu import NNsight", "Model(module)"),
        ("from insitu import IntervenableModel", "an intervention is a line"),
        ("from insitu import SAE", "SparseAutoencoder.load(folder)"),
        ("from insitu import logit_lens", "from insitu.methods import logit_lens"),
        ("from insitu import utils", "model.hook(name)"),
        ("import insitu; insitu.save(1)", "value.save()"),
        ("import insitu; insitu.trace(1)", "with model.trace(prompt):"),
        ("import insitu; insitu.Modle", "nearest: 'Model'"),
    ],
)
def test_a_name_of_another_package_names_what_is_here(typed: str, line: str) -> None:
    with pytest.raises(InsituError, match=re.escape(line)) as caught:
        exec(typed, {})
    assert isinstance(caught.value, ImportError if typed.startswith("from") else AttributeError)


def test_names_that_there_are_are_still_imported() -> None:
    exec("from insitu import Graph, LanguageModel, methods, zoo", {})
    assert not hasattr(insitu, "Trace")
    assert insitu.methods.logit_lens is logit_lens
    with pytest.raises(AttributeError, match="__nothing__"):
        insitu.__nothing__  # noqa: B018


@pytest.mark.parametrize(
    "typed",
    sampled(
        ["list().save()", "[].save()", "dict().save()", "{}.save()"], ["[].save()", "{}.save()"]
    ),
)
def test_an_empty_container_is_filled_with_saved_values(eiffel: LanguageModel, typed: str) -> None:
    for opened in (lambda: eiffel.trace(PROMPT), eiffel.session):
        with pytest.raises(PathError) as caught, opened():
            eval(typed)
        assert isinstance(caught.value, AttributeError)
        scope: dict[str, Any] = {"name": "x"}
        with eiffel.trace(PROMPT):
            scope["x"] = eiffel.logits
            for line in lines(caught.value):
                exec(line, scope)
        kept: Any = scope["values"]
        kept = kept["x"] if isinstance(kept, dict) else kept[0]
        assert kept.shape == (1, 8, 1336)
    with pytest.raises(AttributeError) as raw:
        eval(typed)
    assert not isinstance(raw.value, InsituError)


def test_inputs_are_put_where_the_weights_are() -> None:
    model = LanguageModel("insitu/eiffel")
    inputs = model.tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with model.trace(**inputs):
        logits = model.logits.save()
    module: Any = model.module
    torch.testing.assert_close(logits.value, module(**inputs).logits)


def test_lines_that_run_nothing_say_so(eiffel: LanguageModel) -> None:
    inputs = eiffel.tokenizer(PROMPT, return_tensors="pt")
    for call in (lambda: eiffel(PROMPT), lambda: eiffel(**inputs), lambda: eiffel(inputs)):
        with pytest.raises(InsituError, match=r"with model\.trace\(prompt\):.*model\.load\(\)\("):
            call()
    assert "write `with model.generate(prompt) as generator:`" in repr(eiffel.generate(PROMPT))
    assert "write `with model.trace(prompt) as tracer:`" in repr(eiffel.trace(PROMPT))
    with eiffel.trace(PROMPT) as tracer:
        assert "is open" in repr(tracer)
        hidden = eiffel.blocks[1].residual_out
        eiffel.blocks[2].residual_out.save()
    assert repr(tracer) == f"<Block that ran: {len(tracer.graph)} nodes, 1 passes>"
    assert "not saved" in repr(hidden)
    assert tracer.graph._repr_html_() and tracer.plan._repr_html_()


OPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "verbose": (lambda m: m.generate(PROMPT, verbose=False), "`verbose`: it prints nothing"),
    "validate": (lambda m: m.trace(PROMPT, validate=True), "`validate`: a block is checked"),
    "trace": (lambda m: m.trace(PROMPT, trace=False), r"model\.load\(\)\(\*\*inputs\)"),
    "names_filter": (lambda m: m.run_with_cache(PROMPT, names_filter=["z"]), "write `names=`"),
    "return_type": (lambda m: m.run_with_cache(PROMPT, return_type="loss"), r"model\.logits"),
    "a length": (lambda m: m.generate(PROMPT, 5), r"model\.generate\(prompt, max_new_tokens=5\)"),
    "two prompts": (lambda m: m.trace(PROMPT, OTHER), r"model\.trace\(\[first, second\]\)"),
    "a scan of two": (lambda m: m.scan(PROMPT, OTHER), r"model\.scan\(\[first, second\]\)"),
    "device": (lambda m: LanguageModel("insitu/eiffel", device="cpu"), "write `device_map=`"),
    "a device": (lambda m: LanguageModel("insitu/eiffel", "cpu"), "`device_map=` for a device"),
    "generator": (lambda m: m.generator.output, r"`generator\.output`"),
    "a list": (lambda m: m.blocks.output, r"`model\.blocks\[0\]\.output` for one of them"),
    "a slice": (lambda m: m.transformer.h[1:3].mlp, r"\[block\.mlp for block in"),
    "an item": (lambda m: m.transformer.h.__setitem__(1, 0), r"h\[1\]\.output = value"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_another_library_is_told_what_to_write(
    eiffel: LanguageModel, name: str
) -> None:
    typed, said = OPTIONS[name]
    with pytest.raises(InsituError, match=said):
        typed(eiffel)


@pytest.mark.parametrize("written", ["transformer.h[1:3]", "transformer.h[::-2]", "blocks[-2:]"])
def test_a_slice_of_modules_is_named_as_it_is_written(eiffel: LanguageModel, written: str) -> None:
    scope: dict[str, Any] = {"model": eiffel}
    found: Any = eval(f"model.{written}", scope)
    with pytest.raises(IndexError, match=re.escape(f"no `model.{written}[9]`")):
        found[9]
    with pytest.raises(PathError) as caught:
        found.mlp  # noqa: B018
    one, every = (eval(line, scope) for line in lines(caught.value))
    paths = [f"{block.path}.mlp" for block in found]
    assert [mlp.path for mlp in every] == paths and one.path == paths[0]


@pytest.mark.parametrize(
    ("name", "candidates", "close"),
    [
        ("verbose", ["videos", "use_cache"], ""),
        ("requires_grad_", ["deg2rad_", "index_add_"], ""),
        ("trace", ["temperature", "streamer"], ""),
        ("stop", ["topk", "to", "std"], ""),
        ("mpl", ["mlp", "attn"], "mlp"),
        ("max_tokens", ["max_new_tokens", "num_beams"], "max_new_tokens"),
        ("layr", ["layer", "position"], "layer"),
        ("self_attn", ["attn", "mlp"], "attn"),
        ("patern", ["pattern", "post"], "pattern"),
        ("argmx", ["argmax", "argmin"], "argmax"),
    ],
)
def test_only_what_is_close_in_spelling_or_shares_a_word_is_offered(
    name: str, candidates: list[str], close: str
) -> None:
    found = nearest(name, candidates)
    assert found == (f" (nearest: '{close}')" if close else "") or found.startswith(
        f" (nearest: '{close}', "
    )


@pytest.mark.parametrize("method", ["requires_grad_", "retain_grad", "stop"])
def test_methods_that_values_do_not_need_say_so(eiffel: LanguageModel, method: str) -> None:
    with pytest.raises(InsituError, match=r"write `value\.grad`|write `module\.stop\(\)`"):
        with eiffel.trace(PROMPT):
            getattr(eiffel.blocks[1].residual_out, method)()


@pytest.mark.parametrize(
    ("slip", "line"),
    [
        ("model.blocks[1].residual_outt", "model.blocks[1].residual_out"),
        ("model.blocks[1].attention.patern", "model.blocks[1].attention.pattern"),
        ("model.blocks[1].mlp.posts", "model.blocks[1].mlp.post"),
        ("model.blocks[1].attention_ouput", "model.blocks[1].attention_out"),
        ("model.logit_s", "model.logits"),
    ],
)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.filterwarnings("ignore:Attention scores and patterns")
def test_a_slip_in_a_standard_name_gets_the_line_to_write(
    build: Callable[[], Any], slip: str, line: str
) -> None:
    model = LanguageModel(build())
    with pytest.raises(PathError, match=re.escape(f": write `{line}`")):
        eval(slip)
    with model.trace(torch.tensor([[3, 14, 15]])):
        eval(line).save()
