"""Every route: what it answers to whom, and what it says of what is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from insitu.remote.problems import Line, Problem, ProblemError
from insitu.remote.protocol import (
    JOB_TYPE,
    RESULTS_TYPE,
    SKELETON_TYPE,
    JobList,
    JobPlan,
    JobStatus,
    ModelList,
    Usage,
)
from insitu.server.core import Asked
from insitu.server.http.front import app_of
from tests.server.asking import JOB, answers, asked, bare, done, fake, key, problem_in
from tests.server.fake_served import ADMIN, BOB, DIGEST, RESULTS, SKELETON, FakeServed

pytestmark = pytest.mark.no_wire

BLOB = "ab" * 32
ROUTES = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("POST", "/v1/plan"),
    ("GET", "/v1/jobs/{id}"),
    ("DELETE", "/v1/jobs/{id}"),
    ("GET", "/v1/jobs/{id}/events"),
    ("GET", "/v1/jobs/{id}/result"),
    ("HEAD", f"/v1/blobs/{BLOB}"),
    ("PUT", f"/v1/blobs/{BLOB}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/insitu/eiffel/skeleton"),
    ("GET", "/v1/usage"),
    ("GET", "/metrics"),
]


def read(answer: httpx.Response, kind: type[Any]) -> Any:
    assert answer.headers["content-type"] == "application/json"
    return msgspec.json.decode(answer.content, type=kind)


# Who may ask.


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer insitu_nobodyyy_secret", "Bearer a b", "a"],
)
def test_no_key_and_a_wrong_key_are_401(method: str, path: str, given: str, tmp_path: Path) -> None:
    served = fake(tmp_path)
    path = path.format(id=served.add().id)
    status, headers, body = asyncio.run(
        bare(app_of(served), method, path, {"Authorization": given, **JOB})
    )
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert msgspec.json.decode(body, type=Problem).code == "unauthorised"
    assert served.submitted == [] and served.blobs == {}


def test_keys_come_in_no_other_way(tmp_path: Path) -> None:
    served = fake(tmp_path)
    secret = key()["Authorization"].removeprefix("Bearer ")
    for headers in ({"Cookie": f"key={secret}"}, {"X-Api-Key": secret}):
        given = {"Authorization": "", **headers}
        assert asyncio.run(bare(app_of(served), "GET", "/v1/jobs", given))[0] == 401
    twice = [("Authorization", f"Bearer {secret}")] * 2
    assert answers(served, "GET", "/v1/jobs", twice).status_code == 401  # pyright: ignore[reportArgumentType]
    answer = answers(served, "GET", f"/v1/jobs?key={secret}")
    assert answer.status_code == 422 and secret not in answer.text


@pytest.mark.parametrize("letters", ["bearer", "BEARER"])
def test_the_scheme_of_a_key_is_in_any_letters(letters: str, tmp_path: Path) -> None:
    given = key()["Authorization"].replace("Bearer", letters)
    assert answers(fake(tmp_path), "GET", "/v1/jobs", {"Authorization": given}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [one for one in ROUTES if "{id}" in one[1]])
@pytest.mark.parametrize("id", ["own", "0" * 32, "F" * 32, "x", "..", "%2e%2e%2f", "0" * 33])
def test_what_is_not_the_tenants_is_404(method: str, path: str, id: str, tmp_path: Path) -> None:
    served = fake(tmp_path)
    record = served.add()
    asyncio.run(served.move(record.id, "done"))
    path = path.format(id=record.id if id == "own" else id)
    answer = answers(served, method, path, key(BOB))
    assert answer.status_code == 404 and problem_in(answer).code == "not_found"


def test_a_tensor_of_another_tenant_is_404(tmp_path: Path) -> None:
    served = fake(tmp_path)
    path = f"/v1/blobs/{BLOB}"
    assert answers(served, "HEAD", path).status_code == 404
    assert answers(served, "PUT", path, content=b"tensor").status_code == 204
    assert answers(served, "HEAD", path).status_code == 204
    assert answers(served, "HEAD", path, key(BOB)).status_code == 404
    assert served.blobs["a"] == {BLOB: 6} and not served.blobs["b"]


@pytest.mark.parametrize("digest", ["x", "AB" * 32, "ab" * 31, "ab" * 33, "%2e%2e"])
def test_a_digest_that_is_none_is_404(digest: str, tmp_path: Path) -> None:
    served = fake(tmp_path)
    answer = answers(served, "PUT", f"/v1/blobs/{digest}", content=b"tensor")
    assert answer.status_code == 404 and not served.blobs["a"]


def test_metrics_take_a_key_for_them(tmp_path: Path) -> None:
    served = fake(tmp_path)
    answer = answers(served, "GET", "/metrics")
    assert answer.status_code == 403 and problem_in(answer).code == "scope"
    answer = answers(served, "GET", "/metrics", key(ADMIN))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.startswith("insitu_jobs_accepted_total 3\n")
    assert "insitu_http_streams 0\n" in answer.text


def test_requests_are_counted_by_route(tmp_path: Path) -> None:
    async def count() -> str:
        async with asked(fake(tmp_path)) as client:
            await client.get("/v1/jobs")
            await client.get("/v1/jobs/x")
            await client.get("/v1/%22%0a")
            await client.request("BREW", "/v1/jobs")
            return (await client.get("/metrics", headers=key(ADMIN))).text

    text = asyncio.run(count())
    assert 'insitu_http_requests_total{method="GET",route="jobs",status="200"} 1\n' in text
    assert 'insitu_http_requests_total{method="GET",route="job",status="404"} 1\n' in text
    assert 'insitu_http_requests_total{method="GET",route="none",status="404"} 1\n' in text
    assert 'insitu_http_requests_total{method="other",route="jobs",status="405"} 1\n' in text
    assert 'insitu_http_problems_total{code="not_found"} 2\n' in text


# How it is asked.


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, HEAD, POST"),
        ("/v1/plan", "POST"),
        ("/v1/jobs/" + "0" * 32, "DELETE, GET, HEAD"),
        (f"/v1/blobs/{BLOB}", "HEAD, PUT"),
        ("/v1/models", "GET, HEAD"),
        ("/healthz", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_405(method: str, path: str, allowed: str, tmp_path: Path) -> None:
    answer = answers(fake(tmp_path), method, path)
    assert answer.status_code == 405 and problem_in(answer).code == "method"
    assert ", ".join(sorted(answer.headers["allow"].split(", "))) == allowed
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v1/jobs/", "/v2/jobs", "//v1/jobs", "/v1/../metrics", "/v1/jobs/a/b/c"],
)
def test_other_paths_are_404_and_no_redirect(path: str, tmp_path: Path) -> None:
    status, _, body = asyncio.run(bare(app_of(fake(tmp_path)), "GET", path))
    assert status == 404 and msgspec.json.decode(body, type=Problem).code == "not_found"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plan"])
@pytest.mark.parametrize("given", ["", "text/plain", "application/json", "x" * 300, f"{JOB_TYPE}x"])
def test_other_types_are_415(path: str, given: str, tmp_path: Path) -> None:
    served = fake(tmp_path)
    headers = {"Content-Type": given} if given else {}
    answer = answers(served, "POST", path, headers, content=b"job")
    assert answer.status_code == 415 and problem_in(answer).code == "content_type"
    assert JOB_TYPE in problem_in(answer).detail and served.submitted == []


def test_the_type_may_have_parameters(tmp_path: Path) -> None:
    given = {"Content-Type": f"{JOB_TYPE.upper()} ; charset=x"}
    assert answers(fake(tmp_path), "POST", "/v1/jobs", given, content=b"job").status_code == 202


def test_what_is_compressed_or_a_form_is_415(tmp_path: Path) -> None:
    packed = {**JOB, "Content-Encoding": "gzip"}
    answer = answers(fake(tmp_path), "POST", "/v1/jobs", packed, content=b"job")
    assert answer.status_code == 415 and problem_in(answer).code == "content_encoding"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = answers(fake(tmp_path), "PUT", f"/v1/blobs/{BLOB}", form, content=b"a=b")
    assert answer.status_code == 415


@pytest.mark.parametrize("given", ["0", "2", "1.0", "", "one", "1" * 40, "-1"])
def test_another_protocol_is_named_with_both_numbers(given: str, tmp_path: Path) -> None:
    status, _, body = asyncio.run(
        bare(app_of(fake(tmp_path)), "GET", "/v1/models", {"Insitu-Protocol": given or " "})
    )
    problem = msgspec.json.decode(body, type=Problem)
    assert status == 400 and problem.code == "protocol"
    assert problem.allowed == 1 and "version 1" in problem.detail
    assert problem.found == (2.0 if given == "2" else 0.0)
    assert answers(fake(tmp_path), "GET", "/v1/models", {"Insitu-Protocol": "1"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/v1/jobs?modle=x", "'model'"),
        ("POST", "/v1/plan?priorty=batch", "'priority'"),
        ("POST", "/v1/jobs?priority=intractive", "'interactive'"),
        ("POST", "/v1/jobs?priority=", "`interactive`, `batch`"),
        ("POST", "/v1/jobs?seconds=-1", "no number above 0"),
        ("POST", "/v1/jobs?seconds=nan", "no number above 0"),
        ("POST", "/v1/jobs?seconds=inf", "no number above 0"),
        ("POST", "/v1/jobs?seconds=1_0", "no number above 0"),
        ("POST", "/v1/jobs?model=a&model=b", "more than once"),
        ("POST", "/v1/jobs?model=%ff", "UTF-8"),
        ("POST", "/v1/jobs?model=" + "x" * 600, "longer than"),
        ("POST", "/v1/jobs?" + "&".join(f"a{i}=1" for i in range(50)), "at most"),
        ("GET", "/v1/jobs?states=done", "'state'"),
        ("GET", "/v1/jobs?state=finished", "There are: `queued`"),
        ("GET", "/v1/jobs?limit=0", "from 1 to 1,000"),
        ("GET", "/v1/jobs?limit=1001", "from 1 to 1,000"),
        ("GET", "/v1/jobs?limit=%D9%A1", "from 1 to 1,000"),
        ("GET", "/v1/jobs?after=' or 1=1", "`after`"),
        ("GET", "/v1/jobs?after=" + "9" * 30, "`after`"),
        ("GET", "/v1/models?x=1", "There are: none"),
        ("GET", "/v1/usage?x=1", "There are: none"),
        ("GET", "/v1/models/insitu/eiffel/skeleton?x", "There are: none"),
        ("PUT", f"/v1/blobs/{BLOB}?x=1", "There are: none"),
        ("GET", "/v1/jobs/{id}?x=1", "There are: none"),
        ("GET", "/v1/jobs/{id}/events?after=1", "There are: none"),
        ("GET", "/v1/jobs/{id}/result?part=1", "There are: none"),
    ],
)
def test_other_parameters_are_422_and_name_the_nearest(
    method: str, path: str, said: str, tmp_path: Path
) -> None:
    served = fake(tmp_path)
    answer = answers(served, method, path.replace("{id}", served.add().id), JOB)
    assert answer.status_code == 422 and problem_in(answer).code == "option"
    assert said in problem_in(answer).detail and served.submitted == []


# Jobs.


def test_a_job_is_accepted(tmp_path: Path) -> None:
    served = fake(tmp_path)
    answer = answers(
        served,
        "POST",
        "/v1/jobs?model=insitu/eiffel&priority=batch&seconds=6e1",
        {**JOB, "Idempotency-Key": "once"},
        content=b"job",
    )
    status = read(answer, JobStatus)
    assert answer.status_code == 202 and status.state == "queued"
    assert answer.headers["location"] == f"/v1/jobs/{status.id}"
    assert answer.headers["cache-control"] == "no-store"
    assert served.submitted == [("a", b"job", Asked("insitu/eiffel", "batch", 60.0, "once"))]


def test_nothing_need_be_said_of_a_job(tmp_path: Path) -> None:
    served = fake(tmp_path)
    assert answers(served, "POST", "/v1/jobs", JOB, content=b"").status_code == 202
    assert served.submitted == [("a", b"", Asked())]


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ('"a b"', None),
        ("a b", None),
        ("é", None),
        (" x ", "x"),
        ("k" * 255, "k" * 255),
        ("k" * 256, None),
        ("", None),
        ('"', '"'),
        ("a\x01", None),
    ],
)
def test_idempotency_keys_are_passed_on(given: str, passed: str | None, tmp_path: Path) -> None:
    served = fake(tmp_path)
    app = app_of(served)
    headers = {**JOB, "Idempotency-Key": given or " "}
    status, _, _ = asyncio.run(bare(app, "POST", "/v1/jobs", headers))
    assert status == (422 if passed is None else 202)
    assert [one.idempotency for _, _, one in served.submitted] == ([passed] if passed else [])


def test_what_the_server_says_of_a_job_is_passed_on(tmp_path: Path) -> None:
    served = fake(tmp_path)
    told = [
        Problem("shape", "Shape", 422, "Shapes differ.", line=Line("a.py", 3, "x @ y")),
        Problem("never_fits", "Too large", 413, "It never fits.", limit="peak", found=2, allowed=1),
        Problem("missing_blobs", "Missing", 409, "Send these.", digests=(BLOB,)),
        Problem("quota", "Quota", 429, "Too much.", retry_after=2.2),
        Problem("storage", "Storage", 507, "Full."),
    ]
    for path in ("/v1/jobs", "/v1/plan"):
        for problem in told:
            served.raised = ProblemError(problem)
            answer = answers(served, "POST", path, JOB, content=b"job")
            assert answer.status_code == problem.status
            assert msgspec.json.decode(answer.content, type=Problem) == problem
            assert answer.headers.get("retry-after") == ("3" if problem.retry_after else None)


def test_a_fault_of_the_server_says_nothing_of_its_inside(
    tmp_path: Path, no_fault_is_survived: Any, caplog: pytest.LogCaptureFixture
) -> None:
    served = fake(tmp_path)
    served.raised = RuntimeError("The prompt was 'my secret'")
    for path in ("/v1/jobs", "/v1/plan"):
        answer = answers(served, "POST", path, JOB, content=b"job")
        assert answer.status_code == 500 and problem_in(answer).code == "internal"
        assert "secret" not in answer.text
    no_fault_is_survived.records.clear()  # that it is logged is as it should be
    assert "RuntimeError in a request" in caplog.text and "secret" not in caplog.text
    assert "in submit" in caplog.text


def test_a_problem_with_a_status_of_none_is_a_fault(tmp_path: Path) -> None:
    served = fake(tmp_path)
    served.raised = ProblemError(Problem("x", "X", 200, "No."))
    assert answers(served, "POST", "/v1/jobs", JOB, content=b"").status_code == 500


def test_a_plan_is_answered(tmp_path: Path) -> None:
    plan = read(answers(fake(tmp_path), "POST", "/v1/plan", JOB, content=b"job"), JobPlan)
    assert plan.result_bytes == 3 and plan.results[0].name == "logits"


def test_jobs_are_listed_in_pages(tmp_path: Path) -> None:
    served = fake(tmp_path)
    records = [served.add() for _ in range(5)]
    served.add("b")
    asyncio.run(served.move(records[0].id, "done"))
    asyncio.run(served.move(records[1].id, "failed"))
    assert len(read(answers(served, "GET", "/v1/jobs"), JobList).jobs) == 5
    page = read(answers(served, "GET", "/v1/jobs?state=done,failed"), JobList)
    assert {one.id for one in page.jobs} == {records[0].id, records[1].id} and page.after is None
    seen, after = list[str](), ""
    for _ in range(3):
        page = read(answers(served, "GET", f"/v1/jobs?limit=2{after}"), JobList)
        seen += [one.id for one in page.jobs]
        after = f"&after={page.after}"
    assert seen == [one.id for one in reversed(records)] and page.after is None


def test_a_job_is_asked_for_and_cancelled(tmp_path: Path) -> None:
    served = fake(tmp_path)
    path = f"/v1/jobs/{served.add().id}"
    assert read(answers(served, "GET", path), JobStatus).state == "queued"
    for _ in range(2):
        assert read(answers(served, "DELETE", path), JobStatus).state == "cancelled"
    assert read(answers(served, "GET", path), JobStatus).state == "cancelled"
    asyncio.run(served.move(served.add().id, "done"))
    assert read(answers(served, "DELETE", f"/v1/jobs/{2:032x}"), JobStatus).state == "done"


# Waiting for a job.


def sent(served: FakeServed, prefer: str, state: Any = None, problem: Any = None) -> Any:
    """What is answered to a job that ends in a state once it was submitted."""

    async def ask() -> Any:
        async with asked(served) as client:
            task = asyncio.create_task(
                client.post("/v1/jobs", headers={**JOB, "Prefer": prefer}, content=b"job")
            )
            while not served.submitted:
                await asyncio.sleep(0)
            if state is not None:
                await served.move(f"{1:032x}", state, problem)
            return await task

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "prefer",
    [
        "wait=20",
        "WAIT = 20",
        'wait="20"',
        "respond-async, wait=20",
        "foo; bar=1, wait=20;x, wait=0",
        'x="a,b;\\"wait=0", wait=20',
        "wait=0020",
        "wait=" + "9" * 400,
        "@@, wait=20",
    ],
)
def test_results_come_at_once_to_who_waits(prefer: str, tmp_path: Path) -> None:
    answer = sent(fake(tmp_path), prefer, "done")
    assert answer.status_code == 200 and answer.content == RESULTS
    assert answer.headers["content-type"] == RESULTS_TYPE
    assert answer.headers["insitu-job"] == f"{1:032x}"
    assert answer.headers["content-location"] == f"/v1/jobs/{1:032x}/result"
    assert answer.headers["etag"] == f'"{DIGEST}"'
    assert answer.headers["preference-applied"].startswith("wait=")


@pytest.mark.parametrize(
    "prefer",
    [
        "",
        "wait",
        "wait=",
        "wait=-1",
        "wait=soon",
        "wait=1e3",
        "waits=20",
        'x="wait=20"',
        "wait=0x5",
        "return=minimal",
        'wait="20',
        ",,;;==",
        "wait=\u0663",
    ],
)
def test_what_is_no_preference_is_not_waited_for(prefer: str, tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> Any:
        app = app_of(served)
        # A text that is not in Latin-1 comes as bytes of UTF-8.
        given = {**JOB, "Prefer": prefer.encode().decode("latin-1") or " "}
        return await bare(app, "POST", "/v1/jobs", given)

    assert asyncio.run(asyncio.wait_for(ask(), 5))[0] == 202


def test_several_headers_of_preferences_are_one(tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> Any:
        async with asked(served) as client:
            given = [*JOB.items(), ("Prefer", "respond-async"), ("Prefer", "wait=0.01")]
            return await client.post("/v1/jobs", headers=given, content=b"job")

    answer = asyncio.run(ask())
    assert answer.status_code == 202 and answer.headers["preference-applied"] == "wait=0.01"


def test_who_has_waited_long_enough_gets_the_state(tmp_path: Path) -> None:
    answer = sent(fake(tmp_path), "wait=0")
    assert answer.status_code == 202 and read(answer, JobStatus).state == "queued"
    assert answer.headers["location"] == f"/v1/jobs/{1:032x}"


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_who_waits_for_what_fails_gets_the_state(state: str, tmp_path: Path) -> None:
    problem = Problem("execution", "Execution", 422, "No.") if state == "failed" else None
    answer = sent(fake(tmp_path), "wait=20", state, problem)
    assert answer.status_code == 200
    assert read(answer, JobStatus).state == state and read(answer, JobStatus).problem == problem


# The rest.


def test_models_usage_and_skeletons(tmp_path: Path) -> None:
    served = fake(tmp_path)
    models = read(answers(served, "GET", "/v1/models"), ModelList)
    assert models.models[0].id == "insitu/eiffel" and models.protocol == 1
    assert read(answers(served, "GET", "/v1/usage"), Usage).stored == 6
    for path in ("insitu/eiffel", "insitu%2Feiffel"):
        answer = answers(served, "GET", f"/v1/models/{path}/skeleton")
        assert answer.content == SKELETON and answer.headers["content-type"] == SKELETON_TYPE
        assert answer.headers["etag"] == f'"{DIGEST}"'
    for path in ("other", "../../etc/passwd", "a/b/c", "%00"):
        assert answers(served, "GET", f"/v1/models/{path}/skeleton").status_code == 404


def test_health_takes_no_key(tmp_path: Path) -> None:
    served = fake(tmp_path)
    app = app_of(served)
    bearerless = {"Authorization": ""}
    assert asyncio.run(bare(app, "GET", "/healthz", bearerless))[0] == 200
    assert asyncio.run(bare(app, "GET", "/readyz", bearerless))[0] == 200
    served.states = {"insitu/eiffel": "ready", "gpt2": "loading"}
    status, _, body = asyncio.run(bare(app, "GET", "/readyz", bearerless))
    assert status == 503 and msgspec.json.decode(body) == {"ready": False}  # no model by name


HOSTILE = ["\x00", "a\x00b", "é" * 50, "%n%s%x", "' or 1=1", "<script>", "${jndi:x}", "x" * 9000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "Content-Type",
        "Idempotency-Key",
        "Prefer",
        "Range",
        "If-None-Match",
        "Last-Event-ID",
        "Insitu-Protocol",
        "Content-Encoding",
        "Content-Length",
        "Origin",
        "Host",
    ],
)
def test_hostile_headers_are_refused_or_nothing(name: str, text: str, tmp_path: Path) -> None:
    served = done(tmp_path)
    app = app_of(served)
    paths = [("POST", "/v1/jobs"), ("GET", f"/v1/jobs/{1:032x}/result")]
    for method, path in [*paths, ("GET", f"/v1/jobs/{1:032x}/events")]:
        status, _, body = asyncio.run(bare(app, method, path, {**JOB, name.lower(): text}))
        assert status in (200, 202, 400, 401, 403, 415, 421, 422)
        if status >= 400:
            assert msgspec.json.decode(body, type=Problem).status == status
            assert len(body) < 1000
