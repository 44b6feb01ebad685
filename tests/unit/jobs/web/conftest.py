"""The service in this process, over SQLite and a folder, and the moves that workers would make."""

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from jobs import database, lifecycle, migrate, queries, retries, settings, states, tokens
from jobs.web import app, server, service

VIDEO = bytes(range(256)) * 40
HOST = "http://127.0.0.1:8000"


@dataclass
class Web:
    """A running service and its database."""

    serving: service.Service
    client: TestClient

    @property
    def db(self) -> database.Database:
        return self.serving.db

    def token(self, owner: str = "", *scopes: str) -> dict[str, str]:
        """Headers of a new token; all of its owner's things by default."""
        with self.db.transaction() as session:
            _, secret = tokens.create(
                session,
                name="test",
                owner=owner,
                scopes=[tokens.Scope(scope) for scope in scopes or ("submit", "read")],
            )
        return {"Authorization": f"Bearer {secret}"}

    def submit(self, prompts: list[dict[str, Any]] | int = 1, **given: Any) -> str:
        rows = prompts
        if isinstance(prompts, int):
            rows = [{"prompt": f"prompt {n}", "custom_id": f"p{n}"} for n in range(prompts)]
        headers = given.pop("headers", {})
        answer = self.client.post(
            "/api/batches", json={"preset": "tiny", "prompts": rows} | given, headers=headers
        )
        assert answer.status_code == 201, answer.text
        return str(answer.json()["batch_id"])

    def job_id(self, batch_id: str, position: int = 0) -> int:
        with self.db.reading() as session:
            return queries.find_job(session, f"{batch_id}/{position}").id

    def claim(self, job_id: int) -> int:
        claim = self.db.write(lifecycle.claim, job_id, worker="gpu0@host", lease_seconds=60)
        assert claim is not None
        return claim.attempt_id

    def step(self, attempt_id: int, stage: str, step: int, steps: int) -> lifecycle.Verdict:
        return self.db.write(
            lifecycle.heartbeat, attempt_id, lease_seconds=60, stage=stage, step=step, steps=steps
        )

    def succeed(self, job_id: int, attempt_id: int | None = None) -> None:
        attempt_id = attempt_id or self.claim(job_id)
        key = f"videos/{attempt_id}.mp4"
        stored = self.serving.store.put_bytes(VIDEO, key, content_type="video/mp4")
        video = lifecycle.StoredVideo(key=key, size_bytes=len(VIDEO), sha256=stored.sha256)
        assert self.db.write(lifecycle.succeed, attempt_id, video=video)

    def fail(
        self,
        job_id: int,
        error: str = "it broke",
        kind: states.FailureKind = states.FailureKind.INPUT,
    ) -> None:
        budgets = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0)
        self.db.write(
            lifecycle.fail,
            self.claim(job_id),
            kind=kind,
            error=error,
            budgets=budgets,
        )


@pytest.fixture
def make_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Web]]:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("RUSHES_RESULTS_URL", (tmp_path / "results").as_uri())
    monkeypatch.setenv("RUSHES_DEFAULT_PRESET", "tiny")
    monkeypatch.setenv("RUSHES_DEFAULT_IMAGE_PRESET", "tiny_i2v")
    opened: list[database.Database] = []

    def make(base_url: str = HOST, **given: Any) -> Web:
        config = settings.load(**given)
        db = database.connect(config)
        opened.append(db)
        migrate.upgrade(db)
        if tokens.are_needed(config):
            with db.transaction() as session:
                tokens.create(session, name="first", owner="", scopes=[tokens.Scope.ADMIN])
        serving = server.make_service(config, db)
        client = TestClient(app.make(serving), base_url=base_url, raise_server_exceptions=False)
        return Web(serving, client)

    yield make
    for db in opened:
        db.close()


@pytest.fixture
def web(make_web: Callable[..., Web]) -> Web:
    """As one person has it on their own machine."""
    return make_web()


@dataclass
class Live:
    """The service behind a real socket."""

    web: Web
    url: str


@contextlib.contextmanager
def running(web: Web) -> Iterator[Live]:
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(server.uvicorn_config(web.serving))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Live(web, f"http://127.0.0.1:{listening.getsockname()[1]}")
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    listening.close()


@pytest.fixture
def live(make_web: Callable[..., Web]) -> Iterator[Live]:
    with running(make_web()) as live:
        yield live


@pytest.fixture
def hanging(make_web: Callable[..., Web]) -> Iterator[Callable[[], Web]]:
    """Services over a store that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as silent:
        yield lambda: make_web(
            results_url="s3://bucket",
            s3_endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )


@pytest.fixture
def image() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 30, 30)).save(target, "PNG")
    return target.getvalue()
