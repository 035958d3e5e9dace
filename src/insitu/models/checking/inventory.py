"""What the standard names of a model stand for, listed: what `insitu check` shows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from insitu.display.module_tree import ModuleTree, branches
from insitu.display.report import Found, Part
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.graph.node import Site, readable
from insitu.tracing.forms import PerHead
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Given, Missing, Role, Roles, Vocabulary

if TYPE_CHECKING:
    from insitu.models.wrapped_module import WrappedModule

SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "vocab_size")
ROLES = ("attention", "cross_attention", "mlp", "experts")
"""The parts of a block that have standard names of their own."""

_LAYERS = {"W_E": "embedding", "W_U": "unembedding"}

Shapes = Mapping[tuple[str, str], tuple[int, ...]]
"""Of values of a run, by the block's path and the name on it."""


def sizes_of(model: WrappedModule) -> dict[str, int]:
    """Returns the numbers of a model by their standard names, of those that it has."""
    entries = {name: model.vocabulary.entry("", "", name) for name in SIZES}
    return {name: entry.value for name, entry in entries.items() if isinstance(entry, Given)}


def entries_of(
    model: WrappedModule, path: str, vocabulary: Vocabulary | None = None
) -> Iterator[tuple[str, Entry]]:
    """Yields the standard names on a block, "attention.q" too, and what they stand for.

    Weights are left out: see `weights_of`.

    Args:
        model: the model.
        path: the block's path, "" for the model as a whole.
        vocabulary: what knows the names; the model's own unless given.
    """
    known = vocabulary or model.vocabulary
    for owner, part, prefix in _owners(known, path):
        for name in known.listed(owner, part):
            of_experts = prefix == "mlp." and name in ("router", "weights")
            if name.startswith("W_") or name in SIZES or of_experts:
                continue
            entry = _entry(known, owner, part, name)
            if entry is not None:
                yield prefix + name, entry


def weights_of(model: WrappedModule, path: str) -> Iterator[Found]:
    """Yields the weights that have standard names on a block.

    Args:
        model: the model, with its weights.
        path: the block's path, "" for the model as a whole.
    """
    for owner, part, prefix in _owners(model.vocabulary, path):
        for name in model.vocabulary.listed(owner, part):
            if not name.startswith("W_"):
                continue
            layer = model.vocabulary.entry(owner, part, _LAYERS.get(name, ""))
            entry = (
                layer if isinstance(layer, Missing) else _entry(model.vocabulary, owner, part, name)
            )
            if isinstance(entry, Given) and isinstance(entry.value, torch.Tensor):
                yield Found(prefix + name, "weights", tuple(entry.value.shape))
            elif isinstance(entry, Missing):
                yield Found(prefix + name, missing=entry.reason)


def parts_of(model: WrappedModule, stacks: Mapping[str, int], shapes: Shapes) -> list[Part]:
    """Returns what all names stand for: of the model, and of one block of each kind.

    Args:
        model: the model, with its weights.
        stacks: the lists of its blocks, by path, and how long they are.
        shapes: of the values that were read.
    """
    whole = [_found(model, "", name, entry, shapes) for name, entry in entries_of(model, "")]
    parts = [Part("model", "", (*whole, *weights_of(model, "")))]
    for stack, count in stacks.items():
        kinds: dict[Any, list[int]] = {}
        for layer in range(count):
            kinds.setdefault(_kind(model, f"{stack}.{layer}", shapes), []).append(layer)
        for layers in kinds.values():
            path = f"{stack}.{layers[0]}"
            names = [
                _found(model, path, name, entry, shapes) for name, entry in entries_of(model, path)
            ]
            title = f"{readable(stack)}[{_ranges(layers)}]"
            parts.append(Part(title, readable(path), (*names, *weights_of(model, path))))
    return parts


def module_tree(model: WrappedModule, depth: int | None) -> ModuleTree:
    """Returns the tree of a model's modules with their contents: as of `Model.tree`.

    Args:
        model: the model.
        depth: how deep it goes; None for all of it.

    Raises:
        OptionError: if `depth` is below 1.
    """
    if depth is not None and (type(depth) is not int or depth < 1):
        raise OptionError(f"A tree is at least 1 deep, and not {depth!r}.", here())
    found = branches(model.module, depth)
    with model.vocabulary.quiet():
        names = names_by_module(model, [branch.path for branch in found])
    return ModuleTree(found, names)


def names_by_module(model: WrappedModule, shown: Collection[str]) -> dict[str, list[str]]:
    """Returns the standard names that stand for a module or its values, by the module's path.

    Args:
        model: the model.
        shown: the paths of the modules of interest; of others there are none.
    """
    found: dict[str, list[str]] = {}
    blocks: list[str] = []
    for name, entry in entries_of(model, ""):
        if isinstance(entry, Roles):
            blocks += [path for path in entry.paths if path in shown]
            found.setdefault(entry.paths[0].rpartition(".")[0], []).append(name)
        else:
            _stand(found, name, entry)
    for path in blocks:
        for name, entry in entries_of(model, path):
            _stand(found, name, entry)
    return found


def _stand(found: dict[str, list[str]], name: str, entry: Entry) -> None:
    """Puts a name to the module that it stands for, or whose value."""
    if isinstance(entry, Role) and entry.is_module:
        found.setdefault(entry.path, []).append(name)
    elif isinstance(entry, Named):
        path, inside, _ = entry.path.partition(">")
        place = "inside" if inside else entry.kind
        shown = name if place == "output" else f"{name} ({place})"
        found.setdefault(path, []).append(shown)


def written(entry: Named) -> str:
    """Returns the site of a value, as one would write it.

    Args:
        entry: what its name stands for.
    """
    site = str(Site(0, entry.path, entry.kind, entry.call))
    return site + "".join(f"[{at!r}]" for at in entry.item)


def _owners(vocabulary: Vocabulary, path: str) -> Iterator[tuple[str, str, str]]:
    """A block and those of its parts that have names: path, part and what they begin with."""
    yield path, "", ""
    for role in ROLES if path else ():
        entry = vocabulary.entry(path, "", role)
        if isinstance(entry, Role):
            yield entry.path, entry.part, f"{role}."


def _entry(vocabulary: Vocabulary, path: str, part: str, name: str) -> Entry | None:
    """What a name stands for, or why that cannot be known of the model."""
    try:
        return vocabulary.entry(path, part, name)
    except Exception as error:  # with eager attention, a model may not run
        said = next(iter(str(error).splitlines()), type(error).__name__)
        return Missing(f"it cannot be found out ({type(error).__name__}: {said}).")


def _found(model: WrappedModule, path: str, name: str, entry: Entry, shapes: Shapes) -> Found:
    if isinstance(entry, Missing):
        return Found(name, missing=entry.reason)
    if isinstance(entry, Named):
        place = written(entry)
        if isinstance(entry.form, PerHead):
            place = f"the summands of {place}"
        if entry.options:
            place += ", with eager attention"
        return Found(name, place, shapes.get((path, name)))
    if isinstance(entry, Roles):
        stack = entry.paths[0].rpartition(".")[0]
        return Found(name, f"{readable(stack)}: {len(entry.paths)} blocks")
    if isinstance(entry, Role):
        if not entry.is_module:
            return Found(name, "no module of its own: its layers are the block's")
        return Found(name, f"{readable(entry.path)}: {type(model.modules[entry.path]).__name__}")
    return Found(name, str(entry.value))


def _kind(model: WrappedModule, path: str, shapes: Shapes) -> Any:
    """What two blocks have in common if their names stand for the same in both."""
    found = (_found(model, path, name, entry, shapes) for name, entry in entries_of(model, path))
    inside = readable(path)
    return tuple((one.name, one.stands_for.replace(inside, ""), one.shape) for one in found)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, as in "0-2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
