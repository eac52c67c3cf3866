"""COLD 清扫：最新业务日会前移也会后退，份额之内所有没有 closed_at 的商机两个方向都改对。

`etl.cold_sweeps` 一个 schema 一行：此刻按哪一天判（写商机的都照它），哪个份额里的都已按它判过。换那一天要独占的锁，只在换的
那一刻；换了之后判错的只会是早先写下的，与别的运行并行着，一口一个事务地改对。

没有改完的时候，rollout 里记着欠它的那一天：那天的 leads 仍然到期，做它的运行不扫完不算做完，所以谁死在半途都有人接着；
别的运行不必等它。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled, execute_together
from etl_assets.core.etl_tables import cold_sweeps
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TIMESTAMP, TargetTables
from etl_assets.ledger.locks import cold_stages_lock, lock_cold_stages
from etl_assets.ledger.requests import request_days
from etl_assets.services.customer_orders import Computed
from etl_assets.services.materialization import AssetReport, Begin, DataTransaction, retry_conflicts
from etl_assets.services.people import come_back
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import WriteCounts, read_frame

LEADS_PER_BITE = 5_000
"""一口商机一个事务：别人等的至多是改这么多行。"""
_OWED_ON = "owed on "


@dataclass(frozen=True)
class Sweep:
    """OPEN 与 COLD 按哪一天判（最后一单早于它的是 COLD）；哪个份额已经判完，或者欠在哪一天（`owed_on`）。"""

    last_warm_day: date | None
    rollout: str | None

    @property
    def is_owed(self) -> bool:
        return self.rollout is not None and self.rollout.startswith(_OWED_ON)

    def is_owed_by(self, days: DayRange) -> bool:
        return self.rollout in [owed_on(day) for day in days]


def owed_on(day: date) -> str:
    """还没有判完时的 cold_sweeps.rollout。"""
    return f"{_OWED_ON}{day}"


def complete_if_swept(transaction: DataTransaction, computed: Computed) -> AssetReport | Computed:
    """OPEN 与 COLD 是按此刻最新的业务日判的，都判完了，或者欠在别的日子，就记台账；不然还给清扫。"""
    sweep, last_warm = lock_sweep(transaction)
    # 判 COLD 的那一天没有变，别的商机就都还对，不必扫，一个事务就做完
    is_current = sweep.last_warm_day == last_warm
    if is_current and (sweep.rollout == str(transaction.settings.rollout) or _is_left_to_others(transaction, sweep)):
        return transaction.complete(computed.revisions, scope=computed.scope, written=computed.written)
    return computed


def sweep_cold(begin: Begin, settings: EtlSettings, computed: Computed) -> AssetReport:
    """换成最新的业务日，同时改判第一口；改不完的与别的运行并行，一口一个事务，再看一眼有没有剩下。"""
    done = retry_conflicts(move_day)(begin, computed)
    while isinstance(done, Computed):
        wrong = retry_conflicts(read_all_wrong)(begin, done)
        for leads in wrong.iter_slices(LEADS_PER_BITE):
            done = retry_conflicts(come_back)(settings, partial(judge_bite, begin, done, leads))
        done = retry_conflicts(come_back)(settings, partial(judge_rest, begin, done))
    return done


def move_day(begin: Begin, computed: Computed) -> AssetReport | Computed:
    """独占地换成最新的业务日，改判头一口；别人都等着，所以人正改着的先放过，不去等他。改不完的，记下欠在哪一天。"""
    with begin(started_at=computed.started_at) as transaction:
        _start_judging(transaction, exclusive=True)
        last_warm = read_last_warm_day(transaction)
        wrong = _find_first_wrong(transaction, last_warm)
        swept = _judge(transaction, last_warm, wrong, skip_locked=True)
        computed = _add(computed, swept)
        # 放过了人手里的，或者满满一口：都可能还有，欠着；多欠一次只是多看一眼，少欠就没有人再来改
        if swept < len(wrong) or len(wrong) == LEADS_PER_BITE:
            _remember(transaction, last_warm, owed_on(_day_that_owes(transaction)))
            return computed
        return _finish(transaction, computed, last_warm)


def judge_rest(begin: Begin, computed: Computed) -> AssetReport | Computed:
    """再改判一口；没有剩下，就是判完了。中途最新的业务日又换了，而没有改完的欠在了别的日子，也可以走了。"""
    with begin(started_at=computed.started_at) as transaction:
        _start_judging(transaction, exclusive=False)
        sweep = read_sweep(transaction)
        wrong = _find_first_wrong(transaction, sweep.last_warm_day)
        computed = _add(computed, _judge(transaction, sweep.last_warm_day, wrong))
        if len(wrong) < LEADS_PER_BITE:
            return _finish(transaction, computed, sweep.last_warm_day)
        if _is_left_to_others(transaction, sweep):
            return transaction.complete(computed.revisions, scope=computed.scope, written=computed.written)
        return computed


def read_all_wrong(begin: Begin, computed: Computed) -> pl.DataFrame:
    """此刻判错了的商机的 lead_id；没有锁住，改的时候再看一眼。"""
    with begin(started_at=computed.started_at) as transaction:
        _start_judging(transaction, exclusive=False)
        find, parameters = _find_wrong(transaction, read_sweep(transaction).last_warm_day, at_most=None)
        return read_frame(transaction.connection, find, parameters)


def judge_bite(begin: Begin, computed: Computed, leads: pl.DataFrame) -> Computed:
    with begin(started_at=computed.started_at) as transaction:
        _start_judging(transaction, exclusive=False)
        return _add(computed, _judge(transaction, read_sweep(transaction).last_warm_day, leads["lead_id"].to_list()))


def read_last_warm_day(transaction: DataTransaction) -> date | None:
    """最新业务日往前 ETL_COLD_AFTER_DAYS 天；最后一单早于它的商机是 COLD。"""
    return _warm_from_newest(transaction, transaction.connection.scalar(_newest_day(transaction.tables.orders)))


def _warm_from_newest(transaction: DataTransaction, newest: date | None) -> date | None:
    return newest - timedelta(days=transaction.settings.cold_after_days) if newest else None


@lru_cache(maxsize=16)
def _newest_day(orders: sa.Table) -> sa.Select[tuple[date | None]]:
    return sa.select(sa.func.max(orders.c.order_date))


def lock_sweep(transaction: DataTransaction) -> tuple[Sweep, date | None]:
    """共用的锁，与锁住之后的 `read_sweep`、`read_last_warm_day`，一次往返。"""
    lock, parameters = cold_stages_lock(transaction.target, exclusive=False)
    statements = (lock, _READ_SWEEP, _newest_day(transaction.tables.orders))
    parameters = {**parameters, "of_target": transaction.target}
    _, swept, ((newest,),) = execute_together(transaction.connection, *statements, parameters=parameters)
    return Sweep(*swept[0]) if swept else Sweep(None, None), _warm_from_newest(transaction, newest)


def read_sweep(transaction: DataTransaction) -> Sweep:
    """共用的锁在手，按哪一天判就不会变。"""
    row = transaction.connection.execute(_READ_SWEEP, {"of_target": transaction.target}).first()
    return Sweep(row.last_warm_day, row.rollout) if row else Sweep(None, None)


def _start_judging(transaction: DataTransaction, *, exclusive: bool) -> None:
    """锁住按哪一天判。不许扫整张表：规划器以为阶段与时刻互不相干，会估出一大半的 OPEN 要变，而要变的只有边上的几天。"""
    lock_cold_stages(transaction.connection, transaction.target, exclusive=exclusive)
    transaction.connection.execute(_NO_SEQUENTIAL_SCAN)


def _find_wrong(
    transaction: DataTransaction, last_warm: date | None, *, at_most: int | None
) -> tuple[sa.Select[Any], dict[str, object]]:
    statement = _wrong_leads(transaction.tables, transaction.settings.timezone, transaction.share)
    return statement, {"last_warm": last_warm, "at_most": at_most}


def _find_first_wrong(transaction: DataTransaction, last_warm: date | None) -> Sequence[object]:
    return transaction.connection.scalars(*_find_wrong(transaction, last_warm, at_most=LEADS_PER_BITE)).all()


def _judge(
    transaction: DataTransaction, last_warm: date | None, lead_ids: Sequence[object], *, skip_locked: bool = False
) -> int:
    """改判这些商机里仍然判错的；返回改了几个。别人正锁着的，放过或者报错，从不锁着几个去等。"""
    if not lead_ids:
        return 0
    statement = _judge_stages(transaction.tables, transaction.settings.timezone, skip_locked=skip_locked)
    judged = transaction.connection.execute(statement, {"last_warm": last_warm, "lead_ids": list(lead_ids)}).rowcount
    transaction.written += WriteCounts(updated=judged)
    return judged


def _add(computed: Computed, swept: int) -> Computed:
    return replace(computed, written=computed.written + WriteCounts(updated=swept))


def _finish(transaction: DataTransaction, computed: Computed, last_warm: date | None) -> AssetReport:
    _remember(transaction, last_warm, str(transaction.settings.rollout))
    return transaction.complete(computed.revisions, scope=computed.scope, written=computed.written)


def _day_that_owes(transaction: DataTransaction) -> date:
    """这次的日子里 leads 还到期的一天；都不到期（有人重跑）就让头一天到期。独占的锁在手，没有谁正要记它的台账。"""
    due = transaction.read_revisions().due
    if due:
        return min(due)
    first = transaction.days.first
    request_days(transaction.connection, transaction.target, [first], asset=transaction.asset)
    return first


def _is_left_to_others(transaction: DataTransaction, sweep: Sweep) -> bool:
    return sweep.is_owed and not sweep.is_owed_by(transaction.days)


def _remember(transaction: DataTransaction, last_warm: date | None, rollout: str) -> None:
    values = {"target": transaction.target, "last_warm_day": last_warm, "rollout": rollout}
    execute_compiled(transaction.connection, _REMEMBER_SWEEP, values)


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_READ_SWEEP = sa.select(cold_sweeps.c.last_warm_day, cold_sweeps.c.rollout).where(
    cold_sweeps.c.target == sa.bindparam("of_target")
)
_SWEPT = {
    column.name: sa.bindparam(column.name, type_=column.type)
    for column in cold_sweeps.c["target", "last_warm_day", "rollout"]
}
_REMEMBER_SWEEP = pg.insert(cold_sweeps).values(_SWEPT).on_conflict_do_update(index_elements=["target"], set_=_SWEPT)
_NO_SEQUENTIAL_SCAN = sa.select(sa.func.set_config("enable_seqscan", "off", True))  # 只在这个事务里
_LAST_WARM = sa.bindparam("last_warm", type_=sa.Date)


def _is_open(leads: sa.Table) -> sa.ColumnElement[bool]:
    """没有关闭的、有编号的商机：不是 OPEN 就是 COLD。"""
    return sa.and_(leads.c.closed_at.is_(None), leads.c.lead_no.is_not(None))


def _is_cold(leads: sa.Table, timezone: str) -> sa.ColumnElement[bool]:
    last_day = sa.cast(sa.func.timezone(timezone, leads.c.last_order_at), sa.Date)
    return sa.func.coalesce(last_day < _LAST_WARM, sa.false())


@lru_cache(maxsize=16)
def _wrong_leads(tables: TargetTables, timezone: str, share: Share) -> sa.Select[tuple[UUID]]:
    """没有 closed_at、而 OPEN 或 COLD 不对的商机，至多 at_most 个：各按 (current_stage, last_order_at) 的一段去找。

    一段一段按索引的次序读，够了就停；写成一个 OR，规划器先把每一段的位图读完。
    """
    leads = tables.leads
    stage, last_order_at = leads.c.current_stage, leads.c.last_order_at
    is_cold = _is_cold(leads, timezone)
    earliest, latest = _warm_from(timezone, _LAST_WARM)
    at_most = sa.bindparam("at_most", type_=sa.BigInteger)
    stretches = [
        sa.and_(stage == "OPEN", last_order_at < latest, is_cold),
        sa.and_(stage == "COLD", last_order_at >= earliest, ~is_cold),
        sa.and_(stage == "COLD", last_order_at.is_(None)),
        # 别的写法都不对；不写 <>，它用不上索引
        stage < "COLD",
        sa.and_(stage > "COLD", stage < "OPEN"),
        stage > "OPEN",
        stage.is_(None),
    ]
    of_share = _leads_of_share(tables, share)
    found = [
        sa.select(leads.c.lead_id)
        .where(_is_open(leads), stretch, *of_share)
        .order_by(stage, last_order_at)
        .limit(at_most)
        .subquery()
        for stretch in stretches
    ]
    wrong = sa.union_all(*[sa.select(stretch.c.lead_id) for stretch in found]).subquery("wrong")
    return sa.select(wrong.c.lead_id).limit(at_most)


@lru_cache(maxsize=16)
def _judge_stages(tables: TargetTables, timezone: str, *, skip_locked: bool) -> sa.Update:
    """改判这些商机。先全锁住；锁住之后再看一眼，别人刚写过的、关闭了的不碰。按主键用数组去改，规划器才不会照着估高了的行数扫。"""
    leads = tables.leads
    judged = sa.case((_is_cold(leads, timezone), "COLD"), else_="OPEN")
    named = leads.c.lead_id == sa.any_(array("lead_ids", sa.Uuid))
    still_wrong = sa.select(leads.c.lead_id).where(
        named, _is_open(leads), leads.c.current_stage.is_distinct_from(judged)
    )
    wrong = still_wrong.with_for_update(nowait=not skip_locked, skip_locked=skip_locked, key_share=True, of=leads).cte(
        "wrong"
    )
    ids = sa.func.array(sa.select(wrong.c.lead_id).scalar_subquery(), type_=sa.ARRAY(sa.Uuid))
    return (
        sa.update(leads).where(leads.c.lead_id == sa.any_(ids)).values(current_stage=judged, updated_at=sa.func.now())
    )


def _warm_from(timezone: str, last_warm: sa.ColumnElement[date]) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]]:
    """last_warm 从哪个时刻开始：最早与最晚。前后一天里时钟不改就是同一个时刻；往回拨的钟会让一天开始两次，那就各放宽一天。

    没有 last_warm 就没有 COLD：从来都是暖的。
    """
    midnight = sa.func.timezone(timezone, sa.cast(last_warm, sa.DateTime()), type_=TIMESTAMP)
    day = sa.literal_column("interval '24 hours'", sa.Interval())
    around = sa.func.timezone(timezone, midnight + day) - sa.func.timezone(timezone, midnight - day)
    slack = sa.case((around == day * 2, sa.literal_column("interval '0'", sa.Interval())), else_=day)
    always = sa.literal_column("'-infinity'::timestamptz", TIMESTAMP)
    return sa.func.coalesce(midnight - slack, always), sa.func.coalesce(midnight + slack, always)


def _leads_of_share(tables: TargetTables, share: Share) -> list[sa.ColumnElement[bool]]:
    """SQL 条件：商机属于份额之内的客户；全部客户时没有条件，也就不必去找客户。一行一行地找，同样是因为估高了的行数。"""
    if share.is_whole:
        return []
    customers = tables.customers
    owner = sa.select(customers.c.customer_key).where(
        customers.c.customer_global_id == tables.leads.c.customer_global_id
    )
    return [share.covers_key(owner.scalar_subquery())]
