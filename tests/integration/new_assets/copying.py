"""一份代码，有没有 products 与 daily_report 两个文件夹，由我们定；别的都一样。"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[3]
NEW_ASSETS = Path(__file__).parent
_NAMES = ("products", "daily_report")
_MADE_HERE = (".git", ".venv", ".bootstrap", ".pdm-*", ".*_cache", ".hypothesis", "__pycache__", "build", "results")


def copy_with_new_assets(folder: Path) -> Path:
    copy_without_new_assets(folder)
    for name in _NAMES:
        shutil.copytree(NEW_ASSETS / name, folder / "etl_assets" / name, ignore=shutil.ignore_patterns(*_MADE_HERE))
    return folder


def copy_without_new_assets(folder: Path) -> Path:
    """这份代码自己也许已经放进了它们。"""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_MADE_HERE))
    for name in _NAMES:
        shutil.rmtree(folder / "etl_assets" / name, ignore_errors=True)
    return folder
