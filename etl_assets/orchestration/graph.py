"""从 Dagster 的定义读出资产图：有哪些资产、谁依赖谁，只写在那里。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dagster import AssetsDefinition, AssetSpec, DailyPartitionsDefinition

from etl_assets.ledger.graph import Asset, AssetGraph, GraphError

BY_CUSTOMER = "dayline/by_customer"
"""资产元数据里写着 True 的，按客户计算。"""


def graph_of(definitions: Iterable[Any]) -> AssetGraph:
    """代码位置的资产，不含外面来的（AssetSpec）；依赖外面来的不算上游。

    :raises GraphError: 转着圈，两个同名，依赖不存在的，或者不按天分区。
    """
    given = [(spec, one) for one in definitions for spec in ([one] if isinstance(one, AssetSpec) else one.specs)]
    made = [spec for spec, one in given if isinstance(one, AssetsDefinition) and one.is_materializable]
    sources = {_name(spec) for spec, _ in given} - {_name(spec) for spec in made}
    return AssetGraph.of(_asset(spec, sources) for spec in made)


def _asset(spec: AssetSpec, sources: set[str]) -> Asset:
    name = _name(spec)
    if not isinstance(spec.partitions_def, DailyPartitionsDefinition):
        raise GraphError(f"asset {name} has no daily partitions: give it partitions_def=daily_partitions(...)")
    upstreams = frozenset(dep.asset_key.to_user_string() for dep in spec.deps) - sources
    return Asset(name, upstreams - {name}, by_customer=spec.metadata.get(BY_CUSTOMER) is True)


def _name(spec: AssetSpec) -> str:
    return spec.key.to_user_string()
