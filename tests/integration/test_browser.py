"""The pages in a real browser, over a farm of simulated devices.

Debian's package `chromium`, driven by Playwright; without it these tests are skipped.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.integration import browsing
from tests.integration.browsing import CHROMIUM, SERIOUS, WAIT_MILLISECONDS
from tests.integration.conftest import Farm, start_farm, stop_farm, until

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    # Playwright's own loop and pipes are closed when the interpreter ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PRESET = """{"model_path": "simulated", "denoising_step_list": [1000, 750, 500, 250],
 "target_video_length": 17, "target_width": 160, "target_height": 96, "fps": 8}"""
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
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


def test_a_batch_is_submitted_followed_and_played(
    page: Page, browser: Browser, address: str
) -> None:
    submit(page, "a cat boxes", Seed="7", Videos_per_prompt="2")
    expect(page.locator("#counts")).to_contain_text("0 of 2 done", timeout=WAIT_MILLISECONDS)
    running = page.locator("ul.running")
    # Told by events: the page itself is never loaded again.
    page.evaluate("window.isTheSame = true")
    expect(running).to_contain_text("denoise", timeout=WAIT_MILLISECONDS)
    step = running.inner_text()
    expect(running).not_to_have_text(step, timeout=WAIT_MILLISECONDS)
    expect(page.locator("#counts")).to_contain_text("2 of 2 done", timeout=WAIT_MILLISECONDS)
    assert page.evaluate("window.isTheSame")

    page.get_by_role("link", name="Gallery").last.click()
    expect(page.locator("article")).to_have_count(2)
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
    expect(page.locator(".differs")).to_have_text(["seed7", "seed8"])
    page.get_by_role("button", name="Play together").click()
    # Asked from outside: the page's policy lets nobody evaluate text inside it.
    all_run = "[...document.querySelectorAll('video')].every((video) => video.currentTime > 0.2)"
    until(lambda: page.evaluate(all_run), bool, seconds=WAIT_MILLISECONDS / 1000)
    with browser.new_context(base_url=address) as context:
        window = context.new_page()
        window.route("**/api/jobs/*/video", lambda asked: asked.fulfill(status=404))
        window.goto("/gallery")
        gone = window.get_by_text("it may have been deleted")
        expect(gone.first).to_be_visible(timeout=WAIT_MILLISECONDS)


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


def test_no_page_keeps_anybody_out(browser: Browser, page: Page, address: str) -> None:
    """axe finds nothing serious, nothing is wider than the window; light and dark."""
    batch_id = submit(page, "a cat", Seed="1")
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
            if SHOTS:
                window.screenshot(path=Path(SHOTS, f"{name}-{size}.png"), full_page=True)
        context.close()
    assert found == []


def _add_schedule(page: Page) -> None:
    page.goto("/schedules")
    page.get_by_label("Name").fill("nightly")
    page.get_by_label("Rule").fill("30 2 * * *")
    page.get_by_label("Prompts").fill("a {{weekday}} cat")
    page.get_by_role("button", name="Add schedule").click()
    expect(page.get_by_role("heading", name="nightly")).to_be_visible()
