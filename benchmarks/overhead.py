"""What an experiment costs over the bare model, and over the same written with hooks by hand.

Two GPT-2s with random weights: one of 12 layers and 16 wide, on which nothing but overhead takes
time, and one of the size of GPT-2 small. Run by `make bench`; `--peers` runs nnsight too, with the
Python of an environment that has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import medians
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import LanguageModel

LAYERS = 12
NEW_TOKENS = 20
INVOCATIONS = 4
OPERATIONS = [9 if layer < 4 else 8 for layer in range(LAYERS)]  # 100 in all
Case = Callable[[], object]


def build(width: int, heads: int, vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width,
        n_layer=LAYERS,
        n_head=heads,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def hidden(output: object) -> torch.Tensor:
    """A block's hidden states, on every version of Transformers."""
    return output[0] if isinstance(output, tuple) else output


class _Stop(BaseException):
    """What a hook raises that ends a forward early."""


class Plain:
    """The experiments with hooks, as one writes them by hand."""

    def __init__(self, module: GPT2LMHeadModel, ids: torch.Tensor) -> None:
        self.module = module
        self.ids = ids
        self.blocks = module.transformer.h

    def bare(self) -> object:
        with torch.no_grad():
            return self.module(self.ids, use_cache=False)

    def bare_generate(self) -> object:
        return self.module.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    def hooked(self, hooks: list[tuple[nn.Module, Callable]], run: Case) -> None:
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            run()
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def save_1(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            kept.append(output.clone())

        self.hooked([(self.module.lm_head, hook)], self.bare)
        return kept

    def save_12(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: object) -> None:
            kept.append(hidden(output).clone())

        modules = [*self.blocks[:11], self.module.lm_head]
        self.hooked([(module, hook) for module in modules], self.bare)
        return kept

    def save_12_operations_100(self) -> object:
        kept: list[torch.Tensor] = []

        def computing(count: int) -> Callable:
            def hook(module: nn.Module, args: tuple, output: object) -> None:
                value = hidden(output)
                for _ in range(count):
                    value = value + 1
                kept.append(value.clone())

            return hook

        modules = [*self.blocks[:11], self.module.lm_head]
        hooks = [(m, computing(count)) for m, count in zip(modules, OPERATIONS, strict=True)]
        self.hooked(hooks, self.bare)
        return kept

    def lens(self) -> object:
        kept: list[torch.Tensor] = []
        norm, head = self.module.transformer.ln_f, self.module.lm_head.weight

        def hook(module: nn.Module, args: tuple, output: object) -> None:
            last = F.layer_norm(
                hidden(output)[:, -1], norm.normalized_shape, norm.weight, norm.bias
            )
            kept.append(F.linear(last, head).clone())

        self.hooked([(block, hook) for block in self.blocks], self.bare)
        return kept

    def patch(self) -> object:
        kept: list[torch.Tensor] = []

        def change(module: nn.Module, args: tuple, output: object) -> object:
            changed = hidden(output) * 0.5
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            kept.append(output.clone())

        self.hooked([(self.blocks[5], change), (self.module.lm_head, keep)], self.bare)
        return kept

    def bare_batch(self) -> object:
        with torch.no_grad():
            return self.module(self.ids.repeat(INVOCATIONS, 1), use_cache=False)

    def invocations(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            kept.extend(output[i : i + 1].clone() for i in range(INVOCATIONS))

        self.hooked([(self.module.lm_head, hook)], self.bare_batch)
        return kept

    def gradients(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: object) -> None:
            kept.append(hidden(output))

        def run() -> None:
            logits = self.module(self.ids, use_cache=False).logits
            kept[:] = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), kept)

        self.hooked([(block, hook) for block in self.blocks], run)
        return [grad.clone() for grad in kept]

    def stop(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: object) -> None:
            kept.append(hidden(output).clone())
            raise _Stop

        self.hooked([(self.blocks[0], hook)], self.bare)
        return kept

    def generate(self) -> object:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if not kept:
                kept.append(hidden(output).clone())

        self.hooked([(self.blocks[6], hook)], self.bare_generate)
        return kept


class Insitu:
    """The same experiments with Insitu."""

    def __init__(self, module: GPT2LMHeadModel, ids: torch.Tensor) -> None:
        self.model = LanguageModel(module)
        self.module = module
        self.ids = ids

    def save_1(self) -> object:
        model = self.model
        with model.trace(self.ids):
            kept = model.lm_head.output.save()
        return [kept]

    def save_12(self) -> object:
        model = self.model
        with model.trace(self.ids):
            kept = [block.output[0].save() for block in model.transformer.h[:11]]
            kept.append(model.lm_head.output.save())
        return kept

    def save_12_operations_100(self) -> object:
        model = self.model
        kept = []
        with model.trace(self.ids):
            values = [block.output[0] for block in model.transformer.h[:11]]
            values.append(model.lm_head.output)
            for value, count in zip(values, OPERATIONS, strict=True):
                for _ in range(count):
                    value = value + 1
                kept.append(value.save())
        return kept

    def lens(self) -> object:
        model, norm = self.model, self.module.transformer.ln_f
        head, kept = self.module.lm_head.weight, []
        with model.trace(self.ids):
            for block in model.transformer.h:
                last = block.output[0][:, -1]
                last = F.layer_norm(last, norm.normalized_shape, norm.weight, norm.bias)
                kept.append(F.linear(last, head).save())
        return kept

    def patch(self) -> object:
        model = self.model
        with model.trace(self.ids):
            block = model.transformer.h[5]
            block.output = block.output[0] * 0.5
            kept = model.lm_head.output.save()
        return [kept]

    def invocations(self) -> object:
        model, kept = self.model, []
        with model.trace() as tracer:
            for _ in range(INVOCATIONS):
                with tracer.invoke(self.ids):
                    kept.append(model.lm_head.output.save())
        return kept

    def gradients(self) -> object:
        model = self.model
        with model.trace(self.ids):
            kept = [block.output[0].grad.save() for block in model.transformer.h]
            model.lm_head.output[:, -1].logsumexp(-1).sum().backward()
        return kept

    def stop(self) -> object:
        model = self.model
        with model.trace(self.ids):
            kept = model.transformer.h[0].output[0].save()
        return [kept]

    def generate(self) -> object:
        model = self.model
        with model.generate(self.ids, max_new_tokens=NEW_TOKENS):
            kept = model.transformer.h[6].output[0].save()
        return [kept]


NAMES = (
    *("save_1", "save_12", "save_12_operations_100", "lens", "patch", "invocations"),
    *("gradients", "stop", "generate"),
)
# What is compared with something else than a bare forward.
BARE = {"generate": "bare generate", "invocations": "bare batch"}


def compare(title: str, module: GPT2LMHeadModel, rounds: int) -> dict[str, float]:
    """Prints a table for one model and returns the medians."""
    ids = torch.randint(0, module.config.vocab_size, (1, 16))
    plain, insitu = Plain(module, ids), Insitu(module, ids)
    forwards: dict[str, Case] = {"bare": plain.bare, "bare batch": plain.bare_batch}
    # In a group of its own: twenty forwards between two others leave them no warm cache.
    generations: dict[str, Case] = {"bare generate": plain.bare_generate}
    for name in NAMES:
        theirs, ours = getattr(plain, name)(), getattr(insitu, name)()
        for expected, found in zip(theirs, ours, strict=True):
            torch.testing.assert_close(found.value, expected, msg=name)
        cases = generations if name == "generate" else forwards
        cases[f"hooks {name}"] = getattr(plain, name)
        cases[f"insitu {name}"] = getattr(insitu, name)
    found = medians(forwards, rounds) | medians(generations, max(100, rounds // 4))
    print(f"\n{title}: a bare forward takes {found['bare']:,.0f} µs")
    print(f"{'':24}{'hooks':>9}{'insitu':>9}{'difference':>12}{'ratio':>8}   µs over bare")
    for name in NAMES:
        bare = found[BARE.get(name, "bare")]
        hooks, ours = found[f"hooks {name}"], found[f"insitu {name}"]
        over = f"{hooks - bare:9,.0f}{ours - bare:9,.0f}{ours - hooks:12,.0f}"
        print(f"{name.replace('_', ' '):24}{over}{ours / hooks:8.3f}")
    return found


def report(narrow: dict[str, float], small: dict[str, float]) -> None:
    """Prints the figures that the project holds itself to, with their limits."""
    save_12 = narrow["insitu save_12"] - narrow["hooks save_12"]
    with_operations = (
        narrow["insitu save_12_operations_100"] - narrow["hooks save_12_operations_100"]
    )
    worst = max(
        small[f"insitu {name}"] / small[f"hooks {name}"] for name in NAMES if name != "gradients"
    )
    stopping = narrow["insitu stop"] - narrow["hooks stop"]
    share = small["insitu stop"] / small["bare"]
    lines = [
        ("1 save over bare, µs", narrow["insitu save_1"] - narrow["bare"], 60),
        ("12 saves over hooks, µs", save_12, 80),
        ("a patch and 1 save over bare, µs", narrow["insitu patch"] - narrow["bare"], 80),
        (
            "4 invocations over a bare batch of 4, µs",
            narrow["insitu invocations"] - narrow["bare batch"],
            150,
        ),
        (
            "12 gradients, worst ratio to hooks",
            max(found["insitu gradients"] / found["hooks gradients"] for found in (narrow, small)),
            1.05,
        ),
        ("a recorded operation over one in a hook, µs", (with_operations - save_12) / 100, 4.5),
        ("stop after block 0 over a hook that raises, µs", stopping, 80),
        ("GPT-2 small, worst ratio to hooks", worst, 1.03),
        ("GPT-2 small, stop after block 0, share of bare", share, 0.12),
    ]
    print()
    for what, value, limit in lines:
        verdict = "" if value <= limit else "   MISSED"
        print(f"{what:50}{value:8.2f}  (at most {limit:g}){verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400, help="rounds on the narrow model")
    parser.add_argument("--rounds-small", type=int, default=100, help="rounds on GPT-2 small")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has nnsight")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    narrow = compare("12 layers, 16 wide", build(16, 4, 1000), chosen.rounds)
    small = compare("GPT-2 small's size", build(768, 12, 50257), chosen.rounds_small)
    report(narrow, small)
    if chosen.peers:
        script = Path(__file__).with_name("overhead_nnsight.py")
        command = [chosen.peers, str(script), str(chosen.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        print(f"\nnnsight {theirs.pop('version')}, 12 layers, 16 wide, µs over a bare forward")
        for name, over in theirs.items():
            ours = narrow[f"insitu {name}"] - narrow["bare"]
            print(f"{name.replace('_', ' '):24}{over:9,.0f}   insitu {ours:9,.0f}")


if __name__ == "__main__":
    main()
