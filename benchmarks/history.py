"""一段做完了的历史，由服务器自己填进全部的表：几百万个订单也只要几分钟。

填进去的正是产品会写下的（`changes_of_product` 来核对），只是客户与商机的 id 用 md5：像旧系统留下的那样，库里没有 SHA-1。
导入按时间先后，每次是一天的订单；每十个订单有一个在下一次导入里又来了一次（状态变了），每次导入有一行坏的。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import click
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.customers.etl import materialize_customers
from etl_assets.definitions import graph
from etl_assets.leads.etl import materialize_leads
from etl_assets.ledger.locks import CUSTOMER_STRIPES, STRIPES
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.accounting import count_raw_rows, verify_days
from etl_assets.services.day_accounts import StoredDay, store_counted_days
from etl_assets.services.fingerprints import fingerprint
from etl_assets.services.materialization import RunContext
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import read_frame, stage_frame
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME, RawData


@dataclass(frozen=True)
class History:
    """到 last_day 为止连着 days 天的订单 H-0、H-1、…，先后分给各次导入；第 n 个是「客户」+ n % customers 的。"""

    last_day: date
    days: int
    imports: int
    orders: int
    customers: int

    @property
    def first_day(self) -> date:
        return self.last_day - timedelta(days=self.days - 1)

    def day_of(self, number: int) -> date:
        """第 number 个订单的业务日。"""
        return self.first_day + timedelta(days=number * self.imports // self.orders * self.days // self.imports)

    def customer_of(self, number: int) -> str:
        return f"客户{number % self.customers}"


LAST_DAY = date(2026, 1, 1)
"""最新的业务日。基准的事件不晚于它：一天头一次到来时的清扫，不算在哪个事件头上。"""

ORDINARY = History(LAST_DAY, days=1_000, imports=10_000, orders=1_000_000, customers=200_000)
"""平日的样子：库不是空的。"""


_DAYS_AT_A_TIME = 100


def fill_history(engine: sa.Engine, settings: EtlSettings, history: History) -> None:
    """填进一个迁移好的、还没有订单的数据库；店铺与类型映射由调用者先放好（`RawData`）。

    :param settings: 工人用的：每一天都是照它们整天做完的。
    """
    parameters = {
        "first_day": history.first_day,
        "days": history.days,
        "imports": history.imports,
        "orders": history.orders,
        "customers": history.customers,
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SET LOCAL statement_timeout = 0; SET LOCAL work_mem = '256MB'; SET LOCAL maintenance_work_mem = '256MB'"
        )
        for statement in (_DROP_INDEXES, *_RAW, *_TABLES, *_LEDGER, _RESTORE_INDEXES):
            text = sa.text(statement)
            connection.execute(text, {name: parameters[name] for name in text.compile().params})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET statement_timeout = 0")
        connection.exec_driver_sql("VACUUM ANALYZE")
        connection.exec_driver_sql("RESET statement_timeout")
    for number in range(0, history.days, _DAYS_AT_A_TIME):
        first = history.first_day + timedelta(days=number)
        with engine.begin() as connection:
            _keep_accounts(
                connection,
                settings,
                DayRange(first, min(first + timedelta(days=_DAYS_AT_A_TIME - 1), history.last_day)),
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE etl.ledger, etl.day_accounts, etl.counted_imports")


def _keep_accounts(connection: sa.Connection, settings: EtlSettings, days: DayRange) -> None:
    """每天的账由产品自己数、自己核对、自己存，指纹也是它的：下一个事件只做变了的。"""
    target = settings.target_schema
    raw = count_raw_rows(connection, settings, days)
    orders = target_tables(target).orders.c
    again = sa.select((orders.raw_id - 1).label("raw_id"), orders.shop_id, orders.order_id, orders.order_date)
    superseded = read_frame(
        connection, again.where(sa.func.mod(orders.raw_id, 2) == 0, days.includes(orders.order_date))
    )
    share = Share(percent=100)
    aside = stage_frame(connection, superseded, name="superseded_versions", like=target_tables(target).orders)
    accounts = verify_days(
        connection, settings, days, share=share, raw=raw, superseded=superseded, aside=aside, outside=superseded.clear()
    )
    of_orders = sa.select(ledger.c.day, ledger.c.run_id).where(ledger.c.asset == "orders", days.includes(ledger.c.day))
    made_by = {row.day: row.run_id for row in connection.execute(of_orders)}
    stored = [StoredDay(account, None, made_by[account.day]) for account in accounts if account.day in made_by]
    store_counted_days(connection, target, days, stored, raw)
    now = fingerprint(settings)
    connection.execute(
        sa.update(ledger).where(days.includes(ledger.c.day)).values(scope="whole", fingerprint=now.sql), now.parameters
    )


def fill_ordinary(engine: sa.Engine, settings: EtlSettings) -> None:
    """店铺、类型映射与平日的历史；要一分钟上下。"""
    click.echo(f"filling in {ORDINARY.orders:,} orders of {ORDINARY.days:,} days", err=True)
    RawData(engine)
    fill_history(engine, settings, ORDINARY)


_MATERIALIZE = {"orders": materialize_orders, "customers": materialize_customers, "leads": materialize_leads}


def changes_of_product(engine: sa.Engine, settings: EtlSettings, ranges: Sequence[DayRange]) -> Iterator[str]:
    """让产品把这几段日子整天重做一遍：它若改了什么，或没有订单可做，一句一处。订单的账由它自己核对。"""
    for days in ranges:
        for asset, materialize in _MATERIALIZE.items():
            run = RunContext(run_id="history", assets=frozenset(_MATERIALIZE), upstreams=graph.upstreams(asset))
            report = materialize(engine, settings, days, run)
            written = report.written
            did_nothing = report.asset == "orders" and not written.rows
            if did_nothing or written.inserted or written.updated or written.deleted:
                yield f"{report.asset} of {days}: {written}"


# 一行行地插进索引，比填完再建慢一半
_DROP_INDEXES = """
    DO $$
    DECLARE made text;
    BEGIN
        CREATE TEMPORARY TABLE made_indexes ON COMMIT DROP AS
        SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition
        FROM pg_index
        WHERE indrelid = ANY (ARRAY['public.raw_orders', 'public.orders', 'public.business_leads', 'etl.order_index']::regclass[])
          AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid);
        FOR made IN SELECT name FROM made_indexes LOOP EXECUTE 'DROP INDEX ' || made; END LOOP;
    END $$
"""
_RESTORE_INDEXES = """
    DO $$
    DECLARE made text;
    BEGIN FOR made IN SELECT definition FROM made_indexes LOOP EXECUTE made; END LOOP; END $$
"""

# ---- 原始数据 --------------------------------------------------------------------

_TIMEZONE = EtlSettings.model_fields["timezone"].default

_MADE_IMPORTS = f"""
    CREATE TEMPORARY TABLE made_imports ON COMMIT DROP AS
    SELECT import_no, md5('import ' || import_no)::uuid AS import_id,
           :first_day + (import_no * :days / :imports)::int AS day,
           (:first_day + interval '20 hours' + import_no::float / :imports * make_interval(days => :days))
               AT TIME ZONE '{_TIMEZONE}' AS completed_at
    FROM generate_series(0, CAST(:imports AS bigint) - 1) AS import_no
"""

# 一行一个订单；later 是它又来了一次的导入
_MADE_ORDERS = f"""
    SELECT n, 'H-' || n AS order_id, '客户' || n % :customers AS nickname,
           CASE n % 7 WHEN 0 THEN '打样订单' WHEN 1 THEN '产前样订单' ELSE '大货订单' END AS raw_type,
           CASE n % 7 WHEN 0 THEN 'SAMPLE' WHEN 1 THEN 'PROOF' ELSE 'BULK' END AS system_type,
           CASE WHEN n % 11 = 0 THEN 'cancelled' WHEN n % 11 < 5 THEN 'paid' ELSE 'completed' END AS status,
           (n % 99991)::numeric / 100 AS amount, (1 + n % 9)::int AS quantity,
           own.day, (own.day + make_interval(mins => (n % 1440)::int)) AT TIME ZONE '{_TIMEZONE}' AS ordered_at,
           own.import_id, later.import_id AS later_import_id
    FROM generate_series(0, CAST(:orders AS bigint) - 1) AS n
    JOIN made_imports AS own ON own.import_no = n * :imports / :orders
    LEFT JOIN made_imports AS later ON n % 10 = 0 AND later.import_no = own.import_no + 1
"""

_RAW_COLUMNS = (
    "raw_id, import_id, order_id, shop, customer_name, order_type, order_status, amount, quantity, ordered_at"
)

_RAW = (
    _MADE_IMPORTS,
    "CREATE INDEX ON made_imports (import_no)",
    "ANALYZE made_imports",
    f"""
    INSERT INTO public.raw_orders ({_RAW_COLUMNS})
    SELECT 2 * n + 1, import_id, order_id, '{SAMPLE_SHOP_NAME}', nickname, raw_type,
           CASE WHEN later_import_id IS NULL THEN status ELSE 'new' END, amount, quantity, ordered_at
    FROM ({_MADE_ORDERS}) AS made
    """,
    f"""
    INSERT INTO public.raw_orders ({_RAW_COLUMNS})
    SELECT 2 * n + 2, later_import_id, order_id, '{SAMPLE_SHOP_NAME}', nickname, raw_type, status, amount, quantity, ordered_at
    FROM ({_MADE_ORDERS}) AS made WHERE later_import_id IS NOT NULL
    """,
    f"""
    INSERT INTO public.raw_orders ({_RAW_COLUMNS})
    SELECT 2 * :orders + 1 + import_no, import_id, 'H-bad-' || import_no, '{SAMPLE_SHOP_NAME}', ' ', NULL, NULL, 1, 1,
           day::timestamp AT TIME ZONE '{_TIMEZONE}'
    FROM made_imports
    """,
    "SELECT setval(pg_get_serial_sequence('public.raw_orders', 'raw_id'), 2 * :orders + :imports)",
    """
    INSERT INTO public.import_tasks (import_id, source_name, status, row_count, created_at, completed_at)
    SELECT import_id, 'history', 'completed', (:orders / :imports)::int, completed_at, completed_at FROM made_imports
    """,
)

# ---- 结果 ------------------------------------------------------------------------

_FIGURES = ", ".join(
    f"{figure} FILTER (WHERE system_order_type = '{kind.upper()}' AND is_counted) AS {kind}_{name}"
    for name, figure in (("count", "count(*)"), ("amount", "sum(amount)"))
    for kind in ("sample", "proof", "bulk")
)
_FIGURE_COLUMNS = ", ".join(f"{kind}_{name}" for name in ("count", "amount") for kind in ("sample", "proof", "bulk"))
_FIGURE_VALUES = ", ".join(
    f"coalesce({kind}_{name}, 0)" for name in ("count", "amount") for kind in ("sample", "proof", "bulk")
)
_COUNTED = """
    SELECT shop_id || ':' || customer_nickname AS customer_key, *, latest_status <> 'cancelled' AS is_counted,
           latest_status = 'completed' AND system_order_type = 'BULK' AS wins
    FROM public.orders
"""

_TABLES = (
    f"""
    INSERT INTO public.orders (shop_id, order_id, customer_nickname, latest_status, raw_order_type, system_order_type, amount, quantity,
                               ordered_at, order_date, import_id, raw_id)
    SELECT '{SAMPLE_SHOP}', order_id, nickname, status, raw_type, system_type, amount, quantity, ordered_at, day,
           coalesce(later_import_id, import_id), CASE WHEN later_import_id IS NULL THEN 2 * n + 1 ELSE 2 * n + 2 END
    FROM ({_MADE_ORDERS}) AS made
    """,
    """
    INSERT INTO etl.order_index (shop_id, order_id, target, customer_nickname, customer_key, order_date)
    SELECT shop_id, order_id, 'public', customer_nickname, shop_id || ':' || customer_nickname, order_date FROM public.orders
    """,
    """
    INSERT INTO etl.rejected_rows (target, raw_id, import_id, day, rule)
    SELECT 'public', 2 * :orders + 1 + import_no, import_id, day, 'missing_customer_name' FROM made_imports
    """,
    f"""
    INSERT INTO public.customers (customer_global_id, customer_key, shop_id, customer_nickname, first_order_at, last_order_at,
                                  order_count, total_amount, {_FIGURE_COLUMNS})
    SELECT md5(customer_key)::uuid, customer_key, '{SAMPLE_SHOP}', nickname, first_order_at, last_order_at,
           order_count, coalesce(total_amount, 0), {_FIGURE_VALUES}
    FROM (
        SELECT customer_key, min(customer_nickname) AS nickname,
               min(ordered_at) FILTER (WHERE is_counted) AS first_order_at, max(ordered_at) FILTER (WHERE is_counted) AS last_order_at,
               count(*) FILTER (WHERE is_counted) AS order_count, sum(amount) FILTER (WHERE is_counted) AS total_amount, {_FIGURES}
        FROM ({_COUNTED}) AS counted GROUP BY customer_key
    ) AS figures
    """,
    f"""
    INSERT INTO public.business_leads (lead_id, customer_global_id, lead_no, current_stage, opened_at, last_order_at, closed_at, closed_by,
                                       {_FIGURE_COLUMNS})
    SELECT md5(customer_key || '#' || lead_no)::uuid, md5(customer_key)::uuid, lead_no,
           CASE WHEN won_at IS NOT NULL THEN 'WON'
                WHEN last_day < (SELECT max(order_date) FROM public.orders) - 90 THEN 'COLD' ELSE 'OPEN' END,
           opened_at, last_order_at, won_at, CASE WHEN won_at IS NOT NULL THEN 'etl' END, {_FIGURE_VALUES}
    FROM (
        SELECT customer_key, lead_no, min(ordered_at) AS opened_at, max(ordered_at) AS last_order_at, max(order_date) AS last_day,
               max(ordered_at) FILTER (WHERE wins) AS won_at, {_FIGURES}
        FROM (
            SELECT *, (1 + count(*) FILTER (WHERE wins) OVER (
                PARTITION BY customer_key ORDER BY ordered_at, order_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ))::int AS lead_no
            FROM ({_COUNTED}) AS counted WHERE is_counted
        ) AS dealt
        GROUP BY customer_key, lead_no
    ) AS figures
    """,
    "INSERT INTO etl.cold_sweeps (target, last_warm_day, rollout) SELECT 'public', max(order_date) - 90, '100' FROM public.orders",
)

# ---- 台账：每一天都整天做完了 ------------------------------------------------------

_LEDGER = (
    f"""
    INSERT INTO etl.import_requests (target, import_id, day, revision)
    SELECT 'public', import_id, day, row_number() OVER (PARTITION BY day ORDER BY import_no)
    FROM (
        SELECT import_no, import_id, day FROM made_imports
        UNION
        SELECT later.import_no, later.import_id, made.day
        FROM ({_MADE_ORDERS}) AS made JOIN made_imports AS later ON later.import_id = made.later_import_id
    ) AS affected
    """,
    """
    INSERT INTO etl.import_events (target, import_id, event_id, handled_at, stream_sequence)
    SELECT 'public', import_id, md5('event ' || import_no)::uuid, completed_at, import_no + 1 FROM made_imports
    """,
    f"""
    INSERT INTO etl.ledger (target, asset, day, requested, materialized, requested_at, materialized_at, run_id)
    SELECT 'public', asset, day, revision, revision, day + interval '1 day', day + interval '1 day', md5('run ' || day)::uuid::text
    FROM (SELECT day, max(revision) AS revision FROM etl.import_requests GROUP BY day) AS days
    CROSS JOIN unnest(ARRAY[{", ".join(f"'{asset}'" for asset in _MATERIALIZE)}]) AS asset
    """,
    "INSERT INTO etl.locks (target, kind, key) SELECT 'public', 'day', day - date '0001-01-01' + 1 FROM etl.ledger GROUP BY day",
    f"""
    INSERT INTO etl.locks (target, kind, key)
    SELECT 'public', kind, key
    FROM (VALUES ('import', {STRIPES}), ('customer', {STRIPES}), ('customer stripe', {CUSTOMER_STRIPES})) AS kinds (kind, rows)
    CROSS JOIN LATERAL generate_series(0, rows - 1) AS key
    """,
)
