import asyncio
import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from insitu import OptionError
from insitu.graph.wire_tensors import digest_of
from insitu.remote.problems import ProblemError
from insitu.server.storage import data_folder
from insitu.server.storage.blob_format import DTYPES
from insitu.server.storage.data_folder import TEMPORARY, StorageError, locked, make_private
from insitu.server.storage.files import SPARE_BYTES, Files, put_result

TENSOR = torch.arange(12, dtype=torch.float32).reshape(3, 4)
DIGEST = digest_of(TENSOR)


def blob(tensor: torch.Tensor, **others: torch.Tensor) -> bytes:
    return safetensors.torch.save({"tensor": tensor, **others})


def raw(header: Any, content: bytes) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "data")


def all_files(files: Files) -> list[Path]:
    return sorted(path for path in files.folder.rglob("*") if path.is_file())


@pytest.fixture
def put(files: Files) -> Callable[[str, bytes], None]:
    return files.put_blob


# What is written.


@pytest.mark.parametrize("durable", [False, True])
def test_files_are_named_by_their_digest_and_private(tmp_path: Path, durable: bool) -> None:
    mask = os.umask(0)
    try:
        files = Files(tmp_path / "data", durable)
        body, result = files.put_body(b"job"), put_result(files.results, b"results")
        given = put_result(files.results, b"others", "0" * 64, durable)
        files.put_blob(DIGEST, blob(TENSOR))
    finally:
        os.umask(mask)
    assert body == hashlib.sha256(b"job").hexdigest()
    assert files.body_path(body).read_bytes() == b"job"
    assert files.result_path(result).read_bytes() == b"results"
    assert files.result_path(given).read_bytes() == b"others"
    assert safetensors.torch.load_file(files.blob_path(DIGEST))["tensor"].equal(TENSOR)
    assert files.put_body(b"job") == body
    assert len(all_files(files)) == 4
    for path in files.folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_what_lies_under_a_name_is_replaced_as_a_whole(files: Files) -> None:
    digest = files.put_body(b"job")
    files.body_path(digest).write_bytes(b"")  # as after a power failure
    with open(files.body_path(digest), "rb") as reader:
        assert files.put_body(b"job") == digest
        assert reader.read() == b""  # what is open stays what it was
    assert files.body_path(digest).read_bytes() == b"job"


@pytest.mark.parametrize(
    "digest", ["", "ab", "../" + "a" * 61, "A" * 64, "a" * 64 + "\n", "a" * 65, "٣" * 64, "/" * 64]
)
def test_a_name_that_is_no_digest_is_no_path(files: Files, digest: str) -> None:
    for path in (files.body_path, files.result_path, files.blob_path):
        with pytest.raises(ProblemError) as raised:
            path(digest)
        assert (raised.value.problem.code, raised.value.problem.status) == ("digest", 422)
    with pytest.raises(ProblemError):
        files.put_blob(digest, blob(TENSOR))
    assert all_files(files) == []


# Blobs.


@pytest.mark.parametrize("name", sorted({name for name, _ in DTYPES.values()}))
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (2, 0, 5)])
def test_the_digest_is_that_of_the_tensor(
    put: Callable[[str, bytes], None], files: Files, name: str, shape: tuple[int, ...]
) -> None:
    dtype = getattr(torch, name.removeprefix("torch."))
    tensor = torch.ones(shape).to(dtype)
    put(digest_of(tensor), blob(tensor))
    (path,) = all_files(files)
    found = safetensors.torch.load_file(path)["tensor"]
    assert digest_of(found) == path.name and found.dtype == dtype and found.shape == shape


def test_all_dtypes_of_safetensors_are_known() -> None:
    known = {name: (str(one), one.itemsize) for name, one in safetensors.torch._TYPES.items()}
    assert {name: DTYPES.get(name) for name in known} == known


BAD = {
    "empty": b"",
    "short": b"\1\0\0",
    "text": b"no tensors here, only words",
    "long header": struct.pack("<Q", 2**63) + b"{}",
    "no json": raw(b"{", b""),
    "deep json": raw(b"[" * 50_000, b""),
    "no tensor": safetensors.torch.save({"weight": TENSOR}),
    "two tensors": blob(TENSOR, other=TENSOR + 1),
    "half": blob(TENSOR)[:-4],
    "more": blob(TENSOR) + b"\0",
    "wrong place": raw(
        {"tensor": {"dtype": "F32", "shape": [3, 4], "data_offsets": [4, 52]}}, bytes(52)
    ),
    "negative": raw(
        {"tensor": {"dtype": "F32", "shape": [-3, -4], "data_offsets": [0, 48]}}, bytes(48)
    ),
    "another size": raw(
        {"tensor": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 48]}}, bytes(48)
    ),
    "too large": raw(
        {"tensor": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""
    ),
    "said twice": raw(
        b'{"tensor":{"dtype":"F32","dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}',
        blob(TENSOR)[-48:],
    ),
    "two of metadata": raw(
        b'{"tensor":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},'
        b'"__metadata__":{},"__metadata__":{}}',
        blob(TENSOR)[-48:],
    ),
    "half a byte": raw({"tensor": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"),
    "boolean": raw(
        {"tensor": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bytes_that_are_no_tensor_are_refused(
    put: Callable[[str, bytes], None], files: Files, data: bytes
) -> None:
    with pytest.raises(ProblemError) as raised:
        put(DIGEST, data)
    assert (raised.value.problem.code, raised.value.problem.status) == ("blob", 422)
    assert all_files(files) == []


def test_another_tensor_is_refused_also_where_the_right_one_is(
    put: Callable[[str, bytes], None], files: Files
) -> None:
    put(DIGEST, blob(TENSOR))
    before = files.blob_path(DIGEST).read_bytes()
    for other in (TENSOR + 1, TENSOR.reshape(4, 3), TENSOR.view(torch.int32)):
        with pytest.raises(ProblemError) as raised:
            put(DIGEST, blob(other))
        assert (raised.value.problem.code, raised.value.problem.status) == ("digest", 422)
    assert files.blob_path(DIGEST).read_bytes() == before and len(all_files(files)) == 1


# What is removed.


def test_a_start_removes_what_was_not_finished(files: Files) -> None:
    kept = files.put_body(b"job")
    for folder in (files.bodies, files.results, files.blobs):
        (folder / f"{TEMPORARY}abc").write_bytes(b"half")
    assert all_files(Files(files.folder)) == [files.body_path(kept)]


@pytest.mark.parametrize("in_turns", [False, True])
def test_what_nothing_refers_to_is_removed_after_a_while(files: Files, in_turns: bool) -> None:
    def sweep(*given: Any, **named: Any) -> int:
        if in_turns:
            return asyncio.run(files.sweep_in_turns(*given, **named))
        return files.sweep(*given, **named)

    kept, gone = files.put_body(b"kept"), files.put_body(b"gone")
    result = put_result(files.results, b"gone too")
    assert sweep({kept}.__contains__) == 0  # it may be on its way to the store
    old = os.stat(files.body_path(gone)).st_mtime - 7200
    os.utime(files.body_path(gone), (old, old))
    with open(files.body_path(gone), "rb") as reader:
        assert sweep({kept}.__contains__) == 1
        assert reader.read() == b"gone"  # who downloads it has it to the end
    assert sweep({kept}.__contains__, grace=0) == 1
    assert all_files(files) == [files.body_path(kept)]
    files.remove(files.body_path(kept))
    files.remove(files.result_path(result))
    assert all_files(files) == []


def test_a_sweep_does_not_keep_others_waiting(files: Files) -> None:
    for number in range(250):
        (files.results / f"{number:064}").touch()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> int:
        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        at = list[int]()
        removed = await files.sweep_in_turns(lambda name: bool(at.append(turns)), grace=0)
        task.cancel()
        assert len(at) == 250 and max(map(at.count, at)) == 100
        return removed

    assert asyncio.run(main()) == 250 and all_files(files) == []


# A full disk.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_is_a_problem_and_leaves_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    files.durable = True
    real: Callable[..., Any] = getattr(os, call)
    calls = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if call == "write" and calls % 2:  # some of it goes
            return real(args[0], args[1][:2])
        raise OSError(number, os.strerror(number))

    for act in (
        lambda: files.put_body(b"some job"),
        lambda: files.put_blob(DIGEST, blob(TENSOR)),
        lambda: put_result(files.results, b"some results", durable=True),
    ):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(data_folder.os, call, fails)
            with pytest.raises(StorageError) as raised:
                act()
        assert (raised.value.problem.code, raised.value.problem.status) == ("storage", 507)
        assert isinstance(raised.value, OSError) and isinstance(raised.value, ProblemError)
        assert all_files(files) == []


def test_other_faults_of_the_disk_stay_what_they_are(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(data_folder.os, "replace", fails)
    with pytest.raises(OSError) as raised:
        files.put_body(b"some job")
    assert not isinstance(raised.value, ProblemError) and all_files(files) == []


def test_space_is_promised_once(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda: SPARE_BYTES + 1000)
    files.check_space(1000)
    files.check_space(400, reserved=600)
    for wanted, reserved in ((1001, 0), (401, 600), (1, 1e30)):
        with pytest.raises(StorageError) as raised:
            files.check_space(wanted, reserved)
        assert raised.value.problem.status == 507
    monkeypatch.undo()
    assert files.free_bytes() > 0


def test_durable_waits_for_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def note(number: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")

    real = os.replace

    def replace(source: Path, target: Path) -> None:
        seen.append("name")
        real(source, target)

    monkeypatch.setattr(data_folder, "synchronise", note)
    monkeypatch.setattr(data_folder.os, "replace", replace)
    Files(tmp_path / "a", durable=False).put_body(b"job")
    assert seen == ["name"]
    seen.clear()
    Files(tmp_path / "b", durable=True).put_body(b"job")
    assert seen == ["file", "name", "folder"]


# The folder.


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "data"
    with locked(folder) as lock:
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(OptionError, match=f"process {os.getpid()}.*--data"):
            locked(folder)
        locked(tmp_path / "other").close()
    lock.close()
    held = locked(folder)
    del held  # a server that could not be started
    locked(folder).close()


def test_a_server_that_is_killed_lets_its_folder_go(tmp_path: Path) -> None:
    # The package itself would load PyTorch.
    source = Path(data_folder.__file__).parents[2]
    script = (
        "import sys, time, types, pathlib\n"
        "package = sys.modules['insitu'] = types.ModuleType('insitu')\n"
        f"package.__path__ = [{str(source)!r}]\n"
        "from insitu.server.storage.data_folder import locked\n"
        f"held = locked(pathlib.Path({str(tmp_path)!r}))\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            with pytest.raises(OptionError, match=f"process {process.pid}"):
                locked(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    locked(tmp_path).close()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                theirs.send(b"here")
                theirs.recv(1)  # until the parent lets it end
            os._exit(0)
        try:
            assert ours.recv(4) == b"here"
            with pytest.raises(OptionError):
                locked(tmp_path)  # the parent has it still
            os.close(lock._number)  # as when the parent is killed
            lock._number = -1
            locked(tmp_path).close()
        finally:
            ours.send(b".")
            os.waitpid(pid, 0)


def test_a_folder_that_others_may_write_is_not_taken(tmp_path: Path) -> None:
    empty, used, read = (tmp_path / name for name in ("empty", "used", "read"))
    for folder, mode in ((empty, 0o777), (used, 0o777), (read, 0o755)):
        folder.mkdir()
        if folder != empty:
            (folder / "thesis.txt").write_text("...")
        folder.chmod(mode)
    make_private(empty)
    assert empty.stat().st_mode & 0o777 == 0o700
    with pytest.raises(OptionError, match="chmod 700"):
        make_private(used)
    make_private(read)  # it is the user's, and stays as it is
    assert read.stat().st_mode & 0o777 == 0o755
    locked(read).close()
    make_private(read)  # now it is a server's
    assert read.stat().st_mode & 0o777 == 0o700
