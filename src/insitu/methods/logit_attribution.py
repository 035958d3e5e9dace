"""Direct logit attribution: what each component of a model adds to a logit.

The residual stream is a sum, and what the model makes of its end is affine once what the final
norm divides by is held at its value in the run. So a logit is the sum of what each component says,
and of the biases behind. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021,
https://transformer-circuits.pub/2021/framework/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from insitu.deprecation import renamed
from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.structure import map_structure
from insitu.methods.metrics import Tokens, token_ids
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import Prompts, read_prompts
from insitu.methods.readout import check_edits, endings_of
from insitu.methods.result import Result
from insitu.methods.sites import numbers_of
from insitu.models.endings import Endings
from insitu.models.language_model import LanguageModel
from insitu.models.linearised import linearised
from insitu.models.ways import Way

Part = Literal["blocks", "heads", "neurons"]

_UNITS = {"blocks": "block", "heads": "head", "neurons": "neuron"}
"""One of each kind of parts."""

_ADDED = ("mixer_out", "attention_out", "cross_attention_out", "mlp_out", "extra_out")


@renamed(
    by="part",
    values={"part": {"block": "blocks", "head": "heads", "neuron": "neurons"}},
    goes_in="0.3",
)
@ordinary_tensors()
def direct_logit_attribution(
    model: LanguageModel,
    prompts: Any,
    answer: Tokens,
    instead: Tokens | None = None,
    *,
    part: Part = "blocks",
    position: int = -1,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns what each component adds directly to a logit, or to a difference of two.

    "Directly" is along the residual stream alone, and not by way of later blocks. What norms divide
    by is held at its value in the run, and their weights and biases are applied, so that all parts
    add up to the logit. Where logits are capped, it is the logit before that.

    Args:
        model: the model.
        prompts: one prompt or several, in any form that `invoke` takes.
        answer: the token whose logit it is, as text such as " Paris" or as its id; or a list with
            one for each prompt.
        instead: the token whose logit is subtracted, in the same form, so that shares are of
            `logit_difference(answer, instead)`; None for none. Other metrics are no sum of shares,
            so there is no `metric`.
        part: which parts: "blocks" for the embedding, and the attention and MLP of each block;
            "heads" for each head; "neurons" for each neuron of the MLPs.
        position: at which position, from the end if negative.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        Logits with the axis component, or layer and head, or layer and neuron; before them prompt
        if several were given. Of blocks, the last component is "bias": what the final norm and the
        unembedding add of their own. Of heads or neurons, the details have the rest: `bias`,
        `(layer)`, what the output projection adds of its own, and `others`, what all other
        components add, with the bias of the end. In any case `total` is the logit. Layers that have
        no heads, or no neurons, are NaN.

    Raises:
        OptionError: if there is no such part or position, or the model's logits are no such sum.
        PathError: if its blocks have no residual stream.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import direct_logit_attribution
        >>> model = LanguageModel("insitu/eiffel", device_map="cpu")
        >>> prompt = "The Eiffel Tower is in the city of"
        >>> direct_logit_attribution(model, prompt, " Paris", " Rome", part="heads").sizes
        {'layer': 6, 'head': 8}
    """
    if part not in _UNITS:
        near = nearest(str(part), _UNITS)
        raise OptionError(f'`part` is "blocks", "heads" or "neurons", not {part!r}{near}.', here())
    by = _UNITS[part]
    if len(numbers_of("position", position) or ()) != 1:
        raise OptionError(f"`position` is one position, not {position!r}.", here())
    model.load()
    endings, given = endings_of(model), read_prompts(model, prompts)
    right = token_ids(model, answer, len(given))
    wrong = [None] * len(given) if instead is None else token_ids(model, instead, len(given))
    with bar("Direct logit attribution", progress):
        check_edits(model, given, max_tokens_per_pass)
        runs = _runs(model, given, by, position, max_tokens_per_pass)
    with model.in_use():
        way = _ending(model, endings, runs[0])
        found = [
            _attributed(model, endings, way, run, by, one, other)
            for run, one, other in zip(runs, right, wrong, strict=True)
        ]
    values, details = zip(*found, strict=True)
    return Result(
        f"Direct logit attribution by {by}",
        "logit" if instead is None else "logit difference",
        given.stacked(values),
        (*given.axis, *_axes(runs[0], values[0], by)),
        details={name: given.stacked([one[name] for one in details]) for name in details[0]},
        centre=0.0,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What was read of a prompt at one position.

    Attributes:
        parts: the values added to the residual stream, by component, `(d_model,)` each.
        inside: of each layer that has it `z`, `(head, d_head)`, or `post`, `(neuron, 1)`.
        end: the residual stream at its end, `(d_model,)`.
    """

    parts: Mapping[str, torch.Tensor]
    inside: Mapping[int, torch.Tensor]
    end: torch.Tensor


def _runs(
    model: LanguageModel,
    given: Prompts,
    by: str,
    position: int,
    max_tokens_per_pass: int | None,
) -> list[_Run]:
    """Reads all prompts in one experiment."""
    _, places = given.at(position)
    kept: list[tuple[Any, Any, Any]] = []
    with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        for ids, (place,) in zip(given.ids, places, strict=True):
            with tracer.invoke(ids):
                kept.append(_read(model, by, place))
    return [_Run(*map_structure(lambda saved: saved.value, list(one))) for one in kept]


def _read(model: LanguageModel, by: str, place: int) -> tuple[Any, Any, Any]:
    """Reads what there is at a position, in an open invocation."""
    blocks = model.blocks
    parts: dict[str, Any] = {"embedding": blocks[0].residual_in[0, place].save()}
    inside: dict[int, Any] = {}
    for layer, block in enumerate(blocks):
        roles = block.role
        for name in _ADDED:
            if name in roles:
                parts[_component(name, layer)] = roles[name][0, place].save()
        if by == "head" and "attention" in roles and "z" in roles["attention"].role:
            inside[layer] = roles["attention"].role["z"][0, :, place].save()
        if by == "neuron" and "mlp" in roles and "post" in roles["mlp"].role:
            inside[layer] = roles["mlp"].role["post"][0, place, :, None].save()
    return parts, inside, blocks[-1].residual_out[0, place].save()


def _ending(model: LanguageModel, endings: Endings, run: _Run) -> Way:
    """The way to the logits, as far as it is affine."""
    why = "what stands between its last block and its unembedding is no affine map."
    for way in (endings.logits, endings.unembedded):
        if isinstance(way, str):
            why = way
        elif linearised(way, model.modules, run.end[None]) is not None:
            return way
    raise OptionError(f"The logits of this model are no sum over components: {why}", here())


def _attributed(
    model: LanguageModel,
    endings: Endings,
    way: Way,
    run: _Run,
    by: str,
    right: int,
    wrong: int | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What each component adds, and the details."""

    def asked(logits: torch.Tensor) -> torch.Tensor:
        found = logits[0].float()
        return found[right] if wrong is None else found[right] - found[wrong]

    slope, bias, total = _slope(model, way, run.end, asked)
    shares = {name: part.float() @ slope for name, part in run.parts.items()}
    _check_sum(run)
    if by == "block":
        return torch.stack([*shares.values(), bias]).cpu(), {"total": total.cpu()}
    ways = endings.heads if by == "head" else endings.neurons
    whole = "attention_out" if by == "head" else "mlp_out"
    layers: list[torch.Tensor | None] = []
    biases: list[torch.Tensor] = []
    for layer, block in enumerate(model.blocks):
        inner, given = ways.get(block.path, ""), run.inside.get(layer)
        if isinstance(inner, str) or given is None:
            layers.append(None)
            biases.append(torch.full_like(bias, torch.nan))
            continue
        below, own, _ = _slope(model, inner, given.flatten(), lambda made: made[0].float() @ slope)
        units = (given.float() * below.view_as(given)).sum(-1)
        name = _component(whole, layer)
        _check_units(by, layer, torch.cat([units, own[None]]), run.parts[name], slope)
        layers.append(units)
        biases.append(own)
        del shares[name]
    width = max((len(one) for one in layers if one is not None), default=0)
    if not width:
        raise OptionError(f"No {by} of this model can be told apart.", here())
    values = torch.full((len(layers), width), torch.nan)
    for layer, one in enumerate(layers):
        if one is not None:
            values[layer, : len(one)] = one.cpu()
    others = torch.stack([*shares.values(), bias]).sum()
    told = {"bias": torch.stack(biases), "others": others, "total": total}
    return values, {name: value.cpu() for name, value in told.items()}


def _slope(
    model: LanguageModel,
    way: Way,
    at: torch.Tensor,
    asked: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a number that a way ends in is in terms of the value at its beginning.

    Args:
        model: the model.
        way: the way, its norms' divisors held at what they are with `at`.
        at: the value at its beginning, `(size,)`.
        asked: from what stands at its end, `(1, size)`, to the number.

    Returns:
        The slope `(size,)`, the number for zeros, and the number for `at`.
    """
    function = linearised(way, model.modules, at[None])
    if function is None:
        raise OptionError(
            f"What {', '.join(way.modules)} makes of its input is no affine map, so what its parts "
            "add cannot be told.",
            here(),
        )
    with torch.enable_grad():
        zeros = torch.zeros_like(at[None]).requires_grad_()
        none = asked(function(zeros))
        (slope,) = torch.autograd.grad(none, zeros)
    with torch.no_grad():
        return slope[0].float(), none.detach().float(), asked(function(at[None])).float()


def _check_sum(run: _Run) -> None:
    """Raises if the residual stream is not the sum of what was read."""
    parts = torch.stack([part.double() for part in run.parts.values()])
    size = float(parts.abs().sum(0).max())
    limit = 64 * torch.finfo(run.end.dtype).eps * size
    if float((parts.sum(0) - run.end.double()).abs().max()) > limit:
        raise OptionError(
            "What leaves the last block of this model is not the sum of what its blocks add to "
            "what the first is given, so its logits are no sum over them.",
            here(),
        )


def _check_units(
    by: str, layer: int, shares: torch.Tensor, added: torch.Tensor, slope: torch.Tensor
) -> None:
    """Raises if what the heads or neurons of a block add is not what was read of them together."""
    both = added.float() * slope
    size = float(both.abs().sum() + shares.abs().sum())
    limit = 64 * torch.finfo(added.dtype).eps * size
    if float((shares.sum() - both.sum()).abs()) > limit:
        raise OptionError(
            f"What each {by} of block {layer} adds is not known: together it is not what the block "
            "adds, as where an edit changes that.",
            here(),
        )


def _axes(run: _Run, values: torch.Tensor, by: str) -> tuple[Axis, ...]:
    if by == "block":
        return (Axis("component", (*run.parts, "bias")),)
    return Axis.of("layer", range(len(values))), Axis.of(by, range(values.shape[1]))


def _component(name: str, layer: int) -> str:
    return f"{name.removesuffix('_out')} {layer}"
