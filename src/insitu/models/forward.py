"""`trace` on a language model: one forward of all prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.batching.demand import Demand, Demands, Side, Work
from insitu.batching.pass_plan import PassPlan
from insitu.batching.summary import Facts
from insitu.engine.job_outcome import Outputs
from insitu.engine.model_call import Pass
from insitu.engine.probe import Call
from insitu.graph.errors import OptionError
from insitu.graph.location import Location, Mark
from insitu.models.attention import SETTING
from insitu.models.calls import alone, arguments, content, default_budget
from insitu.models.continued_prompts import continued
from insitu.models.given_caches import taken_out
from insitu.models.padding import padding_of, positioned
from insitu.models.prompt_arguments import checked_seed, given_to_invocation
from insitu.models.prompts import Prompt
from insitu.models.sent_prompts import received, sent

if TYPE_CHECKING:
    from insitu.engine.job_parts import JobPrompt, ProcedureName
    from insitu.models.language_subject import LanguageSubject


class LanguageForward:
    """Forwards of a language model.

    Args:
        model: the model.
        options: keyword arguments for its forward.
        budget: how many tokens a pass may have, where it has several invocations; None for what
            fits into memory.
        share: whether invocations of one prompt share what they have in common; None for where
            that is faster.
        dry: whether the weights are not to be loaded.
    """

    name: ProcedureName = "trace"

    def __init__(
        self,
        model: LanguageSubject,
        options: dict[str, Any],
        budget: int | None = None,
        share: bool | None = None,
        dry: bool = False,
    ) -> None:
        self._model = model
        self._dry = dry
        self._budget = budget
        self._share = share
        if model.traits.takes_use_cache:
            options.setdefault("use_cache", False)
        self._options = options
        self.views = model.traits.block_views[bool(options.get("use_cache"))]
        self.steps = 1
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._caches = {} if plain else taken_out(options)
        self._fixed = (budget, share, *options.items()) if plain else None

    def steps_of(self, request: Prompt) -> int:
        """Returns that there is one step."""
        return 1

    def seeds(self, requests: Sequence[Prompt]) -> Mapping[int, int]:
        """Returns the seeds from which the lines of invocations draw, by their numbers."""
        return {at: one.seed for at, one in enumerate(requests) if one.seed is not None}

    def demanding(self, request: Prompt, options: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of an invocation with options that its values take."""
        return request.demanding(options)

    @property
    def given(self) -> Mapping[str, Any]:
        """The options of the forward and our own."""
        own = {"max_tokens_per_pass": self._budget, "share_prefixes": self._share}
        return {**self._options, **{name: one for name, one in own.items() if one is not None}}

    def prompt(self, request: Prompt) -> JobPrompt:
        """Returns a prompt as a job holds it. Position ids are made anew where it runs."""
        return sent(request)

    def received(self, prompt: JobPrompt) -> Prompt:
        """Returns the prompt that a job holds.

        Raises:
            InsituError: if the model cannot take it.
        """
        read = received(self._model, prompt, self._side, "trace")
        read = read if read.mask is None else positioned(self._model, read, self._dry)
        return continued(self._model, read, self._dry)._replace(seed=prompt.seed)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids, with the seed of its lines."""
        model = self._model
        if kwargs and "seed" in kwargs:
            seed = checked_seed(kwargs.pop("seed"), Location(*mark))
            return self.request(args, kwargs, mark)._replace(seed=seed)
        if self._caches:
            kwargs = {**self._caches, **kwargs}
        if not kwargs and len(args) == 1:
            plain = model.traits.reader.read_plain(args[0], mark)
            if plain is not None:
                return plain
        else:
            kwargs = given_to_invocation(model, args, kwargs, "trace", mark)
        prompt = model.traits.reader.read(args[0] if args else None, self._side, mark, kwargs)
        if prompt.extras:
            model.traits.options.check(prompt.extras, "trace", lambda: Location(*mark))
        prompt = prompt if prompt.mask is None else positioned(model, prompt, self._dry)
        return continued(model, prompt, self._dry) if prompt.extras else prompt

    def _side(self) -> Side:
        """Where a list of prompts is padded."""
        return padding_of(self._model, self._dry).side

    def example(self, request: Prompt) -> Call:
        """Returns the forward of a prompt alone."""
        return Call((), arguments(self._model, request, self._options))

    def key(self, module: nn.Module, requests: Sequence[Prompt]) -> Hashable | None:
        """Returns the form of the prompts and which of them are equal."""
        if self._fixed is None:
            return None
        if len(requests) == 1:
            prompt = requests[0]
            if prompt.extras:
                return None
            shifted = prompt.positions is not None
            alone = (prompt.ids.shape, shifted, module.training, self._fixed)
            return (*alone, *prompt.demands.items()) if prompt.demands else alone
        seen: dict[Hashable, int] = {}
        form: list[Hashable] = []
        tokens = 0
        for number, prompt in enumerate(requests):
            if prompt.extras:
                return None
            tokens += prompt.ids.numel()
            first = seen.setdefault(content(number, prompt), number)
            padded = (prompt.mask is None, prompt.positions is None)
            form.append((prompt.ids.shape, *padded, first, *prompt.demands.items()))
        budget = self._budget or default_budget(self._model, tokens)
        return (tuple(form), budget, self._model.is_training, self._model.has_hooks, self._fixed)

    def demands(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Demands:
        """Returns what the prompts demand: few passes, with as little work as it takes."""
        if len(requests) == 1:
            rows, length = requests[0].ids.shape
            differentiates = work.asked[0].differentiates
            return Demands([Demand(rows, length, differentiates=differentiates)])
        from insitu.models.forward_sharing import ForwardSharing  # of no use to one prompt

        sharing = ForwardSharing(self._model, self._options, self._budget, self._share)
        return sharing.demands(module, requests, work)

    def passes(
        self, module: nn.Module, plans: Sequence[PassPlan], requests: Sequence[Prompt]
    ) -> list[Pass]:
        """Returns forwards ready to be called."""
        if len(requests) == 1:
            return [alone(self._model, module, self._options, plans[0], requests[0])]
        from insitu.models.forward_passes import ForwardPasses  # of no use to one prompt

        return ForwardPasses(self._model, self._options, module, requests).passes(plans)

    @property
    def facts(self) -> Facts:
        """The blocks and what forwards cost."""
        model = self._model
        return Facts(
            tuple(model.traits.block_views[False]),
            model.traits.unembedding_paths,
            model.traits.costs,
        )

    def halved(self, requests: Sequence[Prompt]) -> LanguageForward | None:
        """Returns the same with passes of half as many tokens at most, in which nothing is shared.

        Args:
            requests: the prompts of a pass that is too large.
        """
        tokens = sum(prompt.ids.shape[0] for prompt in requests)
        tokens *= max(prompt.ids.shape[1] for prompt in requests)
        if self._budget is not None:
            tokens = min(tokens, self._budget)
        if tokens == 1:
            return None
        options = dict(self._options)
        return LanguageForward(self._model, options, tokens // 2, False, self._dry)

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A trace chooses no tokens: use `generate`.", location)

    def whole(self, each: Sequence[Any], requests: Sequence[Prompt]) -> None:
        """Returns nothing: as of `outputs`."""

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None


class Usual:
    """The forward that a model usually makes, and whether it is still as it was then.

    It is kept in an object of its own, because Python takes several times as long to find an
    attribute of a model, which answers for the names of its modules.

    Args:
        model: the model.

    Attributes:
        forward: the forward.
    """

    __slots__ = ("_attention", "_settings", "_spine", "forward")

    def __init__(self, model: LanguageSubject) -> None:
        self.forward = LanguageForward(model, {})
        self._spine = model.snapshot.spine
        # A config looks up its attributes in Python, `__dict__` too.
        self._settings = vars(model.config)
        self._attention = self._settings.get(SETTING)

    def still_holds(self) -> bool:
        """Returns whether its blocks, its head and its attention are those that they were."""
        spine = self._spine
        return spine.now == spine.then and self._settings.get(SETTING) == self._attention
