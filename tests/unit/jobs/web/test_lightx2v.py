"""Scripts that were written for LightX2V's server, by the fields that it documents."""

import base64
import time
from typing import Any

import pytest
import requests
from sqlalchemy import select, update

from jobs import database
from jobs.schema import Batch
from tests.unit.jobs.web.conftest import VIDEO, Live, Web


def job_of(live: Live, task_id: str) -> int:
    """The job behind a task: here every task is a batch of one."""
    status = requests.get(f"{live.url}/v1/tasks/{task_id}/status", timeout=9).json()
    for batch in live.web.client.get("/api/batches").json()["batches"]:
        job_id = live.web.job_id(batch["batch_id"])
        if live.web.client.get(f"/api/jobs/{job_id}").json()["seed"] == status["seed"]:
            return job_id
    raise AssertionError(task_id)


def test_a_script_that_posts_waits_and_fetches(live: Live) -> None:
    message = {
        "prompt": "Two cats box on a stage.",
        "negative_prompt": "静态，细节模糊不清，字幕，倒着走",  # noqa: RUF001  # Wan's is Chinese
        "image_path": "",
        "seed": 42,
        "save_result_path": "./cat_boxing.mp4",
        "infer_steps": 4,
        "target_fps": 16,
        "use_prompt_enhancer": True,
        "save_video_path": "./older_name.mp4",
    }
    made = requests.post(f"{live.url}/v1/tasks/video/", json=message, timeout=9).json()
    assert made["task_status"] == "pending"
    assert made["save_result_path"] == "cat_boxing.mp4"
    task_url = f"{live.url}/v1/tasks/{made['task_id']}"
    job_id = job_of(live, made["task_id"])
    assert live.web.client.get(f"/api/jobs/{job_id}").json()["seed"] == 42
    assert requests.get(f"{task_url}/result", timeout=9).status_code == 404
    attempt_id = live.web.claim(job_id)
    assert requests.get(f"{task_url}/status", timeout=9).json()["status"] == "processing"
    live.web.succeed(job_id, attempt_id)
    while (status := requests.get(f"{task_url}/status", timeout=9).json())["status"] not in (
        "completed",
        "failed",
    ):
        time.sleep(0.1)
    assert status["end_time"] is not None
    assert status["error"] is None
    with requests.get(f"{task_url}/result", stream=True, timeout=9) as result:
        assert b"".join(result.iter_content(1 << 20)) == VIDEO
        assert 'filename="cat_boxing.mp4"' in result.headers["content-disposition"]
    part = requests.get(f"{task_url}/result", headers={"Range": "bytes=0-3"}, timeout=9)
    assert (part.status_code, part.content) == (206, VIDEO[:4])


@pytest.mark.parametrize("data_url", [True, False])
def test_a_script_that_sends_an_image_as_base64_to_the_old_path(
    live: Live, image: bytes, data_url: bool
) -> None:
    text = base64.b64encode(image).decode()
    message = {"prompt": "it moves", "image_path": ("data:image/png;base64," * data_url) + text}
    made = requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9).json()
    job = live.web.client.get(f"/api/jobs/{job_of(live, made['task_id'])}").json()
    assert live.web.serving.store.read_bytes(job["image_key"]) == image


def test_a_form_with_an_image_file(live: Live, image: bytes) -> None:
    made = requests.post(
        f"{live.url}/v1/tasks/video/form",
        files={"image_file": ("red.png", image, "image/png")},
        data={"prompt": "it moves", "seed": "42", "infer_steps": "5", "target_fps": "16"},
        timeout=9,
    )
    assert made.status_code == 200, made.text
    assert made.json()["task_status"] == "pending"


def test_a_script_that_looks_for_an_idle_server(live: Live) -> None:
    service = f"{live.url}/v1/service"
    assert requests.get(f"{service}/status", timeout=9).json()["service_status"] == "idle"
    metadata = requests.get(f"{service}/metadata", timeout=9).json()
    assert metadata == {"nproc_per_node": 0, "model_cls": "tiny", "model_path": "tiny"}
    message = {"prompt": "x", "task_id": "test_task_001"}
    requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9)
    job_id = job_of(live, "test_task_001")
    attempt_id = live.web.claim(job_id)
    status = requests.get(f"{service}/status", timeout=9).json()
    assert status["service_status"] == "busy"
    assert status["current_task"] == "test_task_001"
    assert status["active_tasks"] == ["test_task_001"]
    queue = requests.get(f"{live.url}/v1/tasks/queue/status", timeout=9).json()
    assert (queue["is_processing"], queue["pending_count"], queue["active_count"]) == (True, 0, 1)
    live.web.succeed(job_id, attempt_id)
    status = requests.get(f"{service}/status", timeout=9).json()
    assert (status["service_status"], status["current_task"]) == ("idle", None)
    assert (status["total_tasks"], status["completed_tasks"], status["failed_tasks"]) == (1, 1, 0)
    tasks = requests.get(f"{live.url}/v1/tasks/", timeout=9).json()
    assert tasks["test_task_001"]["status"] == "completed"


def test_a_cancel_is_heard_by_the_worker(live: Live) -> None:
    ids = [
        requests.post(f"{live.url}/v1/tasks/", json={"prompt": "x"}, timeout=9).json()["task_id"]
        for _ in range(3)
    ]
    attempt_id = live.web.claim(job_of(live, ids[0]))
    stopped = requests.delete(f"{live.url}/v1/tasks/{ids[0]}", timeout=9).json()
    assert stopped["stop_status"] == "success"
    assert live.web.step(attempt_id, "denoise", 1, 4) == "cancelled"
    assert requests.delete(f"{live.url}/v1/tasks/{ids[1]}", timeout=9).json() == {
        "stop_status": "success",
        "reason": "Task stopped now.",
    }
    again = requests.delete(f"{live.url}/v1/tasks/{ids[1]}", timeout=9).json()
    assert again["stop_status"] == "do_nothing"
    assert requests.delete(f"{live.url}/v1/tasks/none", timeout=9).json() == again
    stopped = requests.delete(f"{live.url}/v1/tasks/all/running", timeout=9).json()
    assert stopped["stop_status"] == "success"
    status = requests.get(f"{live.url}/v1/tasks/{ids[2]}/status", timeout=9).json()
    assert (status["status"], status["error"]) == ("cancelled", "Task cancelled by user")


def test_one_request_leaves_nothing_for_the_next(live: Live) -> None:
    """Their server keeps what a request does not say from the request before."""
    first = {"prompt": "x", "seed": 1, "target_video_length": 9, "target_shape": [32, 32]}
    for message in (first, {"prompt": "y", "seed": 2}):
        requests.post(f"{live.url}/v1/tasks/video/", json=message, timeout=9)
    newest = live.web.client.get("/api/batches").json()["batches"][0]["batch_id"]
    look = live.web.client.get(f"/api/jobs/{live.web.job_id(newest)}").json()["look"]
    assert (look["num_frames"], look["height"], look["width"]) == (17, 48, 48)


@pytest.mark.parametrize(
    ("frames", "shape"), [("target_video_length", "target_shape"), ("num_frames", "size")]
)
def test_length_and_size_by_their_older_and_newer_names(
    live: Live, frames: str, shape: str
) -> None:
    message = {"prompt": "x", frames: 9, shape: [32, 48]}
    made = requests.post(f"{live.url}/v1/tasks/video/", json=message, timeout=9).json()
    look = live.web.client.get(f"/api/jobs/{job_of(live, made['task_id'])}").json()["look"]
    assert (look["num_frames"], look["height"], look["width"]) == (9, 32, 48)


@pytest.mark.parametrize(
    ("message", "status", "told"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x", "target_video_length": 10}, 400, "num_frames"),
        ({"prompt": "x", "num_frames": 0}, 400, "num_frames"),
        ({"prompt": "x", "target_shape": [64]}, 400, "height, width"),
        ({"prompt": "x", "target_video_length": 9, "num_frames": 17}, 400, "says something else"),
        ({"prompt": "x", "image_path": "/etc/passwd"}, 400, "not read"),
        ({"prompt": "x", "image_path": "aGVsbG8="}, 400, "image"),
        ({"prompt": "x", "audio_path": "a.wav"}, 400, "no model here"),
        ({"prompt": "x", "task_id": "a/b"}, 400, "task_id"),
        ({"prompt": "x", "task_id": "video"}, 400, "task_id"),
        ({"prompt": "x", "task_id": ".."}, 400, "task_id"),
        ({"prompt": "x", "task_id": "a%2Fb"}, 400, "task_id"),
        ({"prompt": "x", "seed": "many"}, 422, "cannot be read: body.seed: Input should be"),
        ({"seed": "many", "size": 1}, 422, "cannot be read; body.seed: Input should be"),
    ],
)
def test_what_is_wrong_is_told_in_their_form(
    live: Live, message: dict[str, Any], status: int, told: str
) -> None:
    answer = requests.post(f"{live.url}/v1/tasks/video/", json=message, timeout=9)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]
    assert requests.get(f"{live.url}/v1/tasks/", timeout=9).json() == {}


def test_a_task_id_is_used_once(live: Live) -> None:
    message = {"prompt": "x", "task_id": "mine"}
    assert requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9).status_code == 200
    again = requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9)
    assert (again.status_code, "exists already" in again.json()["detail"]) == (409, True)
    assert len(live.web.client.get("/api/batches").json()["batches"]) == 1
    assert requests.get(f"{live.url}/v1/tasks/none/status", timeout=9).status_code == 404


def test_a_result_path_writes_nothing_anywhere(live: Live) -> None:
    for path in ("/srv/x/../evil.mp4", "..\\..\\evil.mp4", "/"):
        message = {"prompt": "x", "save_result_path": path}
        made = requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9).json()
        assert made["save_result_path"] in ("evil.mp4", "video.mp4")


def test_the_name_of_a_result_fits_into_a_header(live: Live) -> None:
    message = {"prompt": "x", "task_id": "t", "save_result_path": 'a "c" \u732b.mp4'}
    requests.post(f"{live.url}/v1/tasks/", json=message, timeout=9)
    live.web.succeed(job_of(live, "t"))
    answer = requests.get(f"{live.url}/v1/tasks/t/result", timeout=9)
    assert answer.content == VIDEO
    assert answer.headers["content-disposition"] == 'attachment; filename="a _c_ _.mp4"'


def test_a_result_that_was_deleted_as_old_is_not_there(web: Web) -> None:
    task = web.client.post("/v1/tasks/", json={"prompt": "x"}).json()["task_id"]
    with web.db.reading() as session:
        batch_id = session.scalars(select(Batch.id)).one()
    web.succeed(web.job_id(batch_id))
    path = f"/v1/tasks/{task}/result"
    assert web.client.head(path).status_code == 200
    with web.db.transaction() as session:
        session.execute(update(Batch).values(results_expired_at=database.now(session)))
    assert web.client.head(path).status_code == 404
    assert "deleted at" in web.client.get(path).json()["detail"]
