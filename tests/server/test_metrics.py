"""What is measured, as Prometheus reads it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.server.metric_families import Counter, Gauge, Histogram
from insitu.server.metrics import FrontMetrics, Metrics

pytestmark = pytest.mark.no_wire

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:\w+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\\n]|\\[\\n"])*)"')
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The numbers in a text, read as the format has it: what is none of it fails."""
    assert text.endswith("\n")
    found = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP \w+ .*|TYPE \w+ (counter|gauge|histogram))", line)
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample is not None, line
        labels = tuple(
            (name, re.sub(r"\\[\\n\"]", lambda one: _ESCAPES[one[0]], value))
            for name, value in _LABEL.findall(sample[2] or "")
        )
        key = sample[1], labels
        assert key not in found
        found[key] = float(sample[3].replace("Inf", "inf"))
    return found


def test_counters_grow() -> None:
    counter = Counter("jobs_total", "Jobs.", ("state",))
    counter.add(state="done")
    counter.add(2.5, state="done")
    counter.add(0, state="failed")
    assert counter.text() == (
        "# HELP jobs_total Jobs.\n"
        "# TYPE jobs_total counter\n"
        'jobs_total{state="done"} 3.5\n'
        'jobs_total{state="failed"} 0\n'
    )
    for amount in (-1, math.nan):
        with pytest.raises(ValueError, match="cannot grow"):
            counter.add(amount, state="done")
    assert counter.value(state="done") == 3.5 and counter.value(state="none") == 0


def test_gauges_are_what_they_are_now() -> None:
    gauge = Gauge("bytes", "Bytes.")
    for value, text in ((3, "3"), (-0.5, "-0.5"), (math.inf, "+Inf"), (-math.inf, "-Inf")):
        gauge.set(value)
        assert gauge.text().endswith(f"\nbytes {text}\n")
    gauge.set(math.nan)
    assert gauge.text().endswith("\nbytes NaN\n")
    gauge.clear()
    assert gauge.text() == "# HELP bytes Bytes.\n# TYPE bytes gauge\n"


def test_histograms_count_what_is_not_larger() -> None:
    histogram = Histogram("seconds", "Time.", ("state",), (0.5, 1, 2))
    for value in (0.1, 0.5, 0.6, 2, 2.1, math.inf):
        histogram.see(value, state="queued")
    found = samples(histogram.text())
    counts = [
        found["seconds_bucket", (("state", "queued"), ("le", one))]
        for one in ("0.5", "1", "2", "+Inf")
    ]
    assert counts == [2, 3, 4, 6] and histogram.count(state="queued") == 6
    assert found["seconds_count", (("state", "queued"),)] == 6
    assert found["seconds_sum", (("state", "queued"),)] == math.inf


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_buckets_are_as_counted_by_hand(values: list[float]) -> None:
    histogram = Histogram("x", "X.", (), (-1.0, 0.0, 7.5))
    for value in values:
        histogram.see(value)
    found = samples(histogram.text())
    for bucket in (-1.0, 0.0, 7.5, math.inf):
        name = "+Inf" if bucket == math.inf else f"{bucket:g}"
        assert found["x_bucket", (("le", name),)] == sum(value <= bucket for value in values)
    assert found["x_sum", ()] == pytest.approx(sum(values), rel=1e-9, abs=1e-9)


@given(st.text(), st.floats(allow_nan=False))
def test_any_label_comes_back(text: str, value: float) -> None:
    gauge = Gauge("work", 'Work: "all" of it\\, in\nlines.', ("tenant", "other"))
    gauge.set(value, tenant=text, other="b")
    assert gauge.text().split("\n")[0] == r'# HELP work Work: "all" of it\\, in\nlines.'
    assert samples(gauge.text()) == {("work", (("tenant", text), ("other", "b"))): value}


@pytest.mark.parametrize("labels", [{}, {"state": "a", "more": "b"}, {"other": "a"}])
def test_other_labels_are_refused(labels: dict[str, str]) -> None:
    for family in (Counter("a", "", ("state",)), Gauge("a", "", ("state",))):
        with pytest.raises(ValueError, match="has the labels"):
            family.value(**labels)


@pytest.mark.parametrize(
    ("name", "labels", "buckets"),
    [
        ("1a", (), (1,)),
        ("a-b", (), (1,)),
        ("", (), (1,)),
        ("a\n", (), (1,)),
        ("a", ("b-c",), (1,)),
        ("a", ("__b",), (1,)),
        ("a", ("le",), (1,)),
        ("a", (), (2, 1)),
        ("a", (), (1, 1)),
        ("a", (), (1, math.inf)),
    ],
)
def test_names_that_are_none_are_refused(name: str, labels: Any, buckets: Any) -> None:
    with pytest.raises(ValueError):
        Histogram(name, "", labels, buckets)


def test_all_that_happens_is_in_the_text() -> None:
    metrics = Metrics()
    metrics.accepted("m", "batch")
    metrics.refused("quota")
    metrics.ended("m", "done")
    metrics.in_state("queued", 0.2)
    metrics.queue("m", "batch", 4, 1.5)
    metrics.batch("m", 8)
    metrics.batch_ended("m", 0.5, 3, 1e12, 16)
    metrics.batch_ended("m", 0.5, 1, 0.0, 1)
    metrics.engine_died("m")
    metrics.tenants({"a": 1.0, "b": 2.0})
    metrics.tenants({"a": 3.0})
    metrics.memory("front", 1e6)
    metrics.stored("blobs", 7)
    found = samples(metrics.text())
    model = ("model", "m")
    both = model, ("priority", "batch")
    assert found["insitu_jobs_accepted_total", both] == 1
    assert found["insitu_jobs_waiting", both] == 4
    assert found["insitu_oldest_waiting_seconds", both] == 1.5
    assert found["insitu_refused_total", (("code", "quota"),)] == 1
    assert found["insitu_jobs_ended_total", (model, ("state", "done"))] == 1
    assert found["insitu_job_state_seconds_count", (("state", "queued"),)] == 1
    assert found["insitu_batch_jobs_sum", (model,)] == 8
    assert found["insitu_batch_prompts_sum", (model,)] == 17
    assert found["insitu_passes_total", (model,)] == 4
    assert found["insitu_planned_operations_total", (model,)] == 1e12
    assert found["insitu_engine_seconds_total", (model,)] == 1
    assert found["insitu_engine_deaths_total", (model,)] == 1
    work = [key for key in found if key[0] == "insitu_tenant_virtual_work"]
    assert work == [("insitu_tenant_virtual_work", (("tenant", "a"),))]
    assert found["insitu_memory_bytes", (("process", "front"),)] == 1e6
    assert found["insitu_stored_bytes", (("what", "blobs"),)] == 7


def test_the_two_have_no_name_in_common() -> None:
    names = re.findall(r"^# TYPE (\S+)", Metrics().text() + FrontMetrics().text(), re.M)
    assert len(names) == len(set(names)) > 15
    assert all(name.startswith("insitu_") for name in names)
