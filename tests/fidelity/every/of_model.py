"""Compares what has a standard name in a model as a whole, and modules by path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tests.fidelity.every.case import Case
from tests.fidelity.every.verdict import close, demand, same

Tensor = torch.Tensor
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers"),
    "n_heads": ("num_attention_heads", "n_head"),
    "d_model": ("hidden_size", "d_model", "n_embd"),
    "vocab_size": ("vocab_size",),
}
_OF_A_DECODER: Mapping[str, tuple[str, ...]] = {
    "n_heads": ("decoder_attention_heads", "num_decoder_attention_heads"),
    "n_layers": ("decoder_layers", "num_decoder_layers"),
}


def paths(case: Case) -> None:
    """The deepest modules' outputs by path are what plain hooks see."""
    called = [path for path in case.plain.calls if path and _of_text(case, path)]
    chosen = called[:: max(1, len(called) // 12)]
    with case.opened():
        handles = [(path, _handle(case.model, path).output) for path in chosen]
        saved = [(path, value.save()) for path, value in handles]
    for path, one in saved:
        first = case.plain.calls[path][0].returned
        if first and isinstance(one.value, Tensor):
            close(one.value, first[0], path)


def _of_text(case: Case, path: str) -> bool:
    return any(one.returned for one in case.plain.calls[path])


def logits(case: Case) -> None:
    """The logits are those that the module returns."""
    if not case.there("logits", case.model, "logits"):
        if _logits_of(case.plain.output) is not None:
            case.say("logits", "refused", "the model returns logits")
        return
    (found,) = case.read((case.model, "logits"))
    expected = _logits_of(case.plain.output)
    demand(expected is not None, "the model returns no logits")
    close(found, expected, "logits")


def embedding(case: Case) -> None:
    """The embedding and the unembedding are the module's own."""
    model = case.model
    there = case.there("embedding", model, "embedding", "W_E", "W_U")
    theirs = case.module.get_input_embeddings()
    if "W_E" in there:
        demand(torch.equal(model.W_E, theirs.weight), "W_E is not the embedding's weight")
    if "embedding" in there:
        (found,) = case.read((model.role["embedding"], "output"))
        holding = [
            path
            for path, part in case.module.named_modules()
            if getattr(part, "weight", None) is theirs.weight
        ]
        seen = [call.returned[0] for path in holding for call in case.plain.calls.get(path, ())]
        demand(any(same(found, one) for one in seen), "embedding.output")
    head = case.module.get_output_embeddings()
    if "W_U" in there and getattr(head, "weight", None) is not None:
        right = torch.equal(model.W_U, head.weight.T)
        demand(right, "W_U is not the weight of the unembedding")


def blocks(case: Case) -> None:
    """Blocks are called one after the other, with what depends on the prompt."""
    for name in ("blocks", "encoder_blocks"):
        if not case.has(case.model, name):
            if name == "blocks":
                case.there("blocks", case.model, name)
            continue
        listed = [block.path for block in case.model.role[name]]
        calls = [path for path in case.plain.order if path in listed]
        if name == "encoder_blocks" and not calls and not case.module.config.is_encoder_decoder:
            for block in case.model.role[name]:  # a tower of images, that no text passes
                demand(not list(block.role), f"{block.path} has names, and no text passes it")
            continue
        demand(bool(calls), f"{name}: none of {listed[:2]} is called")
        demand(calls == listed, f"{name} are not called one after the other: {calls[:6]}")
        for path in listed:
            given = case.plain.calls[path][0].given
            moved = any(len(one) > 1 and not same(one[0], one[1]) for one in given[:1])
            demand(moved, f"{path} is not given what depends on the prompt")


def passed(case: Case, listed: Iterable[Any]) -> list[Any]:
    """The blocks of a list that plain hooks see called."""
    return [block for block in listed if block.path in case.plain.calls]


def numbers(case: Case) -> None:
    """Numbers are those of the config."""
    model, config = case.model, case.module.config.get_text_config(decoder=True)
    for name, fields in _FIELDS.items():
        if not case.has(model, name):
            continue
        said = next((getattr(config, one) for one in fields if hasattr(config, one)), None)
        for own in _OF_A_DECODER.get(name, ()):  # which may have another number than its encoder
            said = getattr(case.module.config, own, said)
        found = getattr(model, name)
        logits = _logits_of(case.plain.output)
        if name == "vocab_size" and logits is not None:  # a model may have further tokens
            said = logits.shape[-1]
        if name == "n_layers" and found == getattr(config, "num_layers", None):
            continue  # a block of several attentions may count as several layers
        if isinstance(said, int) and said > 0:
            demand(found == said, f"{name} is {found}, and in the config {said}")
        if name == "n_heads":  # a config may say one thing, and be overruled by what else it says
            kind = "decoder_attentions" if case.module.config.is_encoder_decoder else "attentions"
            maps = [one for key, one in case.attentions if key == kind and one.ndim == 4]
            returned = {one.shape[1] for one in maps}
            right = returned <= {found}
            demand(right, f"n_heads is {found}, and the model's attentions have {returned}")


def _logits_of(output: Any) -> Tensor | None:
    for name in ("logits", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return None


def _handle(model: Any, path: str) -> Any:
    handle = model
    for step in path.split("."):
        handle = handle[step]
    return handle
