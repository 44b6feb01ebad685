"""OpenAI's own Python client against our service, unchanged."""

import base64
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from sqlalchemy import event, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from jobs import database, folder_store, lifecycle, orders, presets, results, storage, submission
from jobs.schema import Batch, Job, StoredFile
from jobs.web import openai_files, openai_videos, service
from tests.unit.jobs.web.conftest import VIDEO, Live, Web

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def job_of(video: Any) -> int:
    return int(video.id.removeprefix("video_"))


def test_a_video_from_its_prompt_to_its_bytes(live: Live, client: openai.OpenAI) -> None:
    made = client.videos.create(prompt="a cat", model="sora-2", seconds="2", size="64x64")  # type: ignore[arg-type]
    assert (made.status, made.progress, made.model) == ("queued", 0, "sora-2")
    assert (made.size, made.seconds) == ("64x64", "2.125")
    job_id = job_of(made)
    attempt_id = live.web.claim(job_id)
    live.web.step(attempt_id, "denoise", 2, 4)
    going = client.videos.retrieve(made.id)
    assert (going.status, going.progress) == ("in_progress", 45)
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(made.id)
    live.web.succeed(job_id, attempt_id)
    done = client.videos.poll(made.id)
    assert (done.status, done.progress) == ("completed", 100)
    assert done.completed_at >= done.created_at
    assert client.videos.download_content(made.id).read() == VIDEO
    part = client.videos.download_content(made.id, extra_headers={"Range": "bytes=10-19"})
    assert part.read() == VIDEO[10:20]


def test_a_preset_is_a_model_and_our_own_keys_go_along(live: Live, client: openai.OpenAI) -> None:
    made = client.videos.create(
        prompt="a cat", model="tiny", extra_body={"seed": 7, "negative_prompt": "fog"}
    )
    assert made.model == "tiny"
    job = live.web.client.get(f"/api/jobs/{job_of(made)}").json()
    assert (job["seed"], job["negative_prompt"]) == (7, "fog")
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="sora-3"):
        client.models.retrieve("sora-3")


@pytest.mark.parametrize(
    "as_sent", [lambda value: value, json.dumps], ids=["taken apart by the client", "JSON texts"]
)
def test_sizes_loras_and_metadata_go_along(
    live: Live, client: openai.OpenAI, as_sent: Callable[[Any], Any]
) -> None:
    loras = [{"name": "film", "strength": 0.5}, {"name": "grain", "strength": -1}]
    metadata = {"scene": "12", "take": "", "note": "a]b"}
    body = {"width": 64, "height": 32, "lora": as_sent(loras), "metadata": as_sent(metadata)}
    made = client.videos.create(prompt="a cat", extra_body=body)
    job = live.web.client.get(f"/api/jobs/{job_of(made)}").json()
    assert (made.size, job["metadata"]) == ("64x32", metadata)
    assert [(lora["path"], lora["strength"]) for lora in job["look"]["loras"]] == [
        ("loras/film.safetensors", 0.5),
        ("loras/grain.safetensors", -1.0),
    ]


@pytest.mark.parametrize(
    ("lora", "found"),
    [
        ([{"name": "film"}], [("film", 1.0)]),
        ("film", [("film", 1.0)]),
        ([{"path": "loras/a.safetensors", "strength": 2}], [("a", 2.0)]),
        ([{"name": "film"}, {"path": "loras/a.safetensors"}], [("film", 1.0), ("a", 1.0)]),
    ],
)
def test_loras_go_along_in_every_form(
    live: Live, client: openai.OpenAI, lora: Any, found: list[tuple[str, float]]
) -> None:
    made = client.videos.create(prompt="a cat", extra_body={"lora": lora})
    job = live.web.client.get(f"/api/jobs/{job_of(made)}").json()
    loras = [(f"loras/{name}.safetensors", strength) for name, strength in found]
    told = [(lora["path"], lora.get("strength", 1.0)) for lora in job["look"]["loras"]]
    assert told == loras


@pytest.mark.parametrize("way", ["file", "file_id", "image_url"])
def test_a_video_starts_from_an_input_reference(
    live: Live, client: openai.OpenAI, image: bytes, way: str
) -> None:
    # Objects go as extra_body: the client itself sends files only, whatever its types say.
    if way == "file":
        asked: dict[str, Any] = {"input_reference": ("red.png", io.BytesIO(image), "image/png")}
    elif way == "file_id":
        up = client.files.create(file=("r.png", image), purpose="vision")
        asked = {"extra_body": {"input_reference": {"file_id": up.id}}}
    else:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        asked = {"extra_body": {"input_reference": {"image_url": url}}}
    made = client.videos.create(prompt="it moves", **asked)
    assert made.model == "tiny_i2v"
    job = live.web.client.get(f"/api/jobs/{job_of(made)}").json()
    assert live.web.serving.store.read_bytes(job["image_key"]) == image


def test_failed_and_cancelled_videos_say_why(live: Live, client: openai.OpenAI) -> None:
    made = client.videos.create(prompt="a cat")
    live.web.fail(job_of(made), "the prompt is unusable")
    failed = client.videos.retrieve(made.id)
    assert failed.status == "failed"
    assert (failed.error.code, failed.error.message) == ("input", "the prompt is unusable")


def test_videos_are_listed_page_by_page_both_ways(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"p{n}").id for n in range(5)]
    assert [video.id for video in client.videos.list(limit=2)] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == made


def test_a_list_goes_on_after_a_video_that_was_deleted(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"p{n}").id for n in range(3)]
    assert [client.videos.delete(v.id).id for v in client.videos.list(limit=1)] == made[::-1]
    assert list(client.videos.list()) == []
    with pytest.raises(openai.NotFoundError, match="video_9"):
        client.videos.list(after="video_9")


def test_a_deleted_video_is_gone_and_stops(live: Live, client: openai.OpenAI) -> None:
    waiting, done = client.videos.create(prompt="a"), client.videos.create(prompt="b")
    job_id, store = job_of(done), live.web.serving.store
    attempt_id = live.web.claim(job_id)
    live.web.succeed(job_id, attempt_id)
    batch_id = live.web.client.get(f"/api/jobs/{job_id}").json()["batch_id"]
    sidecar = results.sidecar_key(batch_id, job_id, attempt_id)
    store.put_bytes(b"{}", sidecar, content_type="application/json")
    for video in (waiting, done):
        assert client.videos.delete(video.id).deleted is True
        with pytest.raises(openai.NotFoundError, match="deleted"):
            client.videos.retrieve(video.id)
    assert list(client.videos.list()) == []
    assert live.web.client.get(f"/api/jobs/{job_of(waiting)}").json()["state"] == "cancelled"
    assert list(store.list()) == []


def test_our_own_api_and_page_tell_of_a_deleted_video(live: Live, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a")
    job_id, own = job_of(video), live.web.client
    live.web.succeed(job_id)
    assert own.get(f"/api/jobs/{job_id}").json()["video_deleted_at"] is None
    client.videos.delete(video.id)
    told = own.get(f"/api/jobs/{job_id}").json()
    assert (told["state"], told["video"]) == ("succeeded", None)
    assert told["video_deleted_at"] >= told["finished_at"]
    answer = own.get(f"/api/jobs/{job_id}/video")
    assert (answer.status_code, "deleted at" in answer.json()["detail"]) == (404, True)
    for path in (f"/jobs/{job_id}", "/gallery"):
        page = own.get(path).text
        assert "<video" not in page
        assert "deleted" in page.lower()


def test_a_deleted_video_that_was_rendered_again_is_there(
    live: Live, client: openai.OpenAI
) -> None:
    video = client.videos.create(prompt="a")
    job_id, own = job_of(video), live.web.client
    client.videos.delete(video.id)
    assert own.post(f"/api/jobs/{job_id}/retry").json()["retried"] == 1
    live.web.succeed(job_id)
    assert own.get(f"/api/jobs/{job_id}").json()["video_deleted_at"] is None
    assert own.get(f"/api/jobs/{job_id}/video").content == VIDEO
    assert client.videos.retrieve(video.id).status == "completed"


def test_a_video_that_was_finished_before_the_cancel_was_heard_can_be_deleted_again(
    live: Live, client: openai.OpenAI
) -> None:
    video = client.videos.create(prompt="a")
    attempt_id = live.web.claim(job_of(video))
    client.videos.delete(video.id)
    assert list(client.videos.list()) == []
    live.web.succeed(job_of(video), attempt_id)
    assert [listed.id for listed in client.videos.list()] == [video.id]
    assert client.videos.download_content(video.id).read() == VIDEO
    client.videos.delete(video.id)
    assert list(client.videos.list()) == []
    assert live.web.client.get(f"/api/jobs/{job_of(video)}/video").status_code == 404
    assert list(live.web.serving.store.list("videos")) == []


def test_a_video_of_another_api_is_not_listed_when_it_is_there_again(
    live: Live, client: openai.OpenAI
) -> None:
    job_id = live.web.job_id(live.web.submit())
    attempt_id = live.web.claim(job_id)
    client.videos.delete(f"video_{job_id}")
    live.web.succeed(job_id, attempt_id)
    assert client.videos.retrieve(f"video_{job_id}").status == "completed"
    assert list(client.videos.list()) == []


def test_a_slow_delete_takes_back_no_later_one(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = client.videos.create(prompt="a")
    attempt_id = live.web.claim(job_of(video))
    mark = openai_videos._mark_deleted

    def after_another(session: Session, job: Job, asked_at: datetime) -> None:
        mark(session, job, asked_at + timedelta(seconds=60))
        mark(session, job, asked_at)

    monkeypatch.setattr(openai_videos, "_mark_deleted", after_another)
    client.videos.delete(video.id)
    live.web.succeed(job_of(video), attempt_id)
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.videos.retrieve(video.id)


def test_a_video_whose_job_ends_while_it_is_deleted_is_deleted_too(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = client.videos.create(prompt="a")
    attempt_id = live.web.claim(job_of(video))
    cancel = orders.cancel_job

    def ends_first(session: Session, job_id: int) -> Any:
        key = f"videos/{attempt_id}.mp4"
        stored = live.web.serving.store.put_bytes(VIDEO, key, content_type="video/mp4")
        ended = lifecycle.StoredVideo(key=key, size_bytes=len(VIDEO), sha256=stored.sha256)
        assert lifecycle.succeed(session, attempt_id, video=ended)
        return cancel(session, job_id)

    monkeypatch.setattr(orders, "cancel_job", ends_first)
    client.videos.delete(video.id)
    assert list(live.web.serving.store.list("videos")) == []
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.videos.retrieve(video.id)


def test_a_video_of_expired_results_is_told_as_deleted(live: Live, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a")
    live.web.succeed(job_of(video))
    etag = client.videos.download_content(video.id).response.headers["ETag"]
    with live.web.db.transaction() as session:
        session.execute(update(Batch).values(results_expired_at=database.now(session)))
    own, path = live.web.client, f"/v1/videos/{video.id}/content"
    assert own.head(path).status_code == 404
    assert own.get(path, headers={"If-None-Match": etag}).status_code == 404
    with pytest.raises(openai.NotFoundError, match="deleted at"):
        client.videos.download_content(video.id)


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"prompt": "x", "model": "sora-3"}, openai.NotFoundError, "sora-3"),
        ({"prompt": "x", "size": "huge"}, openai.BadRequestError, "size must be"),
        ({"prompt": "x", "seconds": "a few"}, openai.BadRequestError, "seconds must be"),
        ({"prompt": " "}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": "x", "extra_body": {"promt": "y"}}, openai.BadRequestError, "unknown key"),
        ({"prompt": "x", "extra_body": {"width": "7"}}, openai.BadRequestError, "width"),
        (
            {"prompt": "x", "extra_body": {"lora": [{"name": "a"}, {"name": "b", "strength": 1}]}},
            openai.BadRequestError,
            "which strength belongs",
        ),
        (
            {
                "prompt": "x",
                "extra_body": {
                    "lora": [{"name": "a", "strength": 1}, {"path": "b", "strength": 2}]
                },
            },
            openai.BadRequestError,
            "which strength belongs",
        ),
        (
            {"prompt": "x", "extra_body": {"lora": [{"name": "a", "strength": "much"}]}},
            openai.BadRequestError,
            "strength must be a number",
        ),
        (
            {"prompt": "x", "extra_body": {"metadata": {"a": {"b": "c"}}}},
            openai.BadRequestError,
            "unknown key",
        ),
        (
            {"prompt": "x", "extra_body": {"metadata": "{oops"}},
            openai.BadRequestError,
            "metadata must be an object",
        ),
        ({"prompt": "x", "input_reference": b"no image"}, openai.BadRequestError, "image"),
        (
            {"prompt": "x", "extra_body": {"input_reference": {"file_id": "file-no"}}},
            openai.BadRequestError,
            "no such upload",
        ),
    ],
)
def test_errors_are_those_that_the_client_knows(
    client: openai.OpenAI, asked: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        client.videos.create(**asked)
    assert list(client.videos.list()) == []


def test_the_one_thing_that_cannot_be_read_is_told(web: Web) -> None:
    asked: list[tuple[str, str, dict[str, Any], str]] = [
        ("GET", "/v1/videos?limit=500", {}, "query.limit: Input should be less than or equal"),
        ("POST", "/v1/batches", {"json": {"input_file_id": "f"}}, "body.endpoint: Field required"),
        ("POST", "/v1/batches", {"content": b"?"}, "body: must be JSON"),
        ("POST", "/v1/files", {"files": {"file": b"?"}}, "body.purpose: Field required"),
    ]
    for method, path, sent, told in asked:
        answer = web.client.request(method, path, **sent)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith(f"the request cannot be read: {told}")


def test_an_image_that_no_line_holds_may_be_a_data_url(web: Web) -> None:
    """Of a form it may not: there it is a file."""
    target = io.BytesIO()
    Image.frombytes("RGB", (640, 640), random.Random(1).randbytes(640 * 640 * 3)).save(
        target, "PNG", compress_level=0
    )
    url = f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
    assert len(url) > 1 << 20
    for body in ({"input_reference": {"image_url": url}}, {"image": url}):
        made = web.client.post("/v1/videos", json={"prompt": "x"} | body)
        assert made.status_code == 200, made.text
        job_id = made.json()["id"].removeprefix("video_")
        key = web.client.get(f"/api/jobs/{job_id}").json()["image_key"]
        assert web.serving.store.read_bytes(key) == target.getvalue()
    form = {"prompt": (None, "x"), "input_reference[image_url]": (None, url)}
    answer = web.client.post("/v1/videos", files=form)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert "Send an image as a file" in answer.json()["error"]["message"]
    data = lines({"prompt": "x", "input_reference": {"image_url": url}})
    up = {"files": {"file": ("b.jsonl", data)}, "data": {"purpose": "batch"}}
    file_id = web.client.post("/v1/files", **up).json()["id"]
    new = {"input_file_id": file_id, "endpoint": "/v1/videos"}
    (told,) = web.client.post("/v1/batches", json=new).json()["errors"]["data"]
    assert (told["line"], "or upload it" in told["message"]) == (1, True)
    bad = {"prompt": "x", "input_reference": {"image_url": "data:image/png;base64,?"}}
    answer = web.client.post("/v1/videos", json=bad)
    assert (answer.status_code, "is not base64" in answer.text) == (400, True)


def test_an_image_is_given_once(web: Web, image: bytes) -> None:
    reference = {"image_url": "https://127.0.0.1/a.png"}
    both = {"prompt": "x", "image": "https://127.0.0.1/b.png"}
    asked: list[dict[str, Any]] = [
        {"json": both | {"input_reference": reference}},
        {"data": both, "files": {"input_reference": ("a.png", image)}},
    ]
    for sent in asked:
        answer = web.client.post("/v1/videos", **sent)
        assert (answer.status_code, "both given" in answer.text) == (400, True)


def test_the_document_tells_what_is_sent_and_answered(web: Web) -> None:
    paths = web.client.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/videos"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    for path in ("/v1/videos/{video_id}/content", "/v1/tasks/{task_id}/result"):
        answers = paths[path]["get"]["responses"]
        assert "416" in answers
        assert all("video/mp4" in answers[status]["content"] for status in ("200", "206"))
    answers = paths["/api/batches"]["post"]["responses"]
    assert {"200", "201", "410", "502"} <= answers.keys()
    for status, answer in answers.items():
        kind = "application/json" if status < "300" else "application/problem+json"
        assert (list(answer["content"]), "schema" in answer["content"][kind]) == ([kind], True)
    for path, methods in paths.items():
        is_openai = any("OpenAI" in each.get("tags", ()) for each in methods.values())
        for each in methods.values():
            assert not (is_openai and "422" in each["responses"]), path


@pytest.mark.parametrize("model", ["sora-2", "sora-2-pro"])
def test_a_model_that_scripts_must_name_is_the_default_preset(web: Web, model: str) -> None:
    made = web.client.post("/v1/videos", json={"prompt": "x", "model": model})
    assert (made.status_code, made.json().get("model")) == (200, model)


def test_who_names_no_model_is_told_no_path_of_ours(
    make_web: Callable[..., Web], tmp_path: Path
) -> None:
    """Where the default was there at the start, and is not any more."""
    own = tmp_path / "mine.json"
    shutil.copy(presets.SHIPPED_FOLDER / "tiny.json", own)
    web = make_web(default_preset=str(own))
    assert web.client.post("/v1/videos", json={"prompt": "x"}).status_code == 200
    own.unlink()
    answer = web.client.post("/v1/videos", json={"prompt": "x"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "GET /api/presets lists them" in message
    assert "path" not in message
    assert str(tmp_path) not in message


def test_json_is_json_however_it_is_written(web: Web) -> None:
    kind = {"Content-Type": "Application/JSON"}
    answer = web.client.post("/v1/videos", content=b'{"prompt": "x"}', headers=kind)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("model", [[], {}, 7, True])
def test_a_model_is_a_name(live: Live, model: Any) -> None:
    answer = live.web.client.post("/v1/videos", json={"prompt": "x", "model": model})
    assert answer.status_code == 400
    assert "must be the name of a preset" in answer.json()["error"]["message"]


def test_a_body_nested_too_deeply_is_no_json_to_us(live: Live) -> None:
    nested = {"content": b"[" * 9_000, "headers": {"Content-Type": "application/json"}}
    answer = live.web.client.post("/v1/videos", **nested)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "body: is not JSON")


def lines(*bodies: dict[str, Any]) -> bytes:
    return b"".join(
        json.dumps(
            {"custom_id": f"c{n}", "method": "POST", "url": "/v1/videos", "body": body}
        ).encode()
        + b"\n"
        for n, body in enumerate(bodies)
    )


def test_a_batch_from_its_file_to_its_result_files(live: Live, client: openai.OpenAI) -> None:
    data = lines(*({"model": "tiny", "prompt": f"p{n}", "seconds": "2"} for n in range(3)))
    file = client.files.create(file=("night.jsonl", data), purpose="batch")
    assert (file.bytes, file.filename) == (len(data), "night.jsonl")
    assert client.files.content(file.id).read() == data
    made = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/videos",
        completion_window="24h",
        metadata={"scene": "12"},
    )
    assert (made.status, made.metadata) == ("in_progress", {"scene": "12"})
    batch_id = live.web.client.get("/api/batches").json()["batches"][0]["batch_id"]
    live.web.succeed(live.web.job_id(batch_id, 0))
    live.web.fail(live.web.job_id(batch_id, 1))
    live.web.succeed(live.web.job_id(batch_id, 2))
    done = client.batches.retrieve(made.id)
    assert done.status == "completed"
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    found = [json.loads(x) for x in client.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in found] == ["c0", "c2"]
    video = found[0]["response"]["body"]
    assert client.videos.download_content(video["id"]).read() == VIDEO
    (failed,) = client.files.content(done.error_file_id).text.splitlines()
    assert json.loads(failed)["error"] == {"code": "input", "message": "it broke"}
    size = client.files.retrieve(done.output_file_id).bytes
    assert size == len(client.files.content(done.output_file_id).read())
    asked = client._client.head(f"files/{done.output_file_id}/content")
    assert (asked.status_code, asked.headers["content-length"]) == (200, str(size))


def test_a_batch_that_is_not_finished_in_its_window_expires_and_keeps_what_is(
    live: Live, client: openai.OpenAI
) -> None:
    data = lines(*({"prompt": f"p{n}"} for n in range(3)))
    file = client.files.create(file=("b.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert 24 * 3600 - (made.expires_at - made.created_at) in (0, 1)  # two looks at the clock
    batch_id = live.web.client.get("/api/batches").json()["batches"][0]["batch_id"]
    live.web.succeed(live.web.job_id(batch_id, 0))
    attempt_id = live.web.claim(live.web.job_id(batch_id, 1))
    with live.web.db.transaction() as session:
        session.get(Batch, batch_id).deadline_at -= timedelta(hours=24)
    live.web.db.write(orders.expire_batch, batch_id)
    assert client.batches.retrieve(made.id).status == "finalizing"
    assert live.web.db.write(lifecycle.cancel_attempt, attempt_id)
    ended = client.batches.retrieve(made.id)
    assert (ended.status, ended.completed_at) == ("expired", None)
    assert ended.expired_at >= ended.finalizing_at >= ended.expires_at
    counts = ended.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 1, 2)
    (kept,) = client.files.content(ended.output_file_id).text.splitlines()
    assert json.loads(kept)["custom_id"] == "c0"
    cut = [json.loads(x) for x in client.files.content(ended.error_file_id).text.splitlines()]
    assert [(line["custom_id"], line["error"]["code"]) for line in cut] == [
        ("c1", "batch_expired"),
        ("c2", "batch_expired"),
    ]


def test_a_batch_of_which_nothing_succeeded_has_failed(live: Live, client: openai.OpenAI) -> None:
    data = lines(*({"prompt": f"p{n}"} for n in range(2)))
    file = client.files.create(file=("b.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    batch_id = live.web.client.get("/api/batches").json()["batches"][0]["batch_id"]
    for number in range(2):
        live.web.fail(live.web.job_id(batch_id, number))
    ended = client.batches.retrieve(made.id)
    assert (ended.status, ended.completed_at) == ("failed", None)
    assert ended.failed_at >= ended.in_progress_at
    assert len(client.files.content(ended.error_file_id).text.splitlines()) == 2


@contextmanager
def counted(live: Live) -> Iterator[list[str]]:
    """The statements that the database is asked meanwhile."""
    asked: list[str] = []

    def note(*given: Any) -> None:
        asked.append(given[2])

    event.listen(live.web.db.engine, "before_cursor_execute", note)
    yield asked
    event.remove(live.web.db.engine, "before_cursor_execute", note)


def test_a_result_file_asks_the_database_no_more_often_for_more_jobs(
    live: Live, client: openai.OpenAI
) -> None:
    numbers = []
    for num_jobs in (2, 6):
        batch_id = live.web.submit(num_jobs)
        for position in range(0, num_jobs, 2):
            live.web.succeed(live.web.job_id(batch_id, position))
            live.web.fail(live.web.job_id(batch_id, position + 1))
        for which in ("output", "errors"):
            with counted(live) as asked:
                found = client.files.content(f"file-{batch_id}_{which}").text.splitlines()
            assert len(found) == num_jobs // 2
            numbers.append(len(asked))
    assert numbers[:2] == numbers[2:]


def test_the_size_of_a_result_file_is_counted_once_for_each_end_of_its_batch(
    live: Live, client: openai.OpenAI
) -> None:
    batch_id = live.web.submit(2)
    file_id = f"file-{batch_id}_errors"
    for position in range(2):
        live.web.fail(live.web.job_id(batch_id, position))
    first = client.files.retrieve(file_id).bytes
    with counted(live) as asked:
        assert client.files.retrieve(file_id).bytes == first
    assert not [statement for statement in asked if "FROM jobs" in statement]
    job_id = live.web.job_id(batch_id, 1)
    assert live.web.client.post(f"/api/jobs/{job_id}/retry").json()["retried"] == 1
    live.web.fail(job_id, "it broke in another way")
    second = client.files.retrieve(file_id).bytes
    assert second == len(client.files.content(file_id).read()) > first


def test_a_file_with_bad_lines_is_a_failed_batch_that_names_them(client: openai.OpenAI) -> None:
    data = lines({"prompt": "ok"}, {"prompt": "x", "size": "huge"}) + b"{not json\n"
    file = client.files.create(file=("bad.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert made.status == "failed"
    assert [error.line for error in made.errors.data] == [2, 3]
    assert client.batches.retrieve(made.id).status == "failed"


def test_a_line_with_a_malformed_input_reference_is_told_what_it_must_be(
    client: openai.OpenAI,
) -> None:
    data = lines(
        {"prompt": "ok", "input_reference": {"image_url": "https://127.0.0.1/a.png"}},
        {"prompt": "x", "input_reference": {"url": "https://127.0.0.1/a.png"}},
        {"prompt": "x", "input_reference": "a.png"},
    )
    file = client.files.create(file=("bad.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    told = {error.line: error.message for error in made.errors.data}
    for line, got in ((2, "an object"), (3, '"a.png"')):
        wanted = "must be an object with file_id or image_url only"
        assert told[line] == f"input_reference {wanted}, got {got}"


def test_what_a_line_says_twice_or_not_at_all_is_refused(client: openai.OpenAI) -> None:
    reference = '"input_reference": {"image_url": "https://127.0.0.1/a.png"}'
    bodies = [
        '{"prompt": "x", "model": 5}',
        f'{{"prompt": "x", "prompt": "y", {reference}}}',
        f'{{"prompt": "x", "image": "https://127.0.0.1/b.png", {reference}}}',
    ]
    data = "\n".join(
        f'{{"custom_id": "{n}", "method": "POST", "url": "/v1/videos", "body": {body}}}'
        for n, body in enumerate(bodies)
    )
    file = client.files.create(file=("bad.jsonl", data.encode()), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert [(error.line, error.message) for error in made.errors.data] == [
        (1, "model must be a text, got 5"),
        (2, 'key "prompt" is given twice: keep one'),
        (3, "input_reference and image are both given: keep one"),
    ]


def test_a_file_has_one_model_and_is_of_images_when_one_line_has_one(web: Web) -> None:
    def errors_of(*bodies: dict[str, Any]) -> list[tuple[int | None, str]]:
        up = {"files": {"file": ("b.jsonl", lines(*bodies))}, "data": {"purpose": "batch"}}
        file_id = web.client.post("/v1/files", **up).json()["id"]
        new = {"input_file_id": file_id, "endpoint": "/v1/videos"}
        made = web.client.post("/v1/batches", json=new).json()
        assert made["status"] == "failed"
        return [(error["line"], error["message"]) for error in made["errors"]["data"]]

    two = [{"prompt": "x", "model": "tiny"}, {"prompt": "x", "model": "tiny_i2v"}]
    ((line, told),) = errors_of(*two)
    assert (line, "all lines need one model" in told) == (None, True)
    reference = {"input_reference": {"file_id": "file-none"}}
    found = errors_of({"prompt": "x"} | reference, {"prompt": "x"})
    assert "there is no such upload" in found[0][1]
    assert (found[1][0], "image" in found[1][1]) == (2, True)


def test_a_model_that_nobody_has_fails_the_batch_and_is_named(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("b.jsonl", lines({"prompt": "x", "model": "sora-9"})), purpose="batch"
    )
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert made.status == "failed"
    (told,) = made.errors.data
    assert "'sora-9'" in told.message
    assert client.batches.retrieve(made.id).errors == made.errors


def test_an_input_reference_that_is_null_is_none(live: Live, client: openai.OpenAI) -> None:
    data = lines({"prompt": "x", "input_reference": None})
    file = client.files.create(file=("b.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert made.status == "in_progress", made.errors
    assert live.web.client.get("/api/batches").json()["batches"][0]["preset"] == "tiny"


def test_images_in_a_batch_are_files_or_addresses(
    live: Live, client: openai.OpenAI, image: bytes
) -> None:
    up = client.files.create(file=("r.png", image), purpose="vision")
    data = lines({"prompt": "it moves", "input_reference": {"file_id": up.id}})
    file = client.files.create(file=("b.jsonl", data), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert made.status == "in_progress", made.errors
    batch = live.web.client.get("/api/batches").json()["batches"][0]
    assert batch["preset"] == "tiny_i2v"


def batches(client: openai.OpenAI, number: int) -> tuple[openai.types.FileObject, list[str]]:
    """A file, and the ids of batches made of it."""
    file = client.files.create(file=("b.jsonl", lines({"prompt": "x"})), purpose="batch")
    made = [
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
        ).id
        for _ in range(number)
    ]
    return file, made


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({f"k{n}": "x" for n in range(17)}, "has 17 pairs: at most 16"),
        ({"k" * 65: "x"}, "1 to 64 characters"),
        ({"k": "x" * 513}, "at most 512 characters"),
        ({"k": "a\0b"}, "NUL"),
    ],
)
def test_metadata_of_a_batch_are_as_small_as_those_of_a_row(
    client: openai.OpenAI, metadata: dict[str, str], told: str
) -> None:
    file, _ = batches(client, 0)
    asked: dict[str, Any] = {"input_file_id": file.id, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match=told):
        client.batches.create(endpoint="/v1/videos", metadata=metadata, **asked)
    kept = {"scene": "x" * 512}
    made = client.batches.create(endpoint="/v1/videos", metadata=kept, **asked)
    assert (made.status, made.metadata) == ("in_progress", kept)


def test_batches_are_listed_and_cancelled(client: openai.OpenAI) -> None:
    file, made = batches(client, 3)
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    assert client.batches.cancel(made[0]).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file-none", endpoint="/v1/videos", completion_window="24h"
        )
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )


def test_a_list_goes_on_after_a_batch_that_is_being_forgotten(
    live: Live, client: openai.OpenAI
) -> None:
    _, made = batches(client, 2)
    page = client.batches.list(limit=1)
    with live.web.db.transaction() as session:
        for batch in session.scalars(select(Batch)):
            batch.forgotten_at = batch.created_at
    assert [batch.id for batch in page] == made[1:]


def test_a_file_that_is_empty_is_empty(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store is not asked for a first byte."""
    monkeypatch.setattr(folder_store.FolderStore, "stream", None)
    up = {"files": {"file": ("e.jsonl", b"")}, "data": {"purpose": "batch"}}
    file_id = web.client.post("/v1/files", **up).json()["id"]
    answer = web.client.get(f"/v1/files/{file_id}/content")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "0"


def test_files_are_listed_by_their_purpose(web: Web, image: bytes) -> None:
    for purpose in ("batch", "vision"):
        up = {"files": {"file": ("f", image)}, "data": {"purpose": purpose}}
        assert web.client.post("/v1/files", **up).status_code == 200
        found = web.client.get("/v1/files", params={"purpose": purpose}).json()["data"]
        assert [file["purpose"] for file in found] == [purpose]
    up = {"files": {"file": ("f", b"no image")}, "data": {"purpose": "vision"}}
    assert web.client.post("/v1/files", **up).status_code == 400


@pytest.mark.parametrize("purpose", ["batch", "vision"])
def test_a_file_is_kept_as_bytes_whatever_its_sender_calls_it(
    web: Web, image: bytes, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    """That may be what no header of a store can hold."""
    kinds: list[str] = []
    put = folder_store.FolderStore.put_file

    def note(*given: Any, content_type: str) -> storage.StoredObject:
        kinds.append(content_type)
        return put(*given, content_type=content_type)

    monkeypatch.setattr(folder_store.FolderStore, "put_file", note)
    sent = {"file": ("a.txt", image, "text/html")}
    answer = web.client.post("/v1/files", files=sent, data={"purpose": purpose})
    assert answer.status_code == 200, answer.text
    assert kinds == ["application/octet-stream"]


def test_a_result_file_has_every_line_of_a_finished_batch(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_files, "ROWS_AT_ONCE", 2)
    batch_id = web.submit(5)
    path = f"/v1/files/file-{batch_id}_errors"
    assert web.client.get(path).status_code == 404
    assert web.client.get(f"{path}/content").status_code == 404
    web.client.post(f"/api/batches/{batch_id}/cancel")
    found = web.client.get(f"{path}/content").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in found] == [f"p{n}" for n in range(5)]


def test_files_are_listed_and_deleted(client: openai.OpenAI) -> None:
    made = [
        client.files.create(file=(f"{n}.jsonl", lines({"prompt": str(n)})), purpose="batch").id
        for n in range(3)
    ]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert client.files.delete(made[0]).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.content(made[0])
    assert client.files.content(made[1]).read() == lines({"prompt": "1"})


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_goes_on_after_a_file_that_was_deleted(client: openai.OpenAI, order: Any) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="batch").id for n in range(3)]
    listed = client.files.list(limit=1, order=order)
    gone = [client.files.delete(file.id).id for file in listed]
    assert gone == (made if order == "asc" else made[::-1])
    with pytest.raises(openai.NotFoundError, match="file-no"):
        client.files.list(after="file-no")


def test_files_whose_ids_tell_no_moment_are_listed_among_the_others(
    live: Live, client: openai.OpenAI
) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="batch").id for n in range(3)]
    older = f"file-{'a' * 24}"
    with live.web.db.transaction() as session:
        session.get_one(StoredFile, made[1]).id = older
    assert [file.id for file in client.files.list(limit=1)] == [made[2], older, made[0]]


def test_deleting_a_file_takes_nothing_from_others_with_the_same_bytes(
    live: Live, client: openai.OpenAI, image: bytes
) -> None:
    """Nor from an image of the same bytes, which a job may start from."""
    store = live.web.serving.store
    first, second = (
        client.files.create(file=("a.jsonl", image), purpose=purpose)  # type: ignore[arg-type]
        for purpose in ("batch", "vision")
    )
    third = client.files.create(file=("a.jsonl", image), purpose="batch")
    assert client.files.delete(first.id).deleted
    assert client.files.delete(second.id).deleted
    assert client.files.content(third.id).read() == image
    assert client.files.delete(third.id).deleted
    assert [store.read_bytes(key) for key in store.list("inputs")] == [image]


def test_what_is_stored_is_no_failure_though_the_database_goes_away(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else clients would ask again, and get a second one."""

    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("server closed the connection"))

    file = client.files.create(file=("p.jsonl", lines({"prompt": "a cat"})), purpose="batch")

    def made(create: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:

            def gone(*_: object) -> None:
                patched.setattr(database.Database, "reading", away)

            patched.setattr(service.Service, "wake", gone)
            return create()

    video = made(lambda: client.videos.create(prompt="a cat"))
    assert client.videos.retrieve(video.id) == video
    batch = made(
        lambda: client.batches.create(
            input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
        )
    )
    assert client.batches.retrieve(batch.id) == batch


def test_a_video_of_which_nothing_is_known_is_not_asked_for_again(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def lost(db: database.Database, *_: object, **__: object) -> None:
        asked.append(None)
        raise submission.AnswerLost(db.url, "261128-abc")

    monkeypatch.setattr(submission, "submit", lost)
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=2) as patient,
        pytest.raises(openai.InternalServerError, match="whether batch 261128-abc is stored"),
    ):
        patient.videos.create(prompt="a cat")
    assert len(asked) == 1
    told = live.web.client.post(
        "/api/batches", json={"preset": "tiny", "prompts": [{"prompt": "a cat"}]}
    )
    assert (told.status_code, told.json()["batch_id"]) == (503, "261128-abc")
    assert "sqlite" not in told.text


def test_tokens_are_api_keys(live: Live) -> None:
    secret = live.web.token("ann", "read")["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0) as reader:
        assert list(reader.videos.list()) == []
        with pytest.raises(openai.PermissionDeniedError, match="no scope submit"):
            reader.videos.create(prompt="x")
    nobody = openai.OpenAI(base_url=f"{live.url}/v1", api_key="rushes_no", max_retries=0)
    with nobody, pytest.raises(openai.AuthenticationError):
        nobody.videos.list()
