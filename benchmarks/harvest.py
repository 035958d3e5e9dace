"""What a harvest costs over a loop by hand that stops behind the block, and over whole forwards.

    python benchmarks/harvest.py [--sae-lens PYTHON ...]

The model has the size of GPT-2 small, with random weights. Activations behind the sixth of its
twelve blocks are written as bfloat16. The bound is a loop whose hook raises at that block; it runs
the same batches, and writes the same bytes. All cases run in turn in one process, and ratios are of
medians. On a busy machine seconds of the processor say more than those of the clock: both are
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from experiments import machine
from safetensors.torch import save_file
from subjects import gpt2
from tables import Figure, Table, figures, write_part

from insitu import LanguageModel
from insitu.harvest import harvest
from insitu.harvest.data.ranges import batches

BLOCK, LENGTH, BATCH = 5, 128, 8  # the sixth block of twelve
SITE = f"residual_out:{BLOCK}"


class Stop(Exception):  # noqa: N818
    """Ends a forward."""


class Loops:
    """Loops by hand over the same batches."""

    def __init__(self, module: torch.nn.Module, rows: list[list[int]]) -> None:
        self.module, self.rows = module, rows

    def bound(self, folder: Path) -> None:
        self._run(folder, stops=True)

    def whole(self, folder: Path) -> None:
        self._run(folder, stops=False)

    def _run(self, folder: Path, stops: bool) -> None:
        lengths = [len(row) for row in self.rows]
        starts = [sum(lengths[:at]) for at in range(len(lengths))]
        kept = torch.empty(sum(lengths), 768, dtype=torch.bfloat16)
        seen: list[torch.Tensor] = []

        def hook(_: object, args: object, output: object) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            if stops:
                raise Stop

        handle = self.module.transformer.h[BLOCK].register_forward_hook(hook)
        try:
            for batch in batches(lengths, LENGTH * BATCH):
                places = [place for group in batch for place in group]
                longest = max(lengths[place] for place in places)
                ids = torch.zeros(len(places), longest, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for at, place in enumerate(places):
                    ids[at, : lengths[place]] = torch.tensor(self.rows[place])
                    mask[at, : lengths[place]] = 1
                ragged = None if bool(mask.all()) else mask
                try:
                    with torch.no_grad():
                        self.module(ids, attention_mask=ragged, use_cache=False)
                except Stop:
                    pass
                values = seen.pop().to(torch.bfloat16)
                for at, place in enumerate(places):
                    own = slice(starts[place], starts[place] + lengths[place])
                    kept[own] = values[at, : lengths[place]]
        finally:
            handle.remove()
        folder.mkdir(parents=True)
        path = folder / "0.safetensors"
        save_file(
            {
                "activations": kept,
                "token_ids": torch.tensor([one for row in self.rows for one in row]),
            },
            path,
        )
        with path.open("rb") as file:
            os.fsync(file.fileno())


def timed(cases: dict[str, Callable[[Path], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of the processor and of the clock that each case takes, by their medians."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        order = [*cases]
        random.shuffle(order)
        for name in order:
            folder = Path(tempfile.mkdtemp()) / "a"
            before = time.process_time(), time.perf_counter()
            cases[name](folder)
            if number:
                after = time.process_time(), time.perf_counter()
                found[name].append((after[0] - before[0], after[1] - before[1]))
            shutil.rmtree(folder.parent)
    return {
        name: [statistics.median(one) for one in zip(*times, strict=True)]
        for name, times in found.items()
    }


COLUMNS = ("", "tokens/s", "tokens/s of a processor", "insitu has, times", "by the processor")
OURS, BOUND, WHOLE = "insitu", "a hook that raises: the bound", "a hook, whole forwards"


def compared(title: str, found: dict[str, list[float]], tokens: int) -> Table:
    """The tokens a second of each case, and how many times as many a harvest has."""
    rows = [
        [
            name,
            f"{tokens / clock:,.0f}",
            f"{tokens / processor:,.0f}",
            *(f"{gain(found, name, at):.2f}" for at in (1, 0)),
        ]
        for name, (processor, clock) in found.items()
    ]
    return Table(title, COLUMNS, rows)


def gain(found: dict[str, list[float]], over: str, at: int = 1) -> float:
    """How many times the tokens a second of another case a harvest has: 1 by the clock."""
    return found[over][at] / found[OURS][at]


def memory(tokens: int) -> float:
    """The most memory of a process that harvests so many tokens of a tiny model, in MB."""
    code = f"import harvest; harvest.tiny({tokens})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def tiny(tokens: int) -> None:
    """Harvests ragged text of a tiny model, and prints how much memory that took."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    draw = random.Random(0)

    def documents() -> object:
        while True:
            yield [draw.randrange(100) for _ in range(draw.randrange(20, 200))]

    model = LanguageModel(GPT2LMHeadModel(config).eval())
    with tempfile.TemporaryDirectory() as folder:
        harvest(
            model, documents(), "residual_out:1", to=folder, tokens=tokens, shard_tokens=1 << 14,
            batch_tokens=4096,
        )  # fmt: skip
    # Not `ru_maxrss`, which keeps what the process had before it became this program.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


def sae_lens(
    python: str, module: torch.nn.Module, rows: list[list[int]]
) -> tuple[str, dict[str, list[float]]]:
    """SAELens' version, and what its cache runner takes in its own environment, by its loaders."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(f"{folder}/model")
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        os.makedirs(f"{folder}/data")
        Path(folder, "data", "rows.jsonl").write_text(text)
        script = Path(__file__).with_name("harvest_sae_lens.py")
        done = subprocess.run(
            [python, str(script), folder, str(torch.get_num_threads()), str(sum(map(len, rows)))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        version, times = json.loads(done.stdout.splitlines()[-1])
        return version, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sae-lens", nargs="*", default=[], help="The Pythons of environments with SAELens."
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", type=Path, help="a file with a part of these tables: RESULTS.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    module, draw = gpt2(), random.Random(0)
    model = LanguageModel(module)

    def insitu(rows: list[list[int]], folder: Path) -> None:
        harvest(
            model, rows, SITE, to=folder, dtype="bfloat16", context=LENGTH,
            batch_tokens=LENGTH * BATCH, progress=False,
        )  # fmt: skip
        if rows is even:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            sizes.append(size / (2 * 768 * sum(map(len, rows))))

    sizes: list[float] = []
    even = [[draw.randrange(50257) for _ in range(LENGTH)] for _ in range(chosen.sequences)]
    loops = Loops(module, even)
    cases = {OURS: lambda folder: insitu(even, folder), BOUND: loops.bound, WHOLE: loops.whole}
    found = timed(cases, chosen.rounds)
    held = [
        Figure("of the bound, tokens a second", gain(found, BOUND), 0.93, least=True),
        Figure("of whole forwards, tokens a second", gain(found, WHOLE), 2.7, least=True),
        Figure("bytes on disk, of tokens x width x item size", sizes[-1], 1.02),
    ]
    for python in chosen.sae_lens:
        version, peer = sae_lens(python, module, even)
        for name, least in (("its Hugging Face loader", 2), ("its own model", 1.1)):
            row = f"SAELens {version}, {name}"
            found[row] = peer[name]
            what = f"of {row}, tokens a second"
            held.append(Figure(what, gain(found, row), least, least=True))
    tables = [compared(f"{len(even)} sequences of {LENGTH} tokens", found, LENGTH * len(even))]
    lengths = [min(LENGTH, max(4, int(draw.lognormvariate(4.2, 0.6)))) for _ in range(96)]
    uneven = [[draw.randrange(50257) for _ in range(length)] for length in lengths]
    cases = {OURS: lambda folder: insitu(uneven, folder), BOUND: Loops(module, uneven).bound}
    found = timed(cases, chosen.rounds)
    held.append(
        Figure("of the bound, ragged text, tokens a second", gain(found, BOUND), 0.85, least=True)
    )
    title = f"{len(uneven)} sequences of {min(lengths)} to {max(lengths)} tokens"
    tables.append(compared(title, found, sum(lengths)))
    if not chosen.no_memory:
        few, many = memory(100_000), memory(1_000_000)
        held.append(Figure("most memory at 10^6 tokens, of that at 10^5", many / few, 1.05))
    tables.insert(0, figures(held))
    for table in tables:
        print(table.text(), end="\n\n", flush=True)
    if chosen.write is not None:
        text = TITLE.format(machine=machine(), threads=chosen.threads)
        write_part(chosen.write, [text, *(table.markdown() for table in tables)])


TITLE = """# Harvesting, measured

Written by `make bench-harvest`: {machine}; {threads} threads for torch.

A random model of GPT-2 small's size. Activations behind the sixth of its twelve blocks are written
as bfloat16. The bound is a loop by hand whose hook raises at that block; it runs the same batches,
and writes the same bytes. A harvest is timed with its checks of the model and the data. SAELens
runs in environments of its own. The limits were set against version 6.18, whose cache runner ran
whole models of Hugging Face's. In version 6.54 it stops behind the block too, and so runs at the
bound itself: nothing can be twice as fast. Its times are without opening the model and the data.
"""


if __name__ == "__main__":
    main()
