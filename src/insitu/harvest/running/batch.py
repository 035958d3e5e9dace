"""One batch of a harvest: a forward of the model, and the kept values of its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.running.metrics import MetricFunction
from insitu.harvest.running.sites import HarvestSite
from insitu.harvest.specification import Reduction
from insitu.models.language_model import LanguageModel
from insitu.models.tokens import vocabulary_of

_FEATURES = 1 << 25  # numbers that an autoencoder makes at once: 128 MiB of float32
_TRIAL = 8  # tokens of each of two prompts that show whether prompts share a forward

Kept = dict[str, torch.Tensor]
"""Tensors of one group by their names in a shard, `(sequence, row, ...)`."""


@dataclass(frozen=True, slots=True)
class Taking:
    """The values that are kept of each forward.

    Attributes:
        model: the model.
        sites: the sites.
        dtypes: the dtype that is stored, by label.
        reduce: which rows of a sequence are kept.
        metric: the metric whose gradients are kept; None if there are none.
        most_tokens: how many tokens a forward has at most.
        apart: whether each row has to be an invocation of its own, because the model does not
            keep the rows of a batch apart by itself.
    """

    model: LanguageModel
    sites: Sequence[HarvestSite]
    dtypes: Mapping[str, torch.dtype]
    reduce: Reduction
    metric: MetricFunction | None
    most_tokens: int
    apart: bool

    def run(self, groups: Sequence[torch.Tensor]) -> list[Kept]:
        """Runs a batch, and returns the kept values of each group.

        Args:
            groups: token ids of sequences of one length, `(sequence, position)`.
        """
        if not self.apart:
            return self._run(groups)
        rows = [row[None] for group in groups for row in group]
        each = iter(self._run(rows))
        joined = list[Kept]()
        for group in groups:
            own = [next(each) for _ in group]
            joined.append({name: torch.cat([one[name] for one in own]) for name in own[0]})
        return joined

    def operations(self, groups: Sequence[torch.Tensor]) -> float:
        """Returns how many floating-point operations a batch takes. It is not run.

        Args:
            groups: as of `run`.
        """
        with self.model.scan() as tracer:
            for group in groups:
                with tracer.invoke(group):
                    self._record(group)
        return sum(one.flops for one in tracer.plan.passes)

    def _run(self, groups: Sequence[torch.Tensor]) -> list[Kept]:
        model = self.model
        saved = list[dict[Any, Any]]()
        if len(groups) == 1:
            # A batch of one length is one prompt: nothing has to be put together or cut apart.
            with model.trace(groups[0]):
                saved.append(self._record(groups[0]))
        else:
            # Prefixes would be shared where that is thought to be faster, which depends on more
            # than the specification.
            most = max(self.most_tokens, sum(map(len, groups)) * max(g.shape[1] for g in groups))
            with model.trace(max_tokens_per_pass=most, share_prefixes=False) as tracer:
                for group in groups:
                    with tracer.invoke(group):
                        saved.append(self._record(group))
        return [self._kept(one) for one in saved]

    def _record(self, group: torch.Tensor) -> dict[Any, Any]:
        """Records the reads of one group, by label, or by place for an autoencoder."""
        model, values, wanted = self.model, dict[Any, Any](), dict[Any, Any]()
        for site in self.sites:
            if site.place not in values:
                values[site.place] = site.place.read(model)
        if any(site.gradient for site in self.sites):
            assert self.metric is not None
            self.metric(model.logits, group.to(model.device)).backward()
        for site in self.sites:
            value = values[site.place].grad if site.gradient else values[site.place]
            value = site.place.arranged(value)
            if site.sae is not None:
                # Its features are made behind the run: in it, its weights would be a part of
                # every experiment.
                if site.place not in wanted:
                    reduce = None if self.reduce == "mean" else self.reduce
                    wanted[site.place] = reduced(value, reduce, group.shape[1]).save()
                continue
            dtype = self.dtypes[site.label]
            value = reduced(value, self.reduce, group.shape[1], dtype).to(dtype)
            wanted[site.label] = value.save(to="cpu")
        return wanted

    def _kept(self, saved: Mapping[Any, Any]) -> Kept:
        kept: Kept = {}
        for site in self.sites:
            if site.sae is None:
                kept[site.label] = saved[site.label].value
                continue
            values, indices = largest(site, saved[site.place].value, self.reduce == "mean")
            kept[f"{site.label}/values"] = values.to(self.dtypes[site.label]).cpu()
            kept[f"{site.label}/indices"] = indices.to(torch.int32).cpu()
        return kept


def reduced(value: Any, reduce: Reduction, length: int, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the rows to keep of values `(sequence, position, ...)`, `(sequence, row, ...)`.

    Args:
        value: the values. They may be a proxy.
        reduce: which rows are kept.
        length: how many positions there are.
        dtype: that of the rows. A mean is taken in float32 at least.
    """
    if reduce is None:
        return value
    if reduce == "last":
        return value[:, -1:]
    if reduce == "mean":
        # The mean of a thousand numbers of bfloat16 would have three digits.
        return value.to(torch.promote_types(dtype, torch.float32)).mean(1, keepdim=True)
    return value[:, positions_in(reduce, length)]


def positions_in(reduce: tuple[int, ...], length: int) -> list[int]:
    """Returns which of some positions a sequence has, from 0.

    Args:
        reduce: the positions, from the end if negative.
        length: how many there are.
    """
    return [one % length for one in reduce if -length <= one < length]


def largest(
    site: HarvestSite, values: torch.Tensor, mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest features of activations and which they are, `(sequence, row, k)`.

    Args:
        site: the site, of a sparse autoencoder.
        values: its activations, `(sequence, position, width)`.
        mean: whether features are averaged over positions.
    """
    sae = site.sae
    assert sae is not None
    with torch.no_grad():
        if mean:
            whole = torch.stack([_mean_features(site, one) for one in values])[:, None]
            found = whole.topk(site.k, dim=-1)
            return found.values, found.indices
        rows = values.flatten(0, 1)
        step = max(1, _FEATURES // sae.n_features)
        parts = [sae.encode(part).topk(site.k, dim=-1) for part in rows.split(step)]
        shape = (*values.shape[:2], site.k)
        found = [torch.cat([part[at] for part in parts]).reshape(shape) for at in (0, 1)]
        return found[0], found[1]


def _mean_features(site: HarvestSite, rows: torch.Tensor) -> torch.Tensor:
    assert site.sae is not None
    step = max(1, _FEATURES // site.sae.n_features)
    sums = [site.sae.encode(part).float().sum(0) for part in rows.split(step)]
    return torch.stack(sums).sum(0) / len(rows)


def keeps_rows_apart(model: LanguageModel, sites: Sequence[HarvestSite]) -> bool:
    """Returns whether a model gives each row of a batch what it would have alone.

    Insitu finds that out by value before it lets prompts share a forward.

    Args:
        model: the model, with its weights.
        sites: the sites.
    """
    limit = model.traits.reader.limits.context or _TRIAL
    vocabulary = vocabulary_of(model.module, model.config)
    ids = torch.arange(min(_TRIAL, limit))[None] % 4
    with model.trace(share_prefixes=False) as tracer:
        for shift in (0, 1):
            with tracer.invoke((ids + shift) % vocabulary):
                for site in sites:
                    site.place.read(model).save()
    return len(tracer.plan.passes) == 1


def check_reduction(given: Any) -> Reduction:
    """Returns `reduce` as it is stored: a position becomes a tuple.

    Args:
        given: None, "last", "mean", a position or several.

    Raises:
        OptionError: if it is none of these.
    """
    if given is None or given in ("last", "mean"):
        return given
    numbers = [given] if isinstance(given, int) else given
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if listed and numbers and all(type(one) is int for one in numbers):
        return tuple(numbers)
    raise OptionError(
        f"`reduce` is 'last', 'mean', or positions such as (-1, -2), not {given!r:.80}.", here()
    )
