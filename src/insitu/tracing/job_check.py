"""`JobCheck`: what a job would give and what it would take, found out without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from insitu.batching.summary import Planned
from insitu.display.saved_values import SavedValue
from insitu.engine.results import structure


@dataclass(frozen=True, slots=True)
class Expected:
    """A saved value, before there is one.

    Attributes:
        shape: the size of the tensor, or sizes in the structure of a nested value; None if that is
            not known before the run.
        dtype: its dtype, or dtypes in the structure of the value; likewise.
        bytes: how many bytes it takes; likewise.
        reason: why something of it is not known, or what it is an estimate of; "" if it is certain.
    """

    shape: Any
    dtype: Any
    bytes: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that is not certain.

    Attributes:
        value: the number.
        how: how it was made, and what it leaves out.
    """

    value: float
    how: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class JobCheck:
    """What a job would give and what it would take: what `model.check(job)` returns.

    Attributes:
        results: each saved value, by name.
        plans: how each block would run: its passes, and what each leaves out.
        model_flops: floating-point operations of the model's passes.
        graph_flops: floating-point operations of what was recorded.
        peak_bytes: the most memory that is in use at once, the weights included.
        weight_bytes: the memory of the weights.
        differences: how the model differs from the one that the job was made for.
    """

    results: Mapping[str, Expected]
    plans: Sequence[Planned]
    model_flops: Estimate
    graph_flops: Estimate
    peak_bytes: Estimate
    weight_bytes: int
    differences: Sequence[str]

    @property
    def passes(self) -> int:
        """How many passes of the model all blocks take together."""
        return sum(len(plan.passes) for plan in self.plans)

    @property
    def flops(self) -> float:
        """Floating-point operations of the model and of what was recorded."""
        return self.model_flops.value + self.graph_flops.value

    @property
    def result_bytes(self) -> int | None:
        """How many bytes all results have, None if that of one is not known."""
        found = [expected.bytes for expected in self.results.values()]
        return None if None in found else sum(size for size in found if size is not None)

    def described(self, saves: Mapping[str, str]) -> list[SavedValue]:
        """Returns what each saved value would be.

        Args:
            saves: the expression that each was saved of: `job.saves`.
        """
        return [
            SavedValue(
                name,
                saves.get(name, ""),
                structure(one.shape),
                structure(one.dtype),
                one.bytes,
                one.reason,
            )
            for name, one in self.results.items()
        ]

    def lines(self) -> list[str]:
        """Returns what it would take, a line for each number."""
        estimates = (
            ("model", self.model_flops, 1e9, "GFLOP"),
            ("recorded lines", self.graph_flops, 1e9, "GFLOP"),
            ("memory", self.peak_bytes, 2**20, "MiB at the peak"),
        )
        return [
            f"{self.passes} pass{'es' * (self.passes != 1)}; nothing was run",
            *(
                f"{what}: {one.value / unit:,.4g} {name} ({one.how})"
                for what, one, unit, name in estimates
            ),
            *(f"another model: {what}" for what in self.differences),
        ]

    def numbers(self) -> dict[str, Any]:
        """Returns what it would take as plain data."""
        return {
            "passes": self.passes,
            "result_bytes": self.result_bytes,
            "weight_bytes": self.weight_bytes,
            "model_flops": asdict(self.model_flops),
            "graph_flops": asdict(self.graph_flops),
            "peak_bytes": asdict(self.peak_bytes),
            "differences": [*self.differences],
        }

    def __repr__(self) -> str:
        values = [
            f"  {one.name}: {one.dtype} {one.shape}, "
            f"{'?' if one.bytes is None else f'{one.bytes:,}'} bytes"
            f"{f' ({one.note})' if one.note else ''}"
            for one in self.described({})
        ]
        return "\n".join([*self.lines(), *values])
