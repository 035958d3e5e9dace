"""What other libraries call values, modules and weights, and the line that reads them here.

TransformerLens, pyvene, nnterp and Hugging Face's own classes have words of their own for what has
a standard name here. An error for one of their words, or for a standard name asked of the wrong
module, says the line to write. Methods and options of other libraries are in
`insitu.habits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from insitu.graph.errors import closest
from insitu.models import transformer_lens
from insitu.models.keys import OF_BLOCK, spelled
from insitu.models.transformer_lens import TransformerLens
from insitu.tracing.vocabulary import Entry, Missing, Role, Roles, Vocabulary

_OUT = ("residual_out", "block_out")  # in the order in which they are offered
_MANY: Mapping[tuple[str, ...], Sequence[str]] = {
    ("residual_in",): ("block_input", "layer_input", "layers_input", "residual_pre"),
    _OUT: (
        *("block_output", "layer_output", "layers_output", "residual_post", "residual"),
        *("resid", "residual_stream", "hidden_states", "hidden_state", "hidden"),
    ),
    ("attention_out",): (
        *("attention_output", "attentions_output", "attn_output", "self_attn_output"),
    ),
    ("mlp_out",): ("mlp_output", "mlps_output", "ffn_out", "ffn_output"),
    ("attention.pattern",): (
        *("attention_pattern", "attention_patterns", "attn_pattern", "attention_weights"),
        *("attn_weights", "attention_probs", "attn_probs", "attention_probabilities"),
        *("attentions", "weights"),
    ),
    ("attention.scores",): ("attention_scores",),
    ("attention.z",): (
        *("head", "heads", "head_output", "head_outputs", "head_attention_value_output"),
        "attention_value_output",
    ),
    ("attention.q",): ("query", "queries", "query_output", "head_query_output"),
    ("attention.k",): ("key", "keys", "key_output", "head_key_output"),
    ("attention.v",): ("value_output", "head_value_output"),
    ("mlp.post",): (
        *("mlp_activation", "activation", "activations", "neurons", "neuron_activations"),
        "acts",
    ),
    ("mlp.pre",): ("pre_activation", "pre_activations", "pre_acts"),
    ("attention",): ("attn", "self_attn", "self_attention", "attention_layer"),
    ("mlp",): ("feed_forward", "feedforward", "ffn", "MLP"),
    ("norm_1",): ("ln1", "ln_1", "input_layernorm"),
    ("norm_2",): ("ln2", "ln_2", "post_attention_layernorm"),
    ("embedding",): (
        *("embed", "wte", "embed_tokens", "token_embeddings", "token_embedding", "embeddings"),
        *("word_embeddings", "embed_in"),
    ),
    ("unembedding",): ("unembed", "lm_head", "embed_out", "output_layer"),
    ("final_norm",): ("ln_final", "ln_f", "final_layer_norm", "final_layernorm", "norm"),
    ("logits",): ("logit", "next_token_logits"),
    ("blocks",): (
        *("h", "layer", "layers", "block", "encoder_layers", "transformer_layers", "n_blocks"),
    ),
    ("n_layers",): ("num_layers", "n_layer", "num_hidden_layers", "n_block"),
    ("n_heads",): ("num_heads", "n_head", "num_attention_heads"),
    ("d_model",): ("hidden_size", "n_embd", "d_hidden"),
    ("d_head",): ("head_dim", "d_k"),
    ("d_mlp",): ("intermediate_size", "n_inner"),
    ("vocab_size",): ("d_vocab", "d_vocab_out"),
}
_WEIGHTS: Mapping[str, Sequence[str]] = {
    "attention": ("W_Q", "W_K", "W_V", "W_O"),
    "mlp": ("W_in", "W_out", "W_gate"),
    "": ("W_E", "W_U"),
}
_HOOK = "hook_"
_STANDARD = (
    *(key.partition(".")[2] or key for key in OF_BLOCK if not key.startswith(("norm", "cross"))),
    *("attention", "embedding", "unembedding", "final_norm", "logits"),
)
"""The standard names themselves: somebody's word may be a slip for one."""


def _of_hooks() -> Iterator[tuple[str, tuple[str, ...]]]:
    """TransformerLens's words: those of its hooks, with and without "hook_"."""
    for hooks in (transformer_lens.OF_BLOCK, transformer_lens.OF_MODEL):
        for name, meaning in hooks.items():
            word = name.rpartition(".")[2]
            if word in ("hook_in", "hook_out", "hook_scale", "hook_normalized"):
                continue  # of many modules: the word alone says nothing
            key = ""
            if isinstance(meaning, transformer_lens.Standard):
                key = meaning.key
            elif isinstance(meaning, transformer_lens.Unrotated | transformer_lens.Rotated):
                key = f"attention.{meaning.letter}"
            if key:
                keys = _OUT if key == _OUT[0] else (key,)
                yield word, keys
                yield word.removeprefix(_HOOK), keys


_MEANT: Mapping[str, tuple[str, ...]] = {
    **dict(_of_hooks()),
    **{word: keys for keys, words in _MANY.items() for word in words},
    "hook_unembed": ("unembedding.output",),
}


def line_instead(hooks: TransformerLens, path: str, name: str) -> str:
    """Returns the line to write for another library's word, or for one that is elsewhere.

    Args:
        hooks: the model's hook names, with its standard names.
        path: the module that was asked for it.
        name: the word.

    Returns:
        The end of a message, "" if the word means nothing known.
    """
    vocabulary = hooks.vocabulary
    own = _block_of(vocabulary, path)
    block = own or "blocks.0"
    for part, words in _WEIGHTS.items():
        if name in words:  # without looking it up, which takes the weights
            return _of_weight(block, part, name) if part else f": write `model.{name}`"
    hooked = _hooked(hooks, block, name)
    if hooked is not None and hooks.standard(hooked) is None:  # no other word for a standard name
        entry = hooks.entry(hooked)
        if not isinstance(entry, Missing):
            return f": write `{_hook_line(hooked)}`"
        if not isinstance(transformer_lens.OF_BLOCK[f"attn.{name}"], transformer_lens.Rotated):
            return f": `{_hook_line(hooked)}` would be it, but {entry.reason[:-1]}"
    missing = ""
    for word in meant(name) or (name,):
        key = spelled(word) or word
        if key.partition(".")[0] not in vocabulary.names:
            continue
        places = [key, f"{block}.{key}"]
        for place in places if own is None else reversed(places):
            entry = _entry(vocabulary, place)
            if isinstance(entry, Missing):
                missing = missing or f": `{_line(place)}` would be it, but {entry.reason[:-1]}"
            elif entry is not None:
                return f": write `{_line(place)}`{_with_axes(hooks, hooked, place)}"
    # Three letters are a slip of too many names.
    slips = closest(name, _STANDARD, most=1) if not missing and len(name) > 3 else ()
    return line_instead(hooks, path, slips[0]) if slips else missing


def meant(name: str) -> tuple[str, ...]:
    """Returns the standard names that another library's word may mean, the likeliest first."""
    return _MEANT.get(name, ())


def word_instead(name: str) -> str:
    """Returns the standard name to give in the place of another library's word, as a message's end.

    Args:
        name: the word, also the name of a hook.

    Returns:
        The end of a message, "" if the word means no value of a block.
    """
    for key in meant(name.rpartition(".")[2]):
        if spelled(key) != key:
            continue
        last = key.rpartition(".")[2]
        rotated = ", which is the rotated one on a rotary model" if last in ("q", "k") else ""
        return f": write {(last if spelled(last) == key else key)!r}{rotated}"
    return ""


def whereabouts(vocabulary: Vocabulary) -> str:
    """Returns where the blocks of a model are, for a path that it does not have."""
    entry = vocabulary.entry("", "", "blocks")
    if not isinstance(entry, Roles) or not entry.paths:
        return ""
    stack, _, last = entry.paths[0].rpartition(".")
    numbered = last.isdecimal() and stack != ""
    by_path = f", by path `{_line(stack)}`" if numbered else ""
    return f"; its blocks are `model.blocks`{by_path}"


def _entry(vocabulary: Vocabulary, key: str) -> Entry | None:
    """What a key stands for, also one of a module; None if there is no such key.

    Where a part that it goes through is missing, it is that.
    """
    path = part = ""
    entry: Entry | None = None
    for name in key.split("."):
        if isinstance(entry, Roles):
            path, entry = entry.paths[int(name)], None
            continue
        if name == "output" and isinstance(entry, Role):
            return entry
        entry = vocabulary.entry(path, part, name)
        if entry is None or isinstance(entry, Missing):
            return entry
        if isinstance(entry, Role):
            path, part = entry.path, entry.part
    return entry


def _of_weight(block: str, part: str, name: str) -> str:
    stack = block.partition(".")[0]
    every = f"torch.stack([block.{part}.{name} for block in model.{stack}])"
    return f": write `{_line(f'{block}.{part}.{name}')}`, or of all blocks `{every}`"


def _hooked(hooks: TransformerLens, block: str, name: str) -> str | None:
    """The hook of a block's attention that a word is, such as "hook_q"; None if it is none."""
    hook = f"attn.{name}"
    known = hook in transformer_lens.OF_BLOCK and name.startswith(_HOOK)
    return f"{block}.{hook}" if known and block.startswith("blocks.") else None


def _with_axes(hooks: TransformerLens, hook: str | None, key: str) -> str:
    """What reads it in TransformerLens's order of axes, where that is another one."""
    meant = None if hook is None else hooks.standard(hook)
    if hook is None or meant is None or not meant.heads_third or not key.startswith("blocks."):
        return ""
    return f", or with heads third `{_hook_line(hook)}`"


def _hook_line(hook: str) -> str:
    return f"model.hook({hook!r}).output".replace("'", '"')


def _line(key: str) -> str:
    """A key as it is written in a line, such as `model.blocks[3].attention.z`."""
    names = key.split(".")
    return "model" + "".join(f"[{name}]" if name.isdecimal() else f".{name}" for name in names)


def _block_of(vocabulary: Vocabulary, path: str) -> str | None:
    """The block that a module is or is in, such as "blocks.3", None if it is in none."""
    for stack in ("blocks", "encoder_blocks"):
        entry = vocabulary.entry("", "", stack)
        for number, block in enumerate(entry.paths if isinstance(entry, Roles) else ()):
            if f"{path}.".startswith(f"{block}."):
                return f"{stack}.{number}"
    return None
