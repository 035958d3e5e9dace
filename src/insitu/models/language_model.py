"""`LanguageModel`: a Hugging Face language model, loaded when it first runs."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from insitu.batching.cost_model import Costs
from insitu.batching.procedure import Procedure
from insitu.engine.foreign_hooks import users_hooks_hang_on
from insitu.engine.plan_cache import PlanCache
from insitu.graph.errors import LoadError, OptionError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import Graph
from insitu.graph.tracebacks import short_tracebacks
from insitu.models.blocks import block_views
from insitu.models.dropout import INDIFFERENT
from insitu.models.estimates import bytes_per_token, estimated_costs, weight_of
from insitu.models.forward import LanguageForward
from insitu.models.model import Model
from insitu.models.options import Options, more_prompts
from insitu.models.padding_trial import Padding
from insitu.models.placement import Placement
from insitu.models.prompt_arguments import check_budget, given_to_block
from insitu.models.reader import Reader
from insitu.models.rotary import LengthDependence, growing_parts, length_dependence
from insitu.models.tokens import decoder_start, decodes, limits_of, padding, reads_tokens
from insitu.models.usual import Usual
from insitu.tracing.block import Block
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.batching.shared_blocks import Chain
    from insitu.engine.fallback import Fallback
    from insitu.engine.job_parts import ProcedureName
    from insitu.models.cache import ActivationCache
    from insitu.models.hook import Hook
    from insitu.models.loading import Source
    from insitu.models.selection import Filters
    from insitu.models.separation import Separation
    from insitu.models.transformer_lens import TransformerLens
    from insitu.models.vocabulary import Names


_USED_INSIDE = """
    block_views bytes_per_token chains costs decoder_start forward_parameters generating growing
    has_tokenizer
    is_encoder_decoder is_training lengths options pad_id padded_generations paddings placement
    reader separations takes_use_cache trains unembedding_paths
"""
"""What other parts of Insitu use of a model; not in `dir`."""


class LanguageModel(Model):
    """A language model of Hugging Face, whose inside can be read while it runs.

    It may be causal, masked, or an encoder and decoder. Config and tokenizer are read at once; the
    module tree is there too, without weights, so paths, `print(model)` and shapes work. Weights
    are loaded by the first run, or by `load()`.

    Args:
        model: a repo id, a folder, the name of a bundled model such as "insitu/eiffel", or a
            Transformers model in memory. A repository or folder may have an adapter of PEFT in
            place of a model, and a model in memory may be one of PEFT.
        tokenizer: a tokenizer to use in place of the model's own.
        task: what it is loaded for: "causal", "masked" or "encoder-decoder", or a name that
            Hugging Face has for one of them, such as "text-generation", "fill-mask" or
            "text2text-generation". Unless given, the model is of the class that its weights were
            saved from: what was saved without a head has no logits.
        allow_new_weights: whether weights that the files lack may be drawn at random, others at
            each load. Unless given, that is an error.
        kwargs: keyword arguments for `from_pretrained`: `device_map`, `dtype`, `revision`,
            `quantization_config` and whatever else it takes.

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
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        task: str | None = None,
        allow_new_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        location = here()
        if not isinstance(model, str | os.PathLike | nn.Module):
            raise OptionError(
                "A model is given as a repo id, a folder, or a module of Transformers, not as "
                f"{model!r:.80}.",
                location,
            )
        if isinstance(tokenizer, str):
            raise OptionError(
                f"`tokenizer` is a tokenizer, and not {tokenizer!r}: write "
                f"`tokenizer=AutoTokenizer.from_pretrained(...)`, or `device_map=` for a device.",
                location,
            )
        if isinstance(model, nn.Module):
            given = dict(kwargs) if task is None else {"task": task, **kwargs}
            if allow_new_weights:
                given["allow_new_weights"] = True
            self._wrap(model, given, location)
        else:
            from insitu.models.tasks import language_class

            choose = partial(language_class, asked=task)
            source = self._open(
                model, kwargs, choose, location, allow_new_weights, task is not None
            )
            if tokenizer is None:
                tokenizer = source.tokenizer()
        vars(self)["_tokenizer"] = tokenizer
        self._describe()

    def _wrap(self, module: nn.Module, kwargs: dict[str, Any], location: Location) -> None:
        """Takes a module in memory."""
        if kwargs:
            raise OptionError(
                f"{', '.join(map(repr, kwargs))} would be used to load a model, but the model is "
                "in memory already.",
                location,
            )
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "get_text_config"):
            raise OptionError(
                f"{type(module).__name__} is no Transformers model: wrap it as `Model(module)`.",
                location,
            )
        super().__init__(module)
        if not reads_tokens(self._module):
            raise OptionError(
                f"{type(self._module).__name__} is no language model, because it takes no "
                "`input_ids` or has no one embedding for them: wrap it as `Model(module)`.",
                location,
            )
        vars(self).update(_config=config)

    def _open(
        self,
        name: str | os.PathLike[str],
        kwargs: dict[str, Any],
        choose: Callable[[Any, Location, str], Any],
        location: Location,
        allow_new_weights: bool,
        asked: bool,
    ) -> Source:
        """Takes a model in files, and returns where it comes from."""
        from insitu.models.loading import Source
        from insitu.models.tasks import no_language_model

        source = Source(os.fspath(name), kwargs, choose, location, allow_new_weights, asked)
        tree = source.tree()
        super().__init__(source.weights(location) if tree is None else tree)
        if not reads_tokens(self._module):
            raise OptionError(no_language_model(source.config), location)
        vars(self).update(_config=source.config, _source=None if tree is None else source)
        vars(self)["_origin"] = source.origin
        return source

    _internal = Model._internal | frozenset(_USED_INSIDE.split())
    _lens: TransformerLens | None = None
    _config: Any
    _tokenizer: Any
    _processor: Any = None
    separations: dict[tuple[str, bool], Separation | Fallback]
    chains: dict[Hashable, Chain | Fallback]
    paddings: dict[Any, Padding]
    padded_generations: dict[Any, str | None]
    lengths: LengthDependence
    growing: Sequence[nn.Module]
    placement: Placement
    options: Options
    _usual: Usual
    _costs: Costs | None
    is_encoder_decoder: bool
    reader: Reader
    pad_id: int
    decoder_start: int | None
    generating: str
    unembedding_paths: Sequence[str]
    block_views: Mapping[bool, dict[str, Any]]
    forward_parameters: Mapping[str, inspect.Parameter]
    takes_use_cache: bool

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Returns `LanguageModel(name, **kwargs)`.

        Args:
            name: as of the class.
            kwargs: as of the class.
        """
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

        It is known when the weights are there, so this loads them.
        """
        self.load()
        return self.placement.device

    def _notice(self) -> None:
        """Forgets how the model runs, if its module has since been told to run otherwise."""
        spine = self.snapshot.spine
        if spine.now != spine.then:
            self._renew()
        if not self._usual.still_holds():  # another implementation of attention
            self._forget_runs(self._own_runs.substitute)
            vars(self)["plans"] = PlanCache()
            vars(self)["_vocabulary"] = self._names(self._module)
            self._describe()

    def edited(self, graph: Graph) -> Self:
        """Returns the model with one more edit, over the same weights, loaded or not.

        Args:
            graph: what the edit has recorded.
        """
        other = super().edited(graph)
        other._describe()
        # Edits are no part of the module.
        vars(other).update(separations=self.separations, paddings=self.paddings)
        vars(other).update(padded_generations=self.padded_generations)
        return other

    def trace(
        self,
        prompt: Any = None,
        *others: Any,
        max_tokens_per_pass: int | None = None,
        share_prefixes: bool | None = None,
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
            kwargs: keyword arguments of the model's forward. `use_cache` is False unless given.
                A prompt may be among them, as `input_ids=` or `inputs_embeds=`, and what goes with
                it, such as `attention_mask=`; with a chat, `add_generation_prompt=`. `seed=` is
                where the random numbers start that lines of the block draw.

        Returns:
            A context manager, in whose block sites can be read and written. `tracer.output` is
            a proxy.

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
        if kwargs or max_tokens_per_pass is not None or share_prefixes is not None:
            check_budget(max_tokens_per_pass)
            forward = LanguageForward(self, kwargs, max_tokens_per_pass, share_prefixes)
        return Tracer(Block(self, forward, given))

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

        The weights are not loaded. What is saved in the block is then a fake tensor: it has a
        shape and a dtype, and no content. `tracer.plan` tells how it would run, and `tracer.job`
        can be run by a model that is somewhere else.

        Args:
            prompt: as of `trace`.
            others: nothing, as of `trace`.
            max_tokens_per_pass: as of `trace`.
            share_prefixes: as of `trace`. Whether a model that is not loaded can do so is not
                known.
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
        given = None if prompt is None else ((prompt,), {})
        if kwargs:
            given = given_to_block(self, prompt, kwargs, "scan")
        forward = LanguageForward(self, kwargs, max_tokens_per_pass, share_prefixes, dry=True)
        return Tracer(Block(self, forward, given, dry=True))

    def procedure(
        self, name: ProcedureName, options: Mapping[str, Any], mark: Mark, dry: bool = False
    ) -> Procedure[Any]:
        """Returns the procedure that a job names: as of `Subject`."""
        from insitu.models.job_procedures import language_procedure

        return language_procedure(self, name, options, mark, dry)

    def has_tokenizer(self, tokenizer: object) -> bool:
        """Returns whether a tokenizer is its own."""
        return tokenizer is not None and tokenizer is self._tokenizer

    def generate(
        self,
        prompt: Any = None,
        *others: Any,
        max_tokens_per_pass: int | None = None,
        **kwargs: Any,
    ) -> Tracer:
        """Opens a block that generates when it ends, with the model's own `generate`.

        Sites mean the first forward, which processes the prompt.

        Args:
            prompt: text or token ids, in any form that `invoke` takes. Without one, each
                `generator.invoke(prompt, seed=None, max_new_tokens=None)` in the block gives its
                own; they are generated in as few batches as give each what it would get alone.
            others: nothing. Several prompts are a list, or each its own `generator.invoke(prompt)`.
            max_tokens_per_pass: how many tokens, with padding and those to come, several
                invocations may have in one batch. Unless given, what fits into a quarter of the
                free memory.
            kwargs: keyword arguments of `generate`, such as `max_new_tokens` and `do_sample`;
                with a prompt, `seed` too, and a prompt by keyword as in `trace`.

        Returns:
            A context manager, in whose block sites can be read and written. `generator.output`
            is what `generate` returned, once the block has ended.

        Raises:
            OptionError: if `max_new_tokens` is no positive number, an option means nothing, or the
                model generates nothing.
        """
        if others:
            raise more_prompts("generate", others)
        return self._generating(prompt, kwargs, max_tokens_per_pass)

    def _generating(
        self, prompt: Any, kwargs: dict[str, Any], budget: int | None, dry: bool = False
    ) -> Tracer:
        """A block that generates; with `dry` it runs nothing."""
        if not getattr(self._module, "can_generate", lambda: False)():
            raise OptionError(
                f"{type(self._module).__name__} does not generate: use `trace`.", here()
            )
        from insitu.models.generation import Generation

        if "inputs" in kwargs:  # as `generate` calls token ids
            kwargs["input_ids"] = kwargs.pop("inputs")
        self._notice()
        given = None if prompt is None else ((prompt,), {})
        if kwargs:
            given = given_to_block(self, prompt, kwargs, "generate")
        check_budget(budget)
        generation = Generation(self, kwargs, here(), budget)
        return Tracer(Block(self, generation, given, True, dry))

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

        The model returns what the run returned in `cache.logits`. It runs no further than it has
        to for the values that are asked for, and nothing else is kept.

        Args:
            prompt: text or token ids, in any form that `invoke` takes. Several prompts are the
                rows of one batch: those that are shorter are padded, as `cache.mask` says. None if
                it is among `kwargs`, as `input_ids=` or `inputs_embeds=`.
            names: which values: a name, a glob such as "blocks.*.attention.z", a compiled regular
                expression (searched for), a function from names to whether they are meant, or a
                list of these. A name in short, "residual_out", is meant of all blocks. They are
                standard names or TransformerLens's; patterns and functions are tried on the
                former first. None for all that the model computes, scores and patterns of
                attention too, which takes the eager implementation of it. What is meant by a
                pattern and not there in the model is left out.
            to: the device of what is kept, such as "cpu"; None for the one that it is on.
            dtype: its dtype, None for that of the model.
            kwargs: as of `trace`.

        Returns:
            The values, whose first axis is that of the prompts: see `ActivationCache`.

        Raises:
            OptionError: if the model has no value of such a name.
            BlockError: in a session, whose blocks run when it ends.

        Example:
            >>> from insitu import LanguageModel
            >>> model = LanguageModel("insitu/eiffel")
            >>> cache = model.run_with_cache("The Louvre is in", ["blocks.*.residual_out"])
            >>> cache["residual_out", -1].shape
            torch.Size([1, 4, 128])
            >>> cache.stack("residual_out").shape
            torch.Size([6, 1, 4, 128])
        """
        from insitu.models.caching import cached  # takes a while, and most never ask

        return cached(self, self.trace(prompt, **kwargs), names, self._hooks, to, dtype)

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

        return Hook(self, self._hooks, name)

    @property
    def _hooks(self) -> TransformerLens:
        """Its TransformerLens names."""
        from insitu.models.transformer_lens import TransformerLens

        vocabulary = cast("Names", self.vocabulary)
        if self._lens is None or self._lens.vocabulary is not vocabulary:
            vars(self)["_lens"] = TransformerLens(vocabulary.body, vocabulary)
        return cast("TransformerLens", self._lens)

    @property
    def is_training(self) -> bool:
        """Whether any of its modules is in training mode: dropout may be, apart from the rest."""
        return any(type(part) not in INDIFFERENT for part in self.snapshot.in_training())

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of the user's own hang on its modules."""
        return users_hooks_hang_on(self.snapshot.hooked())

    def trains(self) -> bool:
        """Returns whether it is in training mode, and says once what follows from it."""
        trains = self.is_training
        if trains and "training" not in self._said:
            self._said.add("training")
            warnings.warn(
                "The model, or a part of it, is in training mode, where the rows of a batch may "
                "depend on each other: its invocations run one by one. `model.module.eval()` lets "
                "them run together.",
                stacklevel=2,
            )
        return trains

    @property
    def costs(self) -> Costs:
        """What its passes cost."""
        if self._costs is None:
            found = estimated_costs(
                self._module,
                self.snapshot.modules,
                tuple(self.block_views[False]),
                self.placement.device,
            )
            vars(self)["_costs"] = found
        return self._costs  # pyright: ignore[reportReturnType]

    @property
    def bytes_per_token(self) -> int:
        """How much memory a forward needs for a token, about."""
        return bytes_per_token(self._module)

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
        vars(other).update(_config=copy.deepcopy(self._config, memo), _lens=None)
        other._describe()
        return other

    def _renew(self) -> None:
        super()._renew()
        before = self.block_views
        self._describe()
        for cached, views in before.items():  # blocks that are open have these
            views.clear()
            views.update(self.block_views[cached])

    def _describe(self) -> None:
        """Looks up what runs need to know about the module, once."""
        module: Any = self._module
        embedding = module.get_input_embeddings()
        head = module.get_output_embeddings()
        pad_id = padding(module, self._config)
        parameters = _parameters_of(module)
        generating = module.get_base_model() if hasattr(module, "get_base_model") else module
        vars(self).update(
            placement=Placement(embedding, self.loaded),
            separations={},
            chains={},
            paddings={},
            padded_generations={},
            lengths=length_dependence(module),
            growing=growing_parts(module),
            options=Options(module),
            decoder_start=decoder_start(module, self._config),
            is_encoder_decoder=decodes(module, self._config),
            generating=next(
                path for path, part in self.snapshot.modules.items() if part is generating
            ),
            _costs=None,
            block_views={
                cached: block_views(module, self._config, cached, self._stacks)
                for cached in (True, False)
            },
            reader=Reader(
                self._tokenizer,
                limits_of(module, self._config),
                pad_id,
                weight_of(embedding).device.type == "cpu",
                self._processor,
                None if self._processor is None else module.dtype,
            ),
            pad_id=pad_id,
            unembedding_paths=[path for path, part in self.snapshot.modules.items() if part is head]
            if head
            else [],
            forward_parameters=parameters,
            takes_use_cache="use_cache" in parameters,
        )
        vars(self)["_usual"] = Usual(self)


def _parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward, and of what it passes the others on to."""
    own = inspect.signature(module.forward).parameters
    passes_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values())
    inner: Any = getattr(module, "get_base_model", None)  # of a module of PEFT
    if not passes_on or inner is None:
        return own
    return {**inspect.signature(inner().forward).parameters, **own}
