"""How well the service is while its store, or its database, hangs."""

import asyncio
import contextlib
import gc
import http.client
import http.server
import itertools
import resource
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import exc, text, update

from jobs import database, folder_store, s3_clients, schema, store_mark
from jobs.web import history, server, service
from tests.unit.jobs.web.conftest import VIDEO, Live, Web, running

PROBE_SECONDS = 5  # deploy/kubernetes/web.yaml
STARLETTES_THREADS = 40


def asked(url: str) -> tuple[int, str | None, float]:
    """Status, when to come again, and the seconds that it took."""
    started = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  # our own service
            found = answer.status, answer.headers["Retry-After"]
    except urllib.error.HTTPError as error:
        found = error.code, error.headers["Retry-After"]
    return *found, time.monotonic() - started


def test_a_probe_is_answered_in_its_time_while_the_store_hangs(
    hanging: Callable[[], Web],
) -> None:
    client = hanging().client
    started = time.monotonic()
    answer = client.get("/readyz")
    assert time.monotonic() - started < PROBE_SECONDS
    assert (answer.status_code, answer.json()["checks"]["store"]) == (200, "unavailable")


def test_a_probe_does_not_wait_for_a_store_with_many_addresses(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may be silent for as long as a try lasts."""
    enough = threading.Event()
    monkeypatch.setattr(service, "CHECK_SECONDS", 0.5)
    monkeypatch.setattr(folder_store.FolderStore, "check", lambda _: enough.wait(30))
    for _ in range(4):
        started = time.monotonic()
        answer = web.client.get("/readyz")
        assert time.monotonic() - started < PROBE_SECONDS
        assert (answer.status_code, answer.json()["checks"]["store"]) == (200, "unavailable")
    enough.set()
    assert web.client.get("/readyz").json()["checks"]["store"] == "ok"


def test_a_probe_is_told_of_a_store_that_is_not_the_farms(web: Web, tmp_path: Path) -> None:
    (tmp_path / "farm").mkdir()
    farm = folder_store.FolderStore(tmp_path / "farm", may_make=False)
    store_mark.Guard(web.db, farm).leave()
    assert web.client.get("/readyz").json()["checks"]["store"] == "another"


def test_a_probe_is_answered_while_all_threads_wait_for_the_database(
    make_web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = threading.Event()

    def hangs(*_: object) -> None:
        enough.wait(30)
        raise exc.OperationalError("SELECT", {}, Exception("no answer within 120 s"))

    with running(make_web()) as live, ThreadPoolExecutor(STARLETTES_THREADS) as people:
        monkeypatch.setattr(database.Database, "reading", hangs)
        address = f"{live.url}/api/batches"
        told = [people.submit(asked, address) for _ in range(STARLETTES_THREADS)]
        time.sleep(1)
        status, _, seconds = asked(f"{live.url}/readyz")
        enough.set()
        assert {answer.result()[0] for answer in told} == {503}
    assert (status, seconds < PROBE_SECONDS) == (503, True)


def test_a_store_that_hangs_takes_no_check_from_the_database(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = threading.Event()
    monkeypatch.setattr(service, "CHECK_SECONDS", 0.5)
    for _ in range(2):
        web.serving.checking.submit(enough.wait, 30)
    answer = web.client.get("/readyz")
    enough.set()
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_a_probe_tells_of_a_database_that_takes_no_writes(
    make_web: Callable[..., Web], postgres_database_url: str
) -> None:
    web = make_web(database_url=postgres_database_url)
    with web.db.transaction() as session:
        name = web.db.engine.url.database
        session.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    answer = web.client.get("/readyz")
    web.serving.checked_db.close()
    assert (answer.status_code, answer.json()["status"]) == (200, "read-only")


def test_a_probe_tells_of_a_database_whose_disk_is_full(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LEAST_FREE_BYTES", 1 << 60)
    answer = web.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "read-only")


def test_the_length_of_the_queue_is_kept_after_an_outage(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all connections of the pool hung in it."""
    monkeypatch.setattr(history, "EVERY_SECONDS", 0.01)
    kept, looks = web.serving.history, iter([exc.TimeoutError("QueuePool limit")])
    reading = database.Database.reading

    def once_away(db: database.Database) -> Any:
        if error := next(looks, None):
            raise error
        return reading(db)

    async def keep() -> None:
        async with kept.kept(web.db):
            while not kept.samples:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(database.Database, "reading", once_away)
    asyncio.run(asyncio.wait_for(keep(), 10))
    assert next(looks, None) is None


def test_one_error_of_the_store_is_not_the_viewers(
    make_web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()

    class Store(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if next(asked) == 0:
                self.send_error(503)
                return
            self.send_response(206)
            self.send_header("Content-Length", str(len(VIDEO)))
            self.end_headers()
            self.wfile.write(VIDEO)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = make_web(
            results_url="s3://bucket",
            s3_endpoint_url=f"http://127.0.0.1:{server.server_port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        stream = web.serving.streaming_store.stream("a.mp4", first=0, last=len(VIDEO) - 1)
        assert b"".join(stream) == VIDEO
        server.shutdown()
    assert next(asked) == 2


def test_who_leaves_in_mid_video_leaves_no_connection_to_the_store(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = live.web.job_id(live.web.submit())
    live.web.succeed(job_id)
    with live.web.db.transaction() as session:
        session.execute(update(schema.Attempt).values(video_bytes=10**9))
    closed = threading.Event()

    def stream(*_: object, **__: object) -> Generator[bytes]:
        try:
            while True:
                yield bytes(1 << 16)
        finally:
            closed.set()

    monkeypatch.setattr(live.web.serving.streaming_store, "stream", stream)
    gc.disable()  # which would close it some day
    try:
        with urllib.request.urlopen(f"{live.url}/api/jobs/{job_id}/video") as answer:  # noqa: S310
            answer.read(1 << 17)
        assert closed.wait(10)
    finally:
        gc.enable()


def test_what_needs_no_store_is_quick_while_videos_hang(
    web: Web, hanging: Callable[[], Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More people wait for videos than there are threads; who comes too late is told so soon."""
    monkeypatch.setattr(service, "MAX_OPENED", STARLETTES_THREADS + 5)
    job_id = web.job_id(web.submit())
    web.succeed(job_id)
    with running(hanging()) as live, ThreadPoolExecutor(STARLETTES_THREADS + 10) as people:
        address = f"{live.url}/api/jobs/{job_id}/video"
        videos = [people.submit(asked, address) for _ in range(STARLETTES_THREADS + 10)]
        time.sleep(2)
        for path in ("/batches", f"/api/batches/{web.submit()}", "/healthz"):
            status, _, seconds = asked(f"{live.url}{path}")
            assert status == 200
            assert seconds < service.STREAM_SECONDS / 2, path
        told = [video.result() for video in videos]
    assert {answer[:2] for answer in told} == {(503, "5")}
    waited = sorted(seconds for _, _, seconds in told)
    # Whatever the machine adds to all of them: some are told at once, and the others wait.
    assert waited[4] + 1 < waited[5]
    assert waited[5] >= service.STREAM_SECONDS
    assert waited[-1] < 3 * service.STREAM_SECONDS


def test_uploads_that_hang_leave_threads_to_others(
    hanging: Callable[[], Web], image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_STORING", 2)
    monkeypatch.setattr(s3_clients, "READ_SECONDS", 4)
    monkeypatch.setattr(s3_clients, "MAX_TRIES", 1)
    web = hanging()

    def upload() -> tuple[int, float]:
        started = time.monotonic()
        answer = web.client.post("/api/uploads", files={"file": ("red.png", image, "image/png")})
        return answer.status_code, time.monotonic() - started

    with ThreadPoolExecutor(3) as people:
        told = sorted(future.result() for future in [people.submit(upload) for _ in range(3)])
    assert [status for status, _ in told] == [503] * 3
    assert told[0][1] < 3.5 <= told[1][1]
    web.submit()  # prompts alone need no store
    assert upload()[1] >= 4  # there are turns again


def test_a_batch_waits_for_its_turn_to_be_read(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"method": "POST", "url": "/v1/videos", "body": {"prompt": "x"}}'
    up = {"files": {"file": ("b.jsonl", line)}, "data": {"purpose": "batch"}}
    new = {
        "input_file_id": web.client.post("/v1/files", **up).json()["id"],
        "endpoint": "/v1/videos",
    }
    monkeypatch.setattr(service, "TURN_SECONDS", 0.01)
    with contextlib.ExitStack() as others:
        for _ in range(service.MAX_STORING):
            others.enter_context(web.serving.storing())
        assert web.client.post("/v1/batches", json=new).status_code == 503
    assert web.client.post("/v1/batches", json=new).status_code == 200


def test_a_proxy_ends_idle_connections_before_we_do(web: Web) -> None:
    """What it sends at the moment when we end one is lost, a POST for good."""
    longest_of_proxies = 120  # Caddy's; Traefik has 90, nginx and AWS 60
    assert server.uvicorn_config(web.serving).timeout_keep_alive > longest_of_proxies


def test_a_stop_does_not_wait_for_idle_connections(make_web: Callable[..., Web]) -> None:
    with running(make_web()) as live:
        kept = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=9)
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        silent = socket.create_connection((kept.host, kept.port))
        asked(f"{live.url}/healthz")  # by now it has accepted that one too
        began = time.monotonic()
    assert time.monotonic() - began < server.STOP_SECONDS / 2
    assert kept.sock.recv(1) == silent.recv(1) == b""
    kept.close()
    silent.close()


def test_idle_connections_end_when_there_is_no_file_for_another_one(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(live.url.rpartition(":")[2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as clients, structlog.testing.capture_logs() as told:
        many = [clients.enter_context(socket.socket()) for _ in range(50)]
        clients.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (many[-1].fileno() + 20, hard))
        for client in many:
            client.settimeout(10)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for client in many:
            assert client.recv(12) == b"HTTP/1.1 200"
    assert [each["event"] for each in told].count("web.out_of_files") == 1
    assert not caplog.records


def test_a_service_takes_as_many_files_as_it_may() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        server.allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, server.MOST_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
