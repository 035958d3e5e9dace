"""Metrics: numbers of the run of a prompt, mostly of the logits that it ends in.

Each is a function that is recorded in the run itself, so that of a forward of the model no more
than a number is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, TypeAlias

from insitu.graph.errors import (
    ExecutionError,
    OptionError,
    PathError,
    ShapeError,
    UnknownShapeError,
)
from insitu.graph.location import here
from insitu.graph.proxy import AnyProxy
from insitu.methods.measured_run import Run
from insitu.models.language_model import LanguageModel

Measure: TypeAlias = Callable[[Any, Any], Any]
"""From the logits of a run, `(position, vocabulary)`, and those of the run that it is compared with
(the clean one), to a number. Both may be proxies, and the first is a `Run`."""

Tokens: TypeAlias = str | int | Sequence[str | int]
"""A token, as text or id, or one for each prompt."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of the logits that a prompt ends in.

    Attributes:
        name: what the number is, such as "logit difference".
        of: from a model and the number of prompts to the measure of each of them.
        compares: whether measures look at the logits of the clean run. What does not need them is
            measured in models without logits too.
        of_logits: whether measures look at nothing but logits, so that rows of one run can be
            measured each by itself.
    """

    name: str
    of: Callable[[LanguageModel, int], Sequence[Measure]]
    compares: bool = True
    of_logits: bool = True

    def reference(self, model: LanguageModel) -> Any:
        """Returns the logits that other runs are compared with, in the clean run's invocation.

        Args:
            model: the model.
        """
        return model.logits[0] if self.compares else None


def logit_difference(answer: Tokens, instead: Tokens) -> Metric:
    """Returns the metric logit(answer) - logit(instead), at the last position.

    Args:
        answer: the token that counts for it, as text such as " Paris" or as its id; or a list
            with one for each prompt.
        instead: the token that counts against it, in the same form.
    """

    def of(model: LanguageModel, count: int) -> Sequence[Measure]:
        pairs = zip(token_ids(model, answer, count), token_ids(model, instead, count), strict=True)
        return [_difference(right, wrong) for right, wrong in pairs]

    return Metric("logit difference", of)


def probability(answer: Tokens) -> Metric:
    """Returns the metric p(answer), at the last position.

    Args:
        answer: the token, as text such as " Paris" or as its id; or a list with one for each
            prompt.
    """

    def of(model: LanguageModel, count: int) -> Sequence[Measure]:
        return [_probability(token) for token in token_ids(model, answer, count)]

    return Metric("probability", of)


def log_probability(answer: Tokens) -> Metric:
    """Returns the metric log p(answer) in nats, at the last position.

    Args:
        answer: as of `probability`.
    """

    def of(model: LanguageModel, count: int) -> Sequence[Measure]:
        return [_log_probability(token) for token in token_ids(model, answer, count)]

    return Metric("log probability", of)


def kl_divergence() -> Metric:
    """Returns the metric KL(clean ‖ run) in nats, at the last position.

    It is 0 where the model predicts what it predicts in the clean run.
    """

    def measure(logits: Any, clean: Any) -> Any:
        run, reference = logits[-1].float(), clean[-1].float()
        log_p, log_q = reference.log_softmax(-1), run.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return Metric("KL divergence", lambda model, count: [measure] * count)


def as_metric(metric: Metric | Callable[[Any], Any]) -> Metric:
    """Returns a metric, also of a plain function, which says so if it gives no number.

    Args:
        metric: a metric, or a function of the run to a number: see `Run`.

    Raises:
        OptionError: if it is neither.
    """
    if isinstance(metric, Metric):
        made = metric.of
        return replace(
            metric, of=lambda model, count: [_checked(each) for each in made(model, count)]
        )
    if not callable(metric):
        raise OptionError(
            "A metric is one of `insitu.methods.logit_difference`, `probability`, "
            "`log_probability` and `kl_divergence`, or a function of the run to a number, such as "
            f"`lambda run: run.logits[0, -1, 5]`, not {metric!r}.",
            here(),
        )
    function = metric
    if function in (logit_difference, probability, log_probability, kl_divergence):
        call = f"{function.__name__}({', '.join(signature(function).parameters)})"
        raise OptionError(f"`{function.__name__}` makes a metric: write `{call}`.", here())
    try:
        signature(function).bind(None)
    except ValueError:  # of a function of C, whose arguments nobody knows
        pass
    except TypeError:
        raise OptionError(
            "A metric is a function of one argument, the run or in short its logits (position, "
            "vocabulary), and "
            f"{getattr(function, '__name__', 'this one')}{signature(function)} is not. What "
            "else it needs it can have from where it is made, as in "
            "`lambda logits: metric(logits, answer)`.",
            here(),
        ) from None
    name = getattr(function, "__name__", "metric").replace("_", " ").replace("<lambda>", "metric")
    measure = _checked(lambda logits, _: function(logits))
    return Metric(name, lambda model, count: [measure] * count, compares=False, of_logits=False)


@contextmanager
def differentiated(metric: Metric) -> Generator[None]:
    """Refuses a metric without a gradient, which only the run of a block can tell.

    Args:
        metric: the metric that is differentiated in blocks that run in this one.

    Raises:
        OptionError: if it has none.
    """
    try:
        yield
    except ExecutionError as error:
        if "does not require grad" not in str(error):
            raise
        raise OptionError(
            f"The metric {metric.name!r} has no gradient: `argmax`, comparisons, whole numbers and "
            "`detach` have none. Take a smooth one, such as a logit or a probability, or "
            "`activation_patching` or `ablate`, which take no gradient.",
            here(),
        ) from error


def _checked(measure: Measure) -> Measure:
    """A measure that raises a `ShapeError` if it gives something else than a number."""
    asked = (
        "A metric is one number for a prompt: a tensor without axes, such as "
        "`run.logits[0, -1, 5]` of the logits (1, position, vocabulary). This one gives "
    )

    def number(logits: Any, clean: Any) -> Any:
        found = measure(logits, clean)
        try:
            shape = getattr(found, "shape", None)
        except UnknownShapeError:
            if not _has_known_shape(logits):  # as with experts whose shapes depend on weights
                return found
            raise ShapeError(
                f"{asked}what is not known before the run, as `.item()` and `.tolist()` do: leave "
                "these out.",
                here(),
            ) from None
        # The axis of the one prompt, which values of a run have: `run.output[0][:, 0] @ v`.
        whole = isinstance(logits, Run) and not logits.is_short
        if whole and shape is not None and len(shape) and set(shape) == {1}:
            return found.reshape(())
        if shape is None or len(shape):
            kind = f"a {type(found).__name__}" if shape is None else f"shape {tuple(shape)}"
            raise ShapeError(f"{asked}{kind}.", here())
        if isinstance(logits, AnyProxy) and not isinstance(found, AnyProxy):
            raise ShapeError(f"{asked}a tensor that is made of nothing in the run.", here())
        if found.dtype.is_complex:
            raise ShapeError(
                f"{asked}{found.dtype}, of two: take `.real`, `.imag` or `.abs()` of it.", here()
            )
        return found

    return number


def _has_known_shape(value: Any) -> bool:
    try:
        return value.shape is not None
    except UnknownShapeError:
        return False
    except PathError:  # of a model without logits
        return True


def _difference(right: int, wrong: int) -> Measure:
    return lambda logits, _: logits[-1, right].float() - logits[-1, wrong].float()


def _probability(token: int) -> Measure:
    return lambda logits, _: logits[-1].float().softmax(-1)[token]


def _log_probability(token: int) -> Measure:
    return lambda logits, _: logits[-1].float().log_softmax(-1)[token]


def token_ids(model: LanguageModel, tokens: Tokens, count: int) -> list[int]:
    """Returns the id of a token for each prompt.

    Args:
        model: the model.
        tokens: a token, as text or as its id; or a list with one for each prompt.
        count: how many prompts there are.

    Raises:
        OptionError: if there is another number of them.
        PromptError: if one of them is no one token of the model.
    """
    given: Any = tokens
    tokens = given.tolist() if hasattr(given, "tolist") else given  # of torch or NumPy
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        return [model.token_id(tokens)] * count
    tokens = list(tokens)
    if len(tokens) != count:
        raise OptionError(
            f"There are {len(tokens)} answers for {count} prompts: give one, or one for each.",
            here(),
        )
    return [model.token_id(token) for token in tokens]
