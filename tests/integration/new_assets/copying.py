"""一份代码，多了 products 与 daily_report 两个文件夹，别的都一样。"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[3]
NEW_ASSETS = Path(__file__).parent


def copy_with_new_assets(folder: Path) -> Path:
    not_compiled = shutil.ignore_patterns("__pycache__")
    for package in ("bridge", "etl_assets", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=not_compiled)
    for file in ("pyproject.toml", "workspace.yaml"):
        shutil.copy(ROOT / file, folder)
    for new in ("products", "daily_report"):
        shutil.copytree(NEW_ASSETS / new, folder / "etl_assets" / new, ignore=not_compiled)
    return folder
