"""A real browser, Debian's package `chromium` driven by Playwright, and where a farm's page is."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, sync_playwright

from tests.integration.conftest import START_SECONDS, Farm
from tests.waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SERIOUS = ("serious", "critical")  # of what axe finds
WAIT_MILLISECONDS = 60_000


@contextmanager
def started() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield browser
        browser.close()


def address_of(farm: Farm) -> str:
    """Once it answers."""
    lines = (farm.home / "up.log").read_text().splitlines()
    found = next(line.split()[1] for line in lines if line.startswith("web "))
    until(lambda: _answers(found), seconds=START_SECONDS)
    return found


def _answers(address: str) -> bool:
    try:
        port = urlsplit(address).port
        socket.create_connection(("127.0.0.1", port or 80)).close()
    except OSError:
        return False
    return True
