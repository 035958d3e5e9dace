"""What has to hold at the end: the unembedding of the last residual gives the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from insitu.display.report import Check
from insitu.models.anatomy.between import SCALES, between
from insitu.models.checking.outcomes import listed, not_checked, said, unread
from insitu.models.checking.run import Run, applied
from insitu.models.proof import identities
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Missing, Role

LOGITS = "the last residual gives the logits"


def check_of_logits(run: Run) -> Iterator[Check]:
    """Yields whether the last residual gives the logits.

    Args:
        run: the run.
    """
    entries = run.entries[""]
    head, norm, logits = (entries.get(key) for key in ("unembedding", "final_norm", "logits"))
    for entry in (head, logits):
        if isinstance(entry, Missing) or not run.blocks:
            why = entry.reason if isinstance(entry, Missing) else "it has no list of blocks."
            yield not_checked(LOGITS, "model", why)
            return
    assert isinstance(head, Role) and isinstance(logits, Named)
    keys = ("last", "unembedding.input", "unembedding.output", "logits")
    missing = unread(run, LOGITS, "", *keys)
    if missing:
        yield missing
        return
    last, given, made, shown = (run.values["", key] for key in keys)
    stands = _between_last_block_and_head(run, norm, head)
    if stands:
        yield not_checked(LOGITS, head.path, f"what stands between them: {listed(stands)}.")
        return
    normed = applied(run, norm.path, last) if isinstance(norm, Role) else last
    times = identities.proportion(given, normed) if given.shape == normed.shape else 1.0
    notes = [] if abs(times - 1) < 1e-2 else [f"scaled by {times:.3g} before it is unembedded"]
    expected = applied(run, head.path, (normed * times if notes else normed).to(given.dtype))
    size = expected.abs().amax(-1, keepdim=True)
    found = identities.compared(made, expected, size, (last, given, made))
    if shown.shape == made.shape and not torch.equal(shown.float(), made.float()):
        notes.append("scaled or capped afterwards")
        rises = identities.rising(shown, made)
        found = found if rises.is_rounding else rises
    yield said(LOGITS, head.path, found, " and ".join(notes))


def _between_last_block_and_head(run: Run, norm: Entry | None, head: Role) -> list[str]:
    """What changes numbers there, but for the final norm and a scale."""
    flow = run.flow
    last = [flow.events[index].outputs[0] for index in flow.calls(run.blocks[-1][-1])]
    calls = [flow.events[index] for index in flow.calls(head.path)]
    if not last or not calls:
        return ["a way that is not known"]
    way = between(flow, last, calls[-1].inputs[0])
    if way is None:
        return ["a way that is not known"]
    own = norm.path if isinstance(norm, Role) else None
    others = [one for one in way if own is None or not _is_within(one, own)]
    return [one for one in others if one.partition(">")[2] not in SCALES]  # see `proportion`


def _is_within(one: str, path: str) -> bool:
    owner = one.partition(">")[0]
    return owner == path or owner.startswith(f"{path}.")
