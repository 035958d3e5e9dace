"""Which values of a run are kept: from names, paths, patterns and functions to sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.models.keys import COMPUTED, doubles, entry_of, keys, spelled
from insitu.models.transformer_lens import OF_MODEL, TransformerLens
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Missing, Vocabulary

Filter: TypeAlias = str | re.Pattern[str] | Callable[[str], bool]
Filters: TypeAlias = Filter | Iterable[Filter] | None


def select(
    filters: Filters,
    vocabulary: Vocabulary,
    hooks: TransformerLens,
    modules: Collection[str] = (),
) -> dict[str, Named]:
    """Returns the values that are meant, by key.

    Args:
        filters: the names, patterns and functions: see `LanguageModel.run_with_cache`.
        vocabulary: the model's standard names.
        hooks: its TransformerLens names.
        modules: the paths of its modules, which stand for their outputs.

    Raises:
        OptionError: if a name is none of the model, or a pattern is of no name at all.
    """
    known = list(keys(vocabulary))
    double = doubles(vocabulary)
    if filters is None:
        wanted = [key for key in known if key not in double and not key.endswith(COMPUTED)]
        return _there(wanted, lambda key: entry_of(vocabulary, key))
    chosen: dict[str, Named] = {}
    single = isinstance(filters, str | re.Pattern) or callable(filters)
    listed = single or isinstance(filters, Iterable)
    for one in cast("Iterable[Filter]", filters if listed and not single else [filters]):
        if isinstance(one, str) and one in modules and entry_of(vocabulary, one) is None:
            chosen[one] = Named(one, "output")
            continue
        if isinstance(one, str) and not set(one) & set("*?["):
            within = spelled(one) or hooks.spelled(one)
            if within is None:
                name = f"hook_{one}" if f"hook_{one}" in OF_MODEL else one
                chosen[name] = _named(name, vocabulary, hooks, known)
                continue
            one = f"blocks.*.{within}"
        matches = _matcher(one)
        asked = "block_out" in str(getattr(one, "pattern", one))
        found = [key for key in known if matches(key) and (asked or key not in double)]
        chosen |= _there(found, lambda key: entry_of(vocabulary, key))
        if not found:
            found = [name for name in hooks.names() if matches(name)]
            chosen |= _there(found, hooks.entry)
        if not found:
            found = [path for path in modules if path and matches(path)]
            chosen |= {path: Named(path, "output") for path in found}
        if not found and isinstance(one, str | re.Pattern):
            text = one if isinstance(one, str) else one.pattern
            raise OptionError(f"No value has a name like {text!r}{nearest(text, known)}.", here())
        if not found:
            raise OptionError(
                "A function of `names` is true of no name: they are standard names, such as "
                f"{known[0]!r}, and TransformerLens's, such as 'blocks.0.hook_resid_pre'.",
                here(),
            )
    return chosen


def _there(wanted: Sequence[str], entry: Callable[[str], Entry | None]) -> dict[str, Named]:
    """Those that the model has."""
    entries = {key: entry(key) for key in wanted}
    return {key: found for key, found in entries.items() if isinstance(found, Named)}


def _named(
    name: str, vocabulary: Vocabulary, hooks: TransformerLens, known: Sequence[str]
) -> Named:
    """What one name stands for."""
    entry = entry_of(vocabulary, name)
    if entry is None:
        entry = hooks.entry(name)
    if isinstance(entry, Named):
        return entry
    if isinstance(entry, Missing):
        raise OptionError(f"The model has no `{name}`: {entry.reason}", here())
    from insitu.models.spellings import word_instead  # only errors ask for it

    near = "" if name.startswith("blocks.") else word_instead(name)
    near = near or (hooks.near(name) if "hook" in name else nearest(name, known))
    raise OptionError(f"No value of the model is called {name!r}{near}.", here())


def _matcher(one: Filter) -> Callable[[str], object]:
    if isinstance(one, str):
        return lambda key: fnmatchcase(key, one)
    if isinstance(one, re.Pattern):
        return one.search
    if callable(one):
        return one
    raise OptionError(
        "`names` are strings, patterns such as 'blocks.*.attention.z', compiled regular "
        f"expressions or functions of a name, not {one!r}.",
        here(),
    )
