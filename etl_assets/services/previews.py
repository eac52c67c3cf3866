"""一天的结果给人看的样子：几行样例，与按类型或阶段的笔数（网页把它们画成分区的曲线）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import autocommitting
from etl_assets.core.etl_tables import day_accounts
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.ledger.marking import Scope
from etl_assets.services.day_rows import rows_on

SAMPLE_ROWS = 5
MANY_ROWS = 100
"""只做变了的运行，一天的原始行不止这么多就不看样例：数一千个订单的客户与商机要二十毫秒，比它们的 ETL 还久。"""

_DAY = sa.bindparam("of_day", type_=sa.Date)
_AT_MOST = sa.bindparam("at_most", type_=sa.BigInteger)
_RAW_ROWS = (
    sa.select(sa.cast(day_accounts.c.account["raw"].astext, sa.BigInteger))
    .where(day_accounts.c.target == sa.bindparam("of_target", type_=sa.Text), day_accounts.c.day == _DAY)
    .scalar_subquery()
)
_IS_SMALL = sa.func.coalesce(_RAW_ROWS <= _AT_MOST, sa.true())


@dataclass(frozen=True)
class Preview:
    """rows 是样例，一行一个列名 → 值；counts 是名字 → 笔数。"""

    rows: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)


def has_preview(asset: str, days: DayRange) -> bool:
    """一天的运行；别处定义的资产没有说过自己是怎样的一张表。"""
    return len(days) == 1 and asset in descriptions()


def read_preview(engine: sa.Engine, settings: EtlSettings, asset: str, day: date, scope: Scope) -> Preview:
    """这一天的订单，或这一天有订单的客户与他们的商机。

    只做变了的运行，在大的一天里不看：数一遍比运行本身还久。网页上留着的是整天做的那次。
    """
    target = settings.target_schema
    with translated_errors(), autocommitting(engine) as connection:
        return parse_preview(asset, connection.execute(previewing(target, asset), preview_parameters(target, day, scope)).tuples().all())


def preview_parameters(target: str, day: date, scope: Scope) -> dict[str, object]:
    return {"of_day": day, "of_target": target, "at_most": MANY_ROWS if scope == "changed" else None}


def parse_preview(asset: str, rows: Sequence[tuple[Any, ...]]) -> Preview:
    shown = [dict(zip(_columns(asset), row[:-1], strict=True)) for row in rows]
    return Preview(rows=shown, counts=rows[0][-1] or {} if rows else {})


@lru_cache(maxsize=16)
def previewing(schema: str, asset: str) -> sa.Select[Any]:
    """`read_preview` 的语句，给要与别的一起发的：样例的每一行都带着各类的笔数。"""
    tables, counted = target_tables(schema), descriptions()[asset].counted
    table = tables.of_asset[asset]
    condition = rows_on(tables, asset, lambda day: day == _DAY)
    counts: sa.ColumnElement[Any] = sa.null()
    if counted is not None:
        label = table.c[counted[1]]
        of_day = (
            sa.select(sa.func.coalesce(label, "none").label("name"), sa.func.count().label("rows"))
            .where(condition)
            .group_by(label)
            .subquery("of_day")
        )
        counts = sa.select(sa.func.json_object_agg(of_day.c.name, of_day.c.rows)).scalar_subquery()
    sample = sa.select(*table.c[*_columns(asset)], counts.label("counts")).where(_IS_SMALL, condition)
    return sample.order_by(*table.primary_key).limit(SAMPLE_ROWS)


def _columns(asset: str) -> tuple[str, ...]:
    return descriptions()[asset].previewed or descriptions()[asset].shown
