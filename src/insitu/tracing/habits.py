"""Words of other libraries that are typed by habit, and what is written here instead.

nnsight, TransformerLens, pyvene and baukit have methods that this library does not have. An error
for one of their names says the line to write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from insitu.graph.errors import nearest

_CACHED = "write `model.run_with_cache(prompt, names)`"
_HOOKED = (
    "write `with model.trace(prompt):`, and in it `hook = model.hook(name)` and "
    "`hook.output = f(hook.output)`"
)
_EDITED = "write `with model.edit() as edited:` and the lines that hold in every run of `edited`"
_STEPS = (
    "write `with generator.every_step():`, or `for step in generator.steps:`; one step is "
    "`generator.step[2]`"
)
_TOKENS = "write `model.tokenizer(prompt).input_ids`"
_UNTRAINED = "weights are as they were trained: leave it out"

OF_BLOCKS: Mapping[str, str] = {
    "all": "write `with generator.every_step():`",
    "apply": "write `insitu.apply(function, value)`",
    "backend": "a block runs when it ends: leave it out",
    "barrier": "use a value of one invocation in another, without a barrier",
    "cache": _CACHED,
    "iter": _STEPS,
    "local": "a block runs here: leave it out",
    "log": "save the value, and print it after the block",
    "pull": "save the value with `.save()`, and read it after the block",
    "push": "assign to the site, such as `module.output = value`",
    "result": "write `tracer.output`",
    "results": "write `tracer.output`",
    "save": "save the value itself: `module.output.save()`",
    "stop": "write `module.stop()`, at the module after which the run ends",
}
"""Names asked of a tracer or an invocation."""

OF_MODULES: Mapping[str, str] = {
    "add_hook": _HOOKED,
    "add_perma_hook": _EDITED,
    "add_sae": "write `use_sae` of `insitu.methods`",
    "all": "write `with generator.every_step():`",
    "blocks_output": "write `model.blocks[3].residual_out`",
    "cfg": "write `model.config`, or `model.n_layers`, `model.d_model`, `model.n_heads`",
    "dispatch": "write `model.load()`",
    "dispatched": "write `model.loaded`",
    "forward": "write `model.module(...)` for a plain forward, or `with model.trace(prompt):`",
    "get": "write the path itself, as in `model.transformer.h[3]`",
    "hook_dict": _HOOKED,
    "hook_points": _HOOKED,
    "hooks": _HOOKED,
    "input_ids": _TOKENS,
    "invoke": "write `with model.trace() as tracer:`, and `with tracer.invoke(prompt):` in it",
    "iter": _STEPS,
    "next": "write `with generator.step(1):`, or `for step in generator.steps:`",
    "nns_input": "write `module.input`",
    "nns_output": "write `module.output`",
    "register_forward_hook": f"{_HOOKED}; a hook of torch's own goes to `.module`",
    "register_forward_pre_hook": f"{_HOOKED}; a hook of torch's own goes to `.module`",
    "reset_hooks": "blocks leave no hooks behind: leave it out",
    "retain_output": "save it in a block: `module.output.save()`",
    "run_with_hooks": _HOOKED,
    "source": "write `module.ops.softmax[0].output`, by the name of the function",
    "to_single_token": _TOKENS,
    "to_str_tokens": "write `model.tokenizer.tokenize(prompt)`",
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
    "hf_model": "give the module itself: `LanguageModel(module)`",
    "move_to_device": "write `device_map=`",
    "n_devices": "write `device_map=`",
    "refactor_factored_attn_matrices": _UNTRAINED,
}
"""Options given where a model is made."""


def habit(name: str, known: Mapping[str, str], there: Collection[str] = ()) -> str:
    """Returns the end of a message about a name that there is not: what is written instead.

    Args:
        name: what was asked for.
        known: what is written instead of some names.
        there: the names that there are, of which the nearest is named otherwise.
    """
    instead = known.get(name)
    return f": {instead}" if instead is not None else nearest(name, there)
