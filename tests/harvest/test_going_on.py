"""A harvest that was ended in any way goes on, and gives what an unbroken one gives."""

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from insitu import LanguageModel
from insitu.graph.errors import LoadError, OptionError, SaveError
from insitu.harvest import harvest
from insitu.harvest.folder.lock import locked
from tests.conftest import tiny_gpt2
from tests.harvest.folders import digests, files, manifest, whole
from tests.thinning import sampled

SITE = "residual_out:2"


def documents(count: int = 40, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 100) for _ in range(draw.randrange(1, 30))] for _ in range(count)]


@functools.cache
def usual_model() -> LanguageModel:
    """One for all harvests, which leave it as it is."""
    return LanguageModel(tiny_gpt2())


def run(folder: Path, data: object = None, **options: object) -> object:
    given = {"context": 20, "batch_tokens": 64, "shard_tokens": 60, **options}
    model = given.pop("model", None) or usual_model()
    return harvest(model, documents() if data is None else data, SITE, to=folder, **given)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "a"
    run(folder)
    assert len(manifest(folder)) > 5
    return folder


class BrokenError(Exception):
    pass


def test_one_that_is_complete_returns_at_once(unbroken: Path) -> None:
    before = files(unbroken)
    again = run(unbroken)
    assert again.new_tokens == 0 and again.tokens == sum(map(len, documents()))
    assert files(unbroken) == before


class Rows:
    """Data that can be read again, whose rows fail where they are told to."""

    def __init__(self, rows: list[list[int]], fails_at: int | None = None) -> None:
        self.rows, self.fails_at, self.read = rows, fails_at, 0

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.fails_at:
                raise BrokenError
            self.read += 1
            yield row


def test_it_goes_on_behind_what_is_written(unbroken: Path, tmp_path: Path) -> None:
    data = Rows(documents())
    for stop in (3, 11, 12, 30, None):
        data.fails_at = stop
        if stop is None:
            run(tmp_path, data)
        else:
            with pytest.raises(BrokenError):
                run(tmp_path, data)
    assert digests(tmp_path) == digests(unbroken)
    assert files(tmp_path) == files(unbroken)
    assert manifest(tmp_path) == manifest(unbroken)


def test_batches_and_shards_do_not_depend_on_who_runs_them(unbroken: Path, tmp_path: Path) -> None:
    run(tmp_path, batch_tokens=20)  # other batches: the same ranges, and values up to rounding
    one, other = manifest(unbroken), manifest(tmp_path)
    for name in ("start", "stop", "source", "rows", "tokens", "first_sequence", "skipped"):
        assert [line[name] for line in one] == [line[name] for line in other]
    found = (whole(folder, SITE)[SITE] for folder in (unbroken, tmp_path))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_another_specification_names_what_differs(unbroken: Path) -> None:
    before = files(unbroken)
    with pytest.raises(OptionError, match="context is 20 there and 10 here"):
        run(unbroken, context=10)
    with pytest.raises(OptionError, match=r"sites.residual_out:2.dtype is 'float32' there and"):
        run(unbroken, dtype="bfloat16")
    with pytest.raises(OptionError, match=r"data.digest is '\w+' there and '\w+' here"):
        run(unbroken, documents(seed=2))
    other = tiny_gpt2()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 1e-3
    with pytest.raises(OptionError, match="model_fingerprint is"):
        run(unbroken, model=LanguageModel(other))
    assert files(unbroken) == before


@pytest.mark.parametrize("number", [0, 7, -1])
def test_a_single_weight_makes_another_model(number: int, unbroken: Path) -> None:
    other = tiny_gpt2()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.view(-1)[number] = 0
    with pytest.raises(OptionError, match="model_fingerprint is"):
        run(unbroken, model=LanguageModel(other))


def test_edits_are_of_the_specification(unbroken: Path) -> None:
    model = LanguageModel(tiny_gpt2())
    with model.edit() as edited:
        model.transformer.h[0].mlp.output[:] = 0
    with pytest.raises(OptionError, match="model_fingerprint is"):
        run(unbroken, model=edited)


@pytest.mark.parametrize("changed_row", sampled([0, 5, 13], [5]))
def test_data_that_has_changed_is_an_error(changed_row: int, tmp_path: Path) -> None:
    rows = documents()
    with pytest.raises(BrokenError):
        run(tmp_path, Rows(rows, fails_at=20))
    before = manifest(tmp_path)
    changed = [*rows]
    changed[changed_row] = [1, *rows[changed_row][1:]] if rows[changed_row][0] != 1 else [2]
    with pytest.raises(LoadError, match="The data has changed"):
        run(tmp_path, Rows(changed))
    assert manifest(tmp_path) == before
    run(tmp_path, Rows(rows))


@pytest.mark.parametrize("form", ["data set", "iterable", "generator"])
def test_other_data_is_an_error_where_nothing_is_left_to_run(form: str, tmp_path: Path) -> None:
    def given(rows: list[list[int]]) -> object:
        if form == "data set":
            return pytest.importorskip("datasets").Dataset.from_dict({"input_ids": rows})
        return Rows(rows) if form == "iterable" else (row for row in rows)

    run(tmp_path, given(documents()))
    assert run(tmp_path, given(documents())).new_tokens == 0
    before = digests(tmp_path)
    for other in (documents(seed=2), [[1, 2], *documents()[1:]]):
        with pytest.raises(LoadError, match="The data has changed"):
            run(tmp_path, given(other))
    if form == "data set":
        with pytest.raises(LoadError, match="The data has changed"):
            run(tmp_path, given([*documents(), [1, 2, 3]]))
    assert digests(tmp_path) == before


def test_data_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    rows = documents()
    with pytest.raises(BrokenError):
        run(tmp_path, Rows(rows, fails_at=20))
    with pytest.raises(LoadError, match="The data has changed"):
        run(tmp_path, Rows(rows[:4]))


@pytest.mark.parametrize("breaks", ["gone", "short", "other bytes"])
@pytest.mark.parametrize("kind", sampled([list, Rows], [list]))
def test_a_broken_shard_is_made_again(
    breaks: str, kind: type, unbroken: Path, tmp_path: Path
) -> None:
    run(tmp_path, kind(documents()))
    path = tmp_path / "shards" / "00002.safetensors"
    if breaks == "gone":
        path.unlink()
    elif breaks == "short":
        os.truncate(path, 100)
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    again = run(tmp_path, kind(documents()), verify=breaks == "other bytes")
    assert again.new_tokens == manifest(tmp_path)[2]["tokens"]
    assert digests(tmp_path) == digests(unbroken) and files(tmp_path) == files(unbroken)
    assert path.read_bytes() == (unbroken / "shards" / path.name).read_bytes()


def test_what_a_killed_process_left_is_removed(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        run(tmp_path, Rows(documents(), fails_at=20))
    (tmp_path / "shards" / "00009.safetensors").write_bytes(b"not listed")
    (tmp_path / "shards" / "00010.safetensors.new").write_bytes(b"torn")
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b'{"shard": 5, "rows":')
    run(tmp_path, Rows(documents()))
    assert manifest(tmp_path) == manifest(unbroken) and files(tmp_path) == files(unbroken)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OptionError, match=r"other things, such as 'thesis.tex'"):
        run(tmp_path)
    assert files(tmp_path) == {"thesis.tex"}
    with pytest.raises(OptionError, match="no folder"):
        run(tmp_path / "thesis.tex")


def test_two_on_one_folder_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SaveError, match=f"process {os.getpid()}"):
        run(tmp_path)
    run(tmp_path)


@pytest.mark.thorough
def test_a_folder_that_another_process_holds_is_refused(unbroken: Path, tmp_path: Path) -> None:
    holding = (
        "from insitu.harvest.folder.lock import locked; from pathlib import Path; import sys\n"
    )
    holding += (
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", holding, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(SaveError, match=f"process {other.pid}"):
            run(tmp_path)
    finally:
        other.kill()  # the system takes the lock from it, however it has ended
        other.communicate()
    run(tmp_path)
    assert digests(tmp_path) == digests(unbroken)


def test_a_disk_that_is_full_is_said_and_gone_on_with(unbroken: Path, tmp_path: Path) -> None:
    """A limit on the size of files does as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [line["bytes"] for line in manifest(unbroken)]
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    first_larger = next(at for at, one in enumerate(sizes) if one > sizes[0])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes[:first_larger]), before[1]))
        with pytest.raises(SaveError, match="no space left"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [line["bytes"] for line in manifest(tmp_path)] == sizes[:first_larger]
    assert not [name for name in files(tmp_path) if ".new" in name]
    run(tmp_path)
    assert manifest(tmp_path) == manifest(unbroken)


def test_an_interrupted_one_has_written_what_has_run(unbroken: Path, tmp_path: Path) -> None:
    told = []

    def interrupt(now: object) -> None:
        told.append(now)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    assert threading.active_count() < 20 and told
    run(tmp_path)
    assert manifest(tmp_path) == manifest(unbroken)


CHILD = """
import sys
import torch
torch.set_num_threads(1)
from tests.harvest.test_going_on import run
print("begins", flush=True)
run(sys.argv[1])
"""


def killed_at(folder: Path, seconds: float) -> float | None:
    """Runs a harvest in a process that is killed; returns how long it took if it ended before."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], env=environment, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    began = time.monotonic()
    try:
        assert child.wait(seconds) == 0
        return time.monotonic() - began
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return None
    finally:
        child.stdout.close()


def kill_until_it_ends(folder: Path, kills: int, seed: int) -> int:
    draw, killed = random.Random(seed), 0
    whole = killed_at(folder, 120)
    assert whole is not None
    for _ in range(kills):
        # From here on shards are there: some of them are taken away, so that work remains.
        lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        kept = draw.randrange(len(lines) + 1)
        (folder / "manifest.jsonl").write_bytes(b"".join(lines[:kept]))
        killed += killed_at(folder, draw.uniform(0, whole)) is None
    return killed


def check_killed(folder: Path, unbroken: Path, kills: int, seed: int) -> None:
    assert kill_until_it_ends(folder, kills, seed) > 0
    run(folder)
    assert manifest(folder) == manifest(unbroken)
    assert files(folder) == files(unbroken)
    rows = whole(folder, SITE)
    sizes = [len(ids[at : at + 20]) for ids in documents() for at in range(0, len(ids), 20)]
    assert rows["sequence"].bincount().tolist() == sizes
    run(folder, verify=True)
    assert json.loads((folder / "harvest.json").read_text())["shard_tokens"] == 60


@pytest.mark.thorough
def test_killed_at_random_moments(unbroken: Path, tmp_path: Path) -> None:
    check_killed(tmp_path / "a", unbroken, 3, seed=0)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(unbroken: Path, tmp_path: Path) -> None:
    check_killed(tmp_path / "a", unbroken, 100, seed=1)
