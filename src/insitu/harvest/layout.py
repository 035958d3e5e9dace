"""What a folder of activations looks like on disk: its files, their tensors, and its manifest.

- `harvest.json`: the specification, everything that the numbers depend on
- `manifest.jsonl`: one line for each shard that is complete
- `shards/00042.safetensors`: activations of consecutive sequences, and where they come from
- `lock`: held by the one process that writes

A shard counts once its line is in the manifest, and never before. Any other shard in the folder
was left by a process that ended early, and the next one removes it.
"""

from __future__ import annotations

import msgspec

FORMAT = 1
"""The version of this layout. A folder of another is refused."""

SPECIFICATION = "harvest.json"
MANIFEST = "manifest.jsonl"
SHARDS = "shards"
LOCK = "lock"

# Tensors of a shard that each row has, `(rows,)`. A row is a position of a sequence, or what was
# made of all of its positions.
TOKEN_IDS = "token_ids"
"""int32: the token at that position; -1 for a row that was made of several."""
SEQUENCE = "sequence"
"""int64: the sequence that the model was given, counted from 0 over the whole folder."""
POSITION = "position"
"""int32: the position in it, from 0; -1 for a row that was made of several."""
DOCUMENT = "document"
"""int64: the row of the data that the token comes from, from 0. Packed sequences have several."""

ROW_TENSORS = (TOKEN_IDS, SEQUENCE, POSITION, DOCUMENT)

# Beside these a shard has one tensor for each site, under the site's label, `(rows, *shape)`; of a
# site that keeps the largest features only, two, `(rows, k)`:
VALUES, INDICES = "values", "indices"
"""Endings: `"<label>/values"` holds features, `"<label>/indices"` (int32) says which they are."""

# And, for statistics that no reader has to make again, of each dense site:
SUM, NORM_SUM, SQUARE_SUM = "sum", "norm_sum", "square_sum"
"""Endings, float64: `"<label>/sum"` `(*shape)`, `"<label>/norm_sum"` `()` of the rows' Euclidean
norms, `"<label>/square_sum"` `()` of their squares."""


def shard_name(number: int) -> str:
    """Returns the file of a shard, relative to the folder."""
    return f"{SHARDS}/{number:05}.safetensors"


class Place(msgspec.Struct, frozen=True):
    """A place in the data, between two tokens.

    Attributes:
        document: a row of the data, from 0.
        token: how many of its tokens come before the place.
    """

    document: int
    token: int = 0


class Skipped(msgspec.Struct, frozen=True):
    """A row of the data that could not be used.

    Attributes:
        document: which row, from 0.
        reason: why not.
    """

    document: int
    reason: str


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the manifest: a shard that is complete.

    Attributes:
        shard: its number, from 0.
        rows: how many rows it has.
        tokens: how many tokens the model was given for it.
        first_sequence: the number of its first sequence.
        sequences: how many sequences it is made of.
        start: where its part of the data begins.
        stop: where that ends, and the next one begins.
        source: the digest of the token ids of its sequences: whether the data is still the same.
        skipped: what was skipped in its part of the data.
        bytes: the size of its file.
        sha256: the digest of its file.
        last: whether nothing comes behind it.
    """

    shard: int
    rows: int
    tokens: int
    first_sequence: int
    sequences: int
    start: Place
    stop: Place
    source: str
    skipped: tuple[Skipped, ...]
    bytes: int
    sha256: str
    last: bool = False
