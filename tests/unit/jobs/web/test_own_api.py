"""Our own API, as a program meets it."""

import contextlib
import io
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import exc, update
from starlette.requests import Request

from jobs import (
    bell,
    cancelling,
    database,
    holds,
    reordering,
    results,
    schema,
    states,
    submission,
    tokens,
    uploads,
    watch,
)
from jobs.web import bodies, events, failing, service
from tests.unit.jobs.web.conftest import VIDEO, Web, running
from tests.waiting import until


def test_a_batch_from_its_prompts_to_its_video(web: Web) -> None:
    made = web.client.post(
        "/api/batches",
        json={"preset": "tiny", "prompts": [{"prompt": "a cat", "seed": 5}, {"prompt": "a dog"}]},
    )
    assert made.status_code == 201
    batch_id = made.json()["batch_id"]
    assert made.headers["location"] == f"/api/batches/{batch_id}"
    shown = web.client.get(made.headers["location"]).json()
    assert (shown["state"], shown["counts"]["queued"]) == ("queued", 2)
    first = web.client.get(f"/api/batches/{batch_id}/jobs").json()["jobs"][0]
    assert (first["prompt"], first["seed"]) == ("a cat", 5)
    assert web.client.get(f"/api/jobs/{first['job_id']}/video").status_code == 404
    web.succeed(first["job_id"])
    job = web.client.get(f"/api/jobs/{first['job_id']}").json()
    assert job["state"] == "succeeded"
    assert job["video"]["bytes"] == len(VIDEO)
    video = web.client.get(f"/api/jobs/{first['job_id']}/video")
    assert video.content == VIDEO
    assert video.headers["content-type"] == "video/mp4"


def test_a_preset_file_whose_name_is_no_text_hides_no_other(
    make_web: Callable[..., Web], tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / os.fsdecode(b"caf\xff.json")).write_text("{}")
    web = make_web(presets_dir=str(tmp_path / "own"))
    answer = web.client.get("/api/presets")
    assert answer.status_code == 200
    assert "tiny" in {preset["name"] for preset in answer.json()["presets"]}
    assert web.client.get("/submit", headers={"Accept": "text/html"}).status_code == 200
    new = {"preset": "caf", "prompts": [{"prompt": "x"}]}
    assert web.client.post("/api/batches", json=new).status_code in (404, 422)


def test_what_is_wrong_is_a_problem_document_with_every_line_and_nothing_is_stored(
    web: Web,
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "ok"}, {"promt": "x"}, {"prompt": "y", "seed": -1}]
    answer = web.client.post("/api/batches", json={"preset": "tiny", "prompts": rows})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["status"], body["title"]) == (422, HTTPStatus(422).phrase)
    assert [problem["line"] for problem in body["problems"]] == [2, 3]
    assert "did you mean prompt" in body["problems"][0]["message"]
    assert web.client.get("/api/batches").json()["batches"] == []


def test_values_are_counted_before_they_are_parsed(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES_OF_ROWS", 30)
    web.submit([{"prompt": 'a, "b", [c], {d}, ' * 100}])  # what prompts hold is not counted
    with monkeypatch.context() as patched:
        patched.setattr(Request, "json", None)
        for row in ({"prompt": "x", "seed": 1}, {}, []):
            new = {"preset": "tiny", "prompts": [row] * 50}
            answer = web.client.post("/api/batches", json=new)
            told = "more than 30 values in JSON: send fewer at a time"
            assert (answer.status_code, answer.json()["detail"]) == (413, told)
        for path in ("/v1/tasks/", "/v1/videos"):
            new = {"prompt": "x", "target_shape": [1] * 30_001}
            assert web.client.post(path, json=new).status_code == 413


@pytest.mark.parametrize("path", ["/api/batches", "/v1/videos", "/v1/tasks/"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_is_utf_8_as_it_is_counted(web: Web, path: str, encoding: str) -> None:
    new = {"prompt": "x", "preset": "tiny", "prompts": [{"prompt": "x"}]}
    headers = {"Content-Type": "application/json"}
    answer = web.client.post(path, content=json.dumps(new).encode(encoding), headers=headers)
    assert answer.status_code == 400
    assert "JSON must be UTF-8" in answer.text


def test_a_thousand_unknown_keys_are_one_problem(web: Web) -> None:
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]} | {f"k{n}": 0 for n in range(1_000)}
    for path in ("/api/batches", "/api/schedules"):
        (problem,) = web.client.post(path, json=new).json()["problems"]
        assert "1,002 keys" in problem["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/batches/none", 404),
        ("GET", "/api/batches/%00", 404),
        ("GET", "/api/batches/none/events", 404),
        ("POST", "/api/batches/none/cancel", 404),
        ("GET", "/api/jobs/999", 404),
        ("GET", "/api/jobs/abc", 422),
        ("GET", "/api/jobs/99999999999999999999", 422),
        ("GET", "/api/nowhere", 404),
        ("PUT", "/api/batches", 405),
        ("GET", "/api/batches?limit=0", 422),
        ("GET", "/api/batches?cursor=none", 404),
        ("POST", "/api/batches", 422),
        ("GET", "/api/schedules/none", 404),
    ],
)
def test_every_error_is_a_problem_document(web: Web, method: str, path: str, status: int) -> None:
    answer = web.client.request(method, path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


def test_a_preset_is_found_by_its_name_only(web: Web, tmp_path) -> None:
    path = tmp_path / "own.json"
    path.write_text("{}")
    for name in (str(path), "../configs/tiny.json", "nothing"):
        answer = web.client.post(
            "/api/batches", json={"preset": name, "prompts": [{"prompt": "x"}]}
        )
        assert answer.status_code == 404, answer.text


def test_the_same_key_and_content_is_the_same_batch(web: Web) -> None:
    key = {"Idempotency-Key": "night-1"}
    batch_id = web.submit(2, headers=key)
    rows = [{"prompt": f"prompt {n}", "custom_id": f"p{n}"} for n in range(2)]
    again = web.client.post("/api/batches", json={"preset": "tiny", "prompts": rows}, headers=key)
    assert (again.status_code, again.json()["batch_id"]) == (200, batch_id)
    assert again.json()["is_new"] is False
    other = web.client.post(
        "/api/batches", json={"preset": "tiny", "prompts": rows[:1]}, headers=key
    )
    assert other.status_code == 409


def test_a_prompt_file_is_submitted_as_the_command_line_does(web: Web) -> None:
    answer = web.client.post(
        "/api/batches/file",
        files={"file": ("p.csv", b"prompt,custom_id\na cat,c\n,d\n", "text/csv")},
        data={"preset": "tiny", "name": "night", "skip_invalid": "true", "repeat": "2"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["jobs"] == 2
    assert [problem["line"] for problem in answer.json()["skipped"]] == [3]
    shown = web.client.get(f"/api/batches/{answer.json()['batch_id']}").json()
    assert shown["name"] == "night"


def test_a_format_that_is_named_goes_before_the_name_of_the_file(web: Web) -> None:
    answer = web.client.post(
        "/api/batches/file",
        files={"file": ("p.csv", b"a cat\na dog\n")},
        data={"preset": "tiny", "format": "text"},
    )
    assert (answer.status_code, answer.json().get("jobs")) == (201, 2), answer.text


def test_more_than_an_owner_may_have_queued_is_refused(make_web: Callable[..., Web]) -> None:
    web = make_web(max_queued_per_owner=1)
    rows = {"preset": "tiny", "prompts": [{"prompt": "a"}, {"prompt": "b"}]}
    assert web.client.post("/api/batches", json=rows).status_code == 429
    web.submit(1)
    for path, body in (
        ("/api/batches", {"preset": "tiny", "prompts": [{"prompt": "a"}]}),
        ("/v1/videos", {"prompt": "a"}),
        ("/v1/tasks/", {"prompt": "a"}),
    ):
        answer = web.client.post(path, json=body)
        assert (answer.status_code, "retry-after" in answer.headers) == (429, False)
    assert len(web.client.get("/api/batches").json()["batches"]) == 1


def test_the_dispatchers_hear_of_what_there_is_to_do(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(bell, "kick", lambda *_: told.append("work"))
    monkeypatch.setattr(reordering, "send_anew", lambda *_: told.append("order"))

    def heard(path: str, **body: Any) -> list[str]:
        told.clear()
        answer = web.client.post(path, json=body)
        assert answer.is_success, answer.text
        return list(dict.fromkeys(told))

    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]}
    assert heard("/api/batches", **new) == ["work"]
    batch = f"/api/batches/{web.submit(2)}"
    jobs = [f"/api/jobs/{job['job_id']}" for job in web.client.get(f"{batch}/jobs").json()["jobs"]]
    web.client.post(f"{batch}/pause")
    assert heard(f"{batch}/resume") == ["work"]
    web.client.post(f"{jobs[1]}/pause")
    assert heard(f"{jobs[1]}/resume") == ["work"]
    assert "order" in heard(f"{batch}/priority", priority=7)
    web.client.post(f"{batch}/cancel")
    assert heard(f"{jobs[0]}/retry") == ["work"]
    assert heard(f"{batch}/retry", states=["cancelled"]) == ["work"]
    assert heard(f"{batch}/retry", states=["cancelled"]) == []
    assert heard("/api/schedules", name="n", cron="@daily", **new) == []
    assert heard("/api/schedules/n/run") == ["work"]


@pytest.mark.parametrize("at_once", [False, True])
def test_pages_lead_through_everything_once(web: Web, at_once: bool) -> None:
    made = [web.submit(3) for _ in range(5)]
    if at_once:
        with web.db.transaction() as session:
            now = session.get_one(schema.Batch, made[0]).created_at
            session.execute(update(schema.Batch).values(created_at=now))
    found, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = web.client.get("/api/batches", params=params).json()
        found += [batch["batch_id"] for batch in page["batches"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(found) == sorted(made)
    positions, cursor = [], "-1"
    while cursor is not None:
        page = web.client.get(
            f"/api/batches/{made[0]}/jobs", params={"limit": 2, "cursor": cursor}
        ).json()
        positions += [job["position"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert positions == [0, 1, 2]


def test_batches_and_jobs_are_chosen(web: Web) -> None:
    first, second = web.submit(2), web.submit(2)
    web.client.post(f"/api/batches/{first}/cancel")

    def chosen(**query: Any) -> list[str]:
        answer = web.client.get("/api/batches", params=query)
        assert answer.status_code == 200, answer.text
        return [batch["batch_id"] for batch in answer.json()["batches"]]

    assert chosen(state="cancelled") == [first]
    assert chosen(state=["cancelled", "queued"]) == [second, first]
    assert chosen(state="failed") == []
    assert web.client.get("/api/batches", params={"state": "done"}).status_code == 422
    path = f"/api/batches/{first}/jobs"
    jobs = web.client.get(path, params={"custom_id": "p1"}).json()["jobs"]
    assert [(job["custom_id"], job["position"]) for job in jobs] == [("p1", 1)]
    query = {"custom_id": "p1", "state": "queued"}
    assert web.client.get(path, params=query).json()["jobs"] == []
    assert web.client.get(path, params={"custom_id": "p"}).json()["jobs"] == []


def test_only_an_admin_chooses_an_owner(make_web: Callable[..., Web]) -> None:
    web = make_web(web_require_token=True)
    batch_id = web.submit(headers=web.token("ann"))
    web.submit(headers=web.token("ben"))
    for headers, owner, found in (
        (web.token("", "admin"), "ann", [batch_id]),
        (web.token("ann"), "ann", [batch_id]),
        (web.token("ben"), "ann", []),
    ):
        answer = web.client.get("/api/batches", params={"owner": owner}, headers=headers)
        assert [batch["batch_id"] for batch in answer.json()["batches"]] == found


def test_a_list_goes_on_after_a_batch_that_is_being_forgotten(web: Web) -> None:
    made = [web.submit(1) for _ in range(2)]
    job_id = web.job_id(made[1])
    first = web.client.get("/api/batches", params={"limit": 1}).json()
    with web.db.transaction() as session:
        batch = session.get_one(schema.Batch, first["next_cursor"])
        batch.forgotten_at = batch.created_at
    page = web.client.get("/api/batches", params={"cursor": first["next_cursor"]}).json()
    assert [batch["batch_id"] for batch in page["batches"]] == made[:1]
    for path in (
        f"/api/batches/{first['next_cursor']}",
        f"/api/jobs/{job_id}",
        f"/api/jobs/{job_id}/video",
        f"/v1/videos/video_{job_id}",
    ):
        assert web.client.get(path).status_code == 404, path
    assert web.client.get("/api/batches", params={"cursor": "b" * 8}).status_code == 404


def test_cancel_and_retry(web: Web) -> None:
    batch_id = web.submit(3)
    running, waiting, other = (web.job_id(batch_id, n) for n in range(3))
    attempt_id = web.claim(running)
    assert web.client.post(f"/api/jobs/{other}/cancel").json() == {"cancelled": 1, "stopping": 0}
    answer = web.client.post(f"/api/batches/{batch_id}/cancel")
    assert answer.json() == {"cancelled": 1, "stopping": 1}
    assert web.step(attempt_id, "denoise", 1, 4) == "cancelled"
    answer = web.client.post(f"/api/batches/{batch_id}/retry", json={"states": ["cancelled"]})
    assert answer.json() == {"retried": 3, "doubtful": {}, "batch_is_paused": False}
    assert web.step(attempt_id, "denoise", 2, 4) == "go_on"
    assert web.client.post(f"/api/jobs/{waiting}/retry").json()["retried"] == 0
    bad = web.client.post(f"/api/batches/{batch_id}/retry", json={"states": ["succeeded"]})
    assert bad.status_code == 422


def test_failures_that_take_long_to_count_are_counted_now_and_then(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/api/batches/{(batch_id := web.submit(3))}"

    def told() -> list[tuple[str, int]]:
        return [(each["kind"], each["count"]) for each in web.client.get(path).json()["failures"]]

    web.fail(web.job_id(batch_id, 0))
    assert told() == [("input", 1)]
    monkeypatch.setattr(failing, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(failing, "IDLE_PER_COUNT", 1e9)
    assert told() == [("input", 1)]
    web.fail(web.job_id(batch_id, 1))
    assert told() == [("input", 1)]
    monkeypatch.setattr(failing, "IDLE_PER_COUNT", 0.0)
    web.client.post(f"{path}/retry", json={})
    assert told() == []
    for number, count in ((0, 1), (1, 2)):
        web.fail(web.job_id(batch_id, number))
        assert told() == [("input", count)]


def test_what_failed_is_told_by_kind_and_retried_by_kind(web: Web) -> None:
    path = f"/api/batches/{(batch_id := web.submit(4))}"
    assert web.client.get(path).json()["failures"] == []
    web.fail(web.job_id(batch_id, 0), error="too long")
    device = states.FailureKind.DEVICE
    for number in (1, 2):
        web.fail(web.job_id(batch_id, number), error=f"Xid {number}", kind=device)
    first, other = web.client.get(path).json()["failures"]
    assert first == {
        "kind": "device",
        "quarantined": False,
        "count": 2,
        "may_go_well": True,
        "worker_count": 1,
        "workers": [{"worker": "gpu0@host", "count": 2}],
        "example": {"job_id": web.job_id(batch_id, 1), "custom_id": "p1", "message": "Xid 1"},
    }
    assert (other["kind"], other["count"], other["may_go_well"]) == ("input", 1, False)

    def listed(**query: str) -> list[tuple[str, str | None]]:
        jobs = web.client.get(f"{path}/jobs", params=query).json()["jobs"]
        return [(job["custom_id"], job["worker"]) for job in jobs]

    assert listed(kind="device") == [("p1", "gpu0@host"), ("p2", "gpu0@host")]
    assert listed(state="failed", kind="input", quarantined="false") == [("p0", "gpu0@host")]
    assert listed(quarantined="true") == []
    assert listed()[3] == ("p3", None)
    job = web.client.get(f"/api/jobs/{web.job_id(batch_id, 1)}").json()
    assert job["worker"] == "gpu0@host"
    assert web.client.get(f"{path}/jobs", params={"kind": "devise"}).status_code == 422

    wanted = {"kinds": ["device"], "quarantined": False}
    assert web.client.post(f"{path}/retry", json=wanted).json()["retried"] == 2
    answer = web.client.post(f"{path}/retry").json()
    assert (answer["retried"], answer["doubtful"]) == (1, {"input": 1})
    assert web.client.post(f"{path}/retry", json={"kinds": ["devise"]}).status_code == 422


def test_a_batch_is_paused_resumed_and_moved(web: Web) -> None:
    path = f"/api/batches/{web.submit()}"
    assert web.client.post(f"{path}/pause").json()["state"] == "paused"
    assert web.client.post(f"{path}/pause").json()["changed"] is False
    assert web.client.post(f"{path}/resume").json()["state"] == "queued"
    assert web.client.post(f"{path}/priority", json={"priority": 7}).json()["changed"] is True
    assert web.client.get(path).json()["priority"] == 7
    assert web.client.post(f"{path}/priority", json={"priority": 700}).status_code == 422


def test_a_job_is_paused_and_resumed(web: Web) -> None:
    batch_id = web.submit(2)
    job_id = web.job_id(batch_id, 1)
    path = f"/api/jobs/{job_id}"
    told = {"job_id": job_id, "state": "queued", "is_paused": True, "changed": True}
    assert web.client.post(f"{path}/pause").json() == told
    assert web.client.post(f"{path}/pause").json() == told | {"changed": False}
    listed = web.client.get(f"/api/batches/{batch_id}/jobs").json()["jobs"]
    assert [job["is_paused"] for job in listed] == [False, True]
    job = web.client.get(path).json()
    assert (job["preset"], job["is_paused"]) == ("tiny", True)
    assert (listed[1]["not_before"], job["not_before"]) == (None, None)
    told |= {"is_paused": False}
    assert web.client.post(f"{path}/resume").json() == told
    assert web.client.post(f"{path}/resume").json() == told | {"changed": False}
    web.client.post(f"{path}/pause")
    web.client.post(f"{path}/cancel")
    job = web.client.get(path).json()
    assert (job["is_paused"], job["not_before"]) == (False, None)
    assert web.client.post(f"{path}/resume").json()["changed"] is False
    assert web.client.post("/api/jobs/999/pause").status_code == 404


def events_of(web: Web, batch_id: str) -> list[tuple[str, dict[str, Any]]]:
    text = web.client.get(f"/api/batches/{batch_id}/events").text
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line[1:])
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_events_tell_each_step_and_end_with_the_batch(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    batch_id = web.submit()
    job_id = web.job_id(batch_id)

    def render() -> None:
        attempt_id = web.claim(job_id)
        for step in range(1, 5):
            web.step(attempt_id, "denoise", step, 4)
            time.sleep(0.3)
        web.succeed(job_id, attempt_id)

    worker = threading.Thread(target=render)
    worker.start()
    found = events_of(web, batch_id)
    worker.join()
    steps = [
        (job["stage"], job["step"], job["steps"])
        for name, shape in found
        for job in shape["running"]
        if name == "progress" and job["stage"]
    ]
    assert [("denoise", step, 4) for step in range(1, 5)] == list(dict.fromkeys(steps))
    assert found[-1][0] == "finished"
    assert found[-1][1]["state"] == "succeeded"
    assert not web.serving.listen_turns._taken


def test_events_ask_proxies_to_pass_on_each_as_it_comes(web: Web) -> None:
    batch_id = web.submit()
    web.succeed(web.job_id(batch_id))
    told = web.client.get(f"/api/batches/{batch_id}/events").headers
    assert told["x-accel-buffering"] == "no"
    assert "x-accel-buffering" not in web.client.get(f"/api/batches/{batch_id}").headers


def test_events_end_with_their_token(
    make_web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(events, "TOKEN_SECONDS", 0.1)
    web = make_web(web_require_token=True)
    ann = web.token("ann")
    batch_id = web.submit(headers=ann)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(web.client.get, f"/api/batches/{batch_id}/events", headers=ann)
        with contextlib.suppress(TimeoutError):
            pytest.fail(f"it ended by itself: {reading.result(timeout=1)}")
        with web.db.transaction() as session:
            tokens.revoke(session, tokens.every(session)[-1].id)
        text = reading.result(timeout=10).text
    assert "event: progress" in text
    assert "event: finished" not in text
    assert not web.serving.listen_turns._taken


def test_events_go_on_after_an_outage_of_the_database(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With comments in it, also while a look hangs."""
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(events, "QUIET_SECONDS", 0.2)
    batch_id = web.submit()
    look, looks = watch.look, itertools.count(1)

    def now_and_then(db: database.Database, batch_id: str) -> watch.Snapshot:
        number = next(looks)
        if number == 2:
            time.sleep(0.7)
        if 2 <= number <= 4:
            raise exc.OperationalError("SELECT", {}, Exception("no answer within 120 s"))
        if number == 5:
            cancelling.cancel_batch(db, batch_id)
        return look(db, batch_id)

    monkeypatch.setattr(watch, "look", now_and_then)
    told = web.client.get(f"/api/batches/{batch_id}/events").text
    assert re.findall("event: (.*)", told) == ["progress", "finished"]
    assert told.count(": still here") >= 2
    assert not web.serving.listen_turns._taken


@pytest.mark.parametrize("limit", ["LISTENERS_OF_ONE", "MAX_LISTENERS"])
def test_one_owner_does_not_take_all_streams_of_events(
    make_web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(service, limit, 2)
    web = make_web(web_require_token=True)
    for _ in range(2):
        web.serving.listen_turns.take("ann")
    found = []
    for who in (web.token("ann"), web.token("ben")):
        batch_id = web.submit(headers=who)
        web.succeed(web.job_id(batch_id))
        answer = web.client.get(f"/api/batches/{batch_id}/events", headers=who)
        found.append((answer.status_code, answer.headers.get("retry-after")))
    refused = (429, "10")
    assert found == [refused, (200, None) if limit == "LISTENERS_OF_ONE" else refused]


def test_streams_of_events_that_begin_at_once_are_counted_too(
    make_web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LISTENERS_OF_ONE", 3)
    web = make_web()
    batch_id = web.submit()
    with running(web) as live, ThreadPoolExecutor(12) as pool:
        host = live.url.removeprefix("http://")
        connections = [HTTPConnection(host, timeout=20) for _ in range(12)]

        def listen(connection: HTTPConnection) -> int:
            connection.request("GET", f"/api/batches/{batch_id}/events")
            return connection.getresponse().status

        assert sorted(pool.map(listen, connections)) == [200] * 3 + [429] * 9
        for connection in connections:
            connection.close()
        until(lambda: not web.serving.listen_turns._taken, seconds=20)


def test_an_uploaded_image_is_what_a_row_starts_from(web: Web, image: bytes) -> None:
    up = web.client.post("/api/uploads", files={"file": ("red.png", image, "image/png")})
    assert up.status_code == 201, up.text
    with web.db.reading() as session:
        key = f"inputs/{up.json()['sha256'][:2]}/{up.json()['sha256']}"
        assert holds.held(session, [key]) == {key}
    batch_id = web.submit([{"prompt": "it moves", "image": up.json()["image"]}], preset="tiny_i2v")
    job = web.client.get(f"/api/jobs/{web.job_id(batch_id)}").json()
    assert web.serving.store.read_bytes(job["image_key"]) == image


def test_an_upload_that_was_written_over_in_the_store_is_not_taken(web: Web, image: bytes) -> None:
    up = web.client.post("/api/uploads", files={"file": ("red.png", image, "image/png")}).json()
    other = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(other, "PNG")
    key = uploads.shared_key(up["sha256"])
    web.serving.store.put_bytes(other.getvalue(), key, content_type="image/png")
    asked = {"preset": "tiny_i2v", "prompts": [{"prompt": "x", "image": up["image"]}]}
    answer = web.client.post("/api/batches", json=asked)
    assert answer.status_code == 422
    assert "is not what was uploaded" in answer.json()["problems"][0]["message"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("upload:file-none", "no such upload"),
        ("/etc/hostname", "network"),
        ("file:///etc/hostname", "network"),
        ("given:0", "network"),
    ],
)
def test_images_of_this_machine_are_not_read(web: Web, source: str, told: str) -> None:
    answer = web.client.post(
        "/api/batches",
        json={"preset": "tiny_i2v", "prompts": [{"prompt": "x", "image": source}]},
    )
    assert answer.status_code == 422
    assert "image" in answer.json()["problems"][0]["message"]


def test_what_is_no_image_is_not_kept(web: Web) -> None:
    answer = web.client.post("/api/uploads", files={"file": ("a.png", b"%PDF-1.4", "image/png")})
    assert answer.status_code == 422
    assert "PDF" in answer.text


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-99", 206, 0, 99),
        ("bytes=10000-", 206, 10000, 10239),
        ("bytes=-5", 206, 10235, 10239),
        ("bytes=-20000", 206, 0, 10239),
        ("bytes=0-999999", 206, 0, 10239),
        (f"Bytes=0-{10**25}", 206, 0, 10239),
        ("bytes=5-1", 200, 0, 10239),
        ("bytes=0-1,5-6", 200, 0, 10239),
        ("items=0-1", 200, 0, 10239),
    ],
)
def test_a_range_of_a_video(web: Web, asked: str, status: int, first: int, last: int) -> None:
    job_id = web.job_id(web.submit())
    web.succeed(job_id)
    answer = web.client.get(f"/api/jobs/{job_id}/video", headers={"Range": asked})
    assert answer.status_code == status
    assert answer.content == VIDEO[first : last + 1]
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(VIDEO)}"


def test_what_a_browser_asks_about_a_video(web: Web) -> None:
    job_id = web.job_id(web.submit())
    web.succeed(job_id)
    path = f"/api/jobs/{job_id}/video"
    whole = web.client.get(path)
    assert whole.headers["vary"] == "Cookie, Authorization"
    tag = whole.headers["etag"]
    for held in (tag, f'"other", {tag}', "*"):
        assert web.client.get(path, headers={"If-None-Match": held}).status_code == 304
    for first in (len(VIDEO), 20_000):
        beyond = web.client.get(path, headers={"Range": f"bytes={first}-"})
        told = (beyond.status_code, beyond.headers["content-range"])
        assert told == (416, f"bytes */{len(VIDEO)}")
    assert web.client.get(path, headers={"Range": f"bytes={2**63}-"}).status_code == 416
    head = web.client.head(path, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"], head.content) == (206, "10", b"")
    other = {"Range": "bytes=0-1", "If-Range": '"another"'}
    assert web.client.get(path, headers=other).content == VIDEO


def test_a_video_that_was_deleted_from_the_store_is_not_there(web: Web) -> None:
    job_id = web.job_id(web.submit())
    web.succeed(job_id)
    for key in web.serving.store.list():
        web.serving.store.delete(key)
    answer = web.client.get(f"/api/jobs/{job_id}/video")
    assert answer.status_code == 404
    assert "results" not in answer.text


def test_result_links_come_with_the_result_files(web: Web) -> None:
    batch_id = web.submit()
    path = f"/api/batches/{batch_id}/results"
    assert web.client.get(path).json() == {"output": None, "errors": None, "manifest": None}
    web.succeed(web.job_id(batch_id))
    assert results.write(web.db, web.serving.store, batch_id)
    assert web.client.get(path).json()["manifest"].endswith(f"{batch_id}/manifest.json")
    with web.db.transaction() as session:
        batch = session.get_one(schema.Batch, batch_id)
        batch.results_expired_at = batch.manifest_at
    assert web.client.get(path).json() == {"output": None, "errors": None, "manifest": None}


def test_a_schedule_over_http(web: Web) -> None:
    new = {
        "name": "night",
        "cron": "30 2 * * *",
        "zone": "Europe/Berlin",
        "preset": "tiny",
        "prompts": [{"prompt": "a {{style}} cat"}],
        "lists": {"style": ["noir"]},
    }
    made = web.client.post("/api/schedules", json=new)
    assert made.status_code == 201, made.text
    assert len(made.json()["coming"]) == 5
    assert web.client.post("/api/schedules", json=new).status_code == 422
    bad = web.client.post("/api/schedules", json=new | {"name": "b", "lists": {}})
    assert "unknown variable" in bad.text
    fired = web.client.post("/api/schedules/night/run")
    assert fired.status_code == 201
    (row,) = web.client.get("/api/schedules/night/history").json()["firings"]
    assert row["batch"]["batch_id"] == fired.json()["batch_id"]
    assert web.client.post("/api/schedules/night/pause").json()["state"] == "paused"
    assert web.client.post("/api/schedules/night/resume").json()["changed"] is True
    assert [s["name"] for s in web.client.get("/api/schedules").json()["schedules"]] == ["night"]
    assert web.client.delete("/api/schedules/night").status_code == 204
    assert web.client.get("/api/schedules/night").status_code == 404


def test_of_two_that_run_a_schedule_now_one_is_told_to_try_again(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"name": "n", "cron": "@daily", "preset": "tiny", "prompts": [{"prompt": "a cat"}]}
    assert web.client.post("/api/schedules", json=new).status_code == 201
    submit = submission.submit

    def late(*arguments: Any, **options: Any) -> submission.Submission:
        monkeypatch.setattr(submission, "submit", submit)
        assert web.client.post("/api/schedules/n/run").status_code == 201
        return submit(*arguments, **options)

    monkeypatch.setattr(submission, "submit", late)
    answer = web.client.post("/api/schedules/n/run")
    assert answer.status_code == 409
    assert "try again" in answer.json()["detail"]


def test_without_the_folder_of_presets_there_are_none(
    make_web: Callable[..., Web], tmp_path: Path
) -> None:
    """A shipped one would be taken for the person's own."""
    folder = tmp_path / "presets"
    folder.mkdir()
    web = make_web(presets_dir=folder)
    assert web.client.get("/api/presets").status_code == 200
    folder.rmdir()
    new = {"preset": "tiny", "prompts": [{"prompt": "a cat"}]}
    for method, path in (
        ("GET", "/api/presets"),
        ("GET", "/v1/models"),
        ("GET", "/submit"),
        ("POST", "/api/batches"),
    ):
        answer = web.client.request(method, path, json=new if method == "POST" else None)
        assert answer.status_code == 503, path
        assert answer.headers["Retry-After"] == "5"
        assert "the presets cannot be read" in answer.text
        assert str(folder) not in answer.text
    assert web.client.get("/schedules").status_code == 200


def test_presets_workers_and_health(web: Web) -> None:
    names = [preset["name"] for preset in web.client.get("/api/presets").json()["presets"]]
    assert "tiny" in names
    assert web.client.get("/api/workers").json() == {"workers": []}
    assert web.client.get("/healthz").json() == {"status": "ok"}
    for path in ("/healthz", "/readyz"):
        assert web.client.head(path).status_code == 200
    ready = web.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"] == {"database": "ok", "broker": "unavailable", "store": "ok"}


def test_a_nul_in_an_address_is_nothing_that_there_is(
    make_web: Callable[..., Web], postgres_database_url: str
) -> None:
    """PostgreSQL takes none in a text."""
    web = make_web(database_url=postgres_database_url)
    assert web.client.get("/v1/files?purpose=%00").json()["data"] == []
    assert web.client.get("/api/batches?owner=%00").json()["batches"] == []
    jobs = web.client.get(f"/api/batches/{web.submit(1)}/jobs?custom_id=%00")
    assert jobs.json()["jobs"] == []
    for path in (
        "/api/batches/%00",
        "/api/batches?cursor=%00",
        "/api/schedules/%00",
        "/v1/batches/%00",
        "/v1/batches?after=%00",
        "/v1/files/%00",
        "/v1/files?after=%00",
        "/v1/videos?after=%00",
        "/v1/tasks/%00/status",
    ):
        assert web.client.get(path).status_code == 404, path
