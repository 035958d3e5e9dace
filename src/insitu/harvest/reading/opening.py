"""What a folder of activations says of itself: its specification and manifest, read and checked.

No shard is opened here: see `mapped_shard`. The folder may come from anybody.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import torch

from insitu import disk
from insitu.graph.errors import LoadError
from insitu.graph.location import here
from insitu.harvest.layout import (
    FORMAT,
    INDICES,
    MANIFEST,
    NORM_SUM,
    ROW_TENSORS,
    SPECIFICATION,
    SQUARE_SUM,
    SUM,
    VALUES,
    Line,
)
from insitu.harvest.specification import SiteSpecification, Specification

_LARGEST = 16 * 2**20
"""How many bytes a specification may have."""
_LARGEST_MANIFEST = 2**30
"""How many bytes a manifest may have: some millions of shards."""
_TOO_LARGE = 2**63
"""PyTorch has no tensor of so many bytes."""

DTYPES = {
    **{f"float{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)},
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""The dtypes that a site may be stored in, by the names in a specification."""

Told = TypeVar("Told")


class _Version(msgspec.Struct):
    """The field that says how the others are to be read."""

    format: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder says of itself.

    Attributes:
        specification: everything that the numbers depend on.
        lines: the lines of the manifest, of shard 0, 1, 2 and so on.
    """

    specification: Specification
    lines: tuple[Line, ...]

    @property
    def complete(self) -> bool:
        """Whether the harvest has come to its end."""
        return bool(self.lines) and self.lines[-1].last


def read_contents(folder: str | os.PathLike[str]) -> Contents:
    """Returns what a folder says of itself.

    Args:
        folder: the folder.

    Raises:
        LoadError: if it is no folder of activations, or one that is broken or of another version.
    """
    path = Path(folder)
    specification = _specification(path / SPECIFICATION)
    row = sum(
        math.prod(shape) * dtype.itemsize
        for site in specification.sites
        for dtype, shape in tensors_of_site(site).values()
    )
    return Contents(specification, _lines(path / MANIFEST, max(row, 1)))


def tensors_of_site(site: SiteSpecification) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns the tensors that a site has in each shard, with the dtype and shape of one row."""
    dtype = DTYPES[site.dtype]
    if site.features is None:
        return {site.label: (dtype, site.shape)}
    return {
        f"{site.label}/{VALUES}": (dtype, site.shape),
        f"{site.label}/{INDICES}": (torch.int32, site.shape),
    }


def sums_of_site(site: SiteSpecification) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns the sums that a dense site has in each shard, with their dtypes and shapes."""
    if site.features is not None:
        return {}
    shapes = {SUM: site.shape, NORM_SUM: (), SQUARE_SUM: ()}
    return {f"{site.label}/{name}": (torch.float64, shape) for name, shape in shapes.items()}


def _specification(path: Path) -> Specification:
    # Not those of `pathlib`, which raise on names that are too long.
    if not os.path.isdir(path.parent):
        raise LoadError(f"There is no folder {os.fspath(path.parent)!r}.", here())
    if not os.path.lexists(path):
        raise LoadError(
            f"{os.fspath(path.parent)!r} is no folder of activations: it has no {SPECIFICATION}, "
            "which `insitu harvest` writes.",
            here(),
        )
    data = disk.read(path, _LARGEST)
    version = _decoded(path, data, _Version).format
    if version != FORMAT:
        raise LoadError(
            f"{os.fspath(path)!r} is of version {version}, and this Insitu reads {FORMAT}.", here()
        )
    specification = _decoded(path, data, Specification)
    names = [*ROW_TENSORS]
    for site in specification.sites:
        _check_site(path, site)
        names += [*tensors_of_site(site), *sums_of_site(site)]
    if not specification.sites:
        _refuse(path, "it has no sites")
    if len(set(names)) < len(names):
        _refuse(path, "two of its tensors would have one name")
    return specification


def _check_site(path: Path, site: SiteSpecification) -> None:
    said = f"its site {site.label[:100]!r}"
    if site.dtype not in DTYPES:
        _refuse(path, f"{said} has the dtype {site.dtype[:40]!r}")
    if len(site.shape) > 16 or any(not 0 <= size < _TOO_LARGE for size in site.shape):
        _refuse(path, f"{said} has an impossible shape")
    if math.prod(max(size, 1) for size in site.shape) * 8 >= _TOO_LARGE:
        _refuse(path, f"{said} has an impossible shape")
    if site.features is not None and not (
        len(site.shape) == 1 and 0 < site.shape[0] <= site.features < 2**31
    ):
        _refuse(path, f"{said} keeps {list(site.shape)} of {site.features} features")


def _lines(path: Path, row: int) -> tuple[Line, ...]:
    """The lines of a manifest. A row of all sites has so many bytes."""
    if not os.path.lexists(path):  # a harvest that has just begun
        return ()
    # What stands behind the last end of a line was torn off in the middle of being written.
    data = disk.read(path, _LARGEST_MANIFEST).split(b"\n")[:-1]
    lines: list[Line] = []
    sequences = size = 0
    for number, text in enumerate(data):
        line = _decoded(path, text, Line, f"line {number + 1} of ")
        if line.shard != number:
            _refuse(path, f"line {number + 1} is of shard {line.shard}, not {number}")
        if line.first_sequence != sequences:
            _refuse(path, f"shard {number} does not begin with sequence {sequences}")
        if min(line.rows, line.tokens, line.sequences, line.bytes) < 0:
            _refuse(path, f"a size of shard {number} is negative")
        if max(line.rows * row, line.sequences, 1) > line.bytes:
            _refuse(path, f"the rows of shard {number} would not fit into its file")
        if lines and lines[-1].last:
            _refuse(path, f"shard {number} comes behind the last one")
        sequences, size = sequences + line.sequences, size + line.bytes
        lines.append(line)
    if size >= _TOO_LARGE:
        _refuse(path, "its files would be larger than any disk")
    return tuple(lines)


def _decoded(path: Path, data: bytes, wanted: type[Told], part: str = "") -> Told:
    try:
        return msgspec.json.decode(data, type=wanted)
    # `ValueError` is that of text which is no UTF-8; deep nesting is a `RecursionError`.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason: Any = str(error) or type(error).__name__
        raise LoadError(f"{part}{os.fspath(path)!r} cannot be read: {reason}", here()) from None


def _refuse(path: Path, why: str) -> NoReturn:
    raise LoadError(f"{os.fspath(path)!r} cannot be used: {why}.", here())
