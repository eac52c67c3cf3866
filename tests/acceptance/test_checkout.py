"""README 说的安装：贴一行就有 `etl`，占多少磁盘；命令块由 test_documents.py 跑。"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh-CN.md", "docs/first-hour.md", "docs/first-hour.zh-CN.md")


@pytest.mark.parametrize("page", PAGES)
def test_pasted_alias_is_etl_in_every_folder(page: str, tmp_path: Path) -> None:
    (line,) = re.findall(r"`(alias .*?)`", (ROOT / page).read_text(encoding="utf-8"))
    script = f"shopt -s expand_aliases\n{line}\ncd '{tmp_path}'\netl --version\n"
    printed = subprocess.run(["/bin/bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert printed.stdout.startswith("etl, version "), printed.stderr


@pytest.mark.parametrize("page", PAGES)
def test_disk_is_what_the_page_says(page: str) -> None:
    """开发的与基准的依赖也许也装了；差三成就不该那样写。"""
    (said,) = re.findall(r"([\d.]+) GB", (ROOT / page).read_text(encoding="utf-8"))
    folders = [folder for folder in (".venv", ".bootstrap") if (ROOT / folder).exists()]
    if len(folders) < 2:
        pytest.skip("not installed by run.py")
    printed = subprocess.run(["/usr/bin/du", "-sck", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    used = int(printed.stdout.splitlines()[-1].split()[0]) * 1024 / 1e9
    assert float(said) == pytest.approx(used, rel=0.3)
