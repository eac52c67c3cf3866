"""系统里的 Chromium，不下载自己的；没有就跳过那些测试。"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH: install it (apt install chromium) to test the UI in a browser"
)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE_MILLISECONDS = 30_000


@contextmanager
def open_page(ui_url: str, *, timezone: str) -> Iterator[Page]:
    """浏览器与用户在同一个时区：网页只列到浏览器的今天。"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        page = browser.new_page(base_url=ui_url, viewport={"width": 1500, "height": 950}, timezone_id=timezone)
        page.set_default_timeout(_PATIENCE_MILLISECONDS)
        expect.set_options(timeout=_PATIENCE_MILLISECONDS)
        yield page
        browser.close()
