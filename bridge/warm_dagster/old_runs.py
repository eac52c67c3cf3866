"""Dagster 的存储里过了保留期的：运行与它们的事件、定时与传感器的记录、做完的回填。一口一个短事务。

留着的：没结束的、有人还要的、别的运行由它重来的、没做完的回填的运行；每个资产的每个分区最新的物化与观察，
还没有物化跟上的计划（网页上的“失败”由它而来），这些物化的检查，与写下它们的运行。
表与列的名字是 Dagster 私有的，只在这里用，由 test_old_runs 看守；不导入 Dagster：命令与体检不必等它。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import normalize_url
from etl_assets.core.silent_connections import libpq_patience

RUNS_PER_BITE = 100
EVENTS_PER_BITE = 4_000
"""一个运行三十几个事件；人写的资产也许说了几万句，那就几口才删得完一个。"""
_TICKS_PER_BITE = 1_000
_STATEMENT_TIMEOUT, _LOCK_TIMEOUT = "30s", "1s"

FINISHED_RUNS = ("SUCCESS", "FAILURE", "CANCELED")
UNFINISHED_BACKFILLS = ("REQUESTED", "CANCELING", "FAILING")
_HISTORY = ("ASSET_MATERIALIZATION", "ASSET_OBSERVATION")
_ATTEMPTS = ("ASSET_MATERIALIZATION_PLANNED", "ASSET_FAILED_TO_MATERIALIZE")

Bites = Iterator[Counter[str]]


@contextmanager
def dagster_database(url: str) -> Iterator[sa.Engine]:
    """Dagster 的存储所在的库；URL 里写着它的 schema。"""
    wanted = normalize_url(url)
    # 不留着准备好的语句：按第一口的样子定的计划，不合后面的
    arguments = {"prepare_threshold": None, **libpq_patience(wanted)}
    engine = sa.create_engine(wanted, pool_size=1, max_overflow=0, connect_args=arguments)
    try:
        yield engine
    finally:
        engine.dispose()


def prune_dagster(engine: sa.Engine, *, before: datetime, wanted: Sequence[str], dry_run: bool) -> Bites:
    """全部的步骤，一口一口的，给出这一口清了什么。

    :param wanted: 台账还要的运行。
    :param dry_run: 只数不删。
    """
    yield from _Runs(engine, before, wanted).prune(dry_run=dry_run)
    yield from _prune_ticks(engine, before, dry_run=dry_run)
    yield from _prune_backfills(engine, before, dry_run=dry_run)


@dataclass(frozen=True)
class _Runs:
    """过了保留期的运行。"""

    engine: sa.Engine
    before: datetime
    wanted: Sequence[str]

    def prune(self, *, dry_run: bool) -> Bites:
        with _transaction(self.engine) as connection:
            checks = connection.execute(_CHECKS).all()
        after = 0
        while True:
            with _transaction(self.engine) as connection:
                rows = connection.execute(_LOOK, self._given | {"after": after, "limit": RUNS_PER_BITE}).all()
                given = {
                    "run_ids": [row.run_id for row in rows if row.is_over],
                    "asset_keys": [check.asset_key for check in checks],
                    "check_names": [check.check_name for check in checks],
                }
                bite = self._count(connection, given) if dry_run else self._delete(connection, given)
            yield bite
            # 一口删不完的再来一口；运行的那一行最后才删：死在半路的，下一次接着删
            while bite["run_events"] == EVENTS_PER_BITE and not dry_run:
                with _transaction(self.engine) as connection:
                    bite = self._delete(connection, given)
                yield bite
            # 编号与建立的先后一致：到了没过保留期的，后面的也没有
            if len(rows) < RUNS_PER_BITE or not rows[-1].is_old:
                return
            after = rows[-1].id

    @property
    def _given(self) -> dict[str, Any]:
        return {"before": _stored(self.before), "wanted": list(self.wanted)}

    def _count(self, connection: sa.Connection, given: dict[str, Any]) -> Counter[str]:
        """还有事件要删的运行；别的只是因为最新的物化而留着。"""
        return Counter(runs=connection.scalar(_TO_DELETE, given) or 0) if given["run_ids"] else Counter()

    def _delete(self, connection: sa.Connection, given: dict[str, Any]) -> Counter[str]:
        if not given["run_ids"]:
            return Counter()
        kept = connection.execute(_KEPT_CHECKS, given).all()
        given = given | {
            "kept_checks": [row.id for row in kept],
            "kept_events": [row.event_id for row in kept if row.event_id is not None],
            "holding": sorted({row.run_id for row in kept}),
        }
        events = connection.execute(_DELETE_EVENTS, given | {"limit": EVENTS_PER_BITE}).scalars().all()
        connection.execute(_DELETE_EVENT_TAGS, {"event_ids": events})
        if len(events) == EVENTS_PER_BITE:
            return Counter(run_events=len(events))
        checks = connection.execute(_DELETE_CHECKS, given).rowcount
        runs = connection.execute(_DELETE_RUNS, given).rowcount
        return Counter(run_events=len(events), check_results=checks, runs=runs)


def _prune_ticks(engine: sa.Engine, before: datetime, *, dry_run: bool) -> Bites:
    """传感器一分钟一条。每个的最新一条留着：守护进程从它接着。"""
    after = 0
    while True:
        with _transaction(engine) as connection:
            given = {"after": after, "limit": _TICKS_PER_BITE, "before": _stored(before)}
            rows = connection.execute(_LOOK_AT_TICKS, given).all()
            old = [row.id for row in rows if row.is_over]
            if old and not dry_run:
                connection.execute(_DELETE_TICKS, {"ids": old})
        yield Counter(ticks=len(old))
        if len(rows) < _TICKS_PER_BITE or not rows[-1].is_old:
            return
        after = rows[-1].id


def _prune_backfills(engine: sa.Engine, before: datetime, *, dry_run: bool) -> Bites:
    """做完了、一个运行也不剩的。"""
    given = {"before": _stored(before), "limit": RUNS_PER_BITE}
    while True:
        with _transaction(engine) as connection:
            found = connection.scalars(_OLD_BACKFILLS, given).all()
            if found and not dry_run:
                connection.execute(_DELETE_BACKFILL_TAGS, {"backfill_ids": found})
                connection.execute(_DELETE_BACKFILLS, {"backfill_ids": found})
        yield Counter(backfills=len(found))
        if len(found) < RUNS_PER_BITE or dry_run:
            return


@contextmanager
def _transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """不久等别人的锁，也不久占着：清不了的，过一会儿再来。"""
    with translated_errors(), engine.begin() as connection:
        connection.execute(_PATIENCE, {"statement": _STATEMENT_TIMEOUT, "lock": _LOCK_TIMEOUT})
        yield connection


def _stored(moment: datetime) -> datetime:
    """Dagster 的时刻是没有时区的 UTC。"""
    return moment.astimezone(UTC).replace(tzinfo=None)


# 每条语句都只沿着索引找几行：小的表规划器宁可整个读一遍，表长大了、统计旧了，那就是读一遍大的
_PATIENCE = sa.text("""
    SELECT set_config('statement_timeout', :statement, true), set_config('lock_timeout', :lock, true),
           set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
           set_config('enable_mergejoin', 'off', true)""")


_AFTER = sa.bindparam("after", type_=sa.BigInteger)


def _any_of(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# 一个运行过了保留期、已经结束、没有谁还要它
_LOOK = sa.text(f"""
    SELECT r.id, r.run_id, r.create_timestamp < :before AS is_old,
           r.status IN ({_any_of(FINISHED_RUNS)}) AND r.update_timestamp < :before AND r.run_id <> ALL (:wanted)
           AND NOT EXISTS (
               SELECT FROM bulk_actions b WHERE b.key = r.backfill_id AND b.status IN ({_any_of(UNFINISHED_BACKFILLS)})
           )
           AND NOT EXISTS (
               SELECT FROM run_tags t JOIN runs again ON again.run_id = t.run_id
               WHERE t.key IN ('dagster/parent_run_id', 'dagster/root_run_id') AND t.value = r.run_id
               AND (again.update_timestamp >= :before OR again.status NOT IN ({_any_of(FINISHED_RUNS)}))
           ) AS is_over
    FROM (SELECT * FROM runs WHERE id > :after ORDER BY id LIMIT :limit) r ORDER BY r.id""").bindparams(  # noqa: S608  # 只有本文件的常量，下同
    array("wanted", sa.Text), _AFTER
)

_CHECKS = sa.text("""
    WITH RECURSIVE checks AS (
        (SELECT asset_key, check_name FROM asset_check_executions ORDER BY asset_key, check_name LIMIT 1)
        UNION ALL
        SELECT next.asset_key, next.check_name FROM checks CROSS JOIN LATERAL (
            SELECT c.asset_key, c.check_name FROM asset_check_executions c
            WHERE (c.asset_key, c.check_name) > (checks.asset_key, checks.check_name) ORDER BY c.asset_key, c.check_name LIMIT 1
        ) next
    )
    SELECT asset_key, check_name FROM checks WHERE asset_key IS NOT NULL AND check_name IS NOT NULL""")

# 网页还要的事件：这个资产最新的一个；这个分区最新的一个，计划的还要没有物化跟上
_IS_NEWEST = """NOT EXISTS (
        SELECT FROM event_logs n WHERE n.asset_key = e.asset_key AND n.dagster_event_type = e.dagster_event_type AND n.id > e.id
    )"""
_IS_NEWEST_OF_PARTITION = """NOT EXISTS (
        SELECT FROM event_logs n WHERE n.asset_key = e.asset_key AND n.dagster_event_type = {type}
        AND n.partition = e.partition AND n.partition IS NOT NULL AND n.id > e.id
    )"""
_IS_SHOWN = f"""e.asset_key IS NOT NULL AND e.dagster_event_type IN ({_any_of((*_HISTORY, *_ATTEMPTS))}) AND ({_IS_NEWEST}
        OR e.partition IS NOT NULL AND {_IS_NEWEST_OF_PARTITION.format(type="e.dagster_event_type")}
           AND (e.dagster_event_type IN ({_any_of(_HISTORY)})
                OR {_IS_NEWEST_OF_PARTITION.format(type="'ASSET_MATERIALIZATION'")}))"""
# 检查的结果：这项检查最新的一次，与留着的物化上最新的一次
# 一项检查、一个运行地沿着索引找：别的写法，规划器会把整个索引走一遍
_EXECUTIONS = """unnest(:asset_keys, :check_names) AS checked (asset_key, check_name)
    CROSS JOIN unnest(:run_ids) AS old (run_id) CROSS JOIN LATERAL (
        SELECT * FROM asset_check_executions c
        WHERE c.asset_key = checked.asset_key AND c.check_name = checked.check_name AND c.run_id = old.run_id OFFSET 0
    ) c"""
_RUN_IDS = array("run_ids", sa.Text)
_OF_CHECKS = (_RUN_IDS, array("asset_keys", sa.Text), array("check_names", sa.Text))
_KEPT_CHECKS = sa.text(f"""
    SELECT c.id, c.run_id, c.evaluation_event_storage_id AS event_id FROM (
        SELECT c.*, c.id = max(c.id) OVER (PARTITION BY c.asset_key, c.check_name) AS is_last FROM {_EXECUTIONS}
    ) c
    WHERE c.is_last AND NOT EXISTS (
        SELECT FROM asset_check_executions n WHERE n.asset_key = c.asset_key AND n.check_name = c.check_name AND n.id > c.id
    ) OR EXISTS (
        SELECT FROM event_logs e WHERE e.id = c.materialization_event_storage_id AND {_IS_SHOWN}
    ) AND NOT EXISTS (
        SELECT FROM asset_check_executions n WHERE n.asset_key = c.asset_key AND n.check_name = c.check_name
        AND n.materialization_event_storage_id = c.materialization_event_storage_id AND n.id > c.id
    )""").bindparams(*_OF_CHECKS)  # noqa: S608
_DELETE_EVENTS = sa.text(f"""
    DELETE FROM event_logs WHERE id IN (
        SELECT e.id FROM event_logs e
        WHERE e.run_id = ANY (:run_ids) AND e.id <> ALL (:kept_events) AND ({_IS_SHOWN}) IS NOT TRUE LIMIT :limit
    ) RETURNING id""").bindparams(_RUN_IDS, array("kept_events", sa.BigInteger))  # noqa: S608
_DELETE_EVENT_TAGS = sa.text("DELETE FROM asset_event_tags WHERE event_id = ANY (:event_ids)").bindparams(
    array("event_ids", sa.BigInteger)
)
_DELETE_CHECKS = sa.text(f"""
    DELETE FROM asset_check_executions WHERE id IN (SELECT c.id FROM {_EXECUTIONS} WHERE c.id <> ALL (:kept_checks))
    """).bindparams(*_OF_CHECKS, array("kept_checks", sa.BigInteger))  # noqa: S608
_DELETE_RUNS = sa.text("""
    DELETE FROM runs r WHERE r.run_id = ANY (:run_ids) AND r.run_id <> ALL (:holding)
    AND NOT EXISTS (SELECT FROM event_logs e WHERE e.run_id = r.run_id)
    AND NOT EXISTS (
        SELECT FROM run_tags t WHERE t.key IN ('dagster/parent_run_id', 'dagster/root_run_id') AND t.value = r.run_id
    )""").bindparams(_RUN_IDS, array("holding", sa.Text))
_TO_DELETE = sa.text("""
    SELECT count(*) FROM unnest(:run_ids) AS old (run_id) WHERE EXISTS (
        SELECT FROM event_logs e WHERE e.run_id = old.run_id AND e.dagster_event_type = 'PIPELINE_START'
    )""").bindparams(_RUN_IDS)

_LOOK_AT_TICKS = sa.text("""
    SELECT t.id, t.timestamp < :before AS is_old, t.timestamp < :before AND t.status <> 'STARTED' AND EXISTS (
        SELECT FROM job_ticks n WHERE n.selector_id = t.selector_id AND n.timestamp > t.timestamp
    ) AS is_over
    FROM (SELECT * FROM job_ticks WHERE id > :after ORDER BY id LIMIT :limit) t ORDER BY t.id""").bindparams(_AFTER)
_DELETE_TICKS = sa.text("DELETE FROM job_ticks WHERE id = ANY (:ids)").bindparams(array("ids", sa.BigInteger))

_BACKFILL_IDS = array("backfill_ids", sa.Text)
_OLD_BACKFILLS = sa.text(f"""
    SELECT b.key FROM bulk_actions b
    WHERE b.timestamp < :before AND b.status NOT IN ({_any_of(UNFINISHED_BACKFILLS)})
    AND NOT EXISTS (SELECT FROM runs r WHERE r.backfill_id = b.key) LIMIT :limit""")  # noqa: S608
_DELETE_BACKFILL_TAGS = sa.text("DELETE FROM backfill_tags WHERE backfill_id = ANY (:backfill_ids)").bindparams(
    _BACKFILL_IDS
)
_DELETE_BACKFILLS = sa.text("DELETE FROM bulk_actions WHERE key = ANY (:backfill_ids)").bindparams(_BACKFILL_IDS)
