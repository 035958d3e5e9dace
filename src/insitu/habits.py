"""Words of other libraries that are typed by habit, and the lines to write here instead.

nnsight, TransformerLens, pyvene and baukit have methods that this library does not have. An error
for one of their names says the line to write. Here are the words of methods and options; what
they call values and modules is in `insitu.models.spellings`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from insitu.graph.errors import nearest

_CACHED = "write `model.run_with_cache(prompt, names)`"
_CACHED_HERE = (
    "write `values = {path: model[path].output.save(optional=True) for path in model.modules if "
    "path}`; `model.run_with_cache(prompt, names)` is without a block"
)
_HOOKED = (
    "write `with model.trace(prompt):`, and in it `hook = model.hook(name)` and "
    "`hook.output = f(hook.output)`; its gradient is `hook.output.grad`, of a `loss.backward()`"
)
_GRADIENT = (
    "write `with model.trace(prompt):`, and in it `gradient = model.hook(name).output.grad.save()` "
    "and `loss.backward()`"
)
_CIRCUIT = (
    "write `torch.linalg.svd(attention.W_V[3] @ attention.W_O[3])`, with "
    "`attention = model.blocks[2].attention`"
)
_COMPOSITION = (
    "multiply `W_O` of one block with `W_Q`, `W_K` or `W_V` of a later one: see the recipe "
    "`Composition of two heads`"
)
_DETECTED = "write `head_scores` or `attention_patterns` of `insitu.methods`"
_EDITED = "write `with model.edit() as edited:` and the lines that hold in every run of `edited`"
_STEPS = (
    "write `with generator.every_step():`, or `for step in generator.steps:`; one step is "
    "`generator.step[2]`"
)
_TOKENS = "write `model.tokenizer(prompt).input_ids`"
_HUGGING_FACE = "write `model.load()(**inputs)`"
_LENS = "write `logit_lens` or `direct_logit_attribution` of `insitu.methods`"
_PLAIN = "write Python's own, and save what is put in it: `values[name] = x.save()`"
_RESULTS = (
    "write `model.run_with_cache(prompt, 'attention.result').stack('attention.result')`, with a "
    "name for each further value in a list"
)
_SAE = "write `SparseAutoencoder.load(folder)` and `use_sae` of `insitu.methods`"
_SITE = "write `with model.trace(prompt):`, and in it `model.blocks[3].output.save()`"
_SWEEP = "write `activation_patching` of `insitu.methods`"
_MODEL = "write `LanguageModel(name)`, from `insitu`"
_UNHOOKED = "blocks leave no hooks behind: leave it out"
_ON_DEMAND = "what a block reads is computed, as `block.attention.result`: leave it out"
_UNTRAINED = "weights are as they were trained: leave it out"

OF_BLOCKS: Mapping[str, str] = {
    "all": "write `with generator.every_step():`",
    "apply": "write `insitu.apply(function, value)`",
    "backend": "a block runs when it ends: leave it out",
    "barrier": "use a value of one invocation in another, without a barrier",
    "cache": _CACHED_HERE,
    "cond": "write `insitu.cond(pred, then, otherwise, value)`",
    "iter": _STEPS,
    "local": "a block runs here: leave it out",
    "log": "save the value, and print it after the block",
    "pull": "save the value with `.save()`, and read it after the block",
    "push": "assign to the site, such as `module.output = value`",
    "result": "write `tracer.output`",
    "results": "write `tracer.output`",
    "save": "save the value itself: `module.output.save()`",
    "stop": "write `module.stop()`, at the module after which the run ends",
    "text": "write `model.tokenizer.batch_decode(generator.output, skip_special_tokens=True)`",
    "tokens": "write `tracer.output`, of a generation, or `invoker.ids`",
    "value": "save a value in the block, and read that after it",
    "values": "save a value in the block, and read that after it",
}
"""Names asked of a tracer or an invocation."""

OF_MODULES: Mapping[str, str] = {
    "accumulated_bias": "the error of `model.blocks[0].attention.b_O` names the biases: sum them",
    "add_hook": _HOOKED,
    "add_perma_hook": _EDITED,
    "add_sae": _SAE,
    "all": "write `with generator.every_step():`",
    "all_composition_scores": _COMPOSITION,
    "all_head_labels": (
        "write `[f'L{n}H{h}' for n in range(model.n_layers) for h in range(model.n_heads)]`"
    ),
    "blocks_output": "write `model.blocks[3].residual_out`",
    "cfg": "write `model.config`, or `model.n_layers`, `model.d_model`, `model.n_heads`",
    "clear_edits": "edits leave the model that they were made of as it is: use that one",
    "dispatch": "write `model.load()`",
    "dispatched": "write `model.loaded`",
    "export_edits": "write `model.save_edits(path)`",
    "forward": "write `model.module(...)` for a plain forward, or `with model.trace(prompt):`",
    "generator": (
        "write `with model.generate(prompt, max_new_tokens=5) as generator:`, and after it "
        "`generator.output`"
    ),
    "get": 'write `model["transformer.h.3"]`, with the path of the module',
    "get_caching_hooks": _CACHED,
    "get_token_position": (
        "write `model.tokenizer(prompt).input_ids.index(model.token_id(token))`"
    ),
    "hook_dict": _HOOKED,
    "hook_points": _HOOKED,
    "hooks": _HOOKED,
    "import_edits": "write `model = model.load_edits(path)`",
    "input_ids": _TOKENS,
    "invoke": "write `with model.trace() as tracer:`, and `with tracer.invoke(prompt):` in it",
    "iter": _STEPS,
    "logit_lens": "write `logit_lens(model, prompt)`, from `insitu.methods`",
    "loss": "compute it of `model.logits`, with `torch.nn.functional.cross_entropy`",
    "loss_fn": "compute it of `model.logits`, with `torch.nn.functional.cross_entropy`",
    "n_ctx": "write `model.config.max_position_embeddings`",
    "next": (
        "write `module.call(1).output` for its second call in a forward. Of a generation write "
        "`with generator.step(1):`, or `for step in generator.steps:`"
    ),
    "next_token_probs": "write `model.logits[:, -1].softmax(-1)`",
    "nns_input": "write `module.input`",
    "nns_output": "write `module.output`",
    "out": "write `module.output`",
    "outputs": "write `module.output`",
    "patch": _SWEEP,
    "ping": "write `Connection(url).models()`, with `from insitu.remote import Connection`",
    "probs": "write `model.logits.softmax(-1)`",
    "project_on_vocab": _LENS,
    "register_forward_hook": f"{_HOOKED}; a hook of torch's own goes to `.module`",
    "register_forward_pre_hook": f"{_HOOKED}; a hook of torch's own goes to `.module`",
    "remove_all_hook_fns": _UNHOOKED,
    "rename": "a name of one's own is a variable, `attention = model.transformer.h[3].attn`",
    "reset_hooks": _UNHOOKED,
    "reset_saes": "`use_sae` gives a model with it, and leaves this one as it is: leave it out",
    "retain_output": "save it in a block: `module.output.save()`",
    "run_with_cache_with_saes": _SAE,
    "run_with_hooks": _HOOKED,
    "run_with_hooks_with_saes": _SAE,
    "run_with_saes": _SAE,
    "save": "save a value of it in a block: `module.output.save()`",
    "set_tokenizer": "write `LanguageModel(name, tokenizer=tokenizer)`",
    "set_use_attn_in": _ON_DEMAND,
    "set_use_attn_result": _ON_DEMAND,
    "set_use_hook_mlp_in": _ON_DEMAND,
    "set_use_split_qkv_input": _ON_DEMAND,
    "skip_layers": "write `block.skip(value)`",
    "source": (
        "write `module.ops.linear[0].output`, by the name of the function, which "
        "`print(module.ops)` in a block lists. Softmax of attention is among them with "
        '`LanguageModel(name, attn_implementation="eager")` only, as `block.attention.pattern`'
    ),
    "steer": "write `steer` of `insitu.methods`",
    "to_single_str_token": "write `model.tokenizer.decode(ids)`",
    "to_single_token": "write `model.token_id(token)`",
    "to_str_tokens": (
        "write `[model.tokenizer.decode(one) for one in model.tokenizer(prompt).input_ids]`"
    ),
    "to_string": "write `model.tokenizer.decode(ids)`",
    "to_tokens": _TOKENS,
    "tokens_to_residual_directions": "write `model.W_U[:, id]`",
}
"""Names asked of a model or of a handle."""

OF_LOADING: Mapping[str, str] = {
    "center_unembed": _UNTRAINED,
    "center_writing_weights": _UNTRAINED,
    "default_padding_side": "each prompt is padded as the model reads: leave it out",
    "default_prepend_bos": "the tokenizer decides what is put before a prompt: leave it out",
    "dispatch": (
        "weights are loaded by the first run: leave it out, or write `model.load()` after the "
        "model is made"
    ),
    "fold_ln": _UNTRAINED,
    "fold_value_biases": _UNTRAINED,
    "device": "write `device_map=`",
    "hf_model": "give the module itself: `LanguageModel(module)`",
    "move_to_device": "write `device_map=`",
    "n_devices": "write `device_map=`",
    "rename": "a name of one's own is a variable, `attention = model.transformer.h[3].attn`",
    "refactor_factored_attn_matrices": _UNTRAINED,
    "remote": "a server has language models: write `LanguageModel(name, remote=url)`",
}
"""Options given where a model is made."""


OF_FUSED: Mapping[str, str] = dict.fromkeys(
    ("softmax", "matmul", "baddbmm", "dropout", "masked_fill", "where"),
    "one function is all of attention here. Read `block.attention.pattern`, or make the model with "
    '`LanguageModel(name, attn_implementation="eager")`',
)
"""Functions that attention calls unless one function computes all of it."""

OF_SESSIONS: Mapping[str, str] = {
    "apply": "write `insitu.apply(function, value)`, in a block of the session",
    "iter": "write a loop of Python's, and in it `with model.trace(prompt):`",
    "log": "save the value, and print it after the session",
}
"""Names asked of a session."""

OF_RUNS: Mapping[str, str] = {
    "blocking": "write `remote=url, wait=False`, and then `tracer.remote_job.result()`",
    "add_special_tokens": (
        "give ids: `model.tokenizer(prompt, add_special_tokens=False).input_ids`, in the place of "
        "the prompt"
    ),
    "bwd_hooks": _GRADIENT,
    "clear_contexts": _UNHOOKED,
    "device": "write `LanguageModel(name, device_map='cpu')`, where the model is made",
    "fwd_hooks": _HOOKED,
    "incl_bwd": _GRADIENT,
    "loss_per_token": _HUGGING_FACE,
    "names_filter": "write `names=`, of `run_with_cache`",
    "padding_side": "each prompt is padded as the model reads: leave it out",
    "pos_slice": (
        "it keeps all positions: write `cache['residual_out', 3][:, -1]`, or in a block "
        "`model.blocks[3].residual_out[:, -1].save()`"
    ),
    "prepend_bos": "the tokenizer decides what is put before a prompt: leave it out",
    "remote": (
        "give it where the block begins, `model.trace(prompt, remote=url)`, or where the model is "
        "made, `LanguageModel(name, remote=url)`"
    ),
    "remove_batch_dim": "write `value[0]`",
    "return_cache_object": "it returns a cache that is a mapping: leave it out",
    "return_type": (
        "write `model.logits` in a block, and save what you need of it; text is "
        "`model.tokenizer.batch_decode(generator.output, skip_special_tokens=True)`"
    ),
    "scan": "write `with model.scan(prompt):`; `trace` checks a block anyway: leave it out",
    "stop_at_layer": "a run ends by itself where all is read, or at `model.blocks[3].stop()`",
    "trace": "write `model.load()(**inputs)` for a plain forward",
    "validate": "a block is checked before it runs: leave it out",
    "verbose": "it prints nothing: leave it out",
}
"""Options given where a block begins."""

OF_METHODS: Mapping[tuple[str, str], str] = {
    ("run_with_cache", "device"): (
        "write `to='cpu'` for the values that are kept; the model's own device is given where it "
        "is made, `LanguageModel(name, device_map='cpu')`"
    ),
    ("run_with_cache", "clear_contexts"): _UNHOOKED,
    ("generate", "stop_at_eos"): "a generation ends there by itself; `eos_token_id=None` goes on",
}
"""Options of one method, by its name and theirs."""

OF_CACHES: Mapping[str, str] = {
    "accumulated_resid": (
        "write `torch.cat([cache.stack('residual_in'), cache['residual_out', -1][None]])`, or "
        "`logit_lens` of `insitu.methods`"
    ),
    "apply_ln_to_stack": _LENS,
    "cache_dict": "a cache is a mapping: `dict(cache)`",
    "compute_head_results": _RESULTS,
    "decompose_resid": (
        "write `torch.cat([cache['residual_in', 0][None], cache.stack('attention_out'), "
        "cache.stack('mlp_out')])`, which adds up to `cache['residual_out', -1]`"
    ),
    "get_full_resid_decomposition": _LENS,
    "get_neuron_results": "write `cache.stack('mlp.post')`, which `W_out` of an MLP multiplies",
    "has_batch_dim": "the first axis is always that of the prompts: leave it out",
    "logit_attrs": "write `direct_logit_attribution` of `insitu.methods`",
    "remove_batch_dim": "write `cache['z', 3][0]`",
    "stack_activation": "write `cache.stack('z')`",
    "stack_head_results": _RESULTS,
    "stack_neuron_results": "write `cache.stack('mlp.post')`, which `W_out` of an MLP multiplies",
    "to": "write `model.run_with_cache(prompt, to='cpu')`",
    "toggle_autodiff": _GRADIENT,
}
"""Names asked of a cache."""

_EAGER = (
    "they are there in eager attention alone, `LanguageModel(name, "
    'attn_implementation="eager")` with `model.trace(prompt, output_attentions=True)`; of one '
    "block it is `block.attention.pattern`"
)

OF_OUTPUTS: Mapping[str, str] = {
    "attentions": _EAGER,
    "cross_attentions": _EAGER,
    "hidden_states": (
        "write `model.trace(prompt, output_hidden_states=True)`, or `block.residual_out` for one "
        "of them"
    ),
    "past_key_values": "write `model.trace(prompt, use_cache=True)`",
}
"""Fields of what a model returns that are there only if they are asked for."""

OF_VALUES: Mapping[str, str] = {
    "data": "write `value.detach()` to read it, and to write into it `value[:] = new`",
    "requires_grad": "write `value.grad`, which needs nothing before it: leave it out",
    "retain_grad": "write `value.grad`, which needs nothing before it",
    "requires_grad_": "write `value.grad`, which needs nothing before it",
    "set": "assign to the site: `module.output = value`",
    "stop": "write `module.stop()`, at the module after which the run ends",
    "update": "assign to the site: `module.output = value`",
}
"""Methods called on a recorded value."""

OF_PACKAGE: Mapping[str, str] = {
    **dict.fromkeys(("bool", "bytes", "dict", "float", "int", "set", "str", "tuple"), _PLAIN),
    **dict.fromkeys(("get_act_patch_resid_pre", "get_act_patch_resid_mid"), _SWEEP),
    **dict.fromkeys(("get_act_patch_attn_out", "get_act_patch_mlp_out"), _SWEEP),
    **dict.fromkeys(("get_act_patch_attn_head_out_by_pos", "generic_activation_patch"), _SWEEP),
    **dict.fromkeys(("get_act_patch_attn_head_out_all_pos", "get_act_patch_block_every"), _SWEEP),
    "FactoredMatrix": _CIRCUIT,
    "HookedTransformerConfig": (
        "write `LanguageModel(AutoModelForCausalLM.from_config(config))`, of `transformers`"
    ),
    "SVDInterpreter": _CIRCUIT,
    "composition_scores": _COMPOSITION,
    "detect_head": _DETECTED,
    "head_detector": _DETECTED,
    "logit_attrs": "write `from insitu.methods import direct_logit_attribution`",
    "path_patch": "write `from insitu.methods import path_patching`",
    "test_prompt": (
        "write `model.run_with_cache(prompt).logits[0, -1].softmax(-1).topk(10)`, and "
        "`model.tokenizer.decode(one)` for each id"
    ),
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoTokenizer": "a model has one: `model.tokenizer`",
    "CONFIG": (
        "the variables INSITU_REMOTE and INSITU_KEY of the environment have a server and its key, "
        "as `LanguageModel(name, remote=Connection(url, key))` of `insitu.remote` has"
    ),
    "DiffusionModel": "write `Model(pipeline.unet)`",
    "Envoy": "write `Model(module)`",
    "HookedEncoder": _MODEL,
    "HookedSAETransformer": _SAE,
    "HookedTransformer": _MODEL,
    "HookPoint": _HOOKED,
    "IntervenableConfig": "an intervention is a line: `model.blocks[3].output[0][:, -1] = value`",
    "IntervenableModel": "an intervention is a line: `model.blocks[3].output[0][:, -1] = value`",
    "NNsight": "write `Model(module)`",
    "RepresentationConfig": "write the site itself: `model.blocks[3].output[0]`",
    "SAE": _SAE,
    "StandardizedTransformer": _MODEL,
    "Trace": _SITE,
    "TraceDict": _SITE,
    "TransformerBridge": _MODEL,
    "UnifiedTransformer": _MODEL,
    "VLLM": _MODEL,
    "from_pretrained": _MODEL,
    "generate": "write `with model.generate(prompt, max_new_tokens=5) as generator:`",
    "list": "write a plain list, and save what is put in it: `values.append(x.save())`",
    "load": _MODEL,
    "local": "a block runs here: leave it out",
    "log": "save the value, and print it after the block",
    "nethook": _SITE,
    "patching": "write `from insitu.methods import activation_patching`",
    "save": "write `value.save()`",
    "session": "write `with model.session():`",
    "trace": "write `with model.trace(prompt):`",
    "utils": (
        "write `model.hook(name)` for a hook by its name, or `model.blocks[3].residual_out` for a "
        "value by ours"
    ),
}
"""Names asked of the package."""


def habit(name: str, known: Mapping[str, str], there: Collection[str] = ()) -> str:
    """Returns the end of a message about a name that does not exist: the line to write instead.

    Args:
        name: what was asked for.
        known: the lines to write instead of some names.
        there: the names that there are; the nearest one is offered if the name is not known.
    """
    instead = known.get(name)
    return f": {instead}" if instead is not None else nearest(name, there)
