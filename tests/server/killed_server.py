"""A server with all its processes, which can be killed one by one; see `crashes.py`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args

from insitu.server.storage.keys import KEY_FILE

Kind = Literal["front", "engine", "template", "worker", "all"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ROOT = Path(__file__).parents[2]
_PATIENCE = 240.0


class KilledServer:
    """A server in processes of its own, started anew at the same port whenever it has ended.

    Args:
        data: its data folder.
        model: the folder of its model.

    Attributes:
        url: where it is.
        seen: the numbers of all of its processes that were seen.
    """

    def __init__(self, data: Path, model: Path) -> None:
        self.data, self._model = data, model
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.seen: set[int] = set()
        self._front: subprocess.Popen[bytes] | None = None
        self._log = data.parent / "log"

    @property
    def key(self) -> str:
        """The key of the user who runs it."""
        return (self.data / KEY_FILE).read_text().strip()

    @property
    def log(self) -> str:
        """The end of what its processes have said."""
        return self._log.read_text()[-6000:]

    def start(self) -> None:
        """Starts it, and does not wait until it answers."""
        command = [sys.executable, "-m", "tests.server.front_process"]
        command += [str(self.data), str(self._model), str(self._port)]
        with self._log.open("ab") as log:
            self._front = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log)
        self.seen.add(self._front.pid)
        self._workers: set[int] = set()  # of this front

    def wait_until_it_answers(self) -> None:
        """Waits until connections are accepted."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            assert self._front is not None and self._front.poll() is None, self.log
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return
            time.sleep(0.05)
        raise AssertionError(f"the server does not answer: {self.log}")

    def processes(self) -> dict[Kind, list[int]]:
        """Returns the numbers of its processes, by what they are."""
        assert self._front is not None
        found: dict[Kind, list[int]] = {kind: [] for kind in KINDS}
        found["front"] = [self._front.pid] if self._front.poll() is None else []
        below = _below(self._front.pid)
        for pid in below:
            words = _words(pid)
            if "insitu.server.engines.engine" in words:
                found["engine"].append(pid)
            elif "insitu.server.engines.admission" in words:
                parent_is_front = below[pid] == self._front.pid
                found["template" if parent_is_front else "worker"].append(pid)
        # One goes on when the template that has forked it has ended, and is no child of it then.
        found["worker"] += [
            pid
            for pid in self._workers - below.keys()
            if "insitu.server.engines.admission" in _words(pid)
        ]
        self._workers.update(found["worker"])
        found["all"] = [pid for kind in KINDS[:-1] for pid in found[kind]]
        self.seen.update(found["all"])
        return found

    def kill(self, kind: Kind) -> int:
        """Kills processes at once, starts the front anew if it was one, and returns how many."""
        assert self._front is not None
        pids = self.processes()[kind]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._front.pid in pids:
            self._front.wait()
            self.start()
        return len(pids)

    def stop(self) -> int:
        """Lets it end as it should, and returns its exit status."""
        assert self._front is not None
        self.processes()
        self._front.terminate()
        try:
            return self._front.wait(_PATIENCE)
        finally:
            if self._front.poll() is None:
                self._front.kill()
                self._front.wait()

    def left(self) -> set[int]:
        """Returns which of its processes are still there, after some seconds at most."""
        until = time.monotonic() + 60
        while there := {pid for pid in self.seen if "insitu" in " ".join(_words(pid))}:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        return there


def _below(root: int) -> dict[int, int]:
    """The processes that a process has started, and those that these have, with their parents."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", entry, "stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found: dict[int, int] = {}
    while True:
        more = {
            pid: parent
            for pid, parent in parents.items()
            if pid not in found and (parent == root or parent in found)
        }
        if not more:
            return found
        found |= more


def _words(pid: int) -> list[str]:
    """The command line of a process; nothing if it has ended."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []
