"""每一天的结果给人看的样子：有几行、几行样例、按类型或阶段的笔数（网页把数字画成分区的曲线）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias

import sqlalchemy as sa

from etl_assets.core.arrays import array
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

_DAYS = sa.func.unnest(array("of_days", sa.Date)).table_valued(sa.column("day", sa.Date)).render_derived(name="of_days")
_DAY: sa.ColumnElement[date] = sa.literal_column("of_days.day", sa.Date)
"""写成文字：里层的查询用它的列，SQLAlchemy 会把这张表也放进它们的 FROM。"""
_AT_MOST = sa.bindparam("at_most", type_=sa.BigInteger)
_RAW_ROWS = (
    sa.select(sa.cast(day_accounts.c.account["raw"].astext, sa.BigInteger))
    .where(day_accounts.c.target == sa.bindparam("of_target", type_=sa.Text), day_accounts.c.day == _DAY)
    .scalar_subquery()
)
_IS_SMALL = sa.func.coalesce(_RAW_ROWS <= _AT_MOST, sa.true())


@dataclass(frozen=True)
class Preview:
    """一天的：total 是它的行数，counts 是名字 → 其中的笔数，加起来就是 total；rows 是样例，一行一个列名 → 值。"""

    total: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


Previews: TypeAlias = Mapping[date, Preview]
"""没有看的日子不在其中。"""


def has_previews(asset: str, days: DayRange, scope: Scope) -> bool:
    """只做变了的一段日子不看，事件等着它；别处定义的资产没有说过自己是怎样的一张表。"""
    return asset in descriptions() and (scope == "whole" or len(days) == 1)


def read_previews(engine: sa.Engine, settings: EtlSettings, asset: str, days: DayRange, scope: Scope) -> Previews:
    """这些天的订单，或各天有订单的客户与他们的商机；几天都是一条语句。

    只做变了的运行，在大的一天里不看：数一遍比运行本身还久。
    """
    target = settings.target_schema
    with translated_errors(), autocommitting(engine) as connection:
        rows = connection.execute(previewing(target, asset), preview_parameters(target, days, scope)).tuples().all()
    return parse_previews(asset, days, scope, rows)


def preview_parameters(target: str, days: DayRange, scope: Scope) -> dict[str, object]:
    return {"of_days": list(days), "of_target": target, "at_most": MANY_ROWS if scope == "changed" else None}


def parse_previews(asset: str, days: DayRange, scope: Scope, rows: Sequence[tuple[Any, ...]]) -> Previews:
    """整天做的，一行也没有的日子就是没有行；只做变了的，也许是没有看。"""
    previews = {day: Preview() for day in days} if scope == "whole" else {}
    is_counted = descriptions()[asset].counted is not None
    for day, of_day in groupby(rows, key=itemgetter(0)):
        found = list(of_day)
        counts: dict[str, int] = found[0][-1]
        previews[day] = Preview(
            total=sum(counts.values()),
            counts=counts if is_counted else {},
            rows=[dict(zip(_columns(asset), row[1:-1], strict=True)) for row in found],
        )
    return previews


@lru_cache(maxsize=16)
def previewing(schema: str, asset: str) -> sa.Select[Any]:
    """`read_previews` 的语句，给要与别的一起发的：一天几行样例，每一行都带着那一天各类的笔数。"""
    tables, counted = target_tables(schema), descriptions()[asset].counted
    table = tables.of_asset[asset]
    condition = rows_on(tables, asset, lambda day: day == _DAY)
    label = sa.func.coalesce(table.c[counted[1]], "none") if counted else sa.literal_column("'all'")
    kinds = sa.select(label.label("name"), sa.func.count().label("rows")).where(condition).group_by(sa.text("1"))
    of_kind = kinds.subquery("of_kind")
    counts = sa.select(sa.func.json_object_agg(of_kind.c.name, of_kind.c.rows)).scalar_subquery()
    sample = sa.select(*table.c[*_columns(asset)], counts.label("counts")).where(_IS_SMALL, condition)
    # 一天一天地来：每一天只读它自己的行，与一天的运行读的一样；行的次序也就是日子的次序
    of_day = sample.order_by(*table.primary_key).limit(SAMPLE_ROWS).lateral("of_day")
    return sa.select(_DAYS.c.day, *of_day.c).select_from(_DAYS.join(of_day, sa.true()))


def _columns(asset: str) -> tuple[str, ...]:
    return descriptions()[asset].previewed or descriptions()[asset].shown
