"""Who may do what, and what is refused before anybody is asked."""

import base64
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import limits
import pytest
import redis
from fastapi.routing import iter_route_contexts
from sqlalchemy import delete, exc, update

from jobs import database, errors, migrate, schema, settings, tokens
from jobs import images as all_images
from jobs.web import bodies, cookies, guards, images, rates, server
from tests.unit.jobs.web.conftest import Web
from tests.waiting import until

MakeWeb = Callable[..., Web]


@pytest.fixture
def guarded(make_web: MakeWeb) -> Web:
    return make_web(web_require_token=True)


def test_without_a_token_nothing_but_health_is_answered(guarded: Web) -> None:
    assert guarded.client.get("/healthz").status_code == 200
    assert guarded.client.get("/readyz").status_code == 200
    checked = 0
    for path, methods in guarded.client.get("/openapi.json").json()["paths"].items():
        if path in ("/healthz", "/readyz"):
            continue
        for method in methods:
            answer = guarded.client.request(method, path.replace("{job_id}", "1"), json={})
            # A request that cannot be read may be told so first; nothing is done or shown.
            assert answer.status_code in (401, 422, 400), (method, path, answer.status_code)
            checked += answer.status_code == 401
    assert checked > 20
    answer = guarded.client.get("/api/batches")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer x", "Basic eDp5", "Bearer rushes_x"])
def test_what_is_no_token_of_ours_is_refused(guarded: Web, header: str) -> None:
    answer = guarded.client.get("/api/batches", headers={"Authorization": header})
    assert answer.status_code == 401


def test_scopes_decide_what_a_token_may_do(guarded: Web) -> None:
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]}
    allowed = {"read": (403, 200, 403), "submit": (201, 403, 403), "admin": (201, 200, 201)}
    schedule = {"name": "n", "cron": "@daily", **new}
    for scope, expected in allowed.items():
        headers = guarded.token("ann", scope)
        found = (
            guarded.client.post("/api/batches", json=new, headers=headers).status_code,
            guarded.client.get("/api/batches", headers=headers).status_code,
            guarded.client.post("/api/schedules", json=schedule, headers=headers).status_code,
        )
        assert found == expected, scope


def test_an_owner_sees_only_what_is_theirs_and_an_admin_everything(
    guarded: Web, image: bytes
) -> None:
    ann, ben = guarded.token("ann"), guarded.token("ben")
    admin = guarded.token("", "admin")
    batch_id = guarded.submit(headers=ann)
    job_id = guarded.job_id(batch_id)
    guarded.succeed(job_id)
    up = guarded.client.post("/api/uploads", files={"file": ("r.png", image)}, headers=ann).json()
    task = {"prompt": "x", "task_id": "anns"}
    guarded.client.post("/v1/tasks/", json=task, headers=ann)
    for path in (
        f"/api/batches/{batch_id}",
        f"/api/batches/{batch_id}/jobs",
        f"/api/batches/{batch_id}/events",
        f"/api/batches/{batch_id}/results",
        f"/api/jobs/{job_id}",
        f"/api/jobs/{job_id}/video",
        f"/v1/videos/video_{job_id}",
        f"/v1/videos/video_{job_id}/content",
        f"/v1/files/{up['upload_id']}",
        f"/v1/files/file-{batch_id}_output/content",
        "/v1/tasks/anns/status",
    ):
        assert guarded.client.get(path, headers=ann).status_code == 200, path
        assert guarded.client.get(path, headers=ben).status_code == 404, path
        assert guarded.client.get(path, headers=admin).status_code == 200, path
    for path in (f"/api/batches/{batch_id}", f"/api/jobs/{job_id}"):
        for verb in ("cancel", "retry"):
            assert guarded.client.post(f"{path}/{verb}", headers=ben).status_code == 404
    assert guarded.client.delete(f"/v1/videos/video_{job_id}", headers=ben).status_code == 404
    for path, key in (("/api/batches", "batches"), ("/v1/files", "data"), ("/v1/videos", "data")):
        assert guarded.client.get(path, headers=ben).json()[key] == []
    assert guarded.client.get("/v1/tasks/", headers=ben).json() == {}
    row = {"prompt": "x", "image": up["image"]}
    stolen = {"preset": "tiny_i2v", "prompts": [row]}
    assert guarded.client.post("/api/batches", json=stolen, headers=ben).status_code == 422
    assert guarded.client.post("/api/batches", json=stolen, headers=ann).status_code == 201


def test_what_is_anothers_is_neither_listed_nor_counted_nor_changed(guarded: Web) -> None:
    ann, ben = guarded.token("ann"), guarded.token("ben")
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}], "name": "anns", "cron": "@daily"}
    boss = guarded.token("ann", "admin")
    assert guarded.client.post("/api/schedules", json=new, headers=boss).status_code == 201
    for path in ("/api/schedules/anns", "/api/schedules/anns/history"):
        assert guarded.client.get(path, headers=ann).status_code == 200, path
        assert guarded.client.get(path, headers=ben).status_code == 404, path
    assert guarded.client.post("/v1/videos", json={"prompt": "x"}, headers=ann).is_success
    for path, key in (("/api/schedules", "schedules"), ("/v1/videos", "data")):
        assert len(guarded.client.get(path, headers=ann).json()[key]) == 1, path
        assert guarded.client.get(path, headers=ben).json()[key] == [], path


def test_a_file_and_a_batch_of_another_are_out_of_reach(guarded: Web) -> None:
    ann, ben = guarded.token("ann"), guarded.token("ben")
    line = b'{"method": "POST", "url": "/v1/videos", "body": {"prompt": "x"}}'
    up = {"files": {"file": ("b.jsonl", line)}, "data": {"purpose": "batch"}}
    file_id = guarded.client.post("/v1/files", headers=ann, **up).json()["id"]
    assert guarded.client.delete(f"/v1/files/{file_id}", headers=ben).status_code == 404
    new = {"input_file_id": file_id, "endpoint": "/v1/videos"}
    assert guarded.client.post("/v1/batches", json=new, headers=ben).status_code == 404
    name = guarded.client.post("/v1/batches", json=new, headers=ann).json()["id"]
    assert guarded.client.post(f"/v1/batches/{name}/cancel", headers=ben).status_code == 404
    assert guarded.client.get(f"/v1/batches/{name}", headers=ben).status_code == 404
    assert guarded.client.get("/v1/batches", headers=ben).json()["data"] == []
    shown = guarded.client.get(f"/v1/batches/{name}", headers=ann).json()
    assert shown["status"] == "in_progress"
    assert guarded.client.get(f"/v1/files/{file_id}/content", headers=ann).content == line


def test_tasks_of_another_are_neither_stopped_nor_counted(guarded: Web) -> None:
    ann, ben = guarded.token("ann"), guarded.token("ben")
    for name in ("first", "second"):
        task = {"prompt": "x", "task_id": name}
        assert guarded.client.post("/v1/tasks/", json=task, headers=ann).is_success
    newest = guarded.client.get("/api/batches", headers=ann).json()["batches"][0]["batch_id"]
    guarded.claim(guarded.job_id(newest))
    told = guarded.client.delete("/v1/tasks/first", headers=ben).json()
    assert told["stop_status"] == "do_nothing"
    told = guarded.client.delete("/v1/tasks/all/running", headers=ben).json()
    assert told["reason"].startswith("0 tasks")
    for who, queued, active, total in ((ann, 1, ["second"], 2), (ben, 0, [], 0)):
        queue = guarded.client.get("/v1/tasks/queue/status", headers=who).json()
        current = active[0] if active else None
        assert (queue["pending_count"], queue["current_task"]) == (queued, current)
        assert (queue["active_count"], queue["is_processing"]) == (total, bool(active))
        shown = guarded.client.get("/v1/service/status", headers=who).json()
        assert (shown["pending_tasks"], shown["active_tasks"]) == (queued, active)
        assert (shown["total_tasks"], shown["current_task"]) == (total, current)


@pytest.mark.parametrize(
    ("one", "its_key", "other", "other_key"),
    [
        ("ann", "night", "ben", "night"),
        ("team", "x:n", "team:x", "n"),
        ("a" * 60 + "1", "night", "a" * 60 + "2", "night"),
        ("a" * 199 + "1", "n" * 150, "a" * 199 + "2", "n" * 150),
    ],
)
def test_the_same_idempotency_key_of_two_owners_is_two_batches(
    guarded: Web, one: str, its_key: str, other: str, other_key: str
) -> None:
    first = guarded.submit(headers=guarded.token(one) | {"Idempotency-Key": its_key})
    second = guarded.submit(headers=guarded.token(other) | {"Idempotency-Key": other_key})
    assert first != second


def test_an_admins_task_is_meant_before_anothers_of_its_name(guarded: Web) -> None:
    ann, admin = guarded.token("ann"), guarded.token("boss", "admin")
    for seed, who in ((3, ann), (7, admin)):
        task = {"prompt": "x", "task_id": "t1", "seed": seed}
        assert guarded.client.post("/v1/tasks/", json=task, headers=who).status_code == 200
    stopped = guarded.client.delete("/v1/tasks/t1", headers=admin).json()
    assert stopped["stop_status"] == "success"
    told = {
        name: guarded.client.get("/v1/tasks/t1/status", headers=who).json()["status"]
        for name, who in (("ann", ann), ("admin", admin))
    }
    assert told == {"ann": "pending", "admin": "cancelled"}


def test_lists_pass_over_what_is_being_forgotten(web: Web) -> None:
    """A cleaner that was killed has deleted the jobs, and not yet the name."""
    for path, body in (("/v1/videos", {"prompt": "x"}), ("/v1/tasks/", {"prompt": "x"})):
        assert web.client.post(path, json=body).status_code == 200
    with web.db.transaction() as session:
        session.execute(update(schema.Batch).values(forgotten_at=database.now(session)))
        session.execute(delete(schema.Job))
    assert web.client.get("/v1/videos").json()["data"] == []
    assert web.client.get("/v1/tasks/").json() == {}


def test_a_job_of_a_batch_that_is_being_forgotten_is_not_there(web: Web) -> None:
    job_id = web.job_id(web.submit())
    web.succeed(job_id)
    with web.db.transaction() as session:
        session.execute(update(schema.Batch).values(forgotten_at=database.now(session)))
    for path in (
        f"/api/jobs/{job_id}",
        f"/api/jobs/{job_id}/video",
        f"/jobs/{job_id}",
        f"/v1/videos/video_{job_id}",
    ):
        assert web.client.get(path).status_code == 404, path
    for what in ("retry", "cancel"):
        assert web.client.post(f"/api/jobs/{job_id}/{what}").status_code == 404


def _writers(web: Web) -> list[tuple[str, str]]:
    """Every path that takes a body, with its method."""
    return [
        (method, re.sub(r"\{[^}]*\}", "1", found.path))
        for found in iter_route_contexts(web.client.app.routes)
        for method in sorted(set(found.methods or ()) - cookies.SAFE_METHODS)
    ]


def test_nothing_of_a_strangers_is_read(guarded: Web) -> None:
    read = 0

    def body():
        nonlocal read
        for _ in range(3):
            read += 1
            yield b'{"prompt": "x"}'

    known = {"/login", "/logout"}
    writers = [each for each in _writers(guarded) if each[1] not in known]
    assert len(writers) > 30
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        for method, path in writers:
            sent = {"content": body(), "headers": {"Content-Type": kind}}
            answer = guarded.client.request(method, path, follow_redirects=False, **sent)
            assert answer.status_code in (401, 303), (method, path, answer.text)
            assert answer.status_code == 401 or answer.headers["location"] == "/login"
    assert read == 0


def test_what_is_kept_in_memory_has_a_limit_of_its_own(guarded: Web) -> None:
    large = {"Content-Type": "application/json", "Content-Length": str(50 << 20)}
    headers = guarded.token("ann") | large
    answer = guarded.client.post("/api/batches", content=b"{}", headers=headers)
    assert answer.status_code == 413
    assert "send more as an uploaded file" in answer.json()["detail"]
    # A path that takes files does so in a form alone.
    answer = guarded.client.post("/v1/videos", content=b"{}", headers=headers)
    assert answer.status_code == 413
    form = {"token": "x" * (64 << 10)}
    for path in ("/login", "/logout"):
        assert guarded.client.post(path, data=form).status_code == 413
    large["Content-Type"] = "multipart/form-data; boundary=x"
    headers = guarded.token("ann") | large
    assert guarded.client.post("/api/batches", content=b"{}", headers=headers).status_code == 413
    name = {"filename": "a.txt"}
    answer = guarded.client.post("/v1/files", files={"file": b"x" * (49 << 20)}, data=name)
    assert answer.status_code == 401  # as large as files may be, but nobody's


def test_only_what_takes_files_may_be_large(guarded: Web) -> None:
    described = guarded.client.get("/openapi.json").json()["paths"]
    takes_forms = {
        path
        for path, methods in described.items()
        if "multipart/form-data"
        in methods.get("post", {}).get("requestBody", {}).get("content", {})
    }
    assert takes_forms | {"/submit", "/schedules"} == guards.UPLOAD_PATHS


def test_images_that_are_slow_to_decode_leave_threads_to_others(
    guarded: Web, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Semaphore(0), threading.Event()
    examine = all_images.examine

    def slow(*given: Any, **named: Any) -> Any:
        decoding.release()
        assert go_on.wait(60)
        return examine(*given, **named)

    monkeypatch.setattr(all_images, "examine", slow)
    ann, ben = guarded.token("ann"), guarded.token("ben")
    data_url = "data:image/png;base64," + base64.b64encode(image).decode()
    row = {"preset": "tiny_i2v", "prompts": [{"prompt": "x", "image": data_url}]}

    def upload(who: dict[str, str]) -> Any:
        files = {"file": ("red.png", image, "image/png")}
        return guarded.client.post("/api/uploads", files=files, headers=who)

    def submit(who: dict[str, str]) -> Any:
        return guarded.client.post("/api/batches", json=row, headers=who)

    turns = guarded.serving.check_turns
    with ThreadPoolExecutor(32) as pool:
        checked = [pool.submit(upload, ann) for _ in range(images.CHECKS_OF_ONE)]
        checked.append(pool.submit(submit, ben))  # has his own turn, whatever ann sends
        for _ in checked:
            assert decoding.acquire(timeout=60)
        waiting = [pool.submit(submit, ann) for _ in range(images.CHECKS_WAITING - 1)]
        waiting.append(pool.submit(upload, ben))
        until(lambda: len(turns._line) >= len(waiting), seconds=9)
        for refused in (upload(ann), submit(ann), upload(ben)):
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        guarded.submit(headers=ann)  # without images: as ever
        assert not decoding.acquire(blocking=False)
        go_on.set()
        assert {made.result().status_code for made in checked + waiting} == {201}
    assert not turns._taken
    assert not turns._line


@pytest.mark.parametrize(("waiting", "returning"), [("ann", "ann"), ("ben", "ann")])
def test_who_waits_has_a_turn_before_one_who_just_had_his(waiting: str, returning: str) -> None:
    turns = rates.Turns(1, of_all=1, what="images", wait_seconds=30, waiting=1)
    came = []

    def wait() -> None:
        with turns.taken(waiting):
            came.append("who waits")

    turns.take(returning)
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(wait)
        while not turns._line:
            time.sleep(0.001)
        turns.give_back(returning)
        with turns.taken(returning):
            came.append("who returns")
        waiter.result()
    assert came == ["who waits", "who returns"]


def test_who_has_all_that_one_may_have_keeps_no_other_waiting() -> None:
    turns = rates.Turns(1, of_all=2, what="images", wait_seconds=30, waiting=1)
    turns.take("ann")
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(turns.take, "ann")
        while not turns._line:
            time.sleep(0.001)
        turns.take("ben")
        assert not waiter.done()
        turns.give_back("ann")
        waiter.result()


def test_those_who_wait_are_few_however_many_owners_there_are() -> None:
    turns = rates.Turns(1, of_all=1, what="images", wait_seconds=30, waiting=2)
    turns.take("ann")
    with ThreadPoolExecutor(2) as pool:
        waiters = [pool.submit(turns.take, "ann"), pool.submit(turns.take, "ben")]
        while len(turns._line) < 2:
            time.sleep(0.001)
        with pytest.raises(rates.TooManyRequests, match="more than 1 images"):
            turns.take("eve")
        for owner in ("ann", "ann", "ben"):
            turns.give_back(owner)
            time.sleep(0.05)
        for waiter in waiters:
            waiter.result()


def test_images_that_are_slow_to_fetch_leave_threads_to_others(
    guarded: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request has a time for all of them, and one owner so many requests at once."""
    asked, go_on = threading.Semaphore(0), threading.Event()

    def slow(*_: object, **__: object) -> None:
        asked.release()
        assert go_on.wait(60)
        raise all_images.ImageUnreachable("https://x", "does not answer")

    monkeypatch.setattr(all_images, "fetch", slow)
    ann = guarded.token("ann")
    row = {"prompt": "x", "image": "https://x.example/"}
    new = {"preset": "tiny_i2v", "prompts": [row]}

    def submit(who: dict[str, str]) -> int:
        return guarded.client.post("/api/batches", json=new, headers=who).status_code

    ben, eve = guarded.token("ben"), guarded.token("eve")
    with ThreadPoolExecutor(images.MAX_FETCHES) as pool:
        waiting = []
        for who, turns, next_one in (
            (ann, images.FETCHES_OF_ONE, ann),
            (ben, images.MAX_FETCHES - images.FETCHES_OF_ONE, eve),
        ):
            waiting += [pool.submit(submit, who) for _ in range(turns)]
            for _ in range(turns):
                assert asked.acquire(timeout=60)
            refused = guarded.client.post("/api/batches", json=new, headers=next_one)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        guarded.submit(headers=ann)  # without images: as ever
        go_on.set()
        assert [each.result() for each in waiting] == [422] * images.MAX_FETCHES
    assert submit(ann) == 422  # there are turns again
    monkeypatch.setattr(images, "MAX_FETCH_SECONDS", -1.0)
    answer = guarded.client.post("/api/batches", json=new, headers=ann)
    assert "upload them first" in answer.json()["problems"][0]["message"]


def test_images_from_afar_are_decoded_one_of_an_owner_at_a_time(
    guarded: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Semaphore(0), threading.Event()

    def slow(_: bytes, shown: str, **__: object) -> None:
        decoding.release()
        assert go_on.wait(60)
        raise all_images.ImageUnusable(shown, "is none")

    monkeypatch.setattr(all_images, "_read", lambda *_, **__: b"")
    monkeypatch.setattr(all_images, "examine", slow)
    rows = [{"prompt": "x", "image": f"https://x.example/{n}"} for n in range(4)]
    new = {"preset": "tiny_i2v", "prompts": rows}

    def submit(who: dict[str, str]) -> int:
        return guarded.client.post("/api/batches", json=new, headers=who).status_code

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(submit, guarded.token("ann"))]
        assert decoding.acquire(timeout=60)
        assert not decoding.acquire(timeout=0.3)
        answers.append(pool.submit(submit, guarded.token("ben")))
        assert decoding.acquire(timeout=60)
        go_on.set()
        assert [answer.result() for answer in answers] == [422, 422]
    assert not guarded.serving.far_check_turns._taken


@pytest.mark.parametrize("address", ["s3://b/k", "S3://b/k", "s3:b/k", "S3:b"])
def test_buckets_are_read_for_admins_only(guarded: Web, address: str) -> None:
    new = {"preset": "tiny_i2v", "prompts": [{"prompt": "x", "image": address}]}
    answer = guarded.client.post("/api/batches", json=new, headers=guarded.token("ann"))
    assert "admin tokens only" in answer.json()["problems"][0]["message"]


def test_a_revoked_or_expired_token_is_none(guarded: Web) -> None:
    with guarded.db.transaction() as session:
        row, secret = tokens.create(session, name="x", owner="", scopes=[tokens.Scope.READ], days=1)
    headers = {"Authorization": f"Bearer {secret}"}
    assert guarded.client.get("/api/batches", headers=headers).status_code == 200
    with guarded.db.transaction() as session:
        stored = session.get(tokens.ApiToken, row.id)
        assert secret not in (stored.secret_hash, stored.name)
        assert stored.used_at is not None
        assert stored.expires_at == stored.created_at + timedelta(days=1)
        stored.expires_at = stored.created_at
    assert guarded.client.get("/api/batches", headers=headers).status_code == 401
    with guarded.db.transaction() as session:
        session.get(tokens.ApiToken, row.id).expires_at = None
    assert guarded.db.write(tokens.revoke, row.id)
    assert guarded.client.get("/api/batches", headers=headers).status_code == 401


def test_a_token_is_revoked_once(db: database.Database) -> None:
    with db.transaction() as session:
        row, _ = tokens.create(session, name="x", owner="", scopes=[tokens.Scope.READ])
        assert tokens.revoke(session, row.id)
        row.revoked_at = long_ago = database.now(session) - timedelta(days=400)
    assert not db.write(tokens.revoke, row.id)
    with db.reading() as session:
        assert session.get_one(tokens.ApiToken, row.id).revoked_at == long_ago


@pytest.mark.parametrize(
    ("before_seconds", "is_noted"), [(tokens.USED_EVERY.seconds + 1, True), (5, False)]
)
def test_the_last_use_of_a_token_is_told_to_the_minute(
    db: database.Database, before_seconds: int, is_noted: bool
) -> None:
    with db.transaction() as session:
        row, _ = tokens.create(session, name="x", owner="", scopes=[tokens.Scope.READ])
        row.used_at = before = database.now(session) - timedelta(seconds=before_seconds)
        tokens.note_use(session, row.id)
        assert (row.used_at > before) is is_noted


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("localhost", True), ("127.0.0.2", True), ("localhost.evil.example", False)],
)
def test_a_name_that_begins_like_ours_is_not_loopback(host: str, is_loopback: bool) -> None:
    assert tokens.is_loopback(host) is is_loopback


def test_other_addresses_than_loopback_need_a_token_to_begin_with() -> None:
    db = database.connect(settings.load())
    migrate.upgrade(db)
    for given in ({"web_host": "0.0.0.0"}, {"web_host": "::"}, {"web_require_token": True}):
        config = settings.load(**given)
        with pytest.raises(server.Refused, match="rushes token create"):
            server.make_service(config, db)
        with db.transaction() as session:
            row, _ = tokens.create(session, name="x", owner="", scopes=[tokens.Scope.ADMIN])
        assert server.make_service(config, db).needs_token
        db.write(tokens.revoke, row.id)
    assert not server.make_service(settings.load(web_host="::1"), db).needs_token
    db.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"broker_url": "localhost:6379"}, "CELERY_BROKER_URL must begin with redis://"),
        ({"broker_url": "redis://:hunter2@[::1"}, "CELERY_BROKER_URL is no address"),
        ({"results_url": "ftp://x"}, "RUSHES_RESULTS_URL: must be s3://"),
        ({"results_url": "s3://[x"}, "RUSHES_RESULTS_URL is no address"),
        (
            {"results_url": "s3://bucket", "s3_endpoint_url": "http://[::1"},
            "AWS_ENDPOINT_URL_S3 is",
        ),
        ({"database_url": "postgresql://h/d?schema=x"}, "DATABASE_URL has schema="),
        ({"default_preset": "tinny"}, "RUSHES_DEFAULT_PRESET: no preset 'tinny': did you mean"),
        ({"default_image_preset": "x/y"}, "RUSHES_DEFAULT_IMAGE_PRESET: no preset 'x/y'"),
        ({"forwarded_allow_ips": "10.0.0.1,proxy.example"}, "or *: 'proxy.example' does not"),
        ({"forwarded_allow_ips": "10.1.2.3/8"}, "FORWARDED_ALLOW_IPS: must be such as 10.1.2.3,"),
        ({"forwarded_allow_ips": "unix:"}, "FORWARDED_ALLOW_IPS: must be such as 10.1.2.3,"),
    ],
)
def test_what_every_request_would_fail_for_is_told_at_the_start(
    given: dict[str, str], says: str
) -> None:
    config = settings.load(**given)
    with pytest.raises(errors.InvalidInput) as caught:
        server.make_service(config, database.connect(config))
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("proxies", ["*", "10.0.0.1,", "10.0.0.0/8, ::1", ","])
def test_it_begins_with_these_proxies(proxies: str) -> None:
    config = settings.load(forwarded_allow_ips=proxies)
    with contextlib.closing(database.connect(config)) as db:
        assert server.make_service(config, db)


def test_it_begins_while_the_presets_are_away(tmp_path: Path) -> None:
    config = settings.load(presets_dir=str(tmp_path / "none"), default_preset="mine")
    with contextlib.closing(database.connect(config)) as db:
        assert server.make_service(config, db)


def test_it_begins_while_the_database_is_away_and_lets_nobody_in() -> None:
    config = settings.load(web_host="0.0.0.0", database_url="postgresql://x@127.0.0.1:1/y")
    assert server.make_service(config, database.connect(config)).needs_token


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "", "0.0.0.0"])
def test_on_loopback_other_names_are_not_ours(web: Web, name: str) -> None:
    """A page whose name leads to 127.0.0.1 (DNS rebinding) sends its own name."""
    answer = web.client.get("/api/batches", headers={"Host": f"{name}:8000"})
    assert answer.status_code == 403
    for good in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "localhost."):
        assert web.client.get("/api/batches", headers={"Host": good}).status_code == 200


def test_a_name_that_was_set_is_ours(make_web: MakeWeb) -> None:
    web = make_web(web_names="farm.example, other.example")
    headers = {"Host": "farm.example"}
    assert web.client.get("/api/batches", headers=headers).status_code == 200


@pytest.mark.parametrize("path", sorted(guards.HEALTH_PATHS))
def test_a_balancer_need_not_know_our_name(make_web: MakeWeb, path: str) -> None:
    """It asks by the address of a container, or, over HTTP/1.0, by nothing."""
    web = make_web(web_names="farm.example", web_require_token=True)
    for name in ("10.1.2.3:8000", ""):
        assert web.client.get(path, headers={"Host": name}).status_code == 200
        assert web.client.head(path, headers={"Host": name}).status_code == 200
        assert web.client.post(path, headers={"Host": name}).status_code == 403
        assert web.client.get("/login", headers={"Host": name}).status_code == 403


def test_pages_of_other_sites_change_nothing(web: Web) -> None:
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[x"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        answer = web.client.post("/api/batches", json=new, headers=headers)
        assert answer.status_code == 403, headers
    assert "'http://127.0.0.1:9999' may not change anything at '127.0.0.1:8000'" in (
        web.client.post("/api/batches", json=new, headers={"Origin": "http://127.0.0.1:9999"}).text
    )
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert web.client.post("/api/batches", json=new, headers=own).status_code == 201


def test_no_page_may_read_unless_it_was_allowed(web: Web, make_web: MakeWeb) -> None:
    headers = {"Origin": "https://app.example"}
    assert "access-control-allow-origin" not in web.client.get("/healthz", headers=headers).headers
    allowing = make_web(web_cors_origins="https://app.example")
    answer = allowing.client.get("/healthz", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]}
    made = allowing.client.post("/api/batches", json=new, headers=headers)
    assert made.status_code == 201
    assert "Location" in made.headers["access-control-expose-headers"]
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, range, x-stainless-os",
    }
    assert allowing.client.options("/v1/videos", headers=headers | asking).status_code == 200
    other = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in allowing.client.get("/", headers=other).headers


def test_every_answer_has_its_guarding_headers(web: Web) -> None:
    for path in ("/healthz", "/nowhere", "/api/batches"):
        headers = web.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_too_many_requests_are_told_when_to_come_again(make_web: MakeWeb) -> None:
    web = make_web(web_rate="5/minute", web_require_token=True)
    ann, ben = web.token("ann"), web.token("ben")
    found = [web.client.get("/api/batches", headers=ann) for _ in range(6)]
    assert [answer.status_code for answer in found] == [200] * 5 + [429]
    assert 30 < int(found[-1].headers["retry-after"]) <= 60
    assert web.client.get("/api/batches", headers=ben).status_code == 200
    assert web.client.get("/healthz").status_code == 200
    assert web.client.get("/v1/videos", headers=ann).json()["error"]["type"] == "rate_limit_error"


def test_several_processes_count_together_and_alone_when_redis_is_gone(
    make_web: MakeWeb, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", clean_redis_url)
    one, two = (make_web(web_rate="4/minute", web_require_token=True) for _ in range(2))
    ann = one.token("ann")

    def asked(times: int) -> list[int]:
        webs = [(one, two)[n % 2] for n in range(times)]
        return [web.client.get("/api/batches", headers=ann).status_code for web in webs]

    assert asked(6) == [200] * 4 + [429] * 2
    with redis.Redis.from_url(clean_redis_url) as client:
        client.flushall()
    assert asked(6) == [200] * 4 + [429] * 2
    tried: list[object] = []

    def cut(connection: object, *_: object, **__: object) -> None:
        tried.append(connection)
        raise redis.ConnectionError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(redis.Connection, "send_packed_command", cut)
        assert asked(10) == [200] * 8 + [429] * 2
        assert len(tried) == 2, "each asks once, and no request after that waits for it"


def test_nobody_waits_for_the_clock_of_another_host(
    clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little ahead is as good as none."""
    limiters = [
        rates.Limiter(limits.parse("2/minute"), redis_url=clean_redis_url) for _ in range(2)
    ]
    now = time.time
    for ahead, is_refused in ((0.0, True), (3.0, True), (3600.0, False)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
            assert [limiters[0].seconds_to_wait(f"{ahead}") for _ in range(2)] == [0.0, 0.0]
        assert (limiters[1].seconds_to_wait(f"{ahead}") > 0.0) is is_refused


def test_a_request_writes_nothing_where_its_token_was_used_just_now(
    guarded: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite it would wait while somebody stores a large batch."""
    ann, noted = guarded.token("ann"), []
    note = tokens.note_use

    def count(session: database.Session, token_id: str) -> None:
        noted.append(token_id)
        note(session, token_id)

    monkeypatch.setattr(tokens, "note_use", count)
    for _ in range(3):
        assert guarded.client.get("/api/batches", headers=ann).status_code == 200
    assert len(noted) == 1


def test_guessing_tokens_is_limited_too(make_web: MakeWeb) -> None:
    web = make_web(web_rate="5/minute", web_require_token=True)
    found = [
        web.client.get("/api/batches", headers={"Authorization": f"Bearer rushes_{n}"}).status_code
        for n in range(6)
    ]
    assert found == [401] * 5 + [429]


def test_a_request_that_is_too_large_is_refused_in_each_form(make_web: MakeWeb) -> None:
    web = make_web(web_max_bytes=1 << 20)
    large = b"x" * ((1 << 20) + 1)
    answer = web.client.post("/api/batches/file", files={"file": ("p.txt", large)})
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    answer = web.client.post("/v1/files", files={"file": ("p.txt", large)})
    assert (answer.status_code, "error" in answer.json()) == (413, True)

    def endless():
        for _ in range(40):
            yield b"x" * 65_536

    answer = web.client.post(
        "/api/batches", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/submit", "/schedules"])
def test_all_that_is_typed_has_no_more_memory_than_other_bodies(web: Web, path: str) -> None:
    most = bodies.MAX_TYPED_BYTES
    assert most * bodies.MAX_TYPED_FIELDS <= guards.MAX_BYTES_IN_MEMORY
    for length, refused in ((most, False), (most + 1, True)):
        answer = web.client.post(path, files={"prompts": (None, "x" * length)})
        assert ("maximum size" in answer.text) == refused, answer.text[:200]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/videos", "/api/batches/file"])
def test_texts_of_a_form_are_small_and_few(web: Web, path: str) -> None:
    """They are kept in memory, whatever a file may be."""
    for texts in ({"prompt": "x" * ((1 << 20) + 1)}, {f"t{n}": "x" for n in range(41)}):
        files = {name: (None, text) for name, text in texts.items()}
        answer = web.client.post(path, files=files)
        assert answer.status_code == 400, answer.text
        assert "aximum" in answer.text
    many = [("file", (f"{n}.txt", b"x")) for n in range(5)]
    assert web.client.post(path, files=many).status_code == 400


@pytest.mark.parametrize(
    "error",
    [
        exc.OperationalError("SELECT", {}, Exception("postgresql://user:secret@host")),
        exc.TimeoutError("QueuePool limit of size 4: postgresql://user:secret@host"),
    ],
)
def test_a_database_that_is_away_is_a_503_that_says_when_to_ask_again(
    web: Web, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def away(*_: object) -> None:
        raise error

    monkeypatch.setattr(database.Database, "reading", away)
    answer = web.client.get("/api/batches")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "secret" not in answer.text
    assert web.client.get("/readyz").status_code == 503
    assert web.client.get("/healthz").status_code == 200


def test_a_database_that_takes_no_writes_can_be_read_with_a_token(
    make_web: MakeWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = make_web(web_require_token=True)
    ann = web.token("ann")
    batch_id = web.submit(headers=ann)

    def refused(*_: object) -> None:
        raise exc.InternalError("UPDATE", {}, Exception("cannot execute UPDATE in a read-only ..."))

    monkeypatch.setattr(tokens, "is_due_for_note", lambda *_: True)
    monkeypatch.setattr(tokens, "note_use", refused)
    assert web.client.get(f"/api/batches/{batch_id}", headers=ann).status_code == 200


def test_a_port_that_another_one_has_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = settings.load(web_host="127.0.0.1", web_port=port)
        db = database.connect(config)
        migrate.upgrade(db)
        db.close()
        said: list[str] = []
        with pytest.raises(errors.RushesError, match=f"{port}: Address already in use; give"):
            server.run(config, say=said.append)
    assert said == []


@pytest.mark.parametrize("path", ["/api/batches", "/v1/videos", "/v1/batches", "/v1/tasks/"])
def test_json_that_is_not_said_to_be_json_is_told_so(web: Web, path: str) -> None:
    for said in (
        {"Content-Type": "application/x-www-form-urlencoded"},  # as curl -d sends it
        {"Content-Type": "text/plain"},
        {},
    ):
        answer = web.client.post(path, content=b'{"prompt": "x"}', headers=said)
        assert answer.status_code in (400, 422)
        assert "Content-Type: application/json" in answer.text


def test_a_name_that_is_no_text_is_told_as_far_as_it_is(web: Web) -> None:
    for path, field, name in (
        ("/api/uploads", "file", r"\ud800"),
        ("/api/batches/file", "file", r"\ud800"),
        ("/v1/videos", r"\ud800", "a.png"),
        ("/v1/tasks/video/form", "image_file", r"\ud800"),
    ):
        parts = "".join(
            f"--x\r\nContent-Disposition: form-data; {part}\r\n"
            for part in (
                f'name="{field}"; filename="{name}"\r\n\r\n{{',
                'name="preset"\r\n\r\ntiny',
            )
        )
        kind = "multipart/form-data; boundary=x; charset=unicode_escape"
        sent = {"content": f"{parts}--x--\r\n".encode(), "headers": {"Content-Type": kind}}
        answer = web.client.post(path, **sent)
        assert answer.status_code in (400, 422), answer.text
        assert "ud800" in answer.text
