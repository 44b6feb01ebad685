"""The pages without a browser: who may see what, what forms do, and how they tell what is wrong."""

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from jobs import (
    health,
    presets,
    queries,
    reports,
    results,
    schedules,
    schema,
    states,
    submission,
    throughput,
    tokens,
    workers,
)
from jobs.web import app, history, html
from jobs.web.pages import charts, farm, gallery
from tests.registrations import registration
from tests.unit.jobs.web.conftest import HOST, Web, running

HTML = {"Accept": "text/html"}
PAGES = ("/batches", "/submit", "/gallery", "/schedules", "/farm")


@dataclass
class Browser:
    """Keeps cookies, and sends forms with what they were given with."""

    client: TestClient

    def get(self, path: str) -> Any:
        return self.client.get(path, headers=HTML)

    def post(self, path: str, data: dict[str, Any], *, of: str = "/login", **more: Any) -> Any:
        found = re.search(r'name="csrf" value="(\w+)"', self.get(of).text)
        assert found
        return self.client.post(path, data={"csrf": found[1]} | data, headers=HTML, **more)

    def log_in(self, secret: str) -> Any:
        return self.post("/login", {"token": secret})


@pytest.fixture
def browser(web: Web) -> Browser:
    return Browser(web.client)


@pytest.fixture
def guarded(make_web: Callable[..., Web]) -> Web:
    return make_web(web_require_token=True)


def visitor(web: Web, owner: str, *scopes: str) -> Browser:
    """Somebody with a browser of their own, logged in."""
    secret = web.token(owner, *scopes)["Authorization"].removeprefix("Bearer ")
    browser = Browser(TestClient(web.client.app, base_url=str(web.client.base_url)))
    assert browser.log_in(secret).status_code == 200
    return browser


def errors_of(text: str) -> dict[str, str]:
    """Field -> what stands beside it."""
    return dict(re.findall(r'<p class="error" id="(\w+)-error">([^<]+)</p>', text))


def batches_of(web: Web) -> list[Any]:
    with web.db.reading() as session:
        return list(queries.batches(session, limit=100))


def schedules_of(web: Web) -> list[Any]:
    with web.db.reading() as session:
        return list(schedules.every(session))


def test_each_page_is_there_and_needs_nothing_from_elsewhere(browser: Browser) -> None:
    for path in PAGES:
        answer = browser.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert not re.search(r'<script(?! src)|<style| style="| on\w+="|https?://', answer.text)


def test_the_start_leads_to_the_batches(browser: Browser) -> None:
    assert browser.get("/").url.path == "/batches"


def test_head_is_answered_where_get_is(browser: Browser) -> None:
    for path in ("/", "/login", *PAGES):
        assert browser.client.head(path, headers=HTML).status_code == 200, path


def test_prompts_become_a_batch(web: Web, browser: Browser) -> None:
    form = {"prompts": "a cat\n\na dog\n", "preset": "tiny", "seed": "7", "repeat": "2"}
    more = {"size": "32X32", "seconds": "1", "lora": "film, noir", "strength": "0.5"}
    answer = browser.post("/submit", form | more | {"name": "pets"}, of="/submit")
    assert answer.url.path.startswith("/batches/")
    assert "Submitted." in answer.text
    (batch,) = batches_of(web)
    assert (batch.name, batch.total) == ("pets", 4)
    with web.db.reading() as session:
        jobs = queries.jobs(session, batch.id)
        look = queries.look(session, jobs[0])
    assert [(job.prompt, job.seed) for job in jobs] == [
        ("a cat", 7), ("a cat", 8), ("a dog", 7), ("a dog", 8),
    ]  # fmt: skip
    assert (look["width"], look["height"], look["num_frames"]) == (32, 32, 9)
    assert [lora["strength"] for lora in look["loras"]] == [0.5, 0.5]


def test_what_a_row_of_a_file_says_goes_before_the_form(web: Web, browser: Browser) -> None:
    rows = b'{"prompt": "a", "seed": 3, "num_frames": 5}\n{"prompt": "b"}\n'
    form = {"preset": "tiny", "seed": "5", "seconds": "2"}
    browser.post("/submit", form, of="/submit", files={"file": ("p.jsonl", rows)})
    with web.db.reading() as session:
        jobs = queries.jobs(session, batches_of(web)[0].id)
        frames = [queries.look(session, job)["num_frames"] for job in jobs]
    assert [job.seed for job in jobs] == [3, 5]
    assert frames == [5, 17]


def test_an_image_is_the_first_frame_of_every_prompt(
    web: Web, browser: Browser, image: bytes
) -> None:
    form = {"preset": "tiny_i2v", "prompts": "it moves\nit rests"}
    browser.post("/submit", form, of="/submit", files={"image": ("red.png", image)})
    with web.db.reading() as session:
        jobs = queries.jobs(session, batches_of(web)[0].id)
    assert len({job.image_key for job in jobs}) == 1
    assert web.serving.store.read_bytes(jobs[0].image_key) == image


WRONG = [
    ({"prompts": " "}, "prompts", "Type a prompt"),
    ({"prompts": "\u200b\n\u2060"}, "prompts", "Type a prompt"),
    ({"prompts": "a\x00b"}, "prompts", "NUL"),
    ({"preset": "nothing"}, "preset", "no preset"),
    ({"seed": "-1"}, "seed", "seed must"),
    ({"seed": "x"}, "seed", "seed must"),
    ({"seed": "nan"}, "seed", "seed must"),
    ({"seed": "1e999"}, "seed", "seed must"),
    ({"seed": "9" * 400}, "seed", "seed must"),
    ({"seed": "1_000"}, "seed", "seed must"),
    ({"seed": "\u0661\u0662"}, "seed", "seed must"),
    ({"seconds": "1e0"}, "seconds", "seconds must"),
    ({"repeat": "0"}, "repeat", "Videos per prompt must be a whole number from 1 to 10,000"),
    ({"repeat": "two"}, "repeat", "whole number"),
    ({"repeat": "20-30"}, "repeat", "got &#39;20-30&#39;"),
    ({"priority": "1e"}, "priority", "got &#39;1e&#39;"),
    ({"size": "33x32"}, "size", "multiple of 16"),
    ({"size": "large"}, "size", "size must"),
    ({"seconds": "400"}, "seconds", "at most"),
    ({"seconds": "inf"}, "seconds", "seconds must"),
    ({"fps": "0"}, "fps", "fps must"),
    ({"lora": "../../secret"}, "lora", "below the models folder"),
    ({"lora": "/etc/x"}, "lora", "below the models folder"),
    ({"lora": "film", "strength": "11"}, "lora", "strength"),
    ({"lora": ",".join("abcdefghi")}, "lora", "at most 8 LoRAs, got 9"),
    ({"strength": "strong"}, "strength", "must be a number"),
    ({"strength": "NaN"}, "strength", "must be a number"),
    ({"priority": "101"}, "priority", "-100 to 100"),
    ({"name": "x" * 201}, "name", "1 to 200"),
    ({"name": "\u200b"}, "name", "name must have a character that can be seen"),
    ({"preset": "tiny_i2v"}, "image", "starts from a picture"),
]
"""What is typed into a form that is right beside it, the field that is to blame, words about it."""


def test_what_is_wrong_is_told_at_its_field_and_nothing_is_stored(
    web: Web, browser: Browser
) -> None:
    for given, field, words in WRONG:
        form = {"prompts": "a cat", "preset": "tiny"} | given
        answer = browser.post("/submit", form, of="/submit")
        assert answer.status_code == 422, given
        assert words in errors_of(answer.text)[field], given
        assert re.search(rf'<\w+ id="{field}"[^>]*aria-invalid="true"', answer.text), given
    assert batches_of(web) == []


def test_bad_lines_of_a_file_are_told_by_their_number(web: Web, browser: Browser) -> None:
    rows = b'{"prompt": "a"}\n{"promt": "b"}\n'
    files = {"file": ("p.jsonl", rows)}
    answer = browser.post("/submit", {"preset": "tiny"}, of="/submit", files=files)
    assert "line 2" in errors_of(answer.text)["file"]
    assert batches_of(web) == []
    skipping = {"preset": "tiny", "skip_invalid": "true"}
    browser.post("/submit", skipping, of="/submit", files=files)
    assert batches_of(web)[0].total == 1


def test_what_was_typed_below_more_is_seen_after_a_mistake(browser: Browser) -> None:
    form = {"prompts": "a cat", "preset": "tiny", "seed": "x"}

    def is_open(more: dict[str, str], **files: Any) -> bool:
        text = browser.post("/submit", form | more, of="/submit", **files).text
        return re.search(r"<details[^>]* open>", text) is not None

    untouched = {"strength": "1", "priority": "0", "lora": "", "name": ""}
    assert not is_open(untouched)
    for more in ({"lora": "film"}, {"name": "mine"}, {"fps": "8"}, {"skip_invalid": "true"}):
        assert is_open(untouched | more), more
    bad = {"file": ("p.jsonl", b'{"promt": "b"}')}
    assert is_open(untouched | {"prompts": "", "seed": ""}, files=bad)


def test_each_of_several_mistakes_is_tied_to_its_field(browser: Browser) -> None:
    bad = {"file": ("p.jsonl", b'{"promt": "b"}\n{"promt": "c"}\n')}
    text = browser.post("/submit", {"preset": "tiny"}, of="/submit", files=bad).text
    tied = re.search(r'id="file"[^>]*aria-describedby="([^"]+)"', text)[1].split()
    assert tied == ["file-error", "file-error-2", "file-hint"]
    for name in tied:
        assert text.count(f'id="{name}"') == 1


def test_a_broken_image_is_told_at_its_field(web: Web, browser: Browser) -> None:
    form = {"preset": "tiny_i2v", "prompts": "a"}
    answer = browser.post("/submit", form, of="/submit", files={"image": ("x.png", b"text")})
    assert "x.png" in errors_of(answer.text)["image"]
    assert "choose one" not in answer.text
    assert "data URL" not in answer.text
    assert batches_of(web) == []


def test_megabytes_of_prompts_may_be_pasted(web: Web, browser: Browser) -> None:
    prompts = ("x" * 9_000 + "\n") * 250
    answer = browser.post("/submit", {"preset": "tiny", "prompts": prompts}, of="/submit")
    assert answer.status_code == 200
    assert web.client.get("/api/batches").json()["batches"][0]["counts"]["total"] == 250
    answer = browser.post("/submit", {"preset": "tiny", "prompts": prompts * 4}, of="/submit")
    assert answer.status_code == 400


def test_a_form_that_is_sent_twice_makes_one_batch(web: Web, browser: Browser) -> None:
    form = {"prompts": "a cat", "preset": "tiny", "key": "k" * 20}
    first = browser.post("/submit", form, of="/submit")
    assert browser.post("/submit", form, of="/submit").url.path == first.url.path
    browser.post("/submit", form | {"seed": "1"}, of="/submit")
    assert len(batches_of(web)) == 2


def test_a_form_comes_back_when_the_database_is_away_but_not_when_it_may_be_stored(
    web: Web, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(error: Exception) -> None:
        def away(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(submission, "submit", away)

    form = {"prompts": "a typed cat", "preset": "tiny"}
    refuse(OperationalError("SELECT", {}, Exception("postgresql://user:secret@host")))
    answer = browser.post("/submit", form, of="/submit")
    assert answer.status_code == 503
    assert "The database does not answer. Press the button again" in answer.text
    assert "a typed cat</textarea>" in answer.text
    assert "secret" not in answer.text
    refuse(submission.AnswerLost(make_url("sqlite://"), "261128-abc"))
    answer = browser.post("/submit", form, of="/submit")
    assert answer.status_code == 503
    assert "before it said whether batch 261128-abc is stored" in answer.text
    assert "again" not in answer.text


def test_a_form_comes_back_when_the_folder_of_presets_is_away(
    make_web: Callable[..., Web], tmp_path: Path
) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    web = make_web(presets_dir=folder)
    browser = Browser(web.client)
    schedule = {"name": "n", "cron": "@daily", "prompts": "a typed cat", "preset": "tiny_i2v"}
    forms = {"/submit": {"prompts": "a typed cat", "preset": "tiny_i2v"}, "/schedules": schedule}
    for path, form in forms.items():
        csrf = re.search(r'name="csrf" value="(\w+)"', browser.get(path).text)
        assert csrf
        folder.rmdir()
        answer = browser.client.post(path, data={"csrf": csrf[1]} | form, headers=HTML)
        assert answer.status_code == 503
        assert "The presets cannot be read. Press the button again" in answer.text
        assert "a typed cat</textarea>" in answer.text
        select = answer.text.partition('<select id="preset"')[2].partition("</select>")[0]
        assert re.findall(r"<option[^>]* selected>(\w+)</option>", select) == ["tiny_i2v"]
        folder.mkdir()
    assert not batches_of(web)
    assert not schedules_of(web)


LONG = "\n".join(f"{number} {'x' * 1_000}" for number in range(1_200))  # more than 1 MiB


def test_many_prompts_may_be_typed(web: Web, browser: Browser) -> None:
    browser.post("/submit", {"prompts": LONG, "preset": "tiny"}, of="/submit")
    sent = {"prompts": LONG, "preset": "tiny", "seed": "1"}
    browser.post("/submit", sent, of="/submit", files={"file": ("", b"")})  # as browsers send it
    assert [batch.total for batch in batches_of(web)] == [1_200] * 2
    form = {"name": "many", "preset": "tiny", "cron": "@daily", "prompts": LONG}
    assert browser.post("/schedules", form, of="/schedules").url.path == "/schedules/many"


def test_buttons_do_what_the_api_does(web: Web, browser: Browser) -> None:
    batch_id = web.submit(3)
    base = f"/batches/{batch_id}"

    def press(verb: str, **data: str) -> str:
        return str(browser.post(f"{base}/{verb}", data, of=base).text)

    assert "Paused" in press("pause")
    assert "It goes on" in press("resume")
    assert "It goes before all" in press("priority", to="first")
    assert batches_of(web)[0].boost == 1
    assert "It is the first already" in press("priority", to="first")
    assert batches_of(web)[0].boost == 1
    press("priority", to="0")
    assert batches_of(web)[0].boost == 0
    web.fail(web.job_id(batch_id), error="it broke in the middle")
    assert "it broke in the middle" in browser.get(base).text
    assert "Queued again" in press("retry", states="failed")
    assert "Cancelled" in press("cancel")
    assert batches_of(web)[0].cancelled == 3
    job = f"/jobs/{web.job_id(batch_id)}"
    assert "Queued again" in browser.post(f"{job}/retry", {}, of=job).text
    assert "Cancelled" in browser.post(f"{job}/cancel", {}, of=job).text


def test_a_page_of_a_batch_tells_why_jobs_failed_and_leads_to_those_of_a_kind(
    web: Web, browser: Browser
) -> None:
    batch_id = web.submit(4)
    base = f"/batches/{batch_id}"
    assert "Why jobs failed" not in browser.get(base).text
    lost = states.FailureKind.WORKER_LOST
    web.fail(web.job_id(batch_id, 0), error="too long")
    web.fail(web.job_id(batch_id, 1), error="it fell silent", kind=lost)
    page = browser.get(base).text
    why = page[page.index("Why jobs failed") : page.index("<h2>Running")]
    assert why.count("no use") == 2
    assert "1 on gpu0@host" in why
    links = [link.replace("&amp;", "&") for link in re.findall(rf'href="({base}\?[^"]*)"', why)]
    assert [link.partition("?")[2] for link in links] == [
        "state=failed&kind=input&quarantined=false#jobs",
        "state=failed&kind=worker_lost&quarantined=true#jobs",
    ]
    text = browser.get(links[1]).text
    jobs = text[text.index('id="jobs"') :]
    assert "worker lost (quarantined): it fell silent" in jobs
    assert "on gpu0@host" in jobs
    assert "Only worker lost, quarantined." in jobs
    assert "too long" not in jobs
    asked_again = re.findall(r'hx-get="([^"]*)"', text)[0].replace("&amp;", "&")
    assert "too long" not in browser.get(asked_again).text.partition('id="jobs"')[2]
    which = {"states": "failed", "kind": "worker_lost", "quarantined": "true"}
    browser.post(f"{base}/pause", {}, of=base)
    told = browser.post(f"{base}/retry", which, of=base).text
    assert "Queued again, but the batch is paused" in told
    assert (batches_of(web)[0].failed, batches_of(web)[0].queued) == (1, 3)


@pytest.mark.parametrize("typed", ["900", "1e2", "", "soon", "-101"])
def test_what_is_no_priority_is_told_on_the_page_of_the_batch(
    web: Web, browser: Browser, typed: str
) -> None:
    base = f"/batches/{web.submit(priority=3)}"
    answer = browser.post(f"{base}/priority", {"to": typed}, of=base)
    assert (answer.status_code, answer.url.path) == (200, base)
    said = "Nothing was changed: a priority must be a whole number from -100 to 100."
    assert f'<p class="note" role="status">{said}</p>' in answer.text
    assert [batch.priority + batch.boost for batch in batches_of(web)] == [3]


def test_a_priority_can_be_typed_in_every_browser_and_be_refused_by_us(
    web: Web, browser: Browser
) -> None:
    """Of `type="number"`, browsers send what they make of 1e2, and nothing for what they do not."""
    shown = browser.get(f"/batches/{web.submit(priority=-3)}").text
    (field,) = re.findall(r'<input id="to"[^>]*>', shown)
    assert 'value="-3"' in field
    assert "type=" not in field


def test_first_is_before_all_others_and_says_what_it_reached(web: Web, browser: Browser) -> None:
    other, mine = web.submit(priority=98), web.submit(priority=5)

    def press(batch_id: str, to: str) -> str:
        text = browser.post(f"/batches/{batch_id}/priority", {"to": to}, of="/batches").text
        said = re.search(r'class="note" role="status">([^<]+)', text)[1]
        return f"{web.client.get(f'/api/batches/{batch_id}').json()['priority']} {said}"

    assert press(mine, "first") == "99 It goes before all that waits."
    assert press(mine, "first") == "99 It is the first already."
    assert press(other, "first") == "100 It goes before all that waits."
    shared = "100 It has the highest priority, and so have others: they take turns."
    assert press(mine, "first") == shared
    assert press(mine, "first") == shared
    assert press(mine, "100").startswith("100 Nothing was changed")


def test_one_more_or_less_says_the_number_that_is_wanted(web: Web, browser: Browser) -> None:
    """A browser that lost the answer sends it again."""
    batch_id = web.submit(priority=99)

    def wanted(name: str) -> str:
        form = browser.get("/batches").text.partition(f'id="{name}-{batch_id}"')[2]
        return re.search(r'name="to" value="([^"]+)"', form)[1]

    def press(name: str) -> int:
        to = wanted(name)
        for _ in range(2):
            browser.post(f"/batches/{batch_id}/priority", {"to": to}, of="/batches")
        return int(web.client.get(f"/api/batches/{batch_id}").json()["priority"])

    assert press("up") == 100
    assert wanted("up") == "100"
    assert press("down") == 99


@pytest.mark.parametrize(
    ("own", "others", "told"),
    [
        (-10, 3, "14 It goes before all that waits."),
        (90, 3, "0 It is the first already."),
        (-10, 90, "100 It has the highest priority, and so have others: they take turns."),
        (-10, 95, "100 Its priority is as high as it may be, and others still go before it."),
    ],
)
def test_first_counts_the_priorities_that_rows_have_of_their_own(
    web: Web, browser: Browser, own: int, others: int, told: str
) -> None:
    web.submit(priority=others)
    mine = web.submit([{"prompt": "a cat", "priority": own}])
    text = browser.post(f"/batches/{mine}/priority", {"to": "first"}, of="/batches").text
    said = re.search(r'class="note" role="status">([^<]+)', text)[1]
    assert f"{web.client.get(f'/api/batches/{mine}').json()['priority']} {said}" == told


def test_a_batch_of_which_nothing_waits_is_moved_by_its_own_priority(
    web: Web, browser: Browser
) -> None:
    """Its job may come back, to be tried again."""
    web.submit(priority=7)
    mine = web.submit(priority=5)
    web.claim(web.job_id(mine))
    text = browser.post(f"/batches/{mine}/priority", {"to": "first"}, of="/batches").text
    assert "It goes before all that waits." in text
    assert web.client.get(f"/api/batches/{mine}").json()["priority"] == 8


def test_the_gallery_leads_through_every_video_once(web: Web, browser: Browser) -> None:
    made = [web.submit(count) for count in (9, 1, 8)]
    wanted = []
    for batch_id, count in zip(made, (9, 0, 8), strict=True):
        wanted.append([web.job_id(batch_id, number) for number in range(count)])
        for job_id in wanted[-1]:
            web.succeed(job_id)
    found, path = [], "/gallery"
    while path:
        text = browser.get(path).text
        found += [int(number) for number in re.findall(r'src="/api/jobs/(\d+)/video"', text)]
        following = re.search(r'rel="next" href="([^"]+)"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    assert found == wanted[2] + wanted[1] + wanted[0]
    alone = browser.get(f"/gallery?batch={made[0]}").text
    assert len(re.findall("<video", alone)) == 9


def test_what_differs_between_two_videos_is_marked(web: Web, browser: Browser) -> None:
    batch_id = web.submit([{"prompt": "a cat", "seed": 1}], repeat=2)
    ids = [web.job_id(batch_id, number) for number in range(2)]
    for job_id in ids:
        web.succeed(job_id)
    text = browser.get(f"/compare?job={ids[0]}&job={ids[1]}").text
    assert re.findall(r"<dt>(\w+)</dt><dd[^>]*><mark>(\w+)</mark>", text) == [
        ("seed", "1"), ("seed", "2"),
    ]  # fmt: skip
    assert f"/compare?job={ids[0]}&amp;job={ids[1]}" in browser.get(f"/jobs/{ids[0]}").text
    assert browser.get(f"/compare?job={ids[0]}").status_code == 422


def test_a_choice_that_cannot_be_compared_leads_back_to_it(web: Web, browser: Browser) -> None:
    batch_id = web.submit(18)
    ids = [web.job_id(batch_id, number) for number in range(18)]
    for job_id in ids:
        web.succeed(job_id)
    first = browser.get(f"/gallery?batch={batch_id}").text
    second = re.search(r'rel="next" href="([^"]+)"', first)[1].replace("&amp;", "&")
    form = browser.get(second).text.partition('action="/compare"')[2]
    place = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', form))
    chosen = ids[12:17]
    answer = browser.client.get("/compare", params=place | {"job": chosen}, headers=HTML)
    assert "Choose 2 to 4 videos to compare, not 5." in answer.text
    back = re.search(r'href="(/gallery\?[^"]+)"', answer.text)[1].replace("&amp;", "&")
    checked = re.findall(r'name="job" value="(\d+)" checked', browser.get(back).text)
    assert [int(number) for number in checked] == chosen


def marked(web: Web, browser: Browser, *jobs: int) -> set[str]:
    """What differs between their videos."""
    for job_id in jobs:
        web.succeed(job_id)
    text = browser.get("/compare?" + "&".join(f"job={job_id}" for job_id in jobs)).text
    return set(re.findall(r"<dt>([^<]+)</dt><dd[^>]*><mark>", text))


def two_frames(web: Web, image: bytes) -> list[str]:
    """Uploads, as rows name them."""
    other = io.BytesIO()
    Image.new("RGB", (96, 64), (30, 30, 200)).save(other, "PNG")
    answers = [
        web.client.post("/api/uploads", files={"file": ("frame.png", data)})
        for data in (image, other.getvalue())
    ]
    return [answer.json()["image"] for answer in answers]


def test_another_first_frame_is_a_difference_and_no_other_seed(
    web: Web, browser: Browser, image: bytes
) -> None:
    red, blue = two_frames(web, image)
    drawn = [(red, 5), (blue, 5), (red, 6), (blue, 6)]
    rows = [{"prompt": "it moves", "seed": seed, "image": frame} for frame, seed in drawn]
    batch_id = web.submit(rows, preset="tiny_i2v")
    ids = [web.job_id(batch_id, number) for number in range(4)]
    assert marked(web, browser, ids[0], ids[1]) == {"first frame"}
    siblings = browser.get(f"/jobs/{ids[0]}").text.partition("with other seeds")[2]
    assert set(re.findall(r"/jobs/(\d+)", siblings)) == {str(ids[2])}


TWO_NETWORKS = {"boundary_step_index": 2}
FILM = {"path": "loras/film.safetensors"}
PRESET = """{"model_path": "tiny", "target_width": 48, "target_height": 48, "fps": 8,
 "target_video_length": 17, "denoising_step_list": %s, "step_rule": "%s", "sample_shift": %s}"""


def test_other_steps_are_a_difference(make_web: Callable[..., Web], tmp_path: Path) -> None:
    (tmp_path / "first.json").write_text(PRESET % ([1000, 700, 400, 150], "renoise", 5))
    (tmp_path / "second.json").write_text(PRESET % ([1000, 750, 500, 250], "renoise", 3))
    web = make_web(presets_dir=tmp_path)
    rows = [{"prompt": "a cat", "seed": 5}]
    ids = [web.job_id(web.submit(rows, preset=name)) for name in ("first", "second")]
    browser = Browser(web.client)
    assert marked(web, browser, *ids) == {"preset", "steps", "shift"}
    assert "1000-700-400-150 (renoise)" in browser.get(f"/jobs/{ids[0]}").text


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({}, {"base": "original"}, {"base"}),
        (TWO_NETWORKS, {"boundary_step_index": 1}, {"second network from step"}),
        (TWO_NETWORKS, {"boundary_step_index": None}, {"second network from step"}),
        ({"vae_dtype": "bf16"}, {"vae_dtype": "fp32"}, {"decoded in"}),
        ({}, {"vae_dtype": "fp32"}, {"decoded in"}),
        (
            TWO_NETWORKS | {"loras": [FILM | {"name": "high_noise_model"}]},
            {"loras": [FILM | {"name": "low_noise_model"}]},
            {"LoRA"},
        ),
        (
            TWO_NETWORKS | {"loras": [FILM | {"name": "high_noise_model"}]},
            {"loras": [FILM]},
            {"LoRA"},
        ),
    ],
)
def test_what_a_look_says_of_its_networks_is_among_its_settings(
    one: dict[str, Any], other: dict[str, Any], words: set[str]
) -> None:
    look = presets.load("tiny").look.with_changes(one)
    job = {"preset": "p", "seed": 5, "image_key": None}
    first, second = (
        set(gallery.settings_of(job, each.model_dump(mode="json")))
        for each in (look, look.with_changes(other))
    )
    assert {word for word, _ in first ^ second} == words


def test_loras_of_one_name_in_two_folders_are_a_difference(web: Web, browser: Browser) -> None:
    loras = ({"name": "film"}, {"path": "styles/film.safetensors"})
    batch_id = web.submit([{"prompt": "a cat", "seed": 5, "lora": [lora]} for lora in loras])
    ids = [web.job_id(batch_id, number) for number in range(2)]
    assert marked(web, browser, *ids) == {"LoRA"}
    assert "<dd>film (1)</dd>" in browser.get(f"/jobs/{ids[0]}").text


def test_a_job_that_was_paused_by_itself_says_so_and_goes_on(web: Web, browser: Browser) -> None:
    batch_id = web.submit(2)
    job_id = web.job_id(batch_id)
    job = f"/jobs/{job_id}"
    assert "Paused" in browser.post(f"{job}/pause", {}, of=job).text
    for path in (job, f"/batches/{batch_id}"):
        assert browser.get(path).text.count('class="state paused"') == 1
    shown = browser.get(job).text
    assert f'action="{job}/resume"' in shown
    assert f'action="{job}/pause"' not in shown
    assert "It goes on" in browser.post(f"{job}/resume", {}, of=job).text
    assert "paused" not in browser.get(job).text
    assert "Nothing was changed" in browser.post(f"{job}/resume", {}, of=job).text


def test_a_job_says_until_when_it_waits_for_its_next_attempt(web: Web, browser: Browser) -> None:
    batch_id = web.submit()
    job_id = web.job_id(batch_id)
    for days, is_told in ((-1, False), (1, True)):
        moment = datetime.now(UTC) + timedelta(days=days)
        with web.db.transaction() as session:
            session.get_one(schema.Job, job_id).not_before = moment
        for path in (f"/jobs/{job_id}", f"/batches/{batch_id}"):
            assert (f"not before {html.moment(moment)}" in browser.get(path).text) is is_told


def test_a_schedule_is_added_shown_paused_and_removed(web: Web, browser: Browser) -> None:
    form = {"name": "every night", "preset": "tiny", "cron": "30 2 * * *", "zone": "Europe/Berlin",
            "prompts": "a {{style}} cat", "lists": "style=noir,anime"}  # fmt: skip
    text = browser.post("/schedules", form, of="/schedules").text
    assert text.count("<time") == 5
    base = "/schedules/every%20night"
    assert "It is paused." in browser.post(f"{base}/pause", {}, of=base).text
    assert "It goes on." in browser.post(f"{base}/resume", {}, of=base).text
    assert browser.post(f"{base}/run", {}, of=base).url.path.startswith("/batches/")
    assert len(batches_of(web)) == 1
    with web.db.reading() as session:
        assert queries.jobs(session, batches_of(web)[0].id)[0].prompt == "a noir cat"
    assert "every night" not in browser.post(f"{base}/remove", {}, of=base).text.split("Add one")[0]


COUNTED = {"name": "n", "preset": "tiny", "cron": "@daily", "prompts": "a {{counter}}"}


def run_key(browser: Browser) -> dict[str, str]:
    """What *Run now* is sent with."""
    found = re.search(r'name="key" value="([^"]+)"', browser.get("/schedules/n").text)
    assert found
    return {"key": found[1]}


def test_run_now_that_is_pressed_twice_makes_one_batch(web: Web, browser: Browser) -> None:
    browser.post("/schedules", COUNTED, of="/schedules")
    key = run_key(browser)
    assert run_key(browser) == key  # the page was fetched anew, or is open twice
    first = browser.post("/schedules/n/run", key, of="/schedules/n")
    assert "Submitted." in first.text
    again = browser.post("/schedules/n/run", key, of="/schedules/n")
    assert again.url.path == first.url.path
    assert "were submitted before" in again.text
    assert [batch.total for batch in batches_of(web)] == [1]
    later = browser.post("/schedules/n/run", run_key(browser), of="/schedules/n")
    assert "Submitted." in later.text
    assert later.url.path != first.url.path
    assert browser.post("/schedules/n/run", key, of="/schedules/n").url.path == first.url.path


def test_run_now_that_is_pressed_while_it_is_under_way_makes_one_batch(
    web: Web, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page was fetched anew meanwhile."""
    browser.post("/schedules", COUNTED, of="/schedules")
    first = run_key(browser)
    submit = submission.submit
    meanwhile = []

    def late(*arguments: Any, **options: Any) -> submission.Submission:
        monkeypatch.setattr(submission, "submit", submit)
        meanwhile.append(
            browser.post("/schedules/n/run", run_key(browser), of="/schedules/n").url.path
        )
        return submit(*arguments, **options)

    monkeypatch.setattr(submission, "submit", late)
    answer = browser.post("/schedules/n/run", first, of="/schedules/n")
    assert meanwhile == [answer.url.path]
    assert [batch.total for batch in batches_of(web)] == [1]


def test_run_now_on_a_page_of_a_removed_schedule_is_of_the_one_that_has_its_name(
    web: Web, browser: Browser
) -> None:
    browser.post("/schedules", COUNTED, of="/schedules")
    old = run_key(browser)
    removed = browser.post("/schedules/n/run", old, of="/schedules/n").url.path
    browser.post("/schedules/n/remove", {}, of="/schedules/n")
    browser.post("/schedules", COUNTED, of="/schedules")
    assert run_key(browser) != old
    made = browser.post("/schedules/n/run", old, of="/schedules/n")
    assert "Submitted." in made.text
    assert made.url.path != removed
    again = browser.post("/schedules/n/run", old, of="/schedules/n")
    assert again.url.path == made.url.path


WRONG_SCHEDULES = [
    ({"name": ""}, "name", "a name"),
    ({"name": "a/b"}, "name", "without /"),
    ({"name": "."}, "name", "must not be"),
    ({"name": "\u200b"}, "name", "Give the schedule a name"),
    ({"name": ".."}, "name", "must not be"),
    ({"name": "n" * 151}, "name", "The name may have at most 150 characters."),
    ({"cron": "99 * * * *"}, "cron", "99"),
    ({"zone": "Europe/Berln"}, "zone", "Europe/Berlin"),
    ({"prompts": ""}, "prompts", "Type a prompt"),
    ({"prompts": "\u200b"}, "prompts", "Type a prompt"),
    ({"prompts": "a\n" * 10_001}, "prompts", "There may be at most 10,000 prompts."),
    ({"prompts": "a {{stlye}}"}, "prompts", "unknown variable"),
    ({"lists": "style"}, "lists", "is no list"),
    ({"lists": "style=\nstyle=noir"}, "lists", "is there twice"),
    ({"lists": "style="}, "lists", "style must have 1 to 1,000 items, got 0"),
    ({"lists": "name=", "prompts": "{{name}}"}, "lists", "name must have 1 to 1,000 items"),
    ({"repeat": "x"}, "repeat", "Videos per prompt must be a whole number from 1 to 10,000"),
    ({"repeat": "0"}, "repeat", "Videos per prompt must be a whole number from 1 to 10,000"),
    ({"priority": "101"}, "priority", "The priority must be a whole number from -100 to 100"),
    ({"catch_up": "0"}, "catch_up", "The number of missed times must be a whole number from 1"),
    ({"preset": "nothing"}, "preset", "no preset"),
    ({"misfire": "never"}, "misfire", "misfire"),
]


def test_a_bad_schedule_is_told_at_its_field(browser: Browser) -> None:
    for given, field, words in WRONG_SCHEDULES:
        form = {"name": "n", "preset": "tiny", "cron": "@daily", "prompts": "a"} | given
        answer = browser.post("/schedules", form, of="/schedules")
        assert answer.status_code == 422, given
        assert words in errors_of(answer.text).get(field, ""), (given, errors_of(answer.text))
    both = {"name": "n", "preset": "tiny", "prompts": "a", "cron": "a zone", "zone": "none"}
    text = browser.post("/schedules", both, of="/schedules").text
    assert {"cron", "zone"} <= set(errors_of(text))


def test_without_a_login_every_page_asks_for_it_and_comes_back(guarded: Web) -> None:
    browser = Browser(guarded.client)
    for path in (*PAGES, "/batches/x", "/jobs/1", "/compare?job=1&job=2", "/schedules/x"):
        assert browser.get(path).url.path == "/login", path
    login = browser.get("/batches?cursor=x")
    assert 'name="next" value="/batches?cursor=x"' in login.text
    assert "SameSite=lax" in TestClient(guarded.client.app).get("/login").headers["set-cookie"]
    secret = guarded.token("ann")["Authorization"].removeprefix("Bearer ")
    answer = browser.post("/login", {"token": secret, "next": "/farm"})
    assert answer.url.path == "/farm"
    kept = answer.history[0].headers["set-cookie"]
    assert "HttpOnly" in kept
    assert "SameSite=strict" in kept
    assert (
        browser.post("/login", {"token": secret, "next": "//evil.example"}).url.path == "/batches"
    )
    assert "Log out" in browser.get("/farm").text
    browser.post("/logout", {}, of="/farm")
    assert browser.get("/farm").url.path == "/login"


def test_a_login_comes_back_to_names_of_every_language(guarded: Web) -> None:
    browser = Browser(guarded.client)
    path = "/schedules/n%C3%A4chtlich%3F%20%E6%9D%B1%E4%BA%AC"
    asked = browser.get(f"{path}?did=resumed")
    following = re.search(r'name="next" value="([^"]+)"', asked.text)
    assert following
    assert following[1] == f"{path}?did=resumed"
    secret = guarded.token("ann")["Authorization"].removeprefix("Bearer ")
    answer = browser.post("/login", {"token": secret, "next": following[1]})
    assert answer.url.raw_path.decode() == f"{path}?did=resumed&did=login"


def test_a_login_after_a_link_on_another_site_is_one(guarded: Web) -> None:
    """The page is asked for without the cookie of the login before, and sent with it."""
    ann = visitor(guarded, "ann")
    kept = ann.client.cookies["rushes_token"]
    ann.client.cookies.delete("rushes_token")
    shown = ann.get("/batches?cursor=x")
    assert shown.url.path == "/login"
    csrf = re.search(r'name="csrf" value="(\w+)"', shown.text)[1]
    ann.client.cookies.set("rushes_token", kept)
    form = {"csrf": csrf, "token": kept, "next": "/farm"}
    answer = ann.client.post("/login", data=form, headers=HTML)
    assert (answer.status_code, answer.url.path) == (200, "/farm")


def test_a_login_that_is_too_old_comes_back_with_where_it_leads(guarded: Web) -> None:
    browser = Browser(guarded.client)
    secret = guarded.token("ann")["Authorization"].removeprefix("Bearer ")
    browser.get("/login")
    form = {"csrf": "0" * 64, "token": secret, "next": "/farm"}
    answer = guarded.client.post("/login", data=form, headers=HTML)
    assert answer.status_code == 403
    assert "press the button again" in answer.text
    assert 'name="next" value="/farm"' in answer.text
    assert secret not in answer.text
    assert browser.get("/farm").url.path == "/login"
    fresh = re.search(r'name="csrf" value="(\w+)"', answer.text)[1]
    answer = guarded.client.post("/login", data=form | {"csrf": fresh}, headers=HTML)
    assert answer.url.path == "/farm"


def test_who_may_not_read_is_led_to_the_form_and_told_the_batch(guarded: Web) -> None:
    writer = visitor(guarded, "ann", "submit")
    secret = guarded.token("ann", "submit")["Authorization"].removeprefix("Bearer ")
    page = writer.post("/login", {"token": secret, "next": "/batches"})
    assert page.url.path == "/submit"
    assert writer.get("/").url.path == "/submit"
    assert "Log out" in page.text
    assert not re.search('href="/(batches|gallery|schedules|farm)"', page.text)
    page = writer.post("/submit", {"prompts": "a cat", "preset": "tiny"}, of="/submit")
    assert (page.url.path, page.status_code) == ("/submit", 200)
    assert "Submitted." in page.text
    assert batches_of(guarded)[0].id in page.text


def test_error_pages_lead_on_and_out(guarded: Web) -> None:
    writer = visitor(guarded, "ann", "submit")
    refused = writer.get("/batches")
    assert refused.status_code == 403
    assert all(words in refused.text for words in ("no scope read", "Log out", 'href="/submit"'))
    assert "Log out" in writer.get("/nowhere").text
    writer.post("/logout", {}, of="/batches")
    assert "Log out" not in writer.get("/nowhere").text


@pytest.mark.parametrize(("scheme", "is_secure"), [("https", True), ("http", False)])
def test_what_was_kept_over_tls_is_sent_over_tls_alone(
    guarded: Web, scheme: str, is_secure: bool
) -> None:
    kept = guarded.client.get(f"{scheme}://127.0.0.1:8000/login").headers["set-cookie"]
    assert ("Secure" in kept) is is_secure


@pytest.mark.parametrize(
    ("believed", "is_secure"),
    [("", True), ("10.0.0.0/8,127.0.0.1", True), ("*", True), ("10.0.0.0/8", False)],
)
def test_a_proxy_says_that_it_was_asked_over_tls_where_dotenv_names_it(
    make_web: Callable[..., Web], believed: str, is_secure: bool
) -> None:
    Path(".env").write_text(f"FORWARDED_ALLOW_IPS={believed}\n")
    with running(make_web()) as live:
        said = {"X-Forwarded-Proto": "https"}
        kept = requests.get(f"{live.url}/submit", headers=said, timeout=9).headers["set-cookie"]
    assert ("Secure" in kept) is is_secure


def test_what_is_no_token_logs_nobody_in(guarded: Web) -> None:
    browser = Browser(guarded.client)
    for token in ("", "x", "rushes_x", "é"):
        answer = browser.post("/login", {"token": token})
        assert answer.status_code == 401
        assert "no valid token" in errors_of(answer.text)["token"]
        assert "You are not logged in" in answer.text
        assert "stored" not in answer.text
    assert browser.get("/farm").url.path == "/login"


def test_a_form_without_its_key_changes_nothing(web: Web, browser: Browser) -> None:
    batch_id = web.submit()
    browser.get("/batches")
    for csrf in ("", "x", "0" * 64):
        answer = web.client.post(f"/batches/{batch_id}/cancel", data={"csrf": csrf}, headers=HTML)
        assert answer.status_code == 403
        assert "too old" in answer.text
    assert batches_of(web)[0].queued == 1


def test_a_form_of_before_the_login_is_refused_after_it(guarded: Web) -> None:
    browser = Browser(guarded.client)
    old = re.search(r'name="csrf" value="(\w+)"', browser.get("/login").text)
    assert old
    secret = guarded.token("ann", "admin")["Authorization"].removeprefix("Bearer ")
    browser.log_in(secret)
    typed = {"preset": "tiny", "prompts": "a typed prompt", "name": "mine", "cron": "@daily"}
    for path in ("/submit", "/schedules"):
        stale = {"csrf": old[1]} | typed
        answer = guarded.client.post(path, data=stale, headers=HTML)
        assert answer.status_code == 403
        assert "press the button again" in answer.text
        assert "a typed prompt</textarea>" in answer.text
        assert schedules_of(guarded) == []
        fresh = re.search(r'name="csrf" value="(\w+)"', answer.text)
        assert fresh
        assert (
            guarded.client.post(path, data=stale | {"csrf": fresh[1]}, headers=HTML).status_code
            == 200
        )
    assert (len(batches_of(guarded)), len(schedules_of(guarded))) == (1, 1)


def test_a_cookie_alone_changes_nothing_through_the_api(guarded: Web) -> None:
    ann = visitor(guarded, "ann")
    new = {"preset": "tiny", "prompts": [{"prompt": "x"}]}
    assert ann.client.get("/api/batches").status_code == 200
    assert ann.client.post("/api/batches", json=new).status_code == 401


def test_owners_see_their_own_and_readers_get_no_buttons(guarded: Web) -> None:
    ann, ben = visitor(guarded, "ann"), visitor(guarded, "ben")
    reader, admin = visitor(guarded, "ann", "read"), visitor(guarded, "", "admin")
    batch_id = guarded.submit(headers=guarded.token("ann"), name="anns")
    job_id = guarded.job_id(batch_id)
    attempt_id = guarded.claim(job_id)
    base, job = f"/batches/{batch_id}", f"/jobs/{job_id}"
    for path in (base, job):
        assert "Cancel" in ann.get(path).text
        assert "Cancel" in admin.get(path).text
        assert "Cancel" not in reader.get(path).text
        assert ben.get(path).status_code == 404
    assert "anns" not in ben.get("/batches").text
    assert reader.post(f"{base}/cancel", {}, of="/batches").status_code == 403
    assert ben.post(f"{base}/cancel", {}, of="/batches").status_code == 404
    assert reader.get("/submit").status_code == 403
    assert "Add one" not in ann.get("/schedules").text
    guarded.succeed(job_id, attempt_id)
    assert f"/api/jobs/{job_id}/video" in ann.get("/gallery").text
    assert f"/api/jobs/{job_id}/video" not in ben.get("/gallery").text
    assert ben.get(f"/compare?job={job_id}&job={job_id + 1}").status_code == 404


def test_a_revoked_token_ends_the_login(guarded: Web) -> None:
    ann = visitor(guarded, "ann")
    with guarded.db.transaction() as session:
        tokens.revoke(session, tokens.every(session)[-1].id)
    login = ann.get("/farm")
    assert login.url.path == "/login"
    assert "Your login has ended" in login.text
    for path in ("/submit", "/schedules"):
        sent = ann.client.post(path, data={"prompts": "a cat"}, headers=HTML)
        assert "Your login has ended" in sent.text
        assert f'name="next" value="{path}"' in sent.text
    pressed = ann.client.post("/batches/x/pause", headers=HTML)
    assert 'name="next" value="/batches"' in pressed.text


def test_a_fragment_for_somebody_logged_out_leads_to_the_login(guarded: Web) -> None:
    answer = guarded.client.get("/farm", headers=HTML | {"HX-Request": "true"})
    assert answer.status_code == 401
    assert answer.headers["hx-redirect"] == "/login?next=%2Ffarm"


def test_errors_are_pages_for_people_and_documents_for_programs(web: Web) -> None:
    page = web.client.get("/jobs/99", headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert page.headers["x-rushes"] == "gone"
    for path in ("/api/jobs/99", "/jobs/99"):
        answer = web.client.get(path)
        assert answer.headers["content-type"] == "application/problem+json"


def test_what_people_typed_is_shown_as_text(web: Web, browser: Browser) -> None:
    bad = '<script>alert(1)</script>"><img src=x>'
    batch_id = web.submit([{"prompt": bad, "custom_id": bad[:25]}], name=bad)
    job_id = web.job_id(batch_id)
    web.succeed(job_id)
    for path in ("/batches", f"/batches/{batch_id}", f"/jobs/{job_id}", "/gallery"):
        text = browser.get(path).text
        assert "<script>alert" not in text
        assert "<img" not in text
        assert "&lt;script&gt;" in text


def test_a_farm_shows_those_first_that_need_a_look(
    web: Web, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farm, "WORKERS", 2)
    for name in ("a@host", "b@host", "c@host", "d@host"):
        web.db.write(workers.register, registration(name))
    for job_id in range(health.MAX_SUSPECTS):
        told = {"kind": states.FailureKind.DEVICE, "error": "Xid 79"}
        web.db.write(health.suspect, "d@host", job_id=job_id, **told)
    with web.db.transaction() as session:
        long_ago = datetime.now(UTC) - timedelta(days=1)
        session.get_one(schema.Worker, "c@host").heartbeat_at = long_ago
    text = browser.get("/farm").text
    assert re.findall(r"<h3>(\w@host)</h3>", text) == ["d@host", "c@host"]
    assert "3 of 4, 1 takes nothing" in text
    assert re.search(r"takes nothing until its self-test passes, the next one from \d", text)


def test_videos_of_an_hour_that_were_not_all_counted_are_said_to_be_more(
    web: Web, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "NEWEST_ATTEMPTS", 2)
    batch_id = web.submit(3)
    for number in range(2):
        web.succeed(web.job_id(batch_id, number))
    assert "<dd>2</dd>" in browser.get("/farm").text
    web.succeed(web.job_id(batch_id, 2))
    assert "<dd>over 2</dd>" in browser.get("/farm").text


def test_the_farm_tells_what_waits_and_what_was_finished(web: Web, browser: Browser) -> None:
    batch_id = web.submit(4)
    web.succeed(web.job_id(batch_id))
    web.fail(web.job_id(batch_id, 1))
    load = web.client.get("/api/load").json()
    assert (load["queued"], load["running"]) == (2, 0)
    assert load["spans"][-1]["succeeded"] + load["spans"][-2]["succeeded"] == 1
    assert load["spans"][-1]["failed"] + load["spans"][-2]["failed"] == 1
    assert not load["is_cut"]
    text = browser.get("/farm").text
    assert "1 videos and 1 failed attempts" in text
    assert text.count("times in UTC") == 2


def test_the_farm_tells_how_many_of_those_that_wait_are_paused(web: Web, browser: Browser) -> None:
    batch_id = web.submit(3)
    web.submit(2, name="another")
    web.succeed(web.job_id(batch_id))
    assert "<dt>waiting</dt><dd>4</dd>" in browser.get("/farm").text
    web.client.post(f"/api/batches/{batch_id}/pause")
    load = web.client.get("/api/load").json()
    assert (load["queued"], load["queued_paused"]) == (4, 2)
    assert "<dt>waiting</dt><dd>4, of which 2 paused</dd>" in browser.get("/farm").text


def test_numbers_beside_a_chart_are_short() -> None:
    for queued, told in ((20, ["0", "10", "20"]), (4_000, ["0", "2.5k", "5k"])):
        samples = [{"at": datetime.now(UTC), "queued": queued, "running": 0}]
        assert [word for _, word in charts.lines(samples).ticks] == told


def test_the_farm_names_models_and_memory_as_the_command_line_does(
    web: Web, browser: Browser
) -> None:
    web.db.write(workers.register, registration(memory_bytes=150_000_000_000))
    held = {"model": "/srv/models/tiny", "loras": ("/srv/loras/noir.safetensors",)}
    model = reports.Resident(**held, memory="resident", device_bytes=5, host_bytes=7)
    counts = {"renders": 1, "loads": 1, "lora_switches": 0}
    used = {"device_used_bytes": 60_000_000_000, "host_used_bytes": 480_000_000}
    told = reports.Report(**counts, resident=(model,), **used)
    web.db.write(workers.report, "gpu0@host", told)
    text = browser.get("/farm").text
    assert "60.0 GB of 150.0 GB" in text
    assert "480.0 MB" in text
    assert "loaded: tiny with noir.safetensors, 5 bytes on the device" in text
    assert "/srv" not in text


def test_a_worker_tells_others_neither_a_job_nor_a_folder(guarded: Web) -> None:
    batch_id = guarded.submit(headers=guarded.token("ann"))
    job_id = guarded.job_id(batch_id)
    guarded.db.write(workers.register, registration())
    guarded.claim(job_id)
    with guarded.db.transaction() as session:
        row = session.get_one(schema.Worker, "gpu0@host")
        row.suspects = [job_id]
        row.resident = [{"model": "/srv/models/tiny", "loras": ["/srv/loras/noir.safetensors"]}]
    told = {}
    for owner, scope in (("ann", "read"), ("ben", "read"), ("", "admin")):
        headers = guarded.token(owner, scope)
        (told[owner],) = guarded.client.get("/api/workers", headers=headers).json()["workers"]
    assert told["ann"]["rendering"]["job_id"] == told[""]["rendering"]["job_id"] == job_id
    assert told["ben"]["rendering"]["job_id"] is None
    assert told["ben"]["rendering"]["attempt"] == 1
    named = [{"model": "tiny", "loras": ["noir.safetensors"]}]
    assert told["ann"]["resident"] == told["ben"]["resident"] == named
    assert (told["ben"]["suspects"], told[""]["suspects"]) == ([], [job_id])
    assert told[""]["resident"][0]["model"] == "/srv/models/tiny"


def test_a_long_word_is_shown_as_far_as_there_is_room(web: Web, browser: Browser) -> None:
    prompt = "A " + "\N{CJK UNIFIED IDEOGRAPH-732B}" * 300
    batch_id = web.submit([{"prompt": prompt}])
    web.db.write(workers.register, registration())
    attempt_id = web.claim(web.job_id(batch_id))
    assert prompt[:100] in browser.get(f"/batches/{batch_id}").text
    assert prompt[:100] in browser.get("/farm").text
    web.succeed(web.job_id(batch_id), attempt_id)
    assert prompt[:200] in browser.get("/gallery").text


def test_a_job_has_one_short_name_on_the_page_of_its_batch(web: Web, browser: Browser) -> None:
    batch_id = web.submit([{"prompt": "a"}, {"prompt": "b", "custom_id": "x" * 500}])
    for number in range(2):
        web.claim(web.job_id(batch_id, number))
    text = browser.get(f"/batches/{batch_id}").text
    named = re.findall(r'href="/jobs/\d+" dir="auto">([^<]+)</a>', text)
    assert named == ["#0", "x" * 77 + "..."] * 2
    with web.db.reading() as session:
        assert queries.find_job(session, f"{batch_id}/{named[0][1:]}").custom_id is None


def test_running_jobs_have_a_place_of_their_own_until_the_end(web: Web, browser: Browser) -> None:
    """A link under a pointer stays that of its job, and what is below does not jump."""
    batch_id = web.submit()
    job_id = web.job_id(batch_id)
    assert "Nothing just now." in browser.get(f"/batches/{batch_id}").text
    attempt_id = web.claim(job_id)
    text = browser.get(f"/batches/{batch_id}").text
    assert f'<li id="running-{job_id}">' in text
    assert "Nothing just now." not in text
    web.succeed(job_id, attempt_id)
    assert "<h2>Running" not in browser.get(f"/batches/{batch_id}").text


def test_what_people_do_on_a_page_is_left_alone_when_it_is_asked_for_anew(
    web: Web, browser: Browser
) -> None:
    batch_id = web.submit()
    assert re.search(
        r'<input id="to"[^>]* hx-morph-skip>', browser.get(f"/batches/{batch_id}").text
    )
    assert re.search(
        r'<input id="custom-id"[^>]* hx-morph-skip>', browser.get(f"/batches/{batch_id}").text
    )
    job_id = web.job_id(batch_id)
    web.succeed(job_id)
    assert f'<div id="video-{job_id}" hx-morph-skip>' in browser.get(f"/jobs/{job_id}").text


def test_pages_that_change_say_what_they_need_without_scripts(browser: Browser) -> None:
    for path in PAGES:
        is_live = path not in ("/submit", "/gallery")
        assert ("<noscript>" in browser.get(path).text) is is_live, path


def test_what_people_wrote_is_set_in_its_own_direction(web: Web, browser: Browser) -> None:
    words = "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}!"
    batch_id = web.submit([{"prompt": words, "custom_id": words, "seed": 1}], name=words, repeat=2)
    ids = [web.job_id(batch_id, number) for number in range(2)]
    for job_id in ids:
        web.succeed(job_id)
    paths = ["/batches", f"/batches/{batch_id}", f"/jobs/{ids[0]}", "/gallery"]
    for path in [*paths, f"/gallery?batch={batch_id}", f"/compare?job={ids[0]}&job={ids[1]}"]:
        body = browser.get(path).text.partition("<main")[2]
        before = re.findall(r"((?:<h2[^<>]*>)?<[^<>]*>)\s*" + words, body)
        assert before, path
        for tags in before:
            assert tags == "<bdi>" or 'dir="auto"' in tags, (path, tags)


def test_scripts_and_styles_are_kept_for_ever_by_their_version(web: Web, browser: Browser) -> None:
    text = browser.get("/farm").text
    addresses = re.findall(r'(?:href|src)="(/assets/[^"]+)"', text)
    assert len(addresses) == 4
    for address in addresses:
        assert "immutable" in web.client.get(address).headers["cache-control"]
        plain, _, version = address.partition("?v=")
        assert re.fullmatch("[0-9a-f]{16}", version)
        for other in (plain, f"{plain}?v={'0' * 16}"):
            assert web.client.get(other).headers["cache-control"] == "no-cache"


def test_a_script_replaced_under_a_service_that_runs_is_not_kept(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(html.ASSETS, tmp_path / "assets")  # with the times of its files
    monkeypatch.setattr(html, "ASSETS", tmp_path / "assets")
    client = TestClient(app.make(web.serving), base_url=HOST)
    address = html.asset("page.js")
    assert "immutable" in client.get(address).headers["cache-control"]
    (tmp_path / "assets" / "page.js").write_text("// the next version")
    answer = client.get(address)
    assert (answer.text, answer.headers["cache-control"]) == ("// the next version", "no-cache")


def test_a_batch_is_looked_at_until_its_result_files_are_there(web: Web, browser: Browser) -> None:
    batch_id = web.submit()
    job_id, path = web.job_id(batch_id), f"/batches/{batch_id}"
    assert 'hx-trigger="every 2s"' in browser.get(path).text
    web.succeed(job_id)
    text = browser.get(path).text
    assert "Finished" in text
    assert 'hx-trigger="every 2s"' in text
    results.write(web.db, web.serving.store, batch_id)
    text = browser.get(path).text
    assert "Result files" in text
    assert 'hx-trigger="every 30s"' in text
    assert 'hx-trigger="every 30s"' in browser.get(f"/jobs/{job_id}").text


def test_pages_of_schedules_are_asked_for_anew_but_for_the_form(web: Web, browser: Browser) -> None:
    form = {"name": "every night", "preset": "tiny", "cron": "@daily", "prompts": "a"}
    browser.post("/schedules", form, of="/schedules")
    asked = 'id="live" hx-get="{}" hx-select="#live" hx-swap="outerMorph" hx-trigger="every 5s"'
    for path in ("/schedules", "/schedules?after=a", "/schedules/every%20night"):
        text = browser.get(path).text
        assert asked.format(path) in text
        live = text.partition("<section")[2].partition("</section>")[0]
        assert "<time" in live
        assert "Add one" not in live


def test_a_farm_whose_jobs_wait_for_no_reason_says_so(web: Web, browser: Browser) -> None:
    def tells(*seconds: int) -> bool:
        """So long after each time that it was seen to be idle."""
        now = datetime.now(UTC)
        samples = web.serving.history.samples
        samples.clear()
        samples.extend(
            history.Sample(at=now - timedelta(seconds=each), queued=1, running=0, is_idle=True)
            for each in seconds
        )
        is_told = "does a dispatcher run" in browser.get("/farm").text
        assert (web.client.get("/api/load").json()["idle_since"] is not None) is is_told
        return is_told

    job_id = web.job_id(web.submit())
    assert not tells(70, 40)  # no worker would take it
    web.db.write(workers.register, registration())
    assert not tells(40)
    assert tells(70, 40)
    assert not tells(3700, 3685, 3670)  # nobody looked for an hour
    web.claim(job_id)
    assert not tells(70, 40)


def test_the_jobs_that_are_shown_are_marked_among_the_tabs(web: Web, browser: Browser) -> None:
    batch_id = web.submit()
    current = re.compile(r'aria-current="true">\s*(\w+)')
    for asked, word in (("", "all"), ("?state=queued", "queued")):
        assert current.findall(browser.get(f"/batches/{batch_id}{asked}").text) == [word]


def test_a_job_is_found_by_its_custom_id_on_the_page_of_its_batch(
    web: Web, browser: Browser
) -> None:
    batch_id = web.submit(120)
    base = f"/batches/{batch_id}"
    text = browser.get(base).text
    form = text[text.index('id="find"') :].partition("</form>")[0]
    assert 'name="custom_id"' in form
    found = browser.get(f"{base}?custom_id=p77").text
    assert re.findall(r'<tr id="job-(\d+)"', found) == [str(web.job_id(batch_id, 77))]
    assert f'hx-get="{base}?custom_id=p77"' in found
    assert "Only the job called <bdi>p77</bdi>" in found
    assert browser.get(f"{base}?custom_id=").text.count('<tr id="job-') == 50
    assert "None." in browser.get(f"{base}?custom_id=p777").text


def test_a_page_of_many_jobs_is_short(web: Web, browser: Browser) -> None:
    batch_id = web.submit(120)
    text = browser.get(f"/batches/{batch_id}").text
    assert text.count('<tr id="job-') == 50
    following = re.search(r'rel="next" href="([^"]+)"', text)[1].replace("&amp;", "&")
    assert "#51" not in text
    assert "p50" in browser.get(following).text
    with web.db.reading() as session:
        assert queries.open_jobs(session) == (120, 0)
    assert browser.get(f"/batches/{batch_id}?state={states.JobState.FAILED}").text.count("<tr") == 0


def test_the_page_of_a_batch_says_why_nobody_renders_it(web: Web, browser: Browser) -> None:
    batch_id = web.submit()
    web.db.write(workers.register, registration())
    assert "Nobody renders" not in browser.get(f"/batches/{batch_id}").text
    told = {"kind": states.FailureKind.DISK, "reason": "no <room>"}
    web.db.write(workers.refuse, "gpu0@host", queue=workers.ALL_QUEUES, **told)
    page = browser.get(f"/batches/{batch_id}").text
    assert "Nobody renders queue rushes.render.tiny now" in page
    assert re.search(r"gpu0@host takes nothing until .*: no &lt;room&gt;", page)
