"""Everything that the numbers of a harvest depend on: the content of `harvest.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from insitu.harvest.layout import FORMAT

Reduction = Literal["last", "mean"] | tuple[int, ...] | None
"""The rows of a sequence: its last position, the mean over all, some positions (from the end if
negative), or, if None, every position."""


class SiteSpecification(msgspec.Struct, frozen=True, kw_only=True):
    """A site of a harvest.

    Attributes:
        label: what it is called in the folder, and how it was asked for: "residual_out:6".
        shape: the shape of one row, without the axis of positions; of sparse features `(k,)`.
        dtype: of the stored values, such as "bfloat16".
        model_dtype: of the values that arrive at the site in the run.
        features: how many features there are, of a site that keeps the k largest; else None.
        dictionary: the digest of the sparse autoencoder that makes them; else None.
        metric: of a gradient, the name of the metric; else None.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    model_dtype: str
    features: int | None = None
    dictionary: str | None = None
    metric: str | None = None


class DataSpecification(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a harvest.

    Attributes:
        name: what it was called: an id, a path's last part, or the type of an iterable.
        split: of a data set of several.
        column: the column with texts or token ids.
        revision: of a data set from the Hub.
        digest: of its content where that can be told before it is read; else None, and the
            manifest's digests of what was read tell whether it is the same.
    """

    name: str
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    digest: str | None = None


class Specification(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.

    Attributes:
        model: the name of the model.
        model_fingerprint: the digest of its structure, its edits and all of its weights.
        tokenizer: the digest of the tokenizer; None of a model without one.
        data: the data.
        sites: the sites.
        context: how many tokens a sequence has at most.
        pack: whether documents are put one behind the other, so that each sequence is full.
        bos: whether each sequence begins with the model's own first token.
        separator: the token between packed documents; None for none.
        reduce: which rows of a sequence are kept.
        tokens: how many tokens the model is given in all; None for all of the data.
        batch_tokens: how many tokens a batch has at most. Batches never depend on the machine's
            memory, so that a harvest that goes on gives the same bits.
        shard_tokens: how many tokens a shard is made of, at most one sequence more.
        insitu: the version of Insitu.
        torch: the version of PyTorch.
        transformers: the version of Transformers.
        device: the kind of device that the model is on, such as "cpu".
        format: the version of the folder's layout.
    """

    model: str
    model_fingerprint: str
    tokenizer: str | None
    data: DataSpecification
    sites: tuple[SiteSpecification, ...]
    context: int
    pack: bool
    bos: bool
    separator: int | None
    reduce: Reduction
    tokens: int | None
    batch_tokens: int
    shard_tokens: int
    insitu: str
    torch: str
    transformers: str
    device: str
    format: int = FORMAT


def differences(one: Specification, other: Specification) -> Iterator[tuple[str, Any, Any]]:
    """Yields the fields in which two specifications differ, with both values.

    Fields of parts are named with their path: "data.revision", "sites.residual_out:6.dtype".
    """
    yield from _different("", msgspec.to_builtins(one), msgspec.to_builtins(other))


def _different(path: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if path == "sites":
        one, other = ({site["label"]: site for site in sites} for sites in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            name = f"{path}.{key}" if path else key
            yield from _different(name, one.get(key), other.get(key))
    elif one != other:
        yield path, one, other
