"""Sparse autoencoders in a run: their features read, ablated and steered."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any
from weakref import ref as weakref

from insitu.deprecation import renamed
from insitu.display.axis import Axis
from insitu.graph.errors import OptionError
from insitu.graph.location import Mark, here, mark
from insitu.graph.node import table_of
from insitu.graph.proxy import AnyProxy, Proxy
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.result import Result
from insitu.methods.sae import SparseAutoencoder
from insitu.models.language_model import LanguageModel
from insitu.tracing.invocation import innermost
from insitu.tracing.named import ComputedProxy

_INSTEAD = "assign to `features`, or to a part of them by an index."

_WITH_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_result")
"""Values with an axis of heads, `(batch, position, head, ...)`."""


class Spliced:
    """What `use_sae` gives: a sparse autoencoder in the place of a value of the run.

    Args:
        hook: the value, as `model.hook` gives it.
        invocation: the invocation whose processing it is in.
        sae: the sparse autoencoder.
        error_term: whether what it does not reconstruct is added.
        line: the user's line.

    Attributes:
        error: what it does not reconstruct, `(batch, position, width)`, without a gradient; None
            if that is left out.
    """

    form = None  # features are shown as they are computed

    def __init__(
        self, hook: Any, invocation: Any, sae: SparseAutoencoder, error_term: bool, line: Mark
    ) -> None:
        self._hook, self._invocation, self._sae = hook, invocation, sae
        self._value = hook._named.read(invocation, line)
        self._flat = _side_by_side(hook, self._value)
        features = sae.encode(self._flat)
        self.error: Any = None
        if error_term:
            made = sae.decode(features, self._flat).type_as(self._flat)
            self.error = (self._flat - made).detach()
        self.write(invocation, features, line)

    @property
    def features(self) -> Any:
        """The features, `(batch, position, feature)`. Values assigned to them reach the model.

        A part is assigned by an index: `spliced.features[..., 123] = 0`.
        """
        return self._features

    @features.setter
    def features(self, value: Any) -> None:
        if not isinstance(value, AnyProxy):
            whole = self._features.clone()
            Proxy.__setitem__(whole, ..., value)
            value = whole
        invocation, line = self._invocation, mark()
        now, invocation.current_step = invocation.current_step, self._features._step
        try:
            self.write(invocation, value, line)
        finally:
            invocation.current_step = now

    @property
    def reconstruction(self) -> Any:
        """What the features add up to, `(batch, position, width)`, without the error."""
        return self._sae.decode(self._features, self._flat)

    def write(self, invocation: Any, features: Any, line: Mark) -> None:
        """Lets the model go on with what features add up to.

        Args:
            invocation: the invocation whose processing it is in.
            features: `(batch, position, feature)`.
            line: the user's line.
        """
        made = self._sae.decode(features, self._flat).type_as(self._flat)
        whole = made if self.error is None else made + self.error
        self._hook._named.write(invocation, whole.view_as(self._value), line)
        recording = features._recording
        table_of(recording, "computed")[features._ref.index] = _INSTEAD
        shown: Any = ComputedProxy(recording, features._ref)
        shown._name, shown._source, shown._reading = self, features._ref, weakref(invocation)
        shown._step = invocation.current_step
        self._features = shown


def _side_by_side(hook: Any, value: Any) -> Any:
    """A value with its heads beside each other, as SAELens trains on them."""
    return value.flatten(2) if hook.name.endswith(_WITH_HEADS) else value


@renamed(error="error_term", hook_name="site", goes_in="0.3")
def use_sae(
    model: LanguageModel,
    sae: SparseAutoencoder,
    *,
    error_term: bool = True,
    site: str | None = None,
) -> Spliced:
    """Puts a sparse autoencoder in the place of a value, in an open invocation or edit.

    The model goes on with what its features add up to, and with what they lack, so that without a
    change the logits are what they were, to rounding. (Marks et al. 2024,
    https://arxiv.org/abs/2403.19647.) Gradients go through the features, not through the error.

    Args:
        model: the model.
        sae: the sparse autoencoder.
        error_term: whether what it does not reconstruct is added. Without it the model sees what
            the features say and no more.
        site: where, by TransformerLens's name, which has a block, such as
            "blocks.8.hook_resid_pre"; None for where it was trained.

    Returns:
        The features and the error, which can be read; and the features written.

    Raises:
        PathError: if the model has no such value.
        BlockError: outside of an invocation.

    Example:
        `spliced = use_sae(model, sae); spliced.features[..., 123] = 0`
    """
    hook = model.hook(sae.hook_name if site is None else site)
    found, line = innermost(model, 2)
    invocation = hook._inside(found, line)
    return Spliced(hook, invocation, sae.to(model.device), error_term, line)


@renamed(hook_name="site", goes_in="0.3")
def sae_features(
    model: LanguageModel,
    prompts: Any,
    sae: SparseAutoencoder,
    *,
    top: int = 10,
    site: str | None = None,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns the largest features at each position.

    Args:
        model: the model.
        prompts: one prompt or several, of any lengths.
        sae: the sparse autoencoder.
        top: how many features at each position.
        site: as of `use_sae`.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        How large they are, by prompt if there are several, position and rank. Texts are the
        numbers of the features, and `details["feature"]` has them too, NaN where a prompt has no
        such position.

    Raises:
        PathError: if the model has no such value.
        OptionError: if there are not so many features.
    """
    if not 0 < top <= sae.n_features:
        raise OptionError(f"There are 1 to {sae.n_features} features, not {top!r}.", here())
    read, hook = read_prompts(model, prompts), model.hook(sae.hook_name if site is None else site)
    placed = sae.to(model.device)
    with bar("Features", progress), model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        saved = []
        for ids in read.ids:
            with tracer.invoke(ids):
                largest = placed.encode(_side_by_side(hook, hook.output)[0]).topk(top, dim=-1)
                saved.append((largest.values.save(to="cpu"), largest.indices.save(to="cpu")))
    values = read.stacked([size.value.float() for size, _ in saved], 0)
    numbers = read.stacked([number.value.float() for _, number in saved], 0)
    texts = ["" if number != number else str(int(number)) for number in numbers.flatten().tolist()]
    axes = (*read.axis, read.positions(), Axis.of("rank", range(top)))
    return Result(
        f"Features of {hook.name}",
        "activation",
        values,
        axes,
        read.tokens,
        tuple(texts),
        {"feature": numbers},
    )
