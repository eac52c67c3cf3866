"""一次导入：在一个事务里登记 import_tasks、把文件 COPY 进 raw_orders，要么全有，要么全无。"""

from __future__ import annotations

import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from uuid import UUID, uuid4, uuid5

import polars as pl
import sqlalchemy as sa
from psycopg.copy import QueuedLibpqWriter
from sqlalchemy.dialects.postgresql import insert

from bridge.imports.choosing import open_file
from bridge.imports.earlier_versions import OrderSample, find_turned_back
from bridge.imports.file_rows import FileRows
from bridge.imports.files.source import unreadable
from bridge.imports.known_files import KnownFileError, claim_content, find_known, hash_content, remember
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.conventions import GivenConventions
from bridge.imports.orders.mapping import map_columns
from bridge.imports.orders.statuses import Statuses
from bridge.imports.preview import PreviewBuilder
from bridge.imports.reading import ImportReport, Progress, Reading
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import NO_PROFILE, FileFormat, Profile
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
    choose_profile: bool = False,
    file: FileFormat | None = None,
    shop: str | None = None,
    given: GivenConventions | None = None,
    mapping: Mapping[str, str] | None = None,
    create_shops: bool = False,
    skip_bad_rows: bool = False,
    rejected_folder: Path | None = None,
    again: bool = False,
    dry_run: bool = False,
    on_progress: Progress | None = None,
    committing: Callable[[UUID], AbstractContextManager[None]] = lambda _import_id: nullcontext(),
) -> ImportReport:
    """导入一个文件；返回时事务已经提交。试运行只读文件、查店名，什么也不写。

    DATA_IMPORT_COMPLETED 由调用者随后发布。若进程死在提交与发布之间，导入已经完整地在库里，只是没有人知道：
    `etl imports` 看得到它，`etl publish` 补发事件；补发几次都无妨。

    :param choose_profile: 没有给配置时，表头认得出平台就用随包的那个。
    :param file: 文件的样子，盖过配置的 [file]。
    :param mapping: raw_orders 的列 → 来源的列，盖过配置；空串表示文件里没有这一列。
    :param given: 数与时刻怎样写，盖过配置；没说的由值来定。
    :param rejected_folder: 跳过的坏行写在哪里；缺省在文件旁边。
    :param again: 导入过的内容也再导入一次。
    :param on_progress: 收到（已处理字节，总字节）。
    :param committing: 提交这次导入的一步在它里面：进去之前什么也没有，出来以后就在库里了。
    :raises KnownFileError: 同样的内容导入过了。
    :raises ImportFileError: 文件不能导入；没有 skip_bad_rows 时一个坏行就够。
    :raises DatabaseUnavailableError: 连不上数据库。
    """
    started = time.monotonic()
    try:
        version = _look_at(path)
        content_hash = hash_content(path)
    except OSError as error:
        raise unreadable(path, error) from error
    # 打开之前就问：导入过的文件不必读一遍才拒绝
    with translated_errors(), engine.begin() as connection:
        known = find_known(connection, settings, content_hash)
    if known and not (again or dry_run):
        raise KnownFileError(path, known, settings)
    opened = open_file(path, file or (profile or NO_PROFILE).file, profile, choose=choose_profile)
    columns = map_columns(opened.source, opened.profile, overrides=mapping or {}, shop=shop)
    statuses = Statuses(settings.cancelled_statuses, settings.completed_statuses)
    builder = OrderBuilder(
        opened.source, columns, settings.timezone, given or GivenConventions(), opened.file.lines, statuses
    )
    sample, file_rows = OrderSample(), FileRows()
    with (
        BadRows(path, write=skip_bad_rows and not dry_run, folder=rejected_folder) as bad_rows,
        translated_errors(),
        engine.connect() as connection,
    ):
        if not (again or dry_run):
            # 占住之后再问一遍：等到的也许正是刚导完它的那一个
            claim_content(connection, content_hash)
            if known := find_known(connection, settings, content_hash):
                raise KnownFileError(path, known, settings)
        preview = PreviewBuilder(columns, opened.source, settings) if dry_run else None

        def look_at(orders: pl.DataFrame) -> None:
            sample.add(orders)
            file_rows.add(orders)
            if preview:
                preview.add(orders)

        reading = Reading(
            builder,
            bad_rows,
            skip_bad_rows=skip_bad_rows,
            on_orders=look_at,
            on_progress=on_progress,
            settings=settings,
        )
        report = reading.report
        report.profile, report.profile_chosen = opened.profile.name if opened.profile else None, opened.chosen
        report.imported_before = known
        import_id = None if preview else _register(connection, path.name)
        if import_id is None:
            deque(reading.orders(), maxlen=0)
        else:
            _copy_orders(connection, import_id, reading)
        # 在完成之前问：完成了的这一次就是每一单最新的版本，此前的便看不见了
        report.turned_back = find_turned_back(connection, settings, sample, report.last_ordered_at)
        if import_id is not None:
            _complete(connection, import_id, report.rows)
            remember(connection, import_id, content_hash, file_rows, report.first_ordered_at, report.last_ordered_at)
            if create_shops:
                report.created_shops = _create_shops(connection, reading.shops)
        # 建过之后才问：剩下的才真的没有人认识
        report.unknown_shops = {name: reading.shops[name] for name in _find_unknown_shops(connection, reading.shops)}
        if import_id is not None:
            _check_unchanged(path, version)
            with committing(import_id):
                # 提交之前落地：盘满了写不了，就整个不导入；反过来，跳过的行就没有下落
                report.rejected_file = bad_rows.save()
                connection.commit()
            report.import_id = import_id
    if preview:
        report.preview = preview.preview
    report.skipped_rows = bad_rows.count
    report.seconds = time.monotonic() - started
    logger.info(
        "file imported",
        file=path.name,
        import_id=str(report.import_id),
        rows=report.rows,
        skipped_rows=report.skipped_rows,
    )
    return report


def _register(connection: sa.Connection, source_name: str) -> UUID:
    """登记导入；别的事务在提交之后才看得到它与它的行。"""
    # COPY 是一条语句，文件多大就要多久；它的时限由读文件的人掌握
    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
    import_id = uuid4()
    connection.execute(
        sa.insert(import_tasks).values(
            import_id=import_id,
            source_name=_as_text(source_name),
            status="pending",
            created_at=sa.func.clock_timestamp(),
        )
    )
    return import_id


def _as_text(name: str) -> str:
    """文件名可以是任何字节（GBK 的压缩包里解出来的），PostgreSQL 只收文字。"""
    return os.fsencode(name).decode(errors="backslashreplace")


def _look_at(path: Path) -> tuple[int, int, int]:
    """文件写过就不同。"""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_unchanged(path: Path, version: tuple[int, int, int]) -> None:
    """读它好几遍：还在下载、又存了一次的，读到的一半旧一半新。"""
    try:
        is_same = _look_at(path) == version
    except OSError:
        is_same = False
    if not is_same:
        raise ImportFileError(path, "the file changed while it was read", advice="import it again when it is complete")


def _complete(connection: sa.Connection, import_id: UUID, rows: int) -> None:
    connection.execute(
        sa.update(import_tasks)
        .where(import_tasks.c.import_id == import_id)
        .values(status="completed", row_count=rows, completed_at=sa.func.clock_timestamp())
    )


def _copy_orders(connection: sa.Connection, import_id: UUID, reading: Reading) -> None:
    """一条 COPY 写完所有块；写在另一个线程里等 PostgreSQL，这里同时准备下一块。

    先开始 COPY 再读文件：读得再久，事务也不算闲着（idle_in_transaction_session_timeout）。
    """
    preparer = connection.dialect.identifier_preparer
    names = ", ".join(preparer.quote(name) for name in ("import_id", *reading.columns))
    statement = f"COPY {preparer.format_table(raw_orders)} ({names}) FROM STDIN (FORMAT csv)"
    with (
        driver_of(connection).cursor() as cursor,
        cursor.copy(statement.encode(), writer=QueuedLibpqWriter(cursor)) as copy,
    ):
        for orders in reading.orders():
            copy.write(_to_csv(orders.select(pl.lit(str(import_id)).alias("import_id"), *reading.columns)))


def _to_csv(orders: pl.DataFrame) -> memoryview:
    """会话时区是 UTC，所以时刻写成没有时区的 UTC。"""
    buffer = io.BytesIO()
    orders.with_columns(pl.col(pl.Datetime("us", "UTC")).dt.replace_time_zone(None)).write_csv(
        buffer, include_header=False
    )
    return buffer.getbuffer()


def _find_unknown_shops(connection: sa.Connection, shops: Iterable[str]) -> list[str]:
    names = list(shops)
    known = connection.scalars(
        sa.select(shop_configs.c.shop_name).where(
            shop_configs.c.shop_name == sa.any_(sa.literal(names, sa.ARRAY(sa.Text)))
        )
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
