"""一步的失败：运行页上就是那一句话，种类写在元数据里，工人凭它决定何时再试。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from dagster import Failure, MetadataValue

from etl_assets.core.errors import EtlError, FailureKind

_KIND = "failure_kind"


def failure_of(error: EtlError) -> Failure:
    return Failure(description=str(error), metadata={_KIND: error.kind})


def kind_in(metadata: Mapping[str, MetadataValue]) -> FailureKind | None:
    """`failure_of` 写下的种类；不是它写的是 None。"""
    value = metadata[_KIND].value if _KIND in metadata else None
    return next((kind for kind in get_args(FailureKind) if kind == value), None)
