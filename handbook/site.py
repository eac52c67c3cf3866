"""由 Zensical 把摆好的页面建成网站：两种语言各一份，警告（坏的链接、没有的锚）就是错误。"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from handbook.chapters import PARTS
from handbook.repository import DOCS, LANGUAGES, ROOT, Language
from handbook.staging import stage_pages

SITE = ROOT / "build" / "site"

_NAMES: dict[Language, str] = {"en": "English", "zh-CN": "中文"}
_THEME_LANGUAGES: dict[Language, str] = {"en": "en", "zh-CN": "zh"}
_DECISIONS: dict[Language, str] = {"en": "Decisions", "zh-CN": "决定（英文）"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""NO_COLOR 它不理会。"""
_OTHER_HOME = re.compile(r'(?P<before>href="?(?:\.\./)+(?:en|zh-CN)/)index\.html(?P<after>"? hreflang)')
_EXTENSIONS = {
    # 锚与 GitHub 的一样：中文标题也有
    "toc": {"permalink": True, "slugify": {"object": "pymdownx.slugs.slugify", "kwds": {"case": "lower"}}},
    "pymdownx.highlight": {},
    "pymdownx.superfences": {},
}
_ENTRANCE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dayline</title>
<script>location.replace(navigator.language.startsWith("zh") ? "zh-CN/index.html" : "en/index.html")</script>
</head><body><p><a href="en/index.html">English</a> · <a href="zh-CN/index.html">中文</a></p></body></html>
"""


class SiteError(RuntimeError):
    """网站没有建成；话里有 Zensical 说的。"""


def build_site(site: Path) -> None:
    """建在 site 里，原来的换掉。

    :raises SiteError: Zensical 有一句警告。
    :raises BrokenLinkError: 见 `stage_pages`。
    """
    shutil.rmtree(site, ignore_errors=True)
    for language in LANGUAGES:
        _build(language, site / language)
    (site / "index.html").write_text(_ENTRANCE, encoding="utf-8")
    # llms.txt 点名的是 Markdown
    shutil.copy(ROOT / "llms.txt", site)
    shutil.copytree(DOCS, site / "docs")


def _build(language: Language, target: Path) -> None:
    # 它的缓存放在设置旁边
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage_pages(language, folder / "docs")
        config = folder / "mkdocs.yml"
        config.write_text(json.dumps(_settings(language), ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(config)]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode != 0:
            raise SiteError(
                f"the site in {_NAMES[language]} was not built:\n{_COLOUR.sub('', said.stdout + said.stderr)}"
            )
        for page in (folder / "site").rglob("*.html"):
            _keep_the_page(page, page.relative_to(folder / "site").as_posix())
        shutil.copytree(folder / "site", target)


def _keep_the_page(file: Path, name: str) -> None:
    """换语言时留在同一页：Zensical 的链接到另一种语言的首页。"""
    file.write_text(_OTHER_HOME.sub(rf"\g<before>{name}\g<after>", file.read_text(encoding="utf-8")), encoding="utf-8")


def _settings(language: Language) -> dict[str, Any]:
    """JSON 也是 YAML。字体、图标、搜索都在网站自己里面，打开它不向外要任何东西。"""
    parts = [{part.title(language): [{c.title(language): f"{c.name}.md"} for c in part.chapters]} for part in PARTS]
    parts[-1][PARTS[-1].title(language)].append({_DECISIONS[language]: "decisions/index.md"})
    others = [
        {"name": name, "link": f"../{each}/index.html", "lang": _THEME_LANGUAGES[each]} for each, name in _NAMES.items()
    ]
    return {
        "site_name": "dayline",
        "use_directory_urls": False,
        "docs_dir": "docs",
        "site_dir": "site",
        "nav": parts,
        "theme": {
            "name": "material",
            "language": _THEME_LANGUAGES[language],
            "font": False,
            "features": ["content.code.copy", "navigation.sections", "navigation.top", "toc.follow"],
        },
        "markdown_extensions": [{name: options} for name, options in _EXTENSIONS.items()],
        "plugins": [{"search": {}}],
        "extra": {"generator": False, "alternate": others},
    }
