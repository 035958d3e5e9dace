"""How much each token of a prompt contributes to what the model predicts, by gradients.

Both methods attribute a metric to the output of the embedding, and sum over its width, so that
there is a number for each token. What tokens do through later values is not told apart here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch

from insitu.deprecation import renamed
from insitu.graph.errors import OptionError, ShapeError
from insitu.graph.location import here
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Metric, as_metric, differentiated
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import Prompts, read_prompts
from insitu.methods.result import Result
from insitu.methods.sites import check_count
from insitu.models.configuration import said, text_config
from insitu.models.language_model import LanguageModel

Baseline: TypeAlias = Literal["zero", "pad token"] | int | torch.Tensor
"""Where the path of integrated gradients begins: see `integrated_gradients`."""

Method: TypeAlias = Literal["gauss-legendre", "trapezoid"]
"""How the integral along that path is approximated."""

_TOKENS_PER_PASS = 2048  # of points of a path that run together, each with all its gradients


@renamed(rule="method", goes_in="0.3")
def integrated_gradients(
    model: LanguageModel,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    baseline: Baseline = "zero",
    steps: int = 50,
    method: Method = "gauss-legendre",
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns integrated gradients: each token's part in metric(prompt) - metric(baseline).

    The gradient of the metric is averaged over the straight path from the baseline's embeddings to
    the prompt's, and multiplied with their difference (Sundararajan, Taly and Yan, "Axiomatic
    Attribution for Deep Networks", 2017). In the limit of many steps the attributions of a prompt
    add up to the difference of the metric exactly; by how much they miss it is in the details.

    Args:
        model: the model.
        prompts: one or several, of any length.
        metric: the number to attribute: a metric, or a function of the run: see
            `insitu.methods.Run`.
        baseline: where the path begins. "zero": embeddings of zeros. "pad token": each token is the
            model's padding token, which is seen like any other. An id: each token is that one. A
            tensor: the embeddings themselves, `(d_model,)` for all positions or
            `(position, d_model)`.
        steps: at how many points of the path the gradient is taken.
        method: which points, and their weights. "gauss-legendre" is exact for polynomials of degree
            2 * steps - 1 and has no point at the ends; "trapezoid" has evenly spaced points, with
            both ends.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens the points that run together have at most, and a pass
            that takes no gradient; None for 2048, and for as many as fit into a quarter of the free
            memory. Memory grows with it, since gradients need what the forward has computed.

    Returns:
        Attributions with the axes (prompt), position, in the metric's unit. Details, of each
        prompt: "input" and "baseline", the metric there; "difference", what the attributions
        fall short of `input - baseline`.

    Raises:
        OptionError: if there are too few steps, no such method or baseline, or no padding token.
        ShapeError: if a baseline of embeddings does not have the shape of the prompt's.
    """
    measured, read = as_metric(metric), read_prompts(model, prompts)
    measures = measured.of(model, len(read))
    points, weights = _quadrature(method, steps)
    most = _TOKENS_PER_PASS if max_tokens_per_pass is None else max_tokens_per_pass
    check_count("max_tokens_per_pass", most)
    start = _baseline(model, baseline)
    attributions, inputs, baselines = [], [], []
    with (
        bar("Integrated gradients", progress),
        differentiated(measured),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for ids, measure in zip(read.ids, measures, strict=True):
            with tracer.invoke(ids):
                embeddings = model.embedding.output.detach()
                begin = start(embeddings)
                clean = measured.reference(model)
                clean = None if clean is None else clean.detach()
                inputs.append(measure(Run(model), clean).detach().save(to="cpu"))
            with tracer.invoke(ids):
                model.embedding.output = begin
                baselines.append(measure(Run(model), clean).save(to="cpu"))
            path, total = embeddings - begin, None
            # What looks at more than logits does not know of rows: a run for each point.
            rows = max(1, most // len(ids)) if measured.of_logits else 1
            for first in range(0, steps, rows):
                alphas = points[first : first + rows, None, None]
                weight = weights[first : first + rows, None, None]
                # Gradients of several invocations would be taken in a pass each.
                with tracer.invoke(ids.repeat(len(alphas), 1)):
                    model.embedding.output = begin + path * alphas.to(path)
                    gradients = model.embedding.output.grad.float()
                    if measured.of_logits:
                        logits = model.logits
                        scores = [measure(logits[row], clean) for row in range(len(alphas))]
                        torch.stack(scores).sum().backward()
                    else:
                        measure(Run(model), clean).backward()
                    part = (gradients * weight.to(gradients)).sum(0)
                total = part if total is None else total + part
            attributions.append((path[0].float() * total).sum(-1).save(to="cpu"))
    found = [attribution.value for attribution in attributions]
    at_input, at_baseline = (_numbers(read, values) for values in (inputs, baselines))
    sums = read.stacked([values.sum() for values in found])
    details = {
        "input": at_input,
        "baseline": at_baseline,
        "difference": at_input - at_baseline - sums,
    }
    return _result("Integrated gradients", measured, read, found, details)


def gradient_times_input(
    model: LanguageModel,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns the gradient of the metric at each token's embedding, times that embedding.

    It is the first-order estimate of what setting the embedding to zero takes away. It takes one
    forward and one backward pass (Simonyan et al., "Deep Inside Convolutional Networks", 2013;
    Shrikumar et al., "Not Just a Black Box", 2016).

    Args:
        model: the model.
        prompts: one or several, of any length.
        metric: the number to attribute: a metric, or a function of the run: see
            `insitu.methods.Run`.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        Attributions with the axes (prompt), position, in the metric's unit. Details, of each
        prompt: "input", the metric.
    """
    measured, read = as_metric(metric), read_prompts(model, prompts)
    measures = measured.of(model, len(read))
    attributions, inputs = [], []
    with (
        bar("Gradient times input", progress),
        differentiated(measured),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for ids, measure in zip(read.ids, measures, strict=True):
            with tracer.invoke(ids):
                embeddings = model.embedding.output
                clean = measured.reference(model)
                number = measure(Run(model), None if clean is None else clean.detach())
                gradient = embeddings.grad[0].float()
                number.backward()
                inputs.append(number.save(to="cpu"))
                attributions.append((embeddings[0].float() * gradient).sum(-1).save(to="cpu"))
    found = [attribution.value for attribution in attributions]
    return _result("Gradient times input", measured, read, found, {"input": _numbers(read, inputs)})


def _baseline(model: LanguageModel, baseline: Any) -> Callable[[Any], Any]:
    """From the prompt's embeddings `(1, position, d_model)` to those where the path begins."""
    if isinstance(baseline, torch.Tensor) and baseline.is_floating_point():
        return lambda embeddings: _given(baseline, embeddings)
    if isinstance(baseline, str) and baseline == "zero":
        return torch.zeros_like
    if isinstance(baseline, str) and baseline == "pad token":
        baseline = _pad_token(model)
    if isinstance(baseline, bool) or not isinstance(baseline, int):
        raise OptionError(
            '`baseline` is "zero", "pad token", the id of a token, or a tensor of embeddings, '
            f"not {baseline!r}.",
            here(),
        )
    token = model.token_id(baseline)

    def begin(embeddings: Any) -> Any:
        ids = torch.full_like(embeddings[..., 0], token, dtype=torch.long)
        return model.embedding(ids).detach()

    return begin


def _given(baseline: torch.Tensor, embeddings: Any) -> Any:
    shape = tuple(embeddings.shape)[1:]
    if tuple(baseline.shape) not in (shape, shape[1:]):
        raise ShapeError(
            f"A baseline has the shape {shape} of the prompt's embeddings, or {shape[1:]} for all "
            f"positions, not {tuple(baseline.shape)}.",
            here(),
        )
    return torch.zeros_like(embeddings) + baseline.detach().to(embeddings)


def _pad_token(model: LanguageModel) -> int:
    tokenizer = model._tokenizer
    found = getattr(tokenizer, "pad_token_id", None)
    if found is None:
        found = said(text_config(model.config), "pad_token_id")
    if found is None:
        raise OptionError(
            "The model has no padding token: give the id of a token as `baseline`, such as "
            "`model.tokenizer.eos_token_id`.",
            here(),
        )
    return found


def _quadrature(method: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points between 0 and 1 and their weights, which add up to 1."""
    least = {"gauss-legendre": 1, "trapezoid": 2}
    if method not in least:
        raise OptionError(f'`method` is "gauss-legendre" or "trapezoid", not {method!r}.', here())
    check_count("steps", steps, least[method])
    if method == "trapezoid":
        weights = torch.ones(steps, dtype=torch.float64) / (steps - 1)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, steps, dtype=torch.float64), weights
    from numpy.polynomial.legendre import leggauss

    points, weights = map(torch.from_numpy, leggauss(steps))
    return (points + 1) / 2, weights / 2


def _numbers(read: Prompts, saved: list[Any]) -> torch.Tensor:
    return read.stacked([one.value.float() for one in saved])


def _result(
    title: str,
    metric: Metric,
    read: Prompts,
    found: list[torch.Tensor],
    details: dict[str, torch.Tensor],
) -> Result:
    return Result(
        title,
        f"attribution to {metric.name}",
        read.stacked(found, 0),
        (*read.axis, read.positions()),
        tokens=read.tokens,
        details=details,
        centre=0.0,
    )
