"""一次导入：在一个事务里登记 import_tasks、把文件 COPY 进 raw_orders，要么全有，要么全无。"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import UUID, uuid4, uuid5

import polars as pl
import sqlalchemy as sa
from psycopg.copy import QueuedLibpqWriter
from sqlalchemy.dialects.postgresql import insert

from bridge.imports.mapping import map_columns
from bridge.imports.orders import OrderBuilder
from bridge.imports.problems import BadRows
from bridge.imports.profile import NO_PROFILE, FileFormat, Profile
from bridge.imports.reading import ImportReport, Progress, Reading
from bridge.imports.source import open_source
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs
from etl_assets.services.copy_out import driver_of

logger = get_logger(__name__)

# 由店名算出 shop_id：两处各自建的同名店是同一个 id
SHOP_NAMESPACE = UUID("5a0c2d0e-6c1b-4a57-9d55-6f0d0c1f7e3a")
CREATED_SHOP_PLATFORM = "import"


def import_file(
    engine: sa.Engine,
    path: Path,
    *,
    settings: EtlSettings,
    profile: Profile | None = None,
    file: FileFormat | None = None,
    shop: str | None = None,
    mapping: Mapping[str, str] | None = None,
    create_shops: bool = False,
    skip_bad_rows: bool = False,
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> ImportReport:
    """导入一个文件；返回时事务已经提交。试运行只读文件、查店名，什么也不写。

    DATA_IMPORT_COMPLETED 由调用者随后发布。若进程死在提交与发布之间，导入已经完整地在库里，只是没有人知道：
    `etl imports` 看得到它，`etl publish` 补发事件；补发几次都无妨。

    :param file: 文件的样子，盖过配置的 [file]。
    :param mapping: raw_orders 的列 → 来源的列，盖过配置；空串表示文件里没有这一列。
    :param on_progress: 收到（已处理字节，总字节）。
    :raises ImportFileError: 文件不能导入；没有 skip_bad_rows 时一个坏行就够。
    :raises DatabaseUnavailableError: 连不上数据库。
    """
    started = time.monotonic()
    source = open_source(path, file or (profile or NO_PROFILE).file)
    columns = map_columns(source, profile, overrides=mapping or {}, shop=shop)
    builder = OrderBuilder(source, columns, settings.timezone)
    with BadRows(path, write=skip_bad_rows and not dry_run) as bad_rows:
        reading = Reading(builder, bad_rows, skip_bad_rows=skip_bad_rows, on_progress=on_progress)
        report = reading.report
        with translated_errors(), engine.begin() as connection:
            if dry_run:
                deque(reading.orders(), maxlen=0)
            else:
                report.import_id = _load(connection, path.name, reading)
                if create_shops:
                    report.created_shops = _create_shops(connection, reading.shops)
            report.unknown_shops = {name: reading.shops[name] for name in _find_unknown_shops(connection, reading.shops)}
    report.skipped_rows, report.rejected_file = bad_rows.count, bad_rows.path
    report.seconds = time.monotonic() - started
    logger.info("file imported", file=path.name, import_id=str(report.import_id), rows=report.rows, skipped_rows=report.skipped_rows)
    return report


def _load(connection: sa.Connection, source_name: str, reading: Reading) -> UUID:
    """登记导入、COPY 全部订单、标成完成；别的事务在提交之后才看得到。"""
    # COPY 是一条语句，文件多大就要多久；它的时限由读文件的人掌握
    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
    import_id = uuid4()
    connection.execute(
        sa.insert(import_tasks).values(import_id=import_id, source_name=source_name, status="pending", created_at=sa.func.clock_timestamp())
    )
    _copy_orders(connection, import_id, reading)
    connection.execute(
        sa.update(import_tasks)
        .where(import_tasks.c.import_id == import_id)
        .values(status="completed", row_count=reading.report.rows, completed_at=sa.func.clock_timestamp())
    )
    return import_id


def _copy_orders(connection: sa.Connection, import_id: UUID, reading: Reading) -> None:
    """一条 COPY 写完所有块；写在另一个线程里等 PostgreSQL，这里同时准备下一块。

    先开始 COPY 再读文件：读得再久，事务也不算闲着（idle_in_transaction_session_timeout）。
    """
    preparer = connection.dialect.identifier_preparer
    names = ", ".join(preparer.quote(name) for name in ("import_id", *reading.columns))
    statement = f"COPY {preparer.format_table(raw_orders)} ({names}) FROM STDIN (FORMAT csv)"
    with driver_of(connection).cursor() as cursor, cursor.copy(statement.encode(), writer=QueuedLibpqWriter(cursor)) as copy:
        for orders in reading.orders():
            copy.write(_to_csv(orders.select(pl.lit(str(import_id)).alias("import_id"), *reading.columns)))


def _to_csv(orders: pl.DataFrame) -> memoryview:
    """会话时区是 UTC，所以时刻写成没有时区的 UTC。"""
    buffer = io.BytesIO()
    orders.with_columns(pl.col(pl.Datetime("us", "UTC")).dt.replace_time_zone(None)).write_csv(buffer, include_header=False)
    return buffer.getbuffer()


def _find_unknown_shops(connection: sa.Connection, shops: Iterable[str]) -> list[str]:
    names = list(shops)
    known = connection.scalars(
        sa.select(shop_configs.c.shop_name).where(shop_configs.c.shop_name == sa.any_(sa.literal(names, sa.ARRAY(sa.Text))))
    )
    return sorted(set(names).difference(known))


def _create_shops(connection: sa.Connection, shops: Iterable[str]) -> list[str]:
    """建立不认识的店；别人同时建了同一个也无妨。"""
    missing = [
        {"shop_id": uuid5(SHOP_NAMESPACE, name), "shop_name": name, "platform": CREATED_SHOP_PLATFORM}
        for name in _find_unknown_shops(connection, shops)
    ]
    if not missing:
        return []
    statement = insert(shop_configs).values(missing).on_conflict_do_nothing().returning(shop_configs.c.shop_name)
    return sorted(connection.scalars(statement))
