"""台账的簿记过了保留期：哪个导入要求过哪些天、早已不在的导入的拒收行与文件、发不出去的完成事件。

每个函数一口一个短事务，给出这一口清了什么；dry_run 只数不删。还用得着的都留着：流里还有它的事件、
它要的日子还没做完、没有人宣布的导入还要看到它。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.database_sync import transact
from etl_assets.intake.unannounced_imports import LOOK_BACK
from etl_assets.ledger.locks import lock_imports
from etl_assets.ledger.pruning import note_forgotten

BITE = 500
"""一口看这么多个导入；删的时候占着它们的锁，收事件的等的就是这一口。"""
_ROWS_PER_BITE = 5_000
_FIRST = ("", UUID(int=0))

Bites = Iterator[Counter[str]]


def prune_ledger(engine: sa.Engine, *, before: datetime, oldest_event: datetime | None, dry_run: bool) -> Bites:
    """全部的步骤，一口一口的。

    :param before: 比它早的过了保留期。
    :param oldest_event: 流里最早的事件何时存下：此后处理的，重放与重投还会再来。
    """
    known = before if oldest_event is None else min(before, oldest_event)
    yield from _forget_imports(engine, before=known, dry_run=dry_run)
    yield from _forget_gone(engine, "rejected_rows", _GONE_REJECTED, _DELETE_REJECTED, dry_run=dry_run)
    yield from _forget_gone(engine, "imported_files", _GONE_FILES, _DELETE_FILES, dry_run=dry_run)
    yield from _drop_unpublishable(engine, before=before, dry_run=dry_run)


def _forget_imports(engine: sa.Engine, *, before: datetime, dry_run: bool) -> Bites:
    """哪个导入的哪个事件处理过、要求了哪些天：按主键走一遍，它本来就只有保留期那么多。"""
    after = _FIRST
    while rows := _read(engine, _LOOK, after=after, before=before, look_back=LOOK_BACK):
        after = (rows[-1].target, rows[-1].import_id)
        old = [row for row in rows if row.is_old]
        if dry_run or not old:
            yield Counter(import_events=len(old))
        for target in sorted({row.target for row in old} if not dry_run else ()):
            ids = [row.import_id for row in old if row.target == target]
            yield transact(engine, _forget, target, ids, before=before)
        if len(rows) < BITE:
            return


def _forget(connection: sa.Connection, target: str, import_ids: Sequence[UUID], *, before: datetime) -> Counter[str]:
    """先占住这些导入再看一遍：看过之后又来的事件、重放，不会被一起忘掉。占不住就放手，不拿着一半等另一半。"""
    connection.execute(_PATIENCE)
    lock_imports(connection, target, import_ids)
    given = {"of_target": target, "import_ids": list(import_ids), "before": before, "look_back": LOOK_BACK}
    events, requests = connection.execute(_FORGET, given).one()
    note_forgotten(connection, before)
    return Counter(import_events=events, import_requests=requests)


def _forget_gone(engine: sa.Engine, table: str, look: sa.TextClause, delete: sa.TextClause, *, dry_run: bool) -> Bites:
    """应用删掉了的导入留下的。"""
    after = _FIRST
    while rows := _read(engine, look, after=after):
        after = (rows[-1].target, rows[-1].import_id)
        gone = [row.import_id for row in rows if row.is_gone]
        remove = partial(_delete, engine, delete, import_ids=gone, limit=_ROWS_PER_BITE)
        if dry_run or not gone:
            yield Counter({table: len(gone)})
        else:
            yield from _until_none(table, remove)
        if len(rows) < BITE:
            return


def _drop_unpublishable(engine: sa.Engine, *, before: datetime, dry_run: bool) -> Bites:
    """放在一边、到现在也发不了的完成事件；别的没有人发过，一个也不删。"""
    if dry_run:
        yield Counter(completion_events=transact(engine, sa.Connection.scalar, _UNPUBLISHABLE, {"before": before}) or 0)
        return
    yield from _until_none(
        "completion_events", partial(_delete, engine, _DROP_UNPUBLISHABLE, before=before, limit=_ROWS_PER_BITE)
    )


def _until_none(name: str, remove: partial[int]) -> Bites:
    removed = _ROWS_PER_BITE
    while removed == _ROWS_PER_BITE:
        removed = remove()
        yield Counter({name: removed})


def _read(
    engine: sa.Engine, statement: sa.TextClause, *, after: tuple[str, UUID], **given: object
) -> Sequence[sa.Row[Any]]:
    given |= {"after_target": after[0], "after_id": after[1], "limit": BITE}
    return transact(engine, sa.Connection.execute, statement, given).all()


def _delete(engine: sa.Engine, statement: sa.TextClause, **given: object) -> int:
    return transact(engine, sa.Connection.execute, statement, given).rowcount


_PATIENCE = sa.text("SELECT set_config('lock_timeout', '1s', true)")
# 处理得早、导入也完成得早（钟不准的、没有写完成时刻的留着）：没有事件也会要进来的那一段都看过了；要的日子都做完了
_IS_OLD = """e.handled_at < least(:before, w.watched_until - :look_back)
    AND (t.import_id IS NULL OR t.completed_at >= w.watched_from AND t.completed_at < least(:before, w.watched_until - :look_back))
    AND NOT EXISTS (
        SELECT FROM etl.import_requests r JOIN etl.ledger l ON l.target = r.target AND l.day = r.day
        JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
        WHERE r.target = e.target AND r.import_id = e.import_id AND l.requested > l.materialized AND r.revision > l.materialized
    )"""
_OF_EVENT = """LEFT JOIN etl.import_watches w ON w.target = e.target
    LEFT JOIN public.import_tasks t ON t.import_id = e.import_id"""
_BOUND = (sa.bindparam("before", type_=sa.TIMESTAMP(timezone=True)), sa.bindparam("look_back", type_=sa.Interval))
_LOOK = sa.text(f"""
    SELECT e.target, e.import_id, coalesce({_IS_OLD}, false) AS is_old
    FROM (
        SELECT * FROM etl.import_events WHERE (target, import_id) > (:after_target, :after_id)
        ORDER BY target, import_id LIMIT :limit
    ) e {_OF_EVENT} ORDER BY e.target, e.import_id""").bindparams(*_BOUND)  # noqa: S608  # 只有本文件的常量，下同
_FORGET = sa.text(f"""
    WITH old AS MATERIALIZED (
        SELECT e.target, e.import_id FROM etl.import_events e {_OF_EVENT}
        WHERE e.target = :of_target AND e.import_id = ANY (:import_ids) AND {_IS_OLD}
    ), events AS (
        DELETE FROM etl.import_events e USING old WHERE e.target = old.target AND e.import_id = old.import_id RETURNING 1
    ), requests AS (
        DELETE FROM etl.import_requests r USING old WHERE r.target = old.target AND r.import_id = old.import_id RETURNING 1
    )
    SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM requests)""").bindparams(  # noqa: S608
    array("import_ids", sa.Uuid), *_BOUND
)

_IS_GONE = """NOT EXISTS (SELECT FROM public.import_tasks t WHERE t.import_id = found.import_id)
    AND NOT EXISTS (SELECT FROM public.raw_orders raw WHERE raw.import_id = found.import_id)"""
# 一个导入也许有几千行：沿着索引一个一个跳过去
_GONE_REJECTED = sa.text(f"""
    WITH RECURSIVE found (target, import_id, place) AS (
        (SELECT target, import_id, 1 FROM etl.rejected_rows WHERE (target, import_id) > (:after_target, :after_id)
         ORDER BY target, import_id LIMIT 1)
        UNION ALL
        SELECT next.target, next.import_id, found.place + 1 FROM found CROSS JOIN LATERAL (
            SELECT r.target, r.import_id FROM etl.rejected_rows r WHERE (r.target, r.import_id) > (found.target, found.import_id)
            ORDER BY r.target, r.import_id LIMIT 1
        ) next WHERE found.place < :limit
    )
    SELECT found.target, found.import_id, {_IS_GONE} AS is_gone FROM found ORDER BY place""")  # noqa: S608
_DELETE_REJECTED = sa.text("""
    DELETE FROM etl.rejected_rows WHERE (target, raw_id) IN (
        SELECT r.target, r.raw_id FROM (SELECT DISTINCT target FROM etl.assets) a
        JOIN etl.rejected_rows r ON r.target = a.target AND r.import_id = ANY (:import_ids) LIMIT :limit
    )""").bindparams(array("import_ids", sa.Uuid))
_GONE_FILES = sa.text(f"""
    SELECT :after_target AS target, found.import_id, {_IS_GONE} AS is_gone FROM (
        SELECT import_id FROM etl.imported_files WHERE import_id > :after_id ORDER BY import_id LIMIT :limit
    ) found ORDER BY found.import_id""").bindparams(sa.bindparam("after_target", type_=sa.Text))  # noqa: S608
_DELETE_FILES = sa.text("""
    DELETE FROM etl.imported_files WHERE import_id IN (
        SELECT import_id FROM etl.imported_files WHERE import_id = ANY (:import_ids) LIMIT :limit
    )""").bindparams(array("import_ids", sa.Uuid))

_UNPUBLISHABLE = sa.text("SELECT count(*) FROM etl.outbox WHERE problem IS NOT NULL AND created_at < :before")
_DROP_UNPUBLISHABLE = sa.text("""
    DELETE FROM etl.outbox WHERE outbox_id IN (
        SELECT outbox_id FROM etl.outbox WHERE problem IS NOT NULL AND created_at < :before ORDER BY outbox_id LIMIT :limit
    )""")
