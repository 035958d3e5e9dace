"""Hostile jobs through a server, beside neighbours whose results have to stay what they are.

    python -m tests.attack.hostile_server 50000 --seed 1

Jobs of `mutated_jobs.py` and `hostile_jobs.py` are sent over HTTP by several tenants at once, while
another tenant runs usual experiments. Every refusal is a documented one, and comes soon. The model
is as it was, the processes are those that were there, none has touched a file outside of the data
folder or a socket, and memory does not grow from job to job.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import insitu
from insitu import LanguageModel
from insitu.remote.problems import Problem, problem_of
from tests.attack.hostile_jobs import Hostile, hand_made
from tests.attack.mutated_jobs import GROWTH, Sample, mutated, resident_of
from tests.attack.mutated_jobs import _session as session_job
from tests.server.real_server import Answer, Client, RealServer, real_server, write_model

AUDITED = Path(__file__).parent / "audited"
LIMITS = {"operations": 1e8, "peak_bytes": 2**26, "seconds": 10, "nodes": 2000, "sites": 200}
CLOSE = 1e-5
SLOW = 60.0
"""Seconds in which any job has to be answered, on a machine that does much else."""

OWN_CODE = (
    "<unknown> ast.py:parse inspect.py:_signature_fromstr ",
    "<string> operator_schemas.py:_torchscript_type_to_python_type ",
)
"""Who compiles texts that are no stranger's: signatures in the documentation of C functions, and
types of PyTorch's operators."""

SHOWN = re.compile(r"(\S+)\.py tokenize\.py:open linecache\.py:updatecache ")
"""Who opens source files to show lines: PyTorch, which keeps the stack of runs on fake tensors."""

INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib")),
    *insitu.__path__,
)
"""Where these files lie: Python's, the packages' and ours."""

_OFTEN = 8  # of so many jobs one was thought of, the others were changed at random
_UNEXPECTED = ("internal", "engine_died", "unauthorised", "refused", "not_found")
_STATUSES = frozenset((200, 409, 413, 422))


# What is sent.


def _lines(model: Any) -> bytes:
    """A job with operations of many kinds on values of a language model."""
    with model.scan([[5, 6, 7, 8]]) as tracer:
        hidden = model.transformer.h[1].mlp.output
        hidden[:, 0] = 0
        parts = hidden.split(2, dim=-1)
        (hidden * 2 + parts[0].sum()).save("sum")
        hidden[hidden > 0].save("above")
        hidden[0].unsqueeze(0).expand(5, 4, 16).reshape(20, 16).save("wide")
        torch.cat([hidden, hidden.repeat(2, 1, 1)]).softmax(-1).topk(2).save("most")
        hidden.argmax(-1).flatten().bincount(minlength=4).save("counts")
        (hidden.abs().sum().long().item() << 2).save("number")
        torch.nn.functional.one_hot(hidden.argmax(-1)).save("hot")
        hidden.new_zeros(2, 3).save("zeros")
        model.transformer.ln_f(hidden).save("called")
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 1.5
        model.lm_head.output.save("output")
    return tracer.job.to_bytes()


def _captures(model: Any) -> bytes:
    """A job at whose first run Transformers hangs hooks of its own on a model, which stay."""
    with model.scan([[5, 6, 7, 8]], output_hidden_states=True, output_attentions=True) as tracer:
        model.lm_head.output.save("output")
    return tracer.job.to_bytes()


def _gradients(model: Any) -> bytes:
    with model.scan([[5, 6, 7, 8]]) as tracer:
        hidden = model.transformer.h[1].mlp.output
        hidden.grad.save("grad")
        model.lm_head.output[0, -1, 7].backward()
    return tracer.job.to_bytes()


class Hostiles:
    """Jobs that are sent: bytes by number.

    Args:
        model: the model of the server.
        seed: of what is changed.
    """

    def __init__(self, model: LanguageModel, seed: int) -> None:
        self._seed = seed
        makers: Sequence[Callable[[Any], bytes]] = (_lines, _gradients, session_job)
        self._samples = [Sample(model, make(model)) for make in makers]
        self.thought_of = hand_made(model)

    def __call__(self, number: int) -> Hostile:
        """Returns the job of a number."""
        at, place = divmod(number, _OFTEN)
        if place == 0:
            return self.thought_of[at % len(self.thought_of)]
        dice = random.Random(f"{self._seed} {number}")
        return Hostile(f"mutated {number}", mutated(dice.choice(self._samples), dice), frozenset())


# What usual experiments give.


def _reads(model: Any, ids: Any) -> dict[str, Any]:
    with model.trace(ids):
        hidden = model.transformer.h[1].mlp.output.save()
        logits = model.lm_head.output[0, -1].save()
    return {"hidden": hidden.value, "logits": logits.value}


def _steers(model: Any, ids: Any) -> dict[str, Any]:
    with model.trace() as tracer:
        with tracer.invoke(ids):
            model.transformer.h[0].mlp.output[:] += torch.linspace(-1, 1, 16)
            first = model.lm_head.output.save()
        with tracer.invoke(ids):
            model.transformer.h[2].mlp.output[:, 0] = 0
            second = model.lm_head.output.save()
    return {"first": first.value, "second": second.value}


def _generates(model: Any, ids: Any) -> dict[str, Any]:
    with model.generate(ids, max_new_tokens=4, do_sample=False) as tracer:
        hidden = model.transformer.h[2].mlp.output.save()
    return {"tokens": tracer.output, "hidden": hidden.value}


def _differentiates(model: Any, ids: Any) -> dict[str, Any]:
    with model.trace(ids):
        hidden = model.transformer.h[1].mlp.output
        grad = hidden.grad.save()
        model.lm_head.output[0, -1, 7].backward()
    return {"grad": grad.value}


USUAL: Sequence[Callable[[Any, Any], dict[str, Any]]] = (
    _reads, _steers, _generates, _differentiates,
)  # fmt: skip
PROMPTS = ([[5, 6, 7, 8]], [[9, 8, 7]], [[1, 2, 3, 4, 5, 6, 7]])


@dataclass
class Outcome:
    """What became of many jobs.

    Attributes:
        counts: how many were sent, and what was said of them.
        wrong: what must not have happened.
        slowest: the most seconds that an answer took, and its job.
        neighbours: how many usual experiments were run meanwhile.
        growth: by how many bytes processes grew, by their names.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    slowest: tuple[float, str] = (0.0, "")
    neighbours: int = 0
    growth: dict[str, int] = field(default_factory=dict[str, int])


class Neighbour(threading.Thread):
    """Runs usual experiments for as long as others do harm, and compares what they give.

    Args:
        server: the server.
        local: the same model, which no server runs.
        outcome: what became of all.
    """

    def __init__(self, server: RealServer, local: LanguageModel, outcome: Outcome) -> None:
        super().__init__(daemon=True)
        self._model, self._outcome = server.model("neighbour"), outcome
        self._cases = [*itertools.product(USUAL, PROMPTS)]
        self._known = [usual(local, ids) for usual, ids in self._cases]
        self.over = threading.Event()

    def once(self) -> None:
        """Runs each experiment, and notes what is not as it is without a server."""
        for (usual, ids), known in zip(self._cases, self._known, strict=True):
            try:
                found = usual(self._model, ids)
                for name, one in known.items():
                    torch.testing.assert_close(found[name], one, rtol=CLOSE, atol=CLOSE)
            except Exception:
                what = traceback.format_exc(limit=-3)
                self._outcome.wrong.append(f"a neighbour: {usual.__name__} {ids}: {what}")
            self._outcome.neighbours += 1
            if self.over.is_set():
                return

    def run(self) -> None:
        while not self.over.is_set():
            self.once()


def wrong_with(hostile: Hostile, answer: Answer) -> str:
    """Returns what is wrong with an answer to a hostile job, "" if nothing is."""
    problem = answer.problem
    if answer.results is not None:
        failed = answer.read().failed
        problem = problem_of(failed[0].error) if failed else None
    if answer.status not in _STATUSES and not (problem and problem.code == "storage"):
        return f"HTTP {answer.status}: {problem}"
    if answer.seconds > SLOW:
        return f"{answer.seconds:.1f} seconds"
    if problem is None:
        return (
            "" if answer.is_done and "" in (hostile.codes or {""}) else f"it was done: {answer.job}"
        )
    if problem.code in _UNEXPECTED or not problem.detail or len(problem.detail) > 20_000:
        return f"{problem}"
    if hostile.codes and problem.code not in hostile.codes:
        return f"the code {problem}"
    if hostile.codes and hostile.lined and problem.line is None:
        return f"no line: {problem}"
    return ""


class Attack:
    """Sends hostile jobs to a server that is watched.

    Args:
        server: the server.
        audit: the folder that its processes write what they touch to.
        seed: of what is sent.
    """

    def __init__(self, server: RealServer, audit: Path, seed: int = 1) -> None:
        self._server, self._audit = server, audit
        self.hostiles = Hostiles(server.model("neighbour"), seed)
        self.outcome = Outcome()
        self._lock = threading.Lock()

    def run(self, count: int, said: Callable[[str], object] = lambda line: None) -> Outcome:
        """Sends jobs, and looks at all that must not have happened meanwhile.

        Args:
            count: how many.
            said: is told now and then how far it is.
        """
        server, outcome = self._server, self.outcome
        neighbour = Neighbour(server, LanguageModel(str(server.data.parent / "small")), outcome)
        neighbour.once()  # what is imported late is imported now
        self._warm()
        pids = {module: server.pids(module) for module in ("engine", "admission")}
        digests, touched = self._digests(), len(self._touched())
        neighbour.start()
        base: dict[str, int] = {}
        numbers = iter(range(count))
        threads = [
            threading.Thread(target=self._send, args=(numbers, tenant), daemon=True)
            for tenant in ("eve", "mallory", "trudy")
        ]
        for thread in threads:
            thread.start()
        told = 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            sent = outcome.counts["sent"]
            if not base and sent >= count // 10:
                base = self._resident(pids)
            if sent - told >= max(count // 50, 1):
                told = sent
                said(f"{dict(outcome.counts)}, slowest {outcome.slowest}")
        neighbour.over.set()
        neighbour.join()
        self._note_growth(base, self._resident(pids))
        for module, before in pids.items():
            if server.pids(module) != before:
                outcome.wrong.append(f"another process: {module} {before} {server.pids(module)}")
        if self._digests() != digests:
            outcome.wrong.append("the model has changed")
        lines = self._touched()[touched:]
        outcome.wrong += [f"touched: {one}" for one in lines if not self._may_touch(one)][:20]
        return outcome

    def _warm(self) -> None:
        """Sends what is right once, so that what comes late is there: imports, and hooks."""
        client = self._server.client("eve")
        right = [sample.data for sample in self.hostiles._samples]
        for data in (*right, _captures(self._server.model("eve"))):
            assert client.send(data).is_done
        client.close()

    def _send(self, numbers: Iterator[int], tenant: str) -> None:
        client = self._server.client(tenant)
        while True:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                break
            hostile = self.hostiles(number)
            try:
                self._note(hostile, self._answer(client, hostile))
            except Exception:
                what = traceback.format_exc(limit=-3)
                with self._lock:
                    self.outcome.wrong.append(f"{hostile.name}: {what}")
        client.close()

    def _answer(self, client: Client, hostile: Hostile) -> Answer:
        answer = client.send(hostile.data, path=hostile.path)
        if answer.status == 202 and answer.job is not None:  # it waits for others
            job = client.ended(answer.job.id)
            answer.job, answer.problem, answer.status = job, job.problem, 200
            if job.state == "done":
                answer.results = client.http.get(f"/v1/jobs/{job.id}/result").content
        return answer

    def _note(self, hostile: Hostile, answer: Answer) -> None:
        wrong = wrong_with(hostile, answer)
        with self._lock:
            counts = self.outcome.counts
            counts["sent"] += 1
            problem: Problem | None = answer.problem
            counts["done" if problem is None else problem.code] += 1
            self.outcome.slowest = max(self.outcome.slowest, (answer.seconds, hostile.name))
            if wrong:
                self.outcome.wrong.append(f"{hostile.name}: {wrong}"[:2000])

    # What is looked at from outside.

    def _digests(self) -> str:
        """The digests of the weights and buffers of the engine, as it has them now."""
        (pid,) = self._server.pids("engine")
        there = {*self._audit.glob(f"digests-{pid}-*")}
        os.kill(pid, signal.SIGUSR1)
        until = time.monotonic() + 60
        while True:
            new = [one for one in {*self._audit.glob(f"digests-{pid}-*")} - there if not one.suffix]
            if new:
                return new[0].read_text()
            assert time.monotonic() < until, "the engine does not answer"
            time.sleep(0.05)

    def _touched(self) -> list[str]:
        return (self._audit / "touched").read_text(errors="replace").splitlines()

    def _may_touch(self, line: str) -> bool:
        """Whether a process may have touched that."""
        _, process, event, *what = line.split(" ", 3)
        rest = what[0] if what else ""
        if event in ("compile", "exec") and any(rest.startswith(one) for one in OWN_CODE):
            return True
        shown = SHOWN.match(rest) if event == "open" else None
        if shown is not None and shown[1].startswith(INSTALLED):
            return True
        data = re.escape(str(self._server.data))
        name = r"[0-9a-f]{64}"
        if event == "open" and re.match(rf"{data}/(bodies|blobs)/{name} r ", rest):
            return True
        if process == "engine":
            new = rf"{data}/results/\.new-[0-9a-f]+"
            writes = event == "open" and re.match(rf"{new} None ", rest)
            renames = event == "os.rename" and re.match(rf"{new} {data}/results/{name} -1 -1", rest)
            return bool(writes or renames)
        if process == "admission":  # it forks workers, and nothing else
            return event in ("os.fork", "socket.__new__")
        return event == "open" and rest.startswith("/proc/self/statm r ")

    def _resident(self, pids: Mapping[str, Sequence[int]]) -> dict[str, int]:
        found = {"front": resident_of(self._server.process.pid)}
        for pid in pids["engine"]:
            with suppress(OSError):
                found["engine"] = resident_of(pid)
        return found

    def _note_growth(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        for name, size in after.items():
            self.outcome.growth[name] = size - before.get(name, size)


@contextmanager
def attacked(folder: Path, seed: int = 1) -> Iterator[Attack]:
    """Runs a server that is watched, with tenants who do harm and one who does not."""
    audit = folder / "audit"
    audit.mkdir()
    tenants = {name: {} for name in ("neighbour", "eve", "mallory", "trudy")}
    environment = {"PYTHONPATH": str(AUDITED), "INSITU_AUDIT": str(audit)}
    with real_server(
        folder,
        tenants,
        environment,
        model=write_model(folder),
        job_limits=LIMITS,
        tenant_limits={"lengths_a_minute": float("inf")},
    ) as server:
        yield Attack(server, audit, seed)


def main() -> int:
    """Sends jobs, and says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=None, help="Send the job of this number alone.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, attacked(Path(folder), given.seed) as attack:
        if given.only is not None:
            hostile = attack.hostiles(given.only)
            with attack._server.client("eve") as client:
                attack._note(hostile, attack._answer(client, hostile))
            outcome = attack.outcome
        else:
            outcome = attack.run(given.count, lambda line: print(line, flush=True))
    print(f"{dict(outcome.counts)}\nslowest: {outcome.slowest}; grown: {outcome.growth}")
    print(f"{outcome.neighbours} usual experiments beside them")
    print(f"{len(outcome.wrong)} wrong", *outcome.wrong[:20], sep="\n")
    return bool(outcome.wrong) or max(outcome.growth.values(), default=0) > GROWTH


if __name__ == "__main__":
    sys.exit(main())
