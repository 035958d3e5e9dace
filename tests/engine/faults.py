"""Exceptions that come at any line of Insitu's own, and what a model must be like afterwards."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as everywhere

import insitu
from insitu import LanguageModel
from tests.conftest import tiny_gpt2

SOURCES = str(Path(insitu.__file__).parent)
IDS = torch.tensor([[1, 2, 3, 4, 5]])
OTHER = torch.tensor([[7, 8, 9]])
Values = Mapping[str, torch.Tensor]
Tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
Flags = ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Fault:
    """An exception at one line of Insitu's, counted in the order in which lines run.

    Attributes:
        at: the number of the line; 0 for none.
        error: the exception.
        lines: how many lines have run.
        hit: the file, the line and the function in which it was raised.
    """

    at: int
    error: type[BaseException] = KeyboardInterrupt
    lines: int = 0
    hit: tuple[str, int, str] | None = None
    _known: dict[str, bool] = field(default_factory=dict)

    def run(self, block: Callable[[], object]) -> BaseException | None:
        """Runs a block in this thread, and returns what came out of it, if it is this exception."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            block()
        except BaseException as error:
            if not _is_or_comes_of(error, self.error):
                raise
            return error
        finally:
            sys.settrace(before)
        return None

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if name not in self._known:
            self._known[name] = name.startswith(SOURCES)
        return self._line if self._known[name] else None

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                code = frame.f_code
                self.hit = (Path(code.co_filename).name, frame.f_lineno, code.co_name)
                sys.settrace(None)
                raise self.error("injected")
        return self._line


def _is_or_comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def state_of(module: nn.Module) -> dict[str, Any]:
    """Returns all that a run of a model may not change, to be compared."""
    state: dict[str, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, value in vars(part).items():
            if isinstance(value, dict):
                value = [(key, id(entry)) for key, entry in value.items()]
            elif not isinstance(value, bool | int | float | str | None):
                value = id(value)
            state[f"{path}.{name}"] = value
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                state[f"{path}.{name}"] = (tensor.sum().item(), tensor.grad, tensor.requires_grad)
        config = vars(part).get("config")
        state[f"{path} attention"] = getattr(config, "_attn_implementation", None)
    state["global hooks"] = [
        [*vars(everywhere)[name]] for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    ]
    return state | surroundings()


def surroundings() -> dict[str, Any]:
    """Returns what torch keeps for this thread, and for the process."""
    return {
        "autograd": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().sum().item(),
        "functions": torch._C._len_torch_function_stack(),
        "operations": torch._C._len_torch_dispatch_stack(),
        "log": logging.getLogger("torch._subclasses.fake_tensor").disabled,
    }


class Kind:
    """A kind of block, on a small model, and what plain PyTorch gives for it."""

    def __init__(self, block: Callable[[LanguageModel], Values], right: Values) -> None:
        self.block, self.right = block, right

    def wrong(self, model: LanguageModel) -> str:
        """Runs the block; returns what of its values is wrong, an empty string if nothing is."""
        found = self.block(model)
        for name, expected in self.right.items():
            value = found[name]
            close = 1e-2 if name == "half" else 1e-5  # computed in bfloat16
            if value.shape != expected.shape or not torch.allclose(value, expected, atol=close):
                return f"{name} is wrong"
        return ""


def free_for_others(model: LanguageModel) -> bool:
    """Returns whether another thread can run a model."""
    found: list[torch.Tensor] = []

    def run() -> None:
        with model.trace(IDS):
            hidden = model.transformer.h[0].output[0].save()
        found.append(hidden.value)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    return len(found) == 1


# The kinds of blocks, and what hooks and autograd give for them.


def _plain(
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    ids: torch.Tensor = IDS,
    keep: str = "transformer.h.2",
    gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a module, and logits, where outputs are changed; or the gradient of those."""
    module, found = tiny_gpt2(), []
    for path, change in changes.items():

        def hook(_: nn.Module, __: object, output: Any, change: Any = change) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        module.get_submodule(path).register_forward_hook(hook)

    def note(_: nn.Module, __: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.view_as(hidden)
        if gradient:
            hidden.retain_grad()
        found.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    module.get_submodule(keep).register_forward_hook(note)
    with torch.set_grad_enabled(gradient):
        logits = module(ids, use_cache=False).logits
    if gradient:
        logits.sum().backward()
        return found[0].grad, logits.detach()
    return found[0], logits


def _zero_last(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed[:, -1] = 0
    return changed


def read(model: LanguageModel) -> Values:
    with model.trace(IDS):
        hidden = model.transformer.h[2].output[0].save()
        logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def write(model: LanguageModel) -> Values:
    with model.trace(IDS):
        model.transformer.h[1].mlp.output = model.transformer.h[1].mlp.output * 2
        hidden = model.transformer.h[2].output[0].save()
        logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def in_place(model: LanguageModel) -> Values:
    with model.trace(IDS):
        model.transformer.h[1].mlp.output[:, -1] = 0
        hidden = model.transformer.h[2].output[0].save()
        logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def gradient(model: LanguageModel) -> Values:
    with model.trace(IDS):
        grad = model.transformer.h[2].output[0].grad.save()
        model.lm_head.output.sum().backward()
    return {"grad": grad.value}


def generate(model: LanguageModel) -> Values:
    with model.generate(IDS, max_new_tokens=3, min_new_tokens=3) as generator:
        with generator.step(1):
            hidden = model.transformer.h[2].output[0].save()
        with generator.every_step():
            model.transformer.h[1].mlp.output[:, -1] = 0
    return {"hidden": hidden.value, "ids": generator.output}


def skip(model: LanguageModel) -> Values:
    with model.trace(IDS):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        hidden = model.transformer.h[2].output[0].save()
        logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def stop(model: LanguageModel) -> Values:
    with model.trace(IDS):
        hidden = model.transformer.h[2].output[0].save()
        model.transformer.h[2].stop()
    return {"hidden": hidden.value}


def pattern(model: LanguageModel) -> Values:
    with model.trace(IDS):
        found = model.blocks[2].attention.pattern.save()
    return {"pattern": found.value}


def edit(model: LanguageModel) -> Values:
    with model.edit() as edited:
        model.transformer.h[1].mlp.output[:, -1] = 0
    return read(edited)


def session(model: LanguageModel) -> Values:
    with model.session():
        with model.trace(OTHER):
            other = model.transformer.h[1].mlp.output[:, -1].mean()
        with model.trace(IDS):
            model.transformer.h[1].mlp.output[:, -1] = other * 0
            hidden = model.transformer.h[2].output[0].save()
            logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def scan(model: LanguageModel) -> Values:
    with model.scan(IDS):
        shape = model.transformer.h[2].output[0].shape
        _ = model.transformer.h[2].attn.output
    return {"shape": torch.tensor(shape)}


def contexts(model: LanguageModel) -> Values:
    """Shapes that are asked for while recording, and lines in contexts of torch."""
    with model.trace(IDS):
        hidden = model.transformer.h[2].output[0]
        with torch.no_grad():
            doubled = hidden * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = doubled @ doubled.transpose(1, 2)
        assert half.shape == (1, 5, 5) and half.dtype == torch.bfloat16
        saved, mean = half.float().save(), hidden.mean().save()
    return {"half": saved.value, "mean": mean.value}


def batch(model: LanguageModel) -> Values:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            model.transformer.h[1].mlp.output[:, -1] = 0
            hidden = model.transformer.h[2].output[0].save()
        with tracer.invoke(OTHER):
            logits = model.lm_head.output.save()
    return {"hidden": hidden.value, "logits": logits.value}


def kinds() -> dict[str, Kind]:
    """Returns the kinds of blocks, by name."""
    names = ("hidden", "logits")
    plain = dict(zip(names, _plain({}), strict=True))
    zeroed = dict(zip(names, _plain({"transformer.h.1.mlp": _zero_last}), strict=True))
    doubled = dict(zip(names, _plain({"transformer.h.1.mlp": lambda x: x * 2}), strict=True))
    other = _plain({}, OTHER)[1]
    grad = _plain({}, gradient=True)[0]
    module = tiny_gpt2()
    with torch.no_grad():
        eager = module.transformer.h[2].attn
        module.set_attn_implementation("eager")
        weights = module(IDS, output_attentions=True, use_cache=False).attentions[2]
        del eager
    skipped = tiny_gpt2()
    with torch.no_grad():
        skipped.transformer.h = nn.ModuleList(
            [block for at, block in enumerate(skipped.transformer.h) if at != 1]
        )
        skipped.config.num_hidden_layers = 3
        states = skipped(IDS, use_cache=False, output_hidden_states=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twice = plain["hidden"] * 2
        half = (twice @ twice.transpose(1, 2)).float()
    ids, steps = IDS, list[torch.Tensor]()
    for _ in range(3):  # without a cache: each step's last position is zeroed at its own step
        positions = [range(IDS.shape[1] - 1, ids.shape[1])]

        def zero(value: torch.Tensor, positions: Any = positions[0]) -> torch.Tensor:
            changed = value.clone()
            changed[:, list(positions)] = 0
            return changed

        hidden, logits = _plain({"transformer.h.1.mlp": zero}, ids)
        steps.append(hidden[:, -1:])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return {
        "read": Kind(read, plain),
        "write": Kind(write, doubled),
        "in_place": Kind(in_place, zeroed),
        "gradient": Kind(gradient, {"grad": grad}),
        "generate": Kind(generate, {"hidden": steps[1], "ids": ids}),
        "skip": Kind(skip, {"hidden": states.hidden_states[2], "logits": states.logits}),
        "stop": Kind(stop, {"hidden": plain["hidden"]}),
        "pattern": Kind(pattern, {"pattern": weights}),
        "edit": Kind(edit, zeroed),
        "session": Kind(session, zeroed),
        "scan": Kind(scan, {"shape": torch.tensor([1, 5, 16])}),
        "contexts": Kind(contexts, {"half": half, "mean": plain["hidden"].mean()}),
        "batch": Kind(batch, {"hidden": zeroed["hidden"], "logits": other}),
    }
