"""`LanguageModel`: a Hugging Face language model, loaded when it first runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from insitu.batching.procedure import Procedure
from insitu.engine.plan_cache import PlanCache
from insitu.graph.errors import LoadError
from insitu.graph.location import Mark, here
from insitu.graph.tracebacks import short_tracebacks
from insitu.models.forward import LanguageForward, Usual
from insitu.models.language_traits import LanguageTraits
from insitu.models.options import more_prompts
from insitu.models.prompt_arguments import check_budget, given_to_block
from insitu.models.served_model import ServedModel
from insitu.tracing.block import Block
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.engine.events import TokensChosen
    from insitu.engine.job_parts import ProcedureName
    from insitu.models.cache import ActivationCache
    from insitu.models.hook import Hook
    from insitu.models.loading.opened import Opened
    from insitu.models.selection import Filters
    from insitu.models.vocabulary import Names
    from insitu.remote.away import Remote


class LanguageModel(ServedModel):
    """A language model of Hugging Face, whose inside can be read while it runs.

    It may be causal, masked, or an encoder and decoder. Config and tokenizer are read at once; the
    module tree is there too, without weights, so paths, `print(model)` and shapes work. Weights
    are loaded by the first run, or by `load()`.

    Args:
        model: a repo id, a folder, the name of a bundled model such as "insitu/eiffel", or a
            Transformers model in memory. A repository or folder may have an adapter of PEFT in
            place of a model, and a model in memory may be one of PEFT. With `remote=` it is what
            the server calls it, and need not be given if the server has one model only.
        tokenizer: a tokenizer to use in place of the model's own.
        task: what it is loaded for: "causal", "masked" or "encoder-decoder", or a name that
            Hugging Face has for one of them, such as "text-generation", "fill-mask" or
            "text2text-generation". Unless given, the model is of the class that its weights were
            saved from: what was saved without a head has no logits.
        allow_new_weights: whether weights that the files lack may be drawn at random, others at
            each load. Unless given, that is an error.
        remote: the URL of a server that has the model, or a `Connection` to one; True for the URL
            in `INSITU_REMOTE`. Its config, tokenizer and tree come from there, and all runs are
            there.
        kwargs: keyword arguments for `from_pretrained`: `device_map`, `dtype`, `revision`,
            `quantization_config` and all others that it takes.

    Raises:
        LoadError: if there is no such model. `load()` and the first run raise it if the files lack
            weights.
        OptionError: if it is no language model, or there is none of its type for the task.

    Example:
        >>> from insitu import LanguageModel
        >>> model = LanguageModel("insitu/eiffel")
        >>> with model.trace("The Eiffel Tower is in the city of") as tracer:
        ...     logits = model.lm_head.output[0, -1].save()
        >>> model.tokenizer.decode(logits.argmax())
        ' Paris'
    """

    @short_tracebacks
    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module | None = None,
        tokenizer: Any = None,
        *,
        task: str | None = None,
        allow_new_weights: bool = False,
        remote: Remote | None = None,
        **kwargs: Any,
    ) -> None:
        from insitu.models.loading import language  # most of it only files need

        given = language.Given(model, tokenizer, task, allow_new_weights, remote, kwargs)
        opened, tokenizer, away = language.opened_language_model(given, here())
        self._open(opened, tokenizer)
        vars(self)["away"] = away

    def _open(self, opened: Opened, tokenizer: Any, processor: Any = None) -> None:
        """Wraps a model, with what reads its prompts."""
        super().__init__(opened.module)
        self._come_from(opened)
        vars(self).update(_config=opened.config, _tokenizer=tokenizer, _processor=processor)
        self._describe()

    _internal = ServedModel._internal | {"traits"}
    _config: Any
    _tokenizer: Any
    _processor: Any = None
    traits: LanguageTraits
    _usual: Usual

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Returns `LanguageModel(name, **kwargs)`: its arguments are those of the class."""
        return cls(name, **kwargs)

    @property
    def config(self) -> Any:
        """The model's config, Hugging Face's own object."""
        return self._config

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, Hugging Face's own object, never changed.

        Raises:
            LoadError: if the model came without one.
        """
        if self._tokenizer is None or isinstance(self._tokenizer, Exception):
            reason = str(self._tokenizer or "it was given in memory, without `tokenizer=`.")
            raise LoadError(f"The model has no tokenizer: {reason}", here())
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where token ids have to be: the device of the input embedding.

        It is known when the weights are there, so this loads them. With `remote=` it is the CPU.
        """
        if self.away is None:
            self.load()
        return self.traits.placement.device if self.loaded else torch.device("cpu")

    def token_id(self, token: str | int) -> int:
        """Returns the id of one token, with nothing that the tokenizer puts before a prompt.

        Args:
            token: its text, mostly with a space first: `model.token_id(" Paris")`; or its id.

        Raises:
            PromptError: if it is several tokens, or an id that the model does not have.
        """
        from insitu.models.single_token import token_id

        return token_id(self, token)

    def _notice(self) -> None:
        """Forgets how the model runs, if its module has since been told to run otherwise."""
        super()._notice()
        if not self._usual.still_holds():  # another implementation of attention
            self._forget_runs(self._own_runs.substitute)
            vars(self)["plans"] = PlanCache()
            vars(self)["_vocabulary"] = self._names(self._module)
            self._describe()

    def __copy__(self) -> Self:
        """Returns another wrapper of the same module."""
        other = super().__copy__()
        other._describe()
        other.traits.keep_trials(self.traits)
        return other

    def trace(
        self,
        prompt: Any = None,
        *others: Any,
        max_tokens_per_pass: int | None = None,
        share_prefixes: bool | None = None,
        remote: Remote | None = None,
        wait: bool = True,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a block that runs one forward of the model when it ends.

        Args:
            prompt: text or token ids, in any form that `invoke` takes. Without one, each
                `tracer.invoke(prompt)` in the block gives its own; they run in as few passes, and
                with as little work, as it takes to give each what it would have alone.
            others: nothing. Several prompts are a list, or each its own `tracer.invoke(prompt)`.
            max_tokens_per_pass: how many tokens, with padding, several invocations may have in one
                pass. Unless given, what fits into a quarter of the free memory.
            share_prefixes: whether invocations of one prompt share what comes before their first
                write. Unless given, where that is faster.
            remote: the server that runs it, as of the class; None for where the model is.
            wait: whether the block waits for a server; if not, `tracer.remote_job` has it later.
            kwargs: keyword arguments of the model's forward. `use_cache` is False unless given;
                `past_key_values` stays as it is. A prompt may be among them, `input_ids=` or
                `inputs_embeds=`, and what goes with it, such as `attention_mask=`; with a chat,
                `add_generation_prompt=`. `seed=` starts the numbers that lines of the block draw.

        Returns:
            A context manager, whose block reads and writes sites. `tracer.output` is a proxy.

        Raises:
            OptionError: if an option means nothing to the model, or if there are `others`.
        """
        if others:
            raise more_prompts("trace", others)
        usual = self._usual
        if not usual.still_holds():
            self._notice()
            usual = self._usual
        forward = usual.forward
        given = None if prompt is None else ((prompt,), {})
        if kwargs:
            given = given_to_block(self, prompt, kwargs, "trace")
        if kwargs or max_tokens_per_pass is not None or share_prefixes is not None or remote:
            check_budget(max_tokens_per_pass)
            dry = bool(remote)  # no weights are loaded for a list of prompts
            forward = LanguageForward(self, kwargs, max_tokens_per_pass, share_prefixes, dry)
        block = Block(self, forward, given)
        if remote is not None or not wait:
            self._send_away(block, remote, wait)
        return Tracer(block)

    def scan(
        self,
        prompt: Any = None,
        *others: Any,
        max_tokens_per_pass: int | None = None,
        share_prefixes: bool | None = None,
        generate: bool = False,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a block like `trace`, which checks everything when it ends and runs nothing.

        The weights are not loaded. A value saved in the block is then a fake tensor: it has a shape
        and a dtype, and no content. `tracer.plan` tells how it would run, and `tracer.job` can be
        run by a model that is somewhere else.

        Args:
            prompt: as of `trace`.
            others: nothing.
            max_tokens_per_pass: as of `trace`.
            share_prefixes: as of `trace`, as far as that is known of a model that is not loaded.
            generate: whether it is a block like `generate`, and not like `trace`.
            kwargs: as of `trace`, or of `generate`.
        """
        if others:
            raise more_prompts("scan", others)
        if generate:
            if share_prefixes is not None:
                kwargs["share_prefixes"] = share_prefixes
            return self._generating(prompt, kwargs, max_tokens_per_pass, dry=True)
        self._notice()
        given = given_to_block(self, prompt, kwargs, "scan")
        forward = LanguageForward(self, kwargs, max_tokens_per_pass, share_prefixes, dry=True)
        return Tracer(Block(self, forward, given, dry=True))

    def procedure(
        self, name: ProcedureName, options: Mapping[str, Any], mark: Mark, dry: bool = False
    ) -> Procedure[Any]:
        """Returns the procedure that a job names: as of `Subject`."""
        from insitu.models.job_procedures import language_procedure

        return language_procedure(self, name, options, mark, dry)

    def generate(
        self,
        prompt: Any = None,
        *others: Any,
        max_tokens_per_pass: int | None = None,
        remote: Remote | None = None,
        wait: bool = True,
        on_token: Callable[[TokensChosen], object] | None = None,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a block that generates when it ends, with the model's own `generate`.

        Sites mean the first forward, which processes the prompt.

        Args:
            prompt: text or token ids, in any form that `invoke` takes. Without one, each
                `generator.invoke(prompt, seed=None, max_new_tokens=None)` in the block gives its
                own; they are generated in as few batches as give each what it would get alone.
            others: nothing, as of `trace`.
            max_tokens_per_pass: how many tokens, with padding and those to come, several
                invocations may have in one batch. Unless given, what fits into a quarter of the
                free memory.
            remote: as of `trace`.
            wait: as of `trace`.
            on_token: is given the tokens of each step of each invocation as they come, here and
                from a server, while the model is in use. Searches with beams do not tell.
            kwargs: keyword arguments of `generate`, such as `max_new_tokens` and `do_sample`; with
                a prompt `seed`, and a prompt by keyword as in `trace`.

        Returns:
            A context manager, in whose block sites can be read and written. `generator.output`
            is what `generate` returned, once the block has ended.

        Raises:
            OptionError: if `max_new_tokens` is no positive number, an option means nothing, or the
                model generates nothing.
        """
        if others:
            raise more_prompts("generate", others)
        tracer = self._generating(prompt, kwargs, max_tokens_per_pass)
        if remote is not None or not wait:
            self._send_away(tracer.block, remote, wait)
        return tracer if on_token is None else self._streaming(tracer.block, on_token)

    def _generating(
        self, prompt: Any, kwargs: dict[str, Any], budget: int | None, dry: bool = False
    ) -> Tracer:
        """A block that generates; with `dry` it runs nothing."""
        from insitu.models.generation import opened_block  # takes a while, and most never generate

        self._notice()
        return opened_block(self, prompt, kwargs, budget, dry)

    @short_tracebacks
    def run_with_cache(
        self,
        prompt: Any = None,
        names: Filters = None,
        *,
        to: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> ActivationCache:
        """Runs one forward and returns its values by name: `cache["blocks.3.attention.z"]`.

        The model runs no further than these values need. `cache.logits` are its logits.

        Args:
            prompt: text or token ids, in any form that `invoke` takes. Several prompts are the
                rows of one batch: those that are shorter are padded, as `cache.mask` says. None if
                it is among `kwargs`, as `input_ids=` or `inputs_embeds=`.
            names: which values: a name, a glob such as "blocks.*.attention.z", a compiled regular
                expression (searched for), a function from names to whether they are meant, or a
                list of these. A name in short, "residual_out", is meant of all blocks. They are
                standard names, TransformerLens's, or paths of modules for their outputs; patterns
                and functions are tried in this order, and what the model lacks is left out. None
                for all that the model computes, with scores and patterns of eager attention.
            to: the device of the kept values, such as "cpu"; None for the one that each is on.
            dtype: its dtype, None for that of the model.
            kwargs: as of `trace`.

        Returns:
            The values, whose first axis is that of the prompts: see `ActivationCache`.

        Raises:
            OptionError: if the model has no value of such a name.
            BlockError: in a session, whose blocks run when it ends.
        """
        from insitu.models.caching import cached, check_options  # takes a while

        check_options(self, prompt, kwargs)
        hooks = cast("Names", self.vocabulary).hooks
        return cached(self, self.trace(prompt, **kwargs), names, hooks, to, dtype)

    def hook(self, name: str) -> Hook:
        """Returns a value by TransformerLens's name: `model.hook("blocks.3.attn.hook_z").output`.

        Its `.output` is read and written in a block, in TransformerLens's order of axes.

        Args:
            name: the name of the hook point.

        Raises:
            PathError: if there is no such hook, or nothing that it could stand for.
        """
        self._notice()
        from insitu.models.hook import Hook

        return Hook(self, cast("Names", self.vocabulary).hooks, name)

    def __repr__(self) -> str:
        state = "" if self.loaded else ", weights not loaded yet"
        name = type(self._module).__name__ if self._source is None else repr(self._source.name)
        return f"{type(self).__name__}({name}{state})\n{super().__repr__()}"

    def _take(self, module: nn.Module) -> None:
        super()._take(module)
        self._describe()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a wrapper of a copy of the module, with the same tokenizer and edits."""
        other = super().__deepcopy__(memo)
        vars(other).update(_config=copy.deepcopy(self._config, memo))
        other._describe()
        return other

    def _renew(self) -> None:
        super()._renew()
        before = self.traits
        self._describe()
        self.traits.keep_views(before)

    def _describe(self) -> None:
        """Looks up what runs need to know about the module, once."""
        rest = (self.snapshot, self._stacks, self.loaded, self._tokenizer, self._processor)
        vars(self)["traits"] = LanguageTraits(self._module, self._config, *rest)
        vars(self)["_usual"] = Usual(self)
