"""Lines of a job are found again where they were written."""

from __future__ import annotations

import pytest

from insitu import Job, LanguageModel
from insitu.graph.location import here
from insitu.remote.job_lines import JobLines
from insitu.remote.problems import Line
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire
FILE = "test_job_lines.py"


@pytest.fixture(scope="module")
def job() -> Job:
    model = LanguageModel(tiny_gpt2())
    with model.scan() as tracer:
        with tracer.invoke([[1, 2, 3]]):
            model.transformer.h[1].output[0][:] = 0  # written
            model.lm_head.output.save("logits")
    return tracer.job


def test_a_line_is_found_by_its_number_and_its_text(job: Job) -> None:
    first = job.blocks[0].graph.rows[0][5]
    number = here(1).line
    lines = JobLines(job)
    text = 'model.lm_head.output.save("logits")'
    found = [lines(Line(FILE, n, text)) for n in range(1, number)]
    (there,) = [one for one in found if one is not None]
    assert there.text == text and there.file == __file__
    assert first[0] is there.code


def test_a_server_that_keeps_no_texts_is_understood(job: Job) -> None:
    lines = JobLines(job)
    found = [lines(Line(FILE, n)) for n in range(1, 40)]
    texts = [one.text for one in found if one is not None]
    assert "with tracer.invoke([[1, 2, 3]]):" in texts
    assert "model.transformer.h[1].output[0][:] = 0  # written" in texts


def test_what_the_job_does_not_have_is_not_found(job: Job) -> None:
    lines = JobLines(job)
    assert lines(Line(FILE, here(1).line, "assert False")) is None
    assert lines(Line("other.py", 25)) is None
    found = [lines(Line(FILE, number, "another text")) for number in range(1, 40)]
    assert found == [None] * 39
    assert JobLines(None)(Line(FILE, 25)) is None


def test_two_files_of_one_name_are_told_apart_by_the_text() -> None:
    model = LanguageModel(tiny_gpt2())
    texts = ["model.lm_head.output.save('a')", "model.transformer.h[0].output[0].save('b')"]
    with model.scan([[1, 2, 3]]) as tracer:
        for folder, text in zip(("/one", "/two"), texts, strict=True):
            exec(compile(text, f"{folder}/cell.py", "exec"), {"model": model})
    lines = JobLines(tracer.job)
    assert lines(Line("cell.py", 1)) is None  # which of them is not known
    # The text of a file that is not there cannot be had, so it does not tell them apart either.
    assert lines(Line("cell.py", 1, texts[0])) is None
