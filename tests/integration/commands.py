"""命令在测试里用的引擎与设置：不读环境，不连正在运行的栈。"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
import sqlalchemy as sa

from bridge import cli
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings


def use_in_commands(
    monkeypatch: pytest.MonkeyPatch,
    *,
    engine: sa.Engine | None = None,
    settings: EtlSettings | None = None,
    bridge_settings: BridgeSettings | None = None,
) -> None:
    """每个命令的模块各自导入了这三个函数；没有给出的照旧。"""
    given = {"get_engine": engine, "get_settings": settings, "get_bridge_settings": bridge_settings}
    for found in pkgutil.iter_modules(cli.__path__, "bridge.cli."):
        module = import_module(found.name)
        for name, value in given.items():
            if value is not None and hasattr(module, name):
                monkeypatch.setattr(module, name, lambda value=value: value)
