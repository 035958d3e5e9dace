"""What passes cost: counted floating-point operations, and what every pass costs besides.

A pass reads all weights and calls all modules, however few tokens it has. That is expressed here
in the operations that could be done in the same time, so that everything is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs, in floating-point operations.

    Attributes:
        blocks: how many blocks it has.
        token: in one block, for each token.
        pair: in one block, for each pair of a position and one that it attends to.
        moved: in one block, for each token: what takes as long as moving its values through memory
            where nothing is multiplied with weights, as activation functions and norms do.
        scored: in one block, for each pair: the same for pairs, as in softmax.
        block: for each call of a block, for any number of tokens: operations that take as long.
        call: for each pass, outside of its blocks: operations that take as long.
        unembedding: for each token whose logits are made.
    """

    blocks: int
    token: float
    pair: float
    moved: float
    scored: float
    block: float
    call: float
    unembedding: float

    def flops(self, rows: Sequence[int], queries: int, keys: int, unembedded: int) -> float:
        """Returns the floating-point operations of a pass.

        Args:
            rows: how many rows each block that runs has.
            queries: the positions that are computed of each row.
            keys: the positions that they attend to.
            unembedded: how many positions in all become logits.
        """
        return sum(rows) * queries * (self.token + self.pair * keys) + unembedded * self.unembedding

    def work(self, rows: Sequence[int], queries: int, keys: int, unembedded: int) -> float:
        """Returns what takes as long as the tokens of a pass. Args as `flops`."""
        moving = sum(rows) * queries * (self.moved + self.scored * keys)
        return moving + self.flops(rows, queries, keys, unembedded)

    def time(self, rows: Sequence[int], queries: int, keys: int, unembedded: int) -> float:
        """Returns what takes as long as a pass. Args as `flops`."""
        calls = self.call + len(rows) * self.block
        return calls + self.work(rows, queries, keys, unembedded)
