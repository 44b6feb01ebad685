"""The pages in a real browser, over a farm of simulated devices.

Debian's package `chromium`, driven by Playwright; without it these tests are skipped.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from jobs import queries
from jobs.schema import Job
from jobs.web import html
from tests.integration import browsing
from tests.integration.browsing import CHROMIUM, SERIOUS, WAIT_MILLISECONDS
from tests.integration.conftest import Farm, start_farm, stop_farm
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    # Playwright's own loop and pipes are closed when the interpreter ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PRESET = """{"model_path": "simulated", "denoising_step_list": [1000, 750, 500, 250],
 "target_video_length": 17, "target_width": 160, "target_height": 96, "fps": 8}"""
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
CUT_OFF = """[...document.querySelectorAll(".chart text")].filter((text) => {
  const [own, all] = [text, text.closest("svg")].map((each) => each.getBoundingClientRect());
  return own.top < all.top || own.left < all.left;
}).map((text) => text.textContent)"""
IS_BEHIND_BAR = """(() => {
  const [own, bar] = [document.activeElement, document.querySelector(".sticky")];
  if (!own.closest(".cards")) return false;
  return own.getBoundingClientRect().bottom > bar.getBoundingClientRect().top;
})()"""
SHOTS = os.environ.get("BROWSER_SHOTS")  # a folder that gets a picture of every page


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    home = tmp_path_factory.mktemp("browser") / "home"
    presets = home / "presets"
    presets.mkdir(parents=True)
    (presets / "rehearsal.json").write_text(PRESET)
    for name in ("tiny", "tiny_i2v"):  # nobody renders them here: they need not be made
        (home / "models" / name).mkdir(parents=True)
        (home / "models" / name / "config.json").write_text("{}")
    environment = {"RUSHES_PRESETS_DIR": str(presets), "RUSHES_DEFAULT_PRESET": "rehearsal"}
    # Long enough to see steps go by, and to cancel in the middle.
    farm = start_farm(home, devices="sim:1", RUSHES_SIM_STEP_SECONDS="0.4", **environment)
    yield farm
    stop_farm(farm)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(farm: Farm) -> str:
    return browsing.address_of(farm)


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A window that fails the test for anything that the browser complains about."""
    context = browser.new_context(base_url=address)
    context.set_default_timeout(WAIT_MILLISECONDS)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    # A form that comes back with its mistakes is one, to a browser.
    assert [told for told in complaints if "status of 422" not in told] == []


def submit(page: Page, prompts: str, **fields: str) -> str:
    """Type it into the form; the id of the batch."""
    page.goto("/submit")
    page.get_by_label("Prompts", exact=True).fill(prompts)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("status")).to_have_text("Submitted.", timeout=WAIT_MILLISECONDS)
    return page.url.split("/batches/")[1].partition("?")[0]


def finished_job(page: Page, prompt: str, **fields: str) -> str:
    """Its page."""
    submit(page, prompt, **fields)
    expect(page.locator("#counts")).to_contain_text("1 of 1 done", timeout=WAIT_MILLISECONDS)
    return str(page.locator("tbody th a").first.get_attribute("href"))


def paused(page: Page) -> str:
    """A batch of three, of which one may be rendered and the others wait; its page is shown."""
    batch_id = submit(page, "now\nlater\nlast")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    return batch_id


def ask_anew(page: Page) -> None:
    """Now, not when it is time, for the part of a page that changes."""
    page.evaluate("document.addEventListener('htmx:after:swap', () => window.isNew = true)")
    page.evaluate("window.isNew = false, document.dispatchEvent(new Event('visibilitychange'))")
    until(lambda: page.evaluate("window.isNew"), seconds=20)


def requests_of(page: Page) -> list[str]:
    """Grows with each that it makes from now on, but for its icon."""
    asked: list[str] = []
    page.on("request", lambda made: None if "icon" in made.url else asked.append(made.url))
    return asked


@contextmanager
def window_of(browser: Browser, address: str) -> Iterator[Page]:
    """One that may complain."""
    with browser.new_context(base_url=address) as context:
        context.set_default_timeout(WAIT_MILLISECONDS)
        yield context.new_page()


@contextmanager
def impatient_window_of(browser: Browser, address: str, batch_id: str) -> Iterator[Page]:
    """On a batch. Without a good answer it waits for one second, not ten, before it says so."""
    script = (html.ASSETS / "page.js").read_text(encoding="utf-8")
    assert script.count("10_000") == 1
    body = script.replace("10_000", "1_000")
    with window_of(browser, address) as window:
        window.route(
            "**/assets/page.js*",
            lambda asked: asked.fulfill(body=body, content_type="text/javascript"),
        )
        window.goto(f"/batches/{batch_id}")
        yield window


def test_a_batch_is_submitted_followed_and_played(page: Page) -> None:
    submit(page, "a cat boxes", Seed="7", Videos_per_prompt="4")
    expect(page.locator("#counts")).to_contain_text("0 of 4 done", timeout=WAIT_MILLISECONDS)
    running = page.locator("ul.running")
    # A part of it is fetched anew: the page itself is never loaded again.
    page.evaluate("window.isTheSame = true")
    expect(running).to_contain_text("on sim0", timeout=WAIT_MILLISECONDS)
    step = running.inner_text()
    expect(running).not_to_have_text(step, timeout=WAIT_MILLISECONDS)
    expect(page.locator("#counts")).to_contain_text("4 of 4 done", timeout=WAIT_MILLISECONDS)
    assert page.evaluate("window.isTheSame")

    page.get_by_role("link", name="Gallery").last.click()
    expect(page.locator("article")).to_have_count(4)
    expect(page.locator("article").first).to_contain_text("a cat boxes")
    expect(page.locator("article").first.locator("dl")).to_contain_text("160x96")
    played = page.locator("video").first.evaluate(
        """async (video) => {
          video.muted = true;
          await video.play();
          await new Promise((done) => video.addEventListener("timeupdate", () =>
            video.currentTime > 0.2 && done()));
          return [video.readyState, video.currentTime, video.videoWidth, video.videoHeight];
        }"""
    )
    assert played[0] >= 2
    assert played[1] > 0.2
    assert played[2:] == [160, 96]

    for box in page.get_by_label("compare").all():
        box.check()
    page.get_by_role("button", name="Compare the chosen").click()
    expect(page.locator("mark")).to_have_text([str(seed) for seed in range(7, 11)])
    page.get_by_role("button", name="Play together").click()
    # Asked from outside: the page's policy lets nobody evaluate text inside it.
    all_run = "[...document.querySelectorAll('video')].every((video) => video.currentTime > 0.2)"
    until(lambda: page.evaluate(all_run), seconds=WAIT_MILLISECONDS / 1000)


def test_a_video_that_cannot_be_fetched_is_told_from_one_that_was_deleted(
    page: Page, browser: Browser, address: str, farm: Farm
) -> None:
    job = finished_job(page, "a video")
    with window_of(browser, address) as window:
        video = window.locator("video")
        window.route("**/api/jobs/*/video", lambda asked: asked.fulfill(status=503))
        window.goto(job)
        expect(window.get_by_text("This video cannot be played just now.")).to_be_visible()
        expect(video).to_have_count(0)
        again = window.get_by_role("button", name="Try again")
        again.click()
        expect(again).to_be_focused()
        window.unroute("**/api/jobs/*/video")
        again.click()
        until(lambda: video.evaluate("each => each.readyState >= 2"), seconds=20)
    with farm.db.reading() as session:
        winner = queries.winning_attempt(session, session.get_one(Job, int(job[6:])))
    assert winner is not None
    assert winner.video_key is not None
    farm.store.delete(winner.video_key)  # the database does not know it
    with window_of(browser, address) as window:  # which has kept nothing of it
        window.goto(job)
        expect(window.get_by_text("This video was deleted.")).to_be_visible()
        expect(window.get_by_role("button", name="Try again")).to_have_count(0)


def test_a_browser_without_h264_says_so_and_offers_the_file(
    page: Page, browser: Browser, address: str
) -> None:
    job = finished_job(page, "a video")
    with window_of(browser, address) as window:
        window.add_init_script("HTMLMediaElement.prototype.canPlayType = () => '';")
        unplayable = {"status": 206, "body": "?", "content_type": "video/mp4"}
        window.route("**/api/jobs/*/video", lambda asked: asked.fulfill(**unplayable))
        window.goto(job)
        expect(window.get_by_text("This browser cannot play H.264 video")).to_be_visible()
        link = window.get_by_role("link", name="download it")
        assert link.evaluate("each => [each.pathname, each.download]") == [f"/api{job}/video", ""]
        link.focus()
        ask_anew(window)
        expect(link).to_be_focused()


def test_a_video_goes_on_as_it_was_set_and_ends_with_what_it_was_of(page: Page) -> None:
    job = finished_job(page, "a video")
    page.goto(job)
    video = page.locator("video")
    video.evaluate("each => { each.loop = each.muted = true; each.playbackRate = 2; each.play(); }")
    ask_anew(page)
    state = "each => [each.loop, each.muted, each.playbackRate, each.paused]"
    assert video.evaluate(state) == [True, True, 2, False]
    now = page.context.request.get(job, headers={"Accept": "text/html"}).text()
    following = now.replace("video-", "video-9").replace(f"{job}/video", "/jobs/9/video")
    page.route(f"**{job}", lambda asked: asked.fulfill(body=following, content_type="text/html"))
    page.route("**/jobs/9/video", lambda asked: asked.fulfill(status=204))
    ask_anew(page)
    expect(video).to_have_attribute("src", "/api/jobs/9/video")


def test_videos_of_different_lengths_play_to_the_end_of_the_longest(page: Page) -> None:
    short, long = (finished_job(page, text, Seconds=text) for text in ("1", "3"))
    state = """[...document.querySelectorAll("video")].map((video) =>
        [video.paused, video.currentTime / video.duration])"""

    def reached(share: float) -> None:
        until(lambda: page.evaluate(state)[1][1] >= share, seconds=20)

    page.goto(f"/compare?job={short[6:]}&job={long[6:]}")
    until(lambda: page.evaluate("document.readyState") == "complete", seconds=20)
    page.get_by_role("button", name="Play together").click()
    reached(0.6)
    assert page.evaluate(state)[0] == [True, 1]
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Play together").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    assert [paused for paused, _ in page.evaluate(state)] == [True, False]
    assert page.evaluate(state)[1][1] >= 0.6
    expect(page.get_by_role("button", name="Play together")).to_be_visible(timeout=20_000)
    assert page.evaluate(state) == [[True, 1], [True, 1]]
    expect(page.get_by_label("Time")).to_have_value("1000")
    page.get_by_role("button", name="Play together").click()
    until(lambda: all(share < 0.9 for _, share in page.evaluate(state)), seconds=20)


def test_a_page_without_answers_says_so_and_goes_on_with_the_next(
    page: Page, browser: Browser, address: str
) -> None:
    batch_id = paused(page)
    with impatient_window_of(browser, address, batch_id) as window:
        stale = window.locator("#stale")
        expect(stale).to_be_hidden()
        window.route(f"**/batches/{batch_id}", lambda asked: asked.abort())
        expect(stale).to_contain_text("no good answer since", timeout=20_000)
        window.unroute(f"**/batches/{batch_id}")
        expect(stale).to_be_hidden(timeout=20_000)
        window.route(f"**/batches/{batch_id}", lambda asked: asked.fulfill(status=503))
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#counts")).to_contain_text("3 of 3 done", timeout=WAIT_MILLISECONDS)
        expect(stale).to_be_visible(timeout=20_000)
        expect(window.locator("#counts")).not_to_contain_text("3 of 3 done")
        window.unroute(f"**/batches/{batch_id}")
        expect(window.locator("#counts")).to_contain_text("3 of 3 done", timeout=20_000)
        expect(stale).to_be_hidden()
        # Written after its end, and then there is nothing to wait for.
        expect(window.get_by_role("heading", name="Result files")).to_be_visible(timeout=20_000)
        asked = requests_of(window)
        window.wait_for_timeout(5_000)
        assert asked == []


def test_a_page_of_what_was_deleted_says_so_and_asks_no_more(
    page: Page, browser: Browser, address: str
) -> None:
    batch_id = paused(page)
    with impatient_window_of(browser, address, batch_id) as window:
        path, stale = f"**/batches/{batch_id}", window.locator("#stale")
        window.route(path, lambda asked: asked.fulfill(status=404))  # a proxy's own
        expect(stale).to_contain_text("no good answer since", timeout=20_000)
        window.unroute(path)
        expect(stale).to_be_hidden(timeout=20_000)
        gone = {"X-Rushes": "gone"}
        window.route(path, lambda asked: asked.fulfill(status=404, headers=gone))
        expect(stale).to_contain_text("This was deleted", timeout=20_000)
        asked = requests_of(window)
        window.wait_for_timeout(5_000)  # two polls, and longer than it waits for an answer
        assert asked == []
        expect(stale).to_contain_text("This was deleted")


def test_a_page_that_nobody_sees_asks_for_nothing(page: Page) -> None:
    batch_id = paused(page)
    page.add_init_script(
        "Object.defineProperty(document, 'hidden', {get: () => window.isHidden ?? false});"
    )
    page.goto(f"/batches/{batch_id}")
    asked = requests_of(page)
    page.evaluate("window.isHidden = true")
    page.wait_for_timeout(5_000)
    assert asked == []
    page.evaluate("window.isHidden = false, document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(500)
    assert len(asked) == 1
    expect(page.locator("#stale")).to_be_hidden()


def test_many_open_pages_leave_the_browser_free(page: Page) -> None:
    """It opens six connections to a host at most."""
    path = f"/batches/{paused(page)}"
    for _ in range(7):
        page.context.new_page().goto(path)
    page.goto("/batches")
    expect(page.get_by_role("heading", name="Batches")).to_be_visible()


def test_after_going_back_the_form_fits_its_preset(page: Page) -> None:
    page.goto("/submit")
    image, hint = page.get_by_label("First frame"), page.locator("#preset-hint")
    expect(image).to_be_hidden()
    page.get_by_label("Preset").select_option("tiny_i2v")
    expect(image).to_be_visible()
    page.goto("/farm")
    page.go_back()
    expect(page.get_by_label("Preset")).to_have_value("tiny_i2v")
    expect(hint).to_contain_text("image to video")
    expect(image).to_be_visible()


def test_a_running_batch_is_cancelled(page: Page) -> None:
    submit(page, "one\ntwo\nthree")
    expect(page.locator("ul.running li").first).to_be_visible(timeout=WAIT_MILLISECONDS)
    pill = page.locator(".glance .state.running")
    assert pill.evaluate("each => parseFloat(getComputedStyle(each).paddingLeft)") > 5
    page.on("dialog", lambda question: question.accept())
    page.get_by_role("button", name="Cancel batch").click()
    expect(page.get_by_role("status")).to_contain_text("Cancelled")
    expect(page.locator(".glance .state")).to_have_text("cancelled", timeout=WAIT_MILLISECONDS)


def test_a_mistake_is_told_where_it_was_made_and_the_rest_is_kept(page: Page) -> None:
    page.goto("/submit")
    page.get_by_label("Prompts", exact=True).fill("a cat")
    page.get_by_label("Size").fill("33x32")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_be_focused()
    expect(page.get_by_label("Size")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Size")).to_have_accessible_description(
        "width must be a multiple of 16 from 16 to 2048, got 33: 32 or 48 would do "
        "As 832x480; empty: the preset's."
    )
    expect(page.get_by_label("Prompts", exact=True)).to_have_value("a cat")
    for path, label in (("/submit", "Videos per prompt"), ("/schedules", "of them at most")):
        page.goto(path)
        page.get_by_label(label).fill("")
        page.get_by_label(label).press_sequentially("2e")
        page.locator(".form button.main").click()
        expect(page.get_by_label(label)).to_have_accessible_description(re.compile("got '2e'"))


def test_what_was_done_is_told_once_and_the_button_keeps_the_focus(page: Page) -> None:
    batch_id = paused(page)
    expect(page.get_by_role("status")).to_contain_text("Paused")
    expect(page.get_by_role("button", name="Resume")).to_be_focused()
    assert urlsplit(page.url).query == ""
    page.reload()
    expect(page.get_by_role("status")).to_have_count(0)
    page.goto("/batches")
    page.get_by_role("button", name=f"+1, sooner: {batch_id}").click()
    expect(page.get_by_role("status")).to_contain_text("is changed")
    expect(page.get_by_role("button", name=f"+1, sooner: {batch_id}")).to_be_focused()


def test_the_form_can_be_filled_in_and_sent_by_keyboard(page: Page) -> None:
    page.goto("/submit")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompts", exact=True)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.type("a cat")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Submit":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Submitted.", timeout=WAIT_MILLISECONDS)


def test_what_is_under_way_is_not_sent_again(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda made: sent.append(made.url) if made.method == "POST" else None)
    _type_schedule(page, "pressed")
    page.get_by_role("button", name="Add schedule").dblclick()
    expect(page.get_by_role("heading", name="pressed")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("The schedule is added.")
    assert [urlsplit(url).path for url in sent] == ["/schedules"]
    sent.clear()
    page.route("**/run", lambda asked: asked.fulfill(status=204))  # it stays where it is
    run = page.get_by_role("button", name="Run now")
    run.dblclick()
    run.click()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    assert [urlsplit(url).path for url in sent] == [
        "/schedules/pressed/run", "/schedules/pressed/pause",
    ]  # fmt: skip
    run.click()
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    run.click()
    page.wait_for_timeout(500)
    assert len(sent) == 4


def test_what_has_the_focus_in_the_gallery_is_seen(browser: Browser, address: str) -> None:
    """The bar with the button lies over the end of the window."""
    with window_of(browser, address) as window:
        batch_id = submit(window, "a cat\na dog\na cow")
        expect(window.locator("#counts")).to_contain_text("3 of 3 done", timeout=WAIT_MILLISECONDS)
        for size in ({"width": 390, "height": 500}, {"width": 700, "height": 500}):
            window.set_viewport_size(size)  # type: ignore[arg-type]
            window.goto(f"/gallery?batch={batch_id}")
            hidden = []
            for _ in range(30):
                window.keyboard.press("Tab")
                if window.evaluate(IS_BEHIND_BAR):
                    hidden.append(window.evaluate("document.activeElement.outerHTML"))
            assert hidden == []


def test_no_page_keeps_anybody_out(browser: Browser, page: Page, address: str) -> None:
    """axe finds nothing serious, nothing is wider than the window or cut off; light and dark."""
    batch_id = submit(page, "a cat " + 300 * "wide", Seed="1")
    expect(page.locator("#counts")).to_contain_text("1 of 1 done", timeout=WAIT_MILLISECONDS)
    job = page.locator("tbody th a").first.get_attribute("href")
    _add_schedule(page)
    paths = {
        "submit": "/submit",
        "batches": "/batches",
        "batch": f"/batches/{batch_id}",
        "job": str(job),
        "gallery": "/gallery",
        "schedules": "/schedules",
        "schedule": "/schedules/nightly",
        "farm": "/farm",
        "login": "/login",
        "error": "/jobs/99999",
    }
    found: list[Any] = []
    for size, scheme in (("desktop", "light"), ("phone", "dark")):
        width, height = SIZES[size]
        context = browser.new_context(
            base_url=address,
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        context.set_default_timeout(WAIT_MILLISECONDS)
        window = context.new_page()
        for name, path in paths.items():
            window.goto(path)
            for violation in Axe().run(window).response["violations"]:
                if violation["impact"] in SERIOUS:
                    nodes = [node["html"][:120] for node in violation["nodes"]]
                    found.append((size, name, violation["id"], nodes))
            if window.evaluate("document.documentElement.scrollWidth") > width:
                found.append((size, name, "wider than the window"))
            found += [(size, name, "cut off", text) for text in window.evaluate(CUT_OFF)]
            if SHOTS:
                window.screenshot(path=Path(SHOTS, f"{name}-{size}.png"), full_page=True)
        context.close()
    assert found == []


def _type_schedule(page: Page, name: str) -> None:
    page.goto("/schedules")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Rule").fill("30 2 * * *")
    page.get_by_label("Prompts").fill("a {{weekday}} cat")


def _add_schedule(page: Page) -> None:
    _type_schedule(page, "nightly")
    page.get_by_role("button", name="Add schedule").click()
    expect(page.get_by_role("heading", name="nightly")).to_be_visible()
