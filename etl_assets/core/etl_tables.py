"""ETL 自己的表，schema etl：台账、图、租约、锁、索引、账、发件箱。"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.tables import TIMESTAMP, customer_hash

etl = sa.MetaData(schema="etl")

installation = sa.Table(
    "installation",
    etl,
    sa.Column("installation_id", sa.Uuid, primary_key=True, server_default=sa.func.gen_random_uuid()),
    comment="one row: tells this installation's own completion events from those of another ETL",
)

ledger = sa.Table(
    "ledger",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("requested", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("materialized", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("requested_at", TIMESTAMP),
    sa.Column("materialized_at", TIMESTAMP),
    sa.Column("run_id", sa.Text),
    sa.Column("allow_deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("retry_at", TIMESTAMP),
    sa.Column("held_reason", sa.Text),
    sa.Column("failed_run_id", sa.Text),
    sa.Column("changed_since", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("changed_until", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("fingerprint", sa.Text),
    sa.Column("scope", sa.Text),
    comment="per asset and day: due while requested > materialized; the requests after changed_since up to changed_until name what "
    "changed; fingerprint is of the references and settings when the day was last done as a whole; scope is that of the last run",
)

sa.Index(
    "ix_ledger_due",
    ledger.c.target,
    ledger.c.day,
    postgresql_where=ledger.c.requested > ledger.c.materialized,
)
sa.Index("ix_ledger_materialized_at", ledger.c.target, ledger.c.asset, ledger.c.materialized_at)
assets = sa.Table(
    "assets",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("upstreams", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("ancestors", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("by_customer", sa.Boolean, nullable=False),
    comment="the graph of the code location, upstreams first: what the ledger walks; rows of the ledger for other assets are ignored",
)

graphs = sa.Table(
    "graphs",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("written_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    comment="graphs that were ever written: a worker with older code that restarts does not write its own again",
)

absent_assets = sa.Table(
    "absent_assets",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("by_customer", sa.Boolean, nullable=False),
    comment="assets that were in the graph and are not now: customers who lose an order are marked for them too, and when they come back "
    "the days that came meanwhile are due",
)

import_events = sa.Table(
    "import_events",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, nullable=False),
    sa.Column("handled_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    sa.Column("stream_sequence", sa.BigInteger),
    comment="the newest handled event of each import",
)

import_requests = sa.Table(
    "import_requests",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    comment="the ledger revision of orders at which an import asked for a day",
)

sa.Index("ix_import_requests_day", import_requests.c.target, import_requests.c.day, import_requests.c.revision)
waiting_events = sa.Table(
    "waiting_events",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, primary_key=True),
    sa.Column("allow_deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stream_sequence", sa.BigInteger, nullable=False),
    sa.Column("stored_at", TIMESTAMP, nullable=False),
    sa.Column("looks", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("look_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    comment="events whose import is not completed yet: taken in with it, or dead-lettered",
)

sa.Index("ix_waiting_events_look_at", waiting_events.c.target, waiting_events.c.look_at)
import_watches = sa.Table(
    "import_watches",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("watched_from", TIMESTAMP, nullable=False),
    sa.Column("watched_until", TIMESTAMP, nullable=False),
    comment="imports completed between these moments were announced, or taken in without an event",
)

leases = sa.Table(
    "leases",
    etl,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("token", sa.Uuid, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("first_day", sa.Date),
    sa.Column("last_day", sa.Date),
    sa.Column("acquired_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("expires_at", TIMESTAMP, nullable=False),
    sa.Column("cancel_requested_at", TIMESTAMP),
    comment="one row per running run, by the database's clock; checked in the data transaction",
)

locks = sa.Table(
    "locks",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("key", sa.Integer, primary_key=True),
    comment="rows that stand for days, customers (striped), imports (striped) and the claim; locked in sorted order",
)

cold_sweeps = sa.Table(
    "cold_sweeps",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("last_warm_day", sa.Date),
    sa.Column("rollout", sa.Text, nullable=False),
    comment="leads without closed_at, of the customers in this share, are COLD if their last order is before last_warm_day, else OPEN",
)

# target 放在主键最后：它几乎总是同一个值
order_index = sa.Table(
    "order_index",
    etl,
    sa.Column("shop_id", sa.Uuid, primary_key=True),
    sa.Column("order_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("customer_nickname", sa.Text),
    sa.Column("customer_key", sa.Text, nullable=False),
    sa.Column("order_date", sa.Date),
    comment="order -> customer, written with the order: finding a customer's orders needs no scan",
)

# 散列：比文字短，名字再长也放得进。装在 B 树里：散列索引同一个键的行排成一条链，每插一行都从头走过
sa.Index("ix_order_index_customer", customer_hash(order_index.c.customer_key))
# 别的系统从一天里删去的订单，只有索引还记得
sa.Index("ix_order_index_order_date", order_index.c.order_date)
stale_customers = sa.Table(
    "stale_customers",
    etl,
    sa.Column("mark_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("customer_key", sa.Text, nullable=False),
    sa.Column("day", sa.Date),
    comment="customers whose orders changed; each mark is its own version and is deleted by the run that repaired it: "
    "a run of its day, or any run where it has no day",
)

sa.Index("ix_stale_customers", stale_customers.c.target, stale_customers.c.asset, stale_customers.c.day)
rejected_rows = sa.Table(
    "rejected_rows",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("raw_id", sa.BigInteger, primary_key=True),
    sa.Column("import_id", sa.Uuid, nullable=False),
    sa.Column("day", sa.Date),
    sa.Column("rule", sa.Text, nullable=False),
    comment="one row per rejected raw row; day is NULL when the row has no business day",
)

sa.Index("ix_rejected_rows_import", rejected_rows.c.target, rejected_rows.c.import_id)
sa.Index("ix_rejected_rows_day", rejected_rows.c.target, rejected_rows.c.day)
day_accounts = sa.Table(
    "day_accounts",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("account", pg.JSONB, nullable=False),
    comment="where the raw rows of a day went: counted by runs of the whole day, carried forward by runs of what changed",
)

counted_imports = sa.Table(
    "counted_imports",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("rows", sa.Integer, nullable=False),
    comment="how many raw rows of an import on a day the account of the day has",
)

outbox = sa.Table(
    "outbox",
    etl,
    sa.Column("outbox_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("event_id", sa.Uuid, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("payload", pg.JSONB, nullable=False),
    sa.Column("created_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    sa.Column("problem", sa.Text),
    sa.Column("retry_at", TIMESTAMP),
    comment="completion events written in the data transaction; deleted once NATS has stored them",
)

troubles = sa.Table(
    "troubles",
    etl,
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("times", sa.Integer, nullable=False, server_default=sa.text("1")),
    sa.Column("first_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("last_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    comment="what went wrong beside the work of a process; shown by status and doctor",
)
