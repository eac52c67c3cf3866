"""文档的网站：严格地建成，坏的链接就不成；打开它不向外要任何东西，中文的词搜得到。"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect

from handbook import site as site_module
from handbook import staging
from handbook.chapters import CHAPTERS
from handbook.repository import LANGUAGES
from handbook.site import SiteError, build_site

from .chromium import needs_chromium, open_page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("documents") / "site"
    build_site(built)
    return built


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  标准库的名字
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def test_site_is_built_strictly_and_has_every_page_in_both_languages(site: Path) -> None:
    wanted = [site / language / f"{chapter.name}.html" for language in LANGUAGES for chapter in CHAPTERS]
    assert [page for page in wanted if not page.is_file()] == []
    assert (site / "llms.txt").is_file()


def test_anchor_that_does_not_exist_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_broken_anchor(language: staging.Language, folder: Path) -> None:
        staging.stage_pages(language, folder)
        page = folder / "glossary.md"
        page.write_text(page.read_text(encoding="utf-8") + "\n[gone](operate.md#gone)\n", encoding="utf-8")

    monkeypatch.setattr(site_module, "stage_pages", with_a_broken_anchor)
    with pytest.raises(SiteError, match="anchor does not exist"):
        build_site(tmp_path / "site")


@needs_chromium
def test_language_is_changed_a_chinese_word_is_found_and_nothing_is_asked_of_other_hosts(address: str) -> None:
    with open_page(address, timezone="Asia/Shanghai") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto("/en/reference/settings.html")
        page.locator("a[hreflang=zh]").evaluate("link => link.click()")
        expect(page.get_by_role("heading", name="设置", exact=False).first).to_be_visible()
        page.locator("button.md-search__button").first.click()
        page.keyboard.type("备份")
        expect(page.get_by_text("备份与恢复").first).to_be_visible()
        assert asked
        assert [url for url in asked if not url.startswith(address)] == []
