"""etl_assets 里的每个文件夹都有位置：是一个资产，或者在 import-linter 的层里。"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from etl_assets.core.asset_folders import asset_folders, descriptions

ROOT = Path(__file__).parents[2]


def test_every_folder_is_an_asset_or_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["etl_assets"])
    placed = {name for layer in layers for name in re.split(r"\s*\|\s*", layer)} | set(asset_folders())
    modules = {
        path.stem for path in (ROOT / "etl_assets").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__"} <= placed


def test_assets_come_after_those_that_their_columns_are_computed_from() -> None:
    assert sorted(descriptions()) == asset_folders()
    before: set[str] = set()
    for asset, description in descriptions().items():
        read = {source.partition(".")[0] for sources in description.sources.values() for source in sources}
        assert read & set(descriptions()) <= before | {asset}
        before.add(asset)
