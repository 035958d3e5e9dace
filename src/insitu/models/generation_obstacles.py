"""What keeps a prompt out of a batch of generations: options, and structures used as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from insitu.engine.plan import Plan
from insitu.graph.node import Address, Graph
from insitu.graph.operations import PUT, REPLACE, WRITE, Operation
from insitu.graph.put import Step
from insitu.models.attention import OPTION

# Options with which each prompt of a batch goes on as it would alone: see `decoding.py`.
_BATCHABLE = """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id do_sample
    encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id generation_config
    max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size pad_token_id
    remove_invalid_values renormalize_logits repetition_penalty sequence_bias stop_strings
    suppress_tokens temperature tokenizer top_h top_k top_p typical_p use_cache
"""
_AS_ALONE = frozenset([*_BATCHABLE.split(), OPTION])
# What a config may say beside these, because nothing asks for it or it is about the result.
_WITHOUT_EFFECT = """
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind diversity_penalty
    early_stopping length_penalty max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states return_dict_in_generate
    target_lookbehind transformers_version
"""
_OF_NO_MATTER = frozenset(_WITHOUT_EFFECT.split())
_OFF: Mapping[str, Collection[Any]] = {
    "cache_implementation": (None, "dynamic", "hybrid"),
    "guidance_scale": (None, 1, 1.0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
}


def is_set(name: str, value: Any) -> bool:
    """Returns whether an option of a generation says something.

    Args:
        name: the option.
        value: its value.
    """
    return bool(value) and value not in _OFF.get(name, ())


def unlike_alone(options: Mapping[str, Any], configs: Sequence[Any]) -> str | None:
    """Returns an option with which a prompt may go on otherwise in a batch, None if there is none.

    Args:
        options: what `generate` is given.
        configs: the generation configs that hold where the options say nothing.
    """
    for name in sorted(options.keys() - _AS_ALONE):
        if options[name] not in _OFF.get(name, (None,)):
            return name
    known = vars(GenerationConfig())
    for config in configs:
        for name, value in sorted(config.to_diff_dict().items()):
            if name in _OF_NO_MATTER or name in options or name not in known:
                continue
            # What a config says of these, `generate` makes criteria of that see the whole batch.
            if name in _AS_ALONE and name != "stop_strings":
                continue
            if name[0] != "_" and value not in _OFF.get(name, (None, False)):
                return name
    return None


def entries_used(graph: Graph, plan: Plan, address: Address) -> Collection[str] | None:
    """Returns which entries are used of the mapping that arrives at a site.

    None if it may be all of it.

    Args:
        graph: the recorded experiment.
        plan: its plan.
        address: the site.
    """
    found: set[str] = set()
    written = set(plan.writes.values())
    values = {plan.reads[address]}  # the mapping, and what is made of it by changing entries
    asked: dict[int, int] = dict.fromkeys(values, 0)
    for index, (operation, args, _, inputs, _, _) in enumerate(graph.rows):
        of = values.intersection(inputs)
        if not of:
            continue
        for source in of:
            asked[source] += inputs.count(source)
        if operation.name in ("attribute", "operator.getitem") and isinstance(args[1], str):
            found.add(args[1])
            continue
        if operation is WRITE:  # of what has changed entries
            changed: Any = getattr(args[1], "index", None) in values
        else:
            changed = args[0].index in values and len(of) == 1 and _changed_entry(operation, args)
        if not changed:
            return None
        if isinstance(changed, str):
            found.add(changed)
        values.add(index)
        asked[index] = 0
    for index in values:  # the user may keep one of them
        if plan.uses[index] > asked[index] + (index in written):
            return None
    return found


def _changed_entry(operation: Operation, args: tuple[Any, ...]) -> str | None:
    """The name of the entry of a mapping that an operation changes, None if it does not."""
    key: Any = None
    if operation is REPLACE:
        key = args[1]
    elif operation is PUT:
        steps: Sequence[Step] = args[1]
        key = steps[0][2][0] if steps and steps[0][2] else None
    return key if isinstance(key, str) else None
