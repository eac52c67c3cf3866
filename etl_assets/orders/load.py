"""订单写进目标表：先看删得多不多，再写赢家、删没有赢家的、更新客户索引与拒收记录。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, bound
from etl_assets.core.database_sync import execute_together
from etl_assets.core.errors import TooManyDeletesError
from etl_assets.core.etl_tables import order_index, rejected_rows
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, trimmed
from etl_assets.ledger.marking import Scope
from etl_assets.ledger.requests import days_allowing_deletes
from etl_assets.orders.changed import KEY, named_keys, rows_of_orders
from etl_assets.orders.versions import StagedOrders
from etl_assets.services import raw_rows
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.materialization import DataTransaction
from etl_assets.services.order_index import (
    INDEXED,
    index_orders,
    index_statement,
    insert_marks,
    same_order,
    unindex_orders,
)
from etl_assets.services.vectorized_queries import (
    Upsert,
    WriteCounts,
    create_staging,
    read_frame,
    release_staging,
    stage_frame,
    upsert_text,
)

# DOMAIN 第 3 节：只看份额的话，小的一天删一两笔就会被拦下
ALWAYS_ALLOWED_DELETES = 20
ORDER_UPSERT = Upsert(key=("shop_id", "order_id"), touch="updated_at")


def load(transaction: DataTransaction, staged: StagedOrders) -> tuple[WriteCounts, pl.DataFrame]:
    """写订单、删没有赢家的订单、更新客户索引与拒收记录；另返回只做变了的订单写完之后的行，见 `rows_of_orders`。"""
    connection, target = transaction.connection, transaction.target
    # 删得太多的，一行也不写就停下
    guard_deletes(transaction, staged.gone.filter(transaction.share.covers()), staged.shops)
    # 份额之外的先移走，后面写、标记、读回的各条就都只看见归我们的
    index_outside(transaction, staged.winners)
    changed = staged.winners if staged.changed is not None else stage_changed(transaction, staged.winners)
    written, after = write_winners(transaction, staged, changed)
    deleted = delete_gone(transaction, staged.gone)
    covered = transaction.days.includes(rejected_rows.c.day)
    if staged.changed is not None:  # 导入的行不变，评判的依据也没有变：拒收过的还是那些
        covered &= rejected_rows.c.import_id == sa.any_(sa.cast(staged.changed.import_ids, sa.ARRAY(sa.Uuid)))
    if staged.changed is None or not staged.rejected.is_empty():
        transaction.newly_rejected = raw_rows.write_rejected(connection, target, staged.rejected, covered)
    written += WriteCounts(rows=staged.count, deleted=deleted)
    transaction.written += written
    return written, after


def index_outside(transaction: DataTransaction, winners: sa.Table) -> None:
    """赢家在份额之外的订单移出暂存表：orders 里不写也不删，只记进索引。

    索引记下它的赢家，它离开的客户才会重算；旧系统晚些改写那一行，也不会被当成份额之内的收进来。
    """
    if transaction.share.is_whole:
        return
    names = ("target", "shop_id", "order_id", "customer_nickname", "customer_key", "order_date")
    staging = create_staging(
        transaction.connection, "outside_orders", [sa.Column(name, order_index.c[name].type) for name in names]
    )
    is_outside = sa.not_(transaction.share.covers_key(winners.c.customer_key))
    moved = sa.delete(winners).where(is_outside).returning(*winners.c[names]).cte("moved")
    transaction.connection.execute(sa.insert(staging).from_select(names, sa.select(*moved.c[names])))
    index_orders(transaction.connection, transaction.target, staging, transaction.days)


def stage_changed(transaction: DataTransaction, winners: sa.Table) -> sa.Table:
    """orders 或索引里还不是这样的赢家，另一张暂存表：原样重跑时只联接这一次，后面各条语句几乎无事可做。

    不从赢家里删去没变的：一百万行的 DELETE 比联接还久。这些天还没有订单时都是新的，不必再抄一遍。
    """
    connection, orders = transaction.connection, transaction.tables.orders
    if not connection.scalar(_has_orders(orders), bound(transaction.days)):
        return winners
    changed = create_staging(
        connection, "changed_orders", [sa.Column(column.name, column.type) for column in winners.columns]
    )
    connection.execute(_insert_changed(orders, transaction.target, winners, changed))
    return changed


def write_winners(
    transaction: DataTransaction, staged: StagedOrders, winners: sa.Table
) -> tuple[WriteCounts, pl.DataFrame]:
    """给新来的或有变化的订单此刻的客户记陈旧，写订单，更新索引，读回只做变了的；一次往返。离开了的旧客户由索引那一条记。"""
    connection, orders, target = transaction.connection, transaction.tables.orders, transaction.target
    statements: list[sa.ClauseElement | str] = [
        # 标记在写之前：写过以后，从 orders 就看不出谁变了
        _mark_changed(orders, target, winners, staged.scope),
        upsert_text(connection, winners, orders, ORDER_UPSERT, staged_rows=staged.count),
        index_statement(target, winners),
    ]
    of_after: Mapping[str, object] = {}
    if staged.changed is not None:
        statements.append(rows_of_orders(orders))
        of_after = named_keys(staged.changed.rows.versions.select(KEY).unique())
    _, ((inserted, updated),), _, *after = execute_together(
        connection, *statements, parameters={**bound(transaction.days), **of_after}
    )
    schema = {"shop_id": pl.String, "order_id": pl.String, "raw_id": pl.Int64}
    return WriteCounts(inserted=inserted, updated=updated), pl.DataFrame(
        after[0] if after else [], schema=schema, orient="row"
    )


def delete_gone(transaction: DataTransaction, gone: pl.DataFrame) -> int:
    """删去没有赢家的订单；份额之外的只从索引里去掉。返回删去的行数。"""
    if gone.is_empty():
        return 0
    orders = transaction.tables.orders
    staging = stage_frame(transaction.connection, gone, name="gone_orders", like=order_index)
    unindex_orders(transaction.connection, transaction.target, staging, transaction.days)
    in_share = transaction.share.covers_key(staging.c.customer_key)
    return transaction.connection.execute(sa.delete(orders).where(same_order(orders, staging), in_share)).rowcount


def guard_deletes(transaction: DataTransaction, gone: pl.DataFrame, shops: pl.DataFrame) -> None:
    """要删的太多，或有一个只因为店名不认得了才没有赢家，就停下：店铺改了名，不该抹掉它的历史，一次几个也不行。

    :param shops: 评判所用的店铺，与数据同一个快照。
    """
    if transaction.run.allow_deletes or gone.is_empty():
        return
    connection, days = transaction.connection, transaction.days
    orders = transaction.tables.orders
    allowed = connection.scalars(days_allowing_deletes(transaction.target, transaction.asset, days)).all()
    refused = gone.filter(~pl.col("order_date").is_in(list(allowed)))
    vanished = find_vanished_shops(transaction, refused, shops)
    if not vanished and refused.height <= ALWAYS_ALLOWED_DELETES:
        return
    of_days = sa.select(orders.c.shop_id, orders.c.customer_nickname).where(days.includes(orders.c.order_date))
    named = (
        read_frame(connection, of_days).with_columns(pl.col("customer_nickname").fill_null("")).select(customer_key())
    )
    total = named.filter(transaction.share.covers()).height
    if vanished or refused.height > total * transaction.settings.max_delete_share:
        raise TooManyDeletesError(
            deletes=refused.height,
            orders=total,
            first_day=str(days.first),
            last_day=str(days.last),
            vanished_shops=vanished,
        )


def find_vanished_shops(transaction: DataTransaction, gone: pl.DataFrame, shops: pl.DataFrame) -> Sequence[str]:
    """这些订单的店名里，原始行还在范围之内、而 shop_configs 不认得了的。店名取自 orders 那一行的原始记录。"""
    if gone.is_empty():
        return []
    connection = transaction.connection
    staging = stage_frame(connection, gone.select("shop_id", "order_id"), name="refused_orders", like=order_index)
    known = {"known_shops": shops["shop"].to_list()}
    vanished = connection.scalars(_vanished_shops(transaction.tables.orders, staging), known).all()
    release_staging(connection, staging)
    return vanished


@lru_cache(maxsize=64)
def _has_orders(orders: sa.Table) -> sa.Select[tuple[bool]]:
    return sa.select(sa.select(orders.c.order_id).where(orders.c.order_date.between(FIRST_DAY, LAST_DAY)).exists())


@lru_cache(maxsize=64)
def _insert_changed(orders: sa.Table, target: str, winners: sa.Table, changed: sa.Table) -> sa.Insert:
    written = [
        column.name for column in winners.columns if column.name in orders.c and column.name not in ORDER_UPSERT.key
    ]
    differs = [
        sa.tuple_(*table.c[*names]).is_distinct_from(sa.tuple_(*winners.c[*names]))
        for table, names in ((orders, written), (order_index, INDEXED))
    ]
    compared = (
        sa.select(*winners.c)
        .select_from(winners)
        .outerjoin(orders, same_order(orders, winners))
        .outerjoin(order_index, sa.and_(same_order(order_index, winners), order_index.c.target == target))
    )
    return sa.insert(changed).from_select([column.name for column in winners.columns], compared.where(sa.or_(*differs)))


@lru_cache(maxsize=64)
def _mark_changed(orders: sa.Table, target: str, winners: sa.Table, scope: Scope) -> sa.Insert:
    """整天做的，下游自己找得到这些天的客户，只记赢家在区间之外的。"""
    names = ("customer_nickname", "latest_status", "system_order_type", "amount", "ordered_at")  # 客户与商机由它们算出
    changed = sa.tuple_(*orders.c[*names]).is_distinct_from(sa.tuple_(*winners.c[*names]))
    keys = sa.select(winners.c.customer_key).outerjoin(orders, same_order(winners, orders)).where(changed)
    if scope == "whole":
        keys = keys.where(sa.not_(winners.c.order_date.between(FIRST_DAY, LAST_DAY)))
    return insert_marks(target, keys, FIRST_DAY, lost=scope == "whole")


@lru_cache(maxsize=64)
def _vanished_shops(orders: sa.Table, gone: sa.Table) -> sa.Select[tuple[str]]:
    stored, version = raw_orders.alias("stored"), raw_orders.alias("version")
    shop = trimmed(stored.c.shop)
    in_scope = (
        sa.select(version.c.raw_id)
        .join(import_tasks, import_tasks.c.import_id == version.c.import_id)
        .where(raw_rows.IN_SCOPE, order_id_key(version.c.order_id) == gone.c.order_id, trimmed(version.c.shop) == shop)
    )
    return (
        sa.select(shop.distinct().label("shop"))
        .select_from(gone)
        .join(orders, same_order(orders, gone))
        .join(stored, stored.c.raw_id == orders.c.raw_id)
        .where(shop != sa.all_(array("known_shops", sa.Text)), in_scope.exists())
        .order_by("shop")
    )
