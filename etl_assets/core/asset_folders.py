"""有哪些资产：`etl_assets` 里有 asset.py 的文件夹。看文件夹就知道，不导入它们，更不导入 Dagster。"""

from __future__ import annotations

from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from etl_assets.core.errors import PermanentError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

    from etl_assets.core.asset_description import AssetDescription, TableCheck
    from etl_assets.core.asset_events import AssetEvent

_PACKAGE = Path(__file__).parents[1]


def asset_folders() -> list[str]:
    """资产的名字，按字母。"""
    return sorted(module.parent.name for module in _PACKAGE.glob("*/asset.py"))


def import_of(asset: str, module: str) -> ModuleType:
    """资产的文件夹里的一个模块。"""
    return import_module(f"{_PACKAGE.name}.{asset}.{module}")


def has_module(asset: str, module: str) -> bool:
    return (_PACKAGE / asset / f"{module}.py").is_file()


def checks_of(asset: str) -> Mapping[str, TableCheck]:
    """资产的 checks.py 里的检查，名字 → 检查；可以没有。命令的帮助用不着它们，所以不在描述里。"""
    found: Mapping[str, TableCheck] = import_of(asset, "checks").CHECKS if has_module(asset, "checks") else {}
    return found


def events_of(asset: str) -> Sequence[AssetEvent[Any]]:
    """资产的 events.py 里的，它自己认得的事件；可以没有。"""
    found: Sequence[AssetEvent[Any]] = import_of(asset, "events").EVENTS if has_module(asset, "events") else ()
    return found


@lru_cache(maxsize=1)
def descriptions() -> Mapping[str, AssetDescription]:
    """资产 → 它的描述。一列由哪些资产的列算出，那些资产就在前面；互不相干的按字母。

    :raises PermanentError: 几个资产的列互相算出。
    """
    found: dict[str, AssetDescription] = {
        asset: import_of(asset, "description").DESCRIPTION for asset in asset_folders()
    }
    feeding = {
        asset: {source.partition(".")[0] for sources in description.sources.values() for source in sources}
        & found.keys() - {asset}
        for asset, description in found.items()
    }
    try:
        in_order = upstreams_first(feeding)
    except CycleError as error:
        raise PermanentError(
            f"the columns of {' -> '.join(error.args[1])} are computed from each other: look at `sources`"
        ) from error
    return MappingProxyType({asset: found[asset] for asset in in_order})


def upstreams_first(upstreams: Mapping[str, Collection[str]]) -> list[str]:
    """名字 → 紧排在它前面的；同一层的按名字，谁来排都一样。

    :raises graphlib.CycleError: 有几个互相在前面；args[1] 是它们。
    """
    sorter = TopologicalSorter(upstreams)
    sorter.prepare()
    in_order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        in_order += ready
        sorter.done(*ready)
    return in_order
