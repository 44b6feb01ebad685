"""The Gradio page in a real browser, over a farm that renders the tiny model: `make gradio`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from tests.integration import browsing
from tests.integration.conftest import Farm, start_farm, stop_farm

pytest.importorskip("gradio", reason="needs another pillow than the other tests: make gradio")
pytestmark = [
    pytest.mark.skipif(browsing.CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Playwright's own loop and pipes
]

STEP = re.compile(r"running, [a-z]+ \d+ of \d+")


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    folder = tmp_path_factory.mktemp("gradio")
    # Seconds to render: the page looks once a second.
    shape = {"target_width": 160, "target_height": 96, "target_video_length": 81, "fps": 16}
    slow = {"model_path": "tiny", "denoising_step_list": [1000, 750, 500, 250]} | shape
    (folder / "presets").mkdir()
    (folder / "presets" / "slow.json").write_text(json.dumps(slow))
    own = {"RUSHES_PRESETS_DIR": str(folder / "presets")}
    farm = start_farm(folder / "home", devices="cpu:1", **own)
    yield farm
    stop_farm(farm)


@pytest.fixture
def page(farm: Farm) -> Iterator[Page]:
    """The page, which fails the test for errors of its scripts and of our policy."""
    with browsing.started() as browser:
        page = browser.new_page()
        page.set_default_timeout(browsing.WAIT_MILLISECONDS)
        complaints: list[str] = []
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{browsing.address_of(farm)}/gradio")
        yield page
        # Browsers ask for an icon before Gradio names it.
        assert [told for told in complaints if "status of 404" not in told] == []


def test_one_prompt_is_followed_and_its_video_played(page: Page) -> None:
    page.get_by_label("Prompt").fill("a red kite over the sea")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="slow", exact=True).click()
    page.get_by_role("button", name="Render").click()
    told = page.get_by_text("seed 11:")
    expect(told).to_contain_text(STEP, timeout=browsing.WAIT_MILLISECONDS)
    step = told.inner_text()
    expect(told).not_to_have_text(step, timeout=browsing.WAIT_MILLISECONDS)
    expect(told).to_contain_text("succeeded", timeout=browsing.WAIT_MILLISECONDS)
    assert _played(page) == [160, 96]
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in browsing.SERIOUS]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []


def test_a_first_frame_needs_a_preset_that_takes_one(page: Page, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.radial_gradient("L").convert("RGB").save(image)
    page.get_by_label("Prompt").fill("it moves")
    page.locator("input[type=file]").set_input_files(image)
    expect(page.get_by_role("button", name="Remove Image")).to_be_visible()
    page.get_by_role("button", name="Render").click()
    expect(page.get_by_text("take an image-to-video preset")).to_be_visible()
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="tiny_i2v", exact=True).click()
    page.get_by_role("button", name="Render").click()
    page.locator("video").wait_for()
    assert _played(page)[0] > 0


def _played(page: Page) -> list[int]:
    """Width and height of the video, once it is seen to run."""
    size: list[int] = page.locator("video").evaluate(
        """async (video) => {
          await video.play();
          await new Promise((done) => video.addEventListener("timeupdate", () =>
            video.currentTime > 0.1 && done()));
          return [video.videoWidth, video.videoHeight];
        }"""
    )
    return size
