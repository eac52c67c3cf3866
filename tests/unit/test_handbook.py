"""文档的页面：生成的与代码一致，每一页有两种语言的，点名的都在。网站怎样建成见 tests/acceptance/test_site.py。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from etl_assets.core.asset_folders import asset_folders
from handbook.chapters import CHAPTERS, DECISIONS, Chapter
from handbook.chinese import catalogue, say
from handbook.generated import REFERENCE
from handbook.llms import llms_txt
from handbook.reference.commands import commands_page
from handbook.reference.settings import settings_page
from handbook.repository import DOCS, LANGUAGES, ROOT
from handbook.staging import BrokenLinkError, Places, staged_text

HOW = "run `pdm run docs`, which writes the pages that are generated from the code"
# 别的资产放进来的拷贝里（pdm run test-new-assets），页面说的仍是产品自己的三个
of_the_three = pytest.mark.skipif(
    asset_folders() != ["customers", "leads", "orders"], reason="the pages are about the product's own assets"
)
IN_BOTH = [chapter for chapter in CHAPTERS if chapter.only is None]
README = Chapter("readme", "", "", "README")
"""不在网站里，也有两种语言的。"""


@of_the_three
@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.name)
def test_reference_says_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == REFERENCE[page](), HOW


def test_llms_txt_lists_every_page() -> None:
    assert (ROOT / "llms.txt").read_text(encoding="utf-8") == llms_txt(), HOW


def test_every_chinese_sentence_is_still_of_the_code() -> None:
    """改了英文而忘了旧的中文，它就没有人要了。"""
    # 在表格里 | 前面有一个 \
    pages = (commands_page("zh-CN") + settings_page("zh-CN")).replace("\\|", "|")
    unused = [english for english, chinese in catalogue().items() if chinese not in pages]
    assert unused == []


def test_sentence_without_chinese_is_named() -> None:
    with pytest.raises(LookupError, match=r"has no Chinese for 'Nobody said this\.'"):
        say("Nobody  said\nthis.", "zh-CN")


@pytest.mark.parametrize("chapter", [README, *IN_BOTH], ids=lambda chapter: chapter.name)
def test_both_languages_have_the_same_headings_blocks_tables_and_pictures(chapter: Chapter) -> None:
    english, chinese = (shape_of(chapter.source(language).read_text(encoding="utf-8")) for language in LANGUAGES)
    assert chinese == english


def shape_of(text: str) -> list[str]:
    """一页的骨架：标题的级别，代码块的语言与行数，表的行，图。"""
    shape = []
    blocks = re.split(r"^(```.*?^```)$", text, flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        if block.startswith("```"):
            shape.append(f"{block.splitlines()[0]} {len(block.splitlines())} lines")
            continue
        shape += re.findall(r"^#+(?= )|^\|(?= )|!\[.*?\]\((.*?)\)", block, re.MULTILINE)
    return shape


@pytest.mark.parametrize("chapter", [README, *IN_BOTH], ids=lambda chapter: chapter.name)
def test_both_languages_link_to_the_same_pages_each_in_its_own(chapter: Chapter) -> None:
    english, chinese = (links_of(chapter.source(language)) for language in LANGUAGES)
    folder = chapter.source("en").parent
    assert chinese == [link if twin is None else twin for link in english for twin in [twin_of(folder, link)]]


def links_of(page: Path) -> list[str]:
    """不含锚（标题的话不同）、代码块里的、换语言的；次序不算，句子的次序不同。"""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"(?<!\[中文)(?<!\[English)\]\(([^)\s#]+)", text)
    return sorted(links, key=lambda link: link.replace(".zh-CN", ""))


def twin_of(folder: Path, link: str) -> str | None:
    twin = re.sub(r"\.md$", ".zh-CN.md", link)
    return twin if twin != link and (folder / twin).is_file() else None


def test_every_page_is_in_the_site() -> None:
    pages = {page for page in DOCS.rglob("*.md") if page.parent != DECISIONS}
    assert pages == {
        chapter.source(each) for chapter in IN_BOTH for each in LANGUAGES if DOCS in chapter.source(each).parents
    }


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_links_to_files_that_exist(readme: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert len(links) > len(CHAPTERS) / 2
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_page_is_made_ready_for_the_site(tmp_path: Path) -> None:
    """另一种语言的链接去掉，仓库里的链接换成网站里的，列表前空一行，汉字不因换行而隔开；代码不动。"""
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.touch()
    page.write_text(
        "# 标题\n\n[English](page.md)\n\n第一行，\n第二行：\n- 见[别处](other.md#锚)与[外面](https://example.com/a)\n\n"
        "| `a\\|b` |\n\n```text\n[不动](nowhere.md)\n```\n",
        encoding="utf-8",
    )
    assert staged_text(page, "guides/page", Places({other: "other"}, {})) == (
        "# 标题\n\n第一行，第二行：\n\n- 见[别处](../other.md#锚)与[外面](https://example.com/a)\n\n"
        "| `a|b` |\n\n```text\n[不动](nowhere.md)\n```\n"
    )


def test_link_to_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[gone](gone.md)", encoding="utf-8")
    with pytest.raises(BrokenLinkError, match=r"page\.md: there is no gone\.md"):
        staged_text(page, "page", Places({}, {}))
