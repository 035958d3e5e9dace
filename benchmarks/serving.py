"""What many users get from one server: jobs that share passes, against the same one by one.

A model of the size of GPT-2 small is served by `insitu serve`, by the same told to join nothing,
and by nnsight behind a small HTTP server. Users send one prompt of 16 tokens each, and the next as
soon as they have the answer. The servers take turns, in short rounds and in shuffled order. Clients
are processes of their own, and compare every answer with PyTorch's hooks. Run by
`make bench-serving`; `--nnsight` is the Python of an environment that has nnsight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from experiments import machine
from subjects import gpt2
from tables import Figure, Table, figures, write_part

from insitu.server.records import Tenant
from insitu.server.storage.keys import make_key
from insitu.server.storage.keys_file import write_keys

HERE = Path(__file__).parent
JOINED, ALONE, NNSIGHT = "joined", "one by one", "nnsight, one by one"
USERS = (1, 2, 4, 8, 16, 32)
WARM_UP = 8


@dataclass(slots=True)
class Variant:
    """A server with its client.

    Attributes:
        process: the server.
        client: the process that asks for it.
        url: where it is.
        admin: the key that reads its metrics, "" if it has none.
    """

    process: subprocess.Popen[str]
    client: subprocess.Popen[str]
    url: str
    admin: str = ""

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Lets the client do something, and adds what it has taken of the server."""
        used, batches = self._seconds(), self._batches()
        told = spoken(self.client, asked)
        used = {what: seconds - used[what] for what, seconds in self._seconds().items()}
        jobs, count = (now - then for now, then in zip(self._batches(), batches, strict=True))
        return {**told, "used": used, "batch": jobs / count if count else 1.0}

    def _seconds(self) -> dict[str, float]:
        """The seconds of a processor that the processes of the server have had."""
        found: dict[str, float] = defaultdict(float)
        root = psutil.Process(self.process.pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            line = " ".join(process.cmdline())
            what = "front" if process == root else "admission"
            what = "engine" if "insitu.server.engines.engine" in line else what
            found[what] += times.user + times.system
        return found

    def _batches(self) -> tuple[float, float]:
        """How many jobs there were in how many batches."""
        if not self.admin:
            return 0.0, 0.0
        headers = {"Authorization": f"Bearer {self.admin}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers, trust_env=False).text
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return tuple(
            sum(float(one) for name, one in found.items() if name.startswith(what))
            for what in ("insitu_batch_jobs_sum", "insitu_batch_jobs_count")
        )  # pyright: ignore[reportReturnType]


@dataclass(slots=True)
class Curve:
    """What one number of users has got from one server, round by round."""

    rounds: list[dict[str, Any]] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(one[name] for one in self.rounds)

    @property
    def rates(self) -> list[float]:
        return [one["rate"] for one in self.rounds]

    @property
    def used(self) -> Mapping[str, float]:
        """Seconds of a processor for each request, by what has taken them."""
        requests = sum(len(one["latencies"]) for one in self.rounds)
        names = {name for one in self.rounds for name in one["used"]}
        return {
            name: sum(one["used"].get(name, 0.0) for one in self.rounds) / requests
            for name in names
        }

    def cells(self, users: int) -> list[str]:
        latencies = [one for each in self.rounds for one in each["latencies"]]
        served = [
            sum(counts) for counts in zip(*(one["served"] for one in self.rounds), strict=True)
        ]
        used = self.used
        return [
            str(users),
            f"{statistics.median(self.rates):.1f}",
            f"{1e3 * percentile(latencies, 50):,.0f}",
            f"{1e3 * percentile(latencies, 95):,.0f}",
            f"{jain(served):.3f}",
            f"{statistics.fmean(one['batch'] for one in self.rounds):.1f}",
            f"{1e3 * sum(used.values()):.1f}",
            f"{1e3 * (sum(used.values()) - used.get('engine', 0.0)):.1f}"
            if "engine" in used
            else "",
            f"{1e3 * self.median('client'):.1f}",
            f"{self.median('up'):,.0f}",
            f"{self.median('down'):,.0f}",
        ]


COLUMNS = (
    *("users", "requests/s", "p50 ms", "p95 ms", "Jain", "jobs a batch", "CPU ms"),
    *("of it not engine", "client CPU ms", "bytes up", "bytes down"),
)


def percentile(values: Sequence[float], of: float) -> float:
    """Returns the value below which so many in a hundred of some values are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(of / 100 * len(ordered)))]


def jain(served: Sequence[float]) -> float:
    """Returns Jain's index of fairness: 1 if all have had the same, 1/n if one has had all."""
    return sum(served) ** 2 / (len(served) * sum(one * one for one in served))


def spoken(process: subprocess.Popen[str], asked: Any = None) -> dict[str, Any]:
    """Tells a process something in a line of JSON, and returns what it answers."""
    assert process.stdin is not None and process.stdout is not None
    if asked is not None:
        print(json.dumps(asked), file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{process.args} has ended")


@contextmanager
def process(command: Sequence[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """Runs a process until the block ends."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    started = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield started
    finally:
        started.terminate()
        started.wait()


@contextmanager
def insitu(folder: Path, data: Path, threads: int, *options: str) -> Iterator[Variant]:
    """Serves the model in a folder, with a key for each user."""
    data.mkdir(mode=0o700)
    tenants = [Tenant(f"user{number}", f"user{number}") for number in range(max(USERS))]
    keys = [make_key(tenant.id) for tenant in tenants]
    admin = make_key("admin", ("jobs", "admin"))
    write_keys(
        data / "keys.json", [*tenants, Tenant("admin", "admin")], [key for _, key in [*keys, admin]]
    )
    command = [str(Path(sys.executable).with_name("insitu")), "serve", str(folder)]
    command += ["--port", "0", "--data", str(data / "data"), "--keys", str(data / "keys.json")]
    with process([*command, *options], threads) as server:
        assert server.stdout is not None
        url = next(line for line in server.stdout if "http" in line).split()[-1]
        until_ready(url)
        asked = {"url": url, "keys": [text for text, _ in keys], "threads": threads}
        script = str(HERE / "serving_insitu.py")
        with process([sys.executable, script, json.dumps(asked)], 1) as client:
            spoken(client)
            yield Variant(server, client, url, admin[0])


@contextmanager
def nnsight(python: str, threads: int) -> Iterator[Variant]:
    """Serves the model with nnsight."""
    script = str(HERE / "serving_nnsight.py")
    with process([python, script, json.dumps({"threads": threads})], threads) as server:
        url = spoken(server)["url"]
        asked = {"url": url, "keys": [""] * max(USERS), "threads": threads}
        with process([python, script, json.dumps(asked)], 1) as client:
            spoken(client)
            yield Variant(server, client, url)


def until_ready(url: str) -> None:
    """Waits until a server can run jobs."""
    while httpx.get(f"{url}/readyz", trust_env=False).status_code != 200:
        time.sleep(0.2)


def curves(
    variants: Mapping[str, Variant], users: Sequence[int], rounds: int
) -> dict[tuple[str, int], Curve]:
    """Measures closed loops: each round all servers, in a new order, with each number of users."""
    found: dict[tuple[str, int], Curve] = defaultdict(Curve)
    rng, first = random.Random(0), 1000
    for number in range(rounds):
        for count in users:
            order = list(variants)
            rng.shuffle(order)
            for name in order:
                requests = max(3 * WARM_UP, 8 * count)
                told = variants[name].ask(what="loop", users=count, count=requests, first=first)
                first += requests
                found[name, count].rounds.append(told)
                print(
                    f"round {number + 1}, {count:2} users, {name:20} {told['rate']:6.1f}/s, "
                    f"{told['batch']:.1f} a batch",
                    file=sys.stderr,
                )
    return found


def gains(found: Mapping[tuple[str, int], Curve], users: int, of: str) -> float:
    """Returns how many times the requests a second of another server the joining one answers."""
    pairs = zip(found[JOINED, users].rates, found[of, users].rates, strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def held(
    found: Mapping[tuple[str, int], Curve], idle: dict[str, Any], beside: dict[str, Any]
) -> list[Figure]:
    """Returns the figures that the project holds itself to."""
    limits = {1: 0.95, 8: 2.5, 32: 3.0}
    kept = [
        Figure(
            f"{users} users: requests a second, of {name}", gains(found, users, name), limit, True
        )
        for users, limit in limits.items()
        for name in (ALONE, NNSIGHT)
        if (name, users) in found
    ]
    if (JOINED, 8) in found:
        used = found[JOINED, 8].used
        own = 1e3 * (sum(used.values()) - used["engine"])
        kept.append(Figure("8 users: CPU ms a job, front and admission", own, 3))
    if idle:
        forward = statistics.median(idle["forwards"])
        for of, limit in ((50, 10), (95, 25)):
            over = 1e3 * (percentile(idle["latencies"], of) - percentile(idle["forwards"], of))
            kept.append(
                Figure(f"a small job, idle server: p{of} over its forward, ms", over, limit)
            )
        kept.append(Figure("a small job, idle server: forward, ms", 1e3 * forward, 1e9))
    if beside:
        over = 1e3 * (percentile(beside["latencies"], 95) - max(beside["passes"]))
        kept.append(Figure("a small job beside a sweep: p95 over the longest pass, ms", over, 50))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="*", default=USERS)
    parser.add_argument("--idle", type=int, default=60, help="small jobs on an idle server")
    parser.add_argument("--sweeps", type=int, default=5, help="sweeps beside small jobs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--nnsight", metavar="PYTHON", help="a Python that has nnsight")
    parser.add_argument("--write", type=Path, help="a file with a part of these tables: RESULTS.md")
    chosen = parser.parse_args()
    idle: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gpt2().save_pretrained(folder / "served")
        started = {
            JOINED: insitu(folder / "served", folder / "joined", chosen.threads),
            ALONE: insitu(folder / "served", folder / "alone", chosen.threads, "--no-join"),
        }
        if chosen.nnsight:
            started[NNSIGHT] = nnsight(chosen.nnsight, chosen.threads)
        variants = {name: stack.enter_context(server) for name, server in started.items()}
        for variant in variants.values():
            variant.ask(what="loop", users=4, count=2 * WARM_UP, first=100)
        found = curves(variants, chosen.users, chosen.rounds)
        if chosen.idle:
            idle = variants[JOINED].ask(what="idle", count=chosen.idle, first=200)
        if chosen.sweeps:
            beside = variants[JOINED].ask(what="beside", sweeps=chosen.sweeps, first=300)
    tables = [figures(held(found, idle, beside))] + [
        Table(name, COLUMNS, [found[name, users].cells(users) for users in chosen.users])
        for name in variants
    ]
    for table in tables:
        print(table.text(), end="\n\n", flush=True)
    if chosen.write is not None:
        text = TITLE.format(machine=machine(), threads=chosen.threads)
        write_part(chosen.write, [text, *(table.markdown() for table in tables)])


TITLE = """# Serving, measured

Written by `make bench-serving`: {machine}; servers have {threads} threads for torch.

A random model of GPT-2 small's size; users who send one prompt of 16 tokens each, of four kinds, in
a closed loop; each is a tenant. Servers are interleaved in short rounds; rates and CPU seconds are
medians of rounds, and of a server's processes together. Every answer was compared with hooks.
"""


if __name__ == "__main__":
    main()
