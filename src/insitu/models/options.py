"""Which options a model's forward and its `generate` take, and errors for those that neither does.

A forward with `**kwargs` takes any name in Python, and drops what none of its modules uses. Here
is which names they use; what options do is not decided here.
"""

from __future__ import annotations

import dis
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import Location, here
from insitu.habits import OF_LOADING, OF_METHODS, OF_RUNS, habit
from insitu.models.attention import OPTION

# Decorators of Transformers take these out of `**kwargs`, in no signature.
_TAKEN_BY_DECORATORS = frozenset(["output_attentions", "output_hidden_states", "return_dict"])
# `generate` takes these out of its `**kwargs`, and no config of a generation has them.
_TAKEN_BY_GENERATE = frozenset(["tokenizer", "assistant_tokenizer", "trust_remote_code"])
# Options of our own, by the methods that take them.
_OWN: Mapping[str, Collection[str]] = {
    "trace": ("max_tokens_per_pass", "seed", "share_prefixes"),
    "generate": ("max_tokens_per_pass", "seed"),
    "run_with_cache": ("names", "to", "dtype"),
}
_PROMPT = ("images", "videos", "audio", "add_generation_prompt")
_LOADING = frozenset(
    [
        *(
            "attn_implementation",
            "cache_dir",
            "config",
            "device_map",
            "dtype",
        ),
        *("load_in_4bit", "load_in_8bit", "quantization_config", "revision", "task", "token"),
        *("tokenizer", "torch_dtype", "trust_remote_code"),
    ]
)


def forward_options(module: nn.Module) -> frozenset[str] | None:
    """Returns the names of keyword arguments that a module's forward uses.

    Args:
        module: any module. Of its `**kwargs` those are used that its modules have parameters
            for, and those that annotations of Transformers document.

    Returns:
        The names, None if its code passes `**kwargs` on to where this cannot follow.
    """
    own, rest = _parameters(module)
    if rest is None:
        return frozenset(own)
    if not _is_model(module) and _documented(rest) is None:
        # A wrapper of PEFT has no code of its own; any other module may do what it likes.
        inner: Any = getattr(module, "get_base_model", None)
        return None if inner is None else frozenset(own) | (forward_options(inner()) or frozenset())
    found = {*own, *_TAKEN_BY_DECORATORS}
    for part, names, others in _receiving(module, rest):
        found.update(names)
        found.update(f"output_{name}" for name in getattr(part, "_can_record_outputs", ()) or ())
        if others is not None:
            found.update(_documented(others) or ())
    return frozenset(found)


def generation_options(module: nn.Module) -> frozenset[str]:
    """Returns the names of keyword arguments that a model's `generate` uses beside the forward's.

    Args:
        module: a model of Transformers that generates.
    """
    from transformers import GenerationConfig

    inner: Any = getattr(module, "get_base_model", lambda: module)()
    found = {*vars(GenerationConfig()), *vars(getattr(inner, "generation_config", None) or object)}
    found.update(inspect.signature(inner.generate).parameters)
    if hasattr(inner, "prepare_inputs_for_generation"):
        found.update(inspect.signature(inner.prepare_inputs_for_generation).parameters)
    if getattr(inner.config, "is_encoder_decoder", False):  # it gives these to its parts
        for part in (inner.get_encoder(), inner.get_decoder()):
            names = list(inspect.signature(part.forward).parameters)
            found.update(names, (f"decoder_{name}" for name in names))
    found -= {"self", "args", "kwargs", "model_kwargs", "transformers_version"}
    return frozenset(name for name in found if not name.startswith("_")) | _TAKEN_BY_GENERATE


class Options:
    """The options that blocks of a model take.

    Args:
        module: the model, with weights or without.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @cached_property
    def forward(self) -> frozenset[str] | None:
        """What the forward takes, None if that is not known."""
        return forward_options(self._module)

    @cached_property
    def generation(self) -> frozenset[str]:
        """What `generate` takes beside that."""
        able = getattr(self._module, "can_generate", lambda: False)()
        return generation_options(self._module) if able else frozenset()

    def check(
        self, names: Collection[str], method: str, where: Callable[[], Location | None]
    ) -> None:
        """Checks that the options of a block mean something.

        Args:
            names: their names.
            method: of the model, such as "trace".
            where: gives the user's line.

        Raises:
            OptionError: for one that means nothing there.
        """
        if self.forward is None:
            return
        generates = method == "generate"
        for name in names:
            if name in self.forward or name == OPTION or (generates and name in self.generation):
                continue
            error = OptionError(self._unknown(name, method), where())
            error.option = name
            raise error

    def _unknown(self, name: str, method: str) -> str:
        """The message for an unknown option: what was meant, or where it belongs."""
        generates = method == "generate"
        what = f"`{method}` takes no option `{name}`"
        if (method, name) in OF_METHODS:
            return f"{what}: {OF_METHODS[method, name]}."
        if name in OF_RUNS:
            return f"{what}{habit(name, OF_RUNS)}."
        owners = [owner for owner, own in _OWN.items() if name in own and owner != method]
        if owners and not (name in _LOADING and method in ("trace", "scan", "generate")):
            return f"{what}: it is an option of `{owners[0]}`."
        if not generates and name in self.generation:
            return f"{what}: it is an option of `generate`."
        if name in OF_LOADING:
            return f"{what}{habit(name, OF_LOADING)}."
        if name in _LOADING:
            return f"{what}: give it where the model is made, `LanguageModel(..., {name}=...)`."
        known = {*(self.forward or ()), *_OWN["trace"], *_PROMPT, OPTION}
        elsewhere = {*self.generation, *_OWN["generate"]}
        if generates:
            known |= elsewhere
        close = nearest(name, sorted(known))
        if not close and (close := nearest(name, sorted(elsewhere))):
            close += ", an option of `generate`"
        return (
            f"{what}, and `{type(self._module).__name__}."
            f"{'generate' if generates else 'forward'}` uses none of this name{close}."
        )


def more_prompts(method: str, others: Sequence[Any]) -> OptionError:
    """Returns the error for arguments that stand behind the one prompt of a block.

    Args:
        method: of the model, such as "trace".
        others: the arguments.
    """
    instead = f"write `model.{method}([first, second])`, or a `tracer.invoke(prompt)` for each"
    if method == "generate" and isinstance(others[0], int):
        instead = f"write `model.generate(prompt, max_new_tokens={others[0]})`"
    return OptionError(f"`{method}` takes one prompt, and options by name: {instead}.", here())


def check_call(
    module: nn.Module, kwargs: Collection[str], where: Callable[[], Location | None]
) -> None:
    """Checks that the forward of any module takes some keyword arguments.

    Args:
        module: the module.
        kwargs: their names.
        where: gives the user's line.

    Raises:
        OptionError: for one that it does not take.
    """
    known = forward_options(module)
    for name in kwargs:
        if known is not None and name not in known:
            raise OptionError(
                f"`{type(module).__name__}.forward` takes no `{name}`"
                f"{nearest(name, sorted(known))}.",
                where(),
            )


def _receiving(
    module: nn.Module, rest: inspect.Parameter
) -> Iterator[tuple[nn.Module, Collection[str], inspect.Parameter | None]]:
    """The modules that get a forward's `**kwargs`, with the names that they may be for."""
    waiting: list[nn.Module] = [module]
    yield module, (), rest
    seen: set[type] = set()
    while waiting:
        for part in waiting.pop().children():
            if isinstance(part, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                waiting.append(part)
                continue
            if type(part) in seen or type(part).__module__.startswith("torch."):
                continue
            seen.add(type(part))
            names, others = _parameters(part)
            # A layer's own parameters are for its caller: only models document theirs.
            yield part, names if _is_model(part) else (), others
            if others is not None:
                waiting.append(part)


def _parameters(module: nn.Module) -> tuple[Sequence[str], inspect.Parameter | None]:
    """The names of a forward's parameters, and its `**kwargs` if it uses them."""
    try:
        found = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # of a module in C++
        return (), None
    named = [
        each.name for each in found if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    rest = next((each for each in found if each.kind is each.VAR_KEYWORD), None)
    if rest is not None and not _is_used(module.forward, rest.name):
        rest = None
    return named, rest


def _is_used(forward: Any, name: str) -> bool:
    """Whether the code of a forward looks at its `**kwargs`."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or name not in (*code.co_varnames, *code.co_cellvars):
        return True
    return name in code.co_cellvars or any(
        "LOAD" in step.opname
        and (name in step.argval if isinstance(step.argval, tuple) else step.argval == name)
        for step in dis.get_instructions(code)
    )


def _documented(rest: inspect.Parameter) -> frozenset[str] | None:
    """The names that an annotation `**kwargs: Unpack[Options]` documents, None without one."""
    found: set[str] = set()
    known = False
    waiting = [rest.annotation]
    while waiting:
        annotation = waiting.pop()
        if typing.is_typeddict(annotation):
            known = True
            found |= annotation.__required_keys__ | annotation.__optional_keys__
        else:
            waiting.extend(typing.get_args(annotation))
    return frozenset(found) if known else None


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers, alone or as a part of one."""
    return hasattr(module, "get_input_embeddings") and hasattr(module, "config")
