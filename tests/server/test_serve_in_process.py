"""`insitu.serve(...)`: a server in the user's own process."""

from __future__ import annotations

import subprocess
import sys

import pytest

STOPPED_AT_EXIT = """
import atexit, insitu
server = insitu.serve("insitu/eiffel").start()
atexit.register(lambda: print("stopped", flush=True))
atexit.register(server.stop)
"""


@pytest.mark.thorough
def test_a_server_can_be_stopped_when_python_ends() -> None:
    """Threads take no more work then: what waits for one waits for ever."""
    command = [sys.executable, "-c", STOPPED_AT_EXIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and done.stdout == "stopped\n", done.stderr
    assert "Traceback" not in done.stderr and "failed" not in done.stderr
