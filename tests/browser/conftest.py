"""A headless Chromium, or a reason why there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")  # while Playwright runs, no other test of this process can use asyncio.run
def browser() -> Iterator[Any]:
    """The browser at $E3RL_BROWSER, or the first Chromium on the path."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    found = os.environ.get("E3RL_BROWSER") or next((p for n in NAMES if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("no Chromium: install one, or name it in E3RL_BROWSER")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test when a script in it fails or breaks the page's security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.set_default_timeout(20_000)
    yield opened
    context.close()
    assert problems == []
