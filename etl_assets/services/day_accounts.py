"""每天的账记在表里：整天做的重新数过，只做变了的接着算（orders/carrying.py）。"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array, insert_given, unnest
from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.etl_tables import TARGET, counted_imports, day_accounts
from etl_assets.services.accounting import DayAccount
from etl_assets.services.warned_rows import DayWarnings


@dataclass(frozen=True)
class StoredDay:
    """一天存着的账与警告，是 run_id 做完这一天时的；后来又由不记账的旧版本做过的，对不上台账。"""

    account: DayAccount
    warnings: DayWarnings | None
    run_id: str

    @classmethod
    def parse(cls, day: date, stored: Mapping[str, Any]) -> StoredDay:
        warnings = stored["warnings"]
        account = {name: value for name, value in stored.items() if name not in ("warnings", "run_id")}
        return cls(DayAccount(day=day, **account), DayWarnings(**warnings) if warnings else None, stored["run_id"])

    def format(self) -> dict[str, Any]:
        account = {name: value for name, value in asdict(self.account).items() if name not in ("day", "lost_examples")}
        return {**account, "warnings": asdict(self.warnings) if self.warnings else None, "run_id": self.run_id}


def read_stored_days(
    connection: sa.Connection, target: str, days: Iterable[date], import_ids: Iterable[str]
) -> tuple[Mapping[date, StoredDay], pl.DataFrame]:
    """存着账的日子，与这些导入里账上已有的：day、import_id、rows，一行一天的一次导入。"""
    parameters = {"of_target": target, "days": sorted(days), "import_ids": sorted(set(import_ids))}
    rows = connection.execute(_STORED_DAYS, parameters).all()
    counted = [(row.day, import_id, count) for row in rows for import_id, count in (row.counted or {}).items()]
    schema = {"day": pl.Date, "import_id": pl.String, "rows": pl.Int64}
    return {row.day: StoredDay.parse(row.day, row.account) for row in rows}, pl.DataFrame(
        counted, schema=schema, orient="row"
    )


def store_counted_days(
    connection: sa.Connection, target: str, days: DayRange, stored: Iterable[StoredDay], counted: pl.DataFrame
) -> None:
    """整天数过的：存下账，与账上各次导入的行数（day、import_id、rows），先前的作废。"""
    # 先全忘掉：其间撤回的导入不在这次的账上，它的行数不能留着
    connection.execute(_FORGET_COUNTED, {"of_target": target, **bound(days)})
    if values := values_to_store(target, list(stored), counted):
        execute_compiled(connection, STORE, values)


def forget_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """这些天的账不作数了：它们下一次整天做。"""
    connection.execute(_FORGET_DAYS, {"of_target": target, "days": sorted(days)})


def forget_accounts_with(
    connection: sa.Connection, target: str, import_ids: Iterable[UUID], days: Iterable[date]
) -> None:
    """这些天里，账上有这些导入的行的，账不作数了：人点的运行见过它们，而它们撤回了，没有一行在表里。"""
    connection.execute(
        _FORGET_WITH,
        {"of_target": target, "import_ids": [str(import_id) for import_id in import_ids], "days": list(days)},
    )


def values_to_store(target: str, days: Sequence[StoredDay], counted: pl.DataFrame) -> dict[str, object] | None:
    """`STORE` 的参数：这些天的账，与账上添的各次导入的行数（day、import_id、rows）；没有什么要存的是 None。"""
    if not days and counted.is_empty():
        return None
    return {
        "of_target": target,
        "days": [day.account.day for day in days],
        "accounts": [json.dumps(day.format()) for day in days],
        **{f"{counted_imports.name}_{name}": counted[name].to_list() for name in counted.columns},
    }


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_IMPORT_IDS = array("import_ids", sa.Uuid(as_uuid=False))
_IS_COUNTED = sa.and_(
    counted_imports.c.target == day_accounts.c.target,
    counted_imports.c.day == day_accounts.c.day,
    counted_imports.c.import_id == sa.any_(_IMPORT_IDS),
)
_COUNTED = (
    sa.select(sa.func.jsonb_object_agg(counted_imports.c.import_id, counted_imports.c.rows, type_=pg.JSONB))
    .where(_IS_COUNTED)
    .scalar_subquery()
)
_OF_DAYS = sa.and_(day_accounts.c.target == TARGET, day_accounts.c.day == sa.any_(array("days", sa.Date)))
_STORED_DAYS = sa.select(day_accounts.c.day, day_accounts.c.account, _COUNTED.label("counted")).where(_OF_DAYS)
_FORGET_COUNTED = sa.delete(counted_imports).where(
    counted_imports.c.target == TARGET, counted_imports.c.day.between(FIRST_DAY, LAST_DAY)
)
_FORGET_DAYS = sa.delete(day_accounts).where(_OF_DAYS)
_FORGET_WITH = _FORGET_DAYS.where(sa.select(counted_imports.c.rows).where(_IS_COUNTED).exists())


def _store_statement() -> pg.Insert:
    stored = unnest("stored", day=array("days", sa.Date), account=array("accounts", sa.Text))
    count = insert_given(counted_imports, ["day", "import_id", "rows"]).cte("counting")
    accounts = sa.select(TARGET, stored.c.day, sa.cast(stored.c.account, pg.JSONB))
    insert = pg.insert(day_accounts).from_select(["target", "day", "account"], accounts)
    return insert.on_conflict_do_update(
        index_elements=["target", "day"], set_={"account": insert.excluded.account}
    ).add_cte(count)


STORE = _store_statement()
