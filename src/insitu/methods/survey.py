"""Survey: what a model's wiring is, found by standard names and tried in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods.sites import site_of
from insitu.methods.trial import POSITIONS, difference
from insitu.methods.wiring import Group, Part, Receiver, Wiring
from insitu.models.keys import entry_of
from insitu.models.language_model import LanguageModel
from insitu.tracing.named import Named

_TOLERANCE = 0.05  # between what is equal but for rounding, in bfloat16 too; scales are far from it
_LETTERS = {"attention_out": "a", "mixer_out": "s", "mlp_out": "m"}


def wiring_of(model: LanguageModel, ids: torch.Tensor) -> Wiring:
    """Returns what a model consists of, as far as it is connected by a residual stream.

    What names say of it is tried: whether the added values make up the stream, whether heads add
    up, and whether parts that seem to stand side by side do.

    Args:
        model: the model.
        ids: a prompt to try it on, `(position,)`.

    Raises:
        OptionError: if it has no such stream.
    """
    ids = ids[:POSITIONS]
    layers = [_places(model, layer) for layer in range(len(model.blocks))]
    beside: dict[int, Any] = {}
    with model.trace() as tracer:
        with tracer.invoke(ids):
            before = [_values(model, layer, names) for layer, names in enumerate(layers)]
            heads = [_heads(model, layer, names) for layer, names in enumerate(layers)]
        with tracer.invoke(ids):
            # The numbers of each token backwards: another stream, whatever the prompt is.
            model.blocks[0].residual_in = model.blocks[0].residual_in.flip(-1)
            after = [_values(model, layer, names) for layer, names in enumerate(layers)]
            turned = [_read(model, layer, of_layer) for layer, of_layer in enumerate(heads)]
        sums, split = _compared(before, after)
        with tracer.invoke(ids):
            told = _told(model, heads, turned, after)
        for layer, names in enumerate(layers):
            of_input = [name for name, place in names.items() if place == "residual_in"]
            if len(of_input) > 1:
                with tracer.invoke(ids):
                    site_of(of_input[0]).write(model, layer, after[layer][of_input[0]])
                    left = site_of(of_input[-1]).read(model, layer)
                    beside[layer] = difference(left, before[layer][of_input[-1]]).save()
    for layer, differ in enumerate(sums):
        if not differ.value < _TOLERANCE:
            raise OptionError(
                f"What the parts of block {layer} add to the residual stream does not make up the "
                "stream behind it, so this model has no edges between its parts.",
                here(),
            )
    for layer, differ in beside.items():
        if not differ.value < _TOLERANCE:
            raise OptionError(
                f"A part of block {layer} reads what another adds, and the residual stream between "
                "them has no name, so this model has no edges between its parts.",
                here(),
            )
    whole = {layer for layer, differ in split.items() if not differ.value < _TOLERANCE}
    more = {layer for layer, differ in told.items() if not differ.value < _TOLERANCE}
    counts = [{name: len(one.value) for name, one in of_layer.items()} for of_layer in heads]
    return _wired(layers, counts, whole, more)


def _places(model: LanguageModel, layer: int) -> dict[str, str]:
    """What a block adds to the residual stream, in order, and where each of these reads it.

    Raises:
        OptionError: if that has no names.
    """
    if _has(model, layer, "cross_attention_out"):
        raise OptionError(
            f"Block {layer} attends to states of an encoder, which come from another residual "
            "stream: edges are those of one.",
            here(),
        )
    if not (_has(model, layer, "residual_in") and _has(model, layer, "residual_out")):
        raise OptionError(
            f"Block {layer} has no residual stream: `model.blocks[{layer}].residual_in` says why.",
            here(),
        )
    if _has(model, layer, "extra_out"):
        raise OptionError(
            f"Block {layer} adds more to the residual stream behind its MLP, `extra_out`, and what "
            "that reads has no name, so this model has no edges between its parts.",
            here(),
        )
    names = [name for name in _LETTERS if _has(model, layer, name)]
    middle = "residual_mid" if _has(model, layer, "residual_mid") else "residual_in"
    return {name: middle if name == "mlp_out" else "residual_in" for name in names}


def _has(model: LanguageModel, layer: int, key: str) -> bool:
    return isinstance(entry_of(model.vocabulary, f"blocks.{layer}.{key}"), Named)


def _values(model: LanguageModel, layer: int, names: Mapping[str, str]) -> dict[str, Any]:
    """What has to add up in a block, in an open invocation."""
    wanted = ["residual_in", *names, "residual_out"]
    if "attention_out" in names and _has(model, layer, "attention.result"):
        wanted.append("result")
    return {name: site_of(name).read(model, layer) for name in wanted}


def _heads(model: LanguageModel, layer: int, names: Mapping[str, str]) -> dict[str, Any]:
    """A number of each head of queries, keys, values and results, where they are told.

    How many there are is known after the run: a shape would take a run without data for each block.
    """
    if "attention_out" not in names:
        return {}
    return {
        name: site_of(name).read(model, layer)[0, :, 0, 0].save()
        for name in ("q", "k", "v", "result")
        if _has(model, layer, f"attention.{name}")
    }


def _read(model: LanguageModel, layer: int, heads: Mapping[str, Any]) -> dict[str, Any]:
    """The queries, keys and values of a block, if all of them are told."""
    if not all(name in heads for name in "qkv"):
        return {}
    return {name: site_of(name).read(model, layer) for name in "qkv"}


def _told(
    model: LanguageModel,
    heads: Sequence[Mapping[str, Any]],
    turned: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
) -> dict[int, Any]:
    """By how much attention differs from that of another run if it is given all that run's heads.

    It does where it reads the stream besides, as for a gate at its output.
    """
    found: dict[int, Any] = {}
    for layer, given in enumerate(turned):
        for name, value in given.items():
            site_of(name).write(model, layer, value)
        if given:
            added = site_of("attention_out").read(model, layer)
            found[layer] = difference(added, after[layer]["attention_out"]).save()
    return found


def _compared(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], dict[int, Any]]:
    """By how much sums differ from what they should be, in the change between two runs.

    Biases are in no sum of heads, and are the same of both runs.

    Returns:
        The sum of the added values of each block; and that of heads, of each block that has them.
    """
    changes = [
        {name: value.float() - old[name].float() for name, value in new.items()}
        for old, new in zip(before, after, strict=True)
    ]
    sums: list[Any] = []
    split: dict[int, Any] = {}
    stream = changes[0]["residual_in"]
    for layer, change in enumerate(changes):
        for name in _LETTERS:
            if name in change:
                stream = stream + change[name]
        sums.append(difference(stream, change["residual_out"]).save())
        stream = change["residual_out"]
        if "result" in change:
            heads = change["result"].sum(1)
            split[layer] = difference(heads, change["attention_out"]).save()
    return sums, split


def _wired(
    layers: Sequence[Mapping[str, str]],
    heads: Sequence[Mapping[str, int]],
    whole: set[int],
    more: set[int],
) -> Wiring:
    """The parts of a model.

    Args:
        layers: what each block adds, and where each of these reads.
        heads: how many heads its attention has.
        whole: the blocks whose heads do not add up to what attention adds.
        more: the blocks whose attention reads more than queries, keys and values.
    """
    parts: list[Part] = []
    receivers, senders = 0, 1
    for layer, names in enumerate(layers):
        before = senders
        for name, place in names.items():
            letter = f"{_LETTERS[name]}{layer}"
            read = (Receiver(letter, site_of(name)),)
            gives, given = site_of(name), (letter,)
            counts = dict(heads[layer]) if name == "attention_out" else {}
            result = 0 if layer in whole else counts.pop("result", 0)
            if result:
                gives, given = site_of("result"), _numbered(f"{letter}.h", result)
            sizes = [0 if layer in more else counts.get(kind, 0) for kind in "qkv"]
            if all(sizes):
                read = tuple(
                    Receiver(f"{letter}.{kind}{head}", site_of(kind), head)
                    for kind, size in zip("qkv", sizes, strict=True)
                    for head in range(size)
                )
            upstream = before if place == "residual_in" else senders
            groups = _groups(sizes, result, len(read), len(given))
            parts.append(
                Part(
                    layer, site_of(place), gives, read, given, groups, upstream, receivers, senders
                )
            )
            receivers, senders = receivers + len(read), senders + len(given)
    last = len(layers) - 1
    logits = (Receiver("logits", None),)
    groups = (Group((0,), ()),)
    parts.append(
        Part(last, site_of("residual_out"), None, logits, (), groups, senders, receivers, senders)
    )
    return Wiring(tuple(parts))


def _groups(sizes: Sequence[int], result: int, read: int, given: int) -> tuple[Group, ...]:
    """Which senders of a part depend on which of its receivers.

    Args:
        sizes: how many heads queries, keys and values have, 0 if these are not told.
        result: how many heads the added value has, 0 if that is not told.
        read: how many receivers there are.
        given: how many senders.
    """
    queries, keys, values = sizes
    if not (result == queries and keys == values and keys and queries % keys == 0):
        return (Group(tuple(range(read)), tuple(range(given))),)
    share = queries // keys  # heads that have keys and values in common
    groups: list[Group] = []
    for key in range(keys):
        own = tuple(range(key * share, (key + 1) * share))
        groups.append(Group((*own, queries + key, queries + keys + key), own))
    return tuple(groups)


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number}" for number in range(count))
