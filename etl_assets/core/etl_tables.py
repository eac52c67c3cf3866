"""ETL 自己的表，schema etl：台账、图、租约、锁、索引、账、发件箱。"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.tables import TIMESTAMP, customer_hash

etl = sa.MetaData(schema="etl")

TARGET = sa.bindparam("of_target", type_=sa.Text)
"""语句里的目标 schema；语句只拼一次，每次执行用参数 of_target 填上。"""


def _of_target(name: str, *columns: sa.Column[Any]) -> sa.Table:
    """每个目标 schema 各有自己的行：主键从 target 起。"""
    return sa.Table(name, etl, sa.Column("target", sa.Text, primary_key=True), *columns)


# 一行：由它认出自己发的完成事件，不与别的 ETL 的混
installation = sa.Table(
    "installation",
    etl,
    sa.Column("installation_id", sa.Uuid, primary_key=True, server_default=sa.func.gen_random_uuid()),
)

# 一行一个资产的一天：requested 大于 materialized 就是到期。(changed_since, changed_until] 里的要求说得出变了什么；
# fingerprint 是上次整天做时的店铺、映射与设置的，scope 是上次做的
ledger = _of_target(
    "ledger",
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
)
sa.Index("ix_ledger_due", ledger.c.target, ledger.c.day, postgresql_where=ledger.c.requested > ledger.c.materialized)
sa.Index("ix_ledger_materialized_at", ledger.c.target, ledger.c.asset, ledger.c.materialized_at)

# 代码位置的资产图，上游在前：台账照它走；台账里别的资产的行谁也不看
assets = _of_target(
    "assets",
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("upstreams", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("ancestors", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("by_customer", sa.Boolean, nullable=False),
)

# 写过的图：代码旧的工人重起，不把自己的图再写回来
graphs = _of_target(
    "graphs",
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("written_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
)

# 不在图里了的资产：失去订单的客户也给它记标记，它回来时其间来的日子到期
absent_assets = _of_target(
    "absent_assets",
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("by_customer", sa.Boolean, nullable=False),
)

# 每个导入最近处理的事件
import_events = _of_target(
    "import_events",
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, nullable=False),
    sa.Column("handled_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    sa.Column("stream_sequence", sa.BigInteger),
    sa.Column("stored_at", TIMESTAMP),
    # 处理它时导入的状态；早先的版本不记
    sa.Column("import_status", sa.Text),
)

# 一个导入要求一天时，台账（没有上游的资产）到的版本
import_requests = _of_target(
    "import_requests",
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
)
sa.Index("ix_import_requests_day", import_requests.c.target, import_requests.c.day, import_requests.c.revision)

# 导入还没完成的事件：完成了就要求它的日子，过了限期进死信
waiting_events = _of_target(
    "waiting_events",
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, primary_key=True),
    sa.Column("allow_deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stream_sequence", sa.BigInteger, nullable=False),
    sa.Column("stored_at", TIMESTAMP, nullable=False),
    sa.Column("looks", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("look_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
)
sa.Index("ix_waiting_events_look_at", waiting_events.c.target, waiting_events.c.look_at)

# 这两个时刻之间完成的导入，都有人宣布过，或者没有事件也收下了
import_watches = _of_target(
    "import_watches",
    sa.Column("watched_from", TIMESTAMP, nullable=False),
    sa.Column("watched_until", TIMESTAMP, nullable=False),
)

# 一行一次由文件来的导入：文件内容的 SHA-256，它的订单从何时到何时。撤回了没有，看 import_tasks。
# 存下的第 first_places[i] 行是文件的第 first_rows[i] 行，后面的接着它，到下一个为止
imported_files = sa.Table(
    "imported_files",
    etl,
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.Column("first_ordered_at", TIMESTAMP),
    sa.Column("last_ordered_at", TIMESTAMP),
    sa.Column("first_places", pg.ARRAY(sa.Integer)),
    sa.Column("first_rows", pg.ARRAY(sa.Integer)),
)
sa.Index("ix_imported_files_content_hash", imported_files.c.content_hash)
sa.Index("ix_imported_files_last_ordered_at", imported_files.c.last_ordered_at)

# 一行一个正在执行的运行，以数据库的时钟为准；在数据事务里核对
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
)

# 代表业务日、客户（分条）、导入（分条）与领取的行；按序锁
locks = _of_target(
    "locks",
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("key", sa.Integer, primary_key=True),
)

# 没有 closed_at 的商机（这个份额里的客户的）：最后一单早于 last_warm_day 的是 COLD，别的是 OPEN
cold_sweeps = _of_target(
    "cold_sweeps",
    sa.Column("last_warm_day", sa.Date),
    sa.Column("rollout", sa.Text, nullable=False),
)

# 订单 → 客户，与订单一起写下：找一个客户的订单不用扫表。target 放在主键最后：它几乎总是同一个值
order_index = sa.Table(
    "order_index",
    etl,
    sa.Column("shop_id", sa.Uuid, primary_key=True),
    sa.Column("order_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("customer_nickname", sa.Text),
    sa.Column("customer_key", sa.Text, nullable=False),
    sa.Column("order_date", sa.Date),
)
# 散列：比文字短，名字再长也放得进。装在 B 树里：散列索引同一个键的行排成一条链，每插一行都从头走过
sa.Index("ix_order_index_customer", customer_hash(order_index.c.customer_key))
# 别的系统从一天里删去的订单，只有索引还记得
sa.Index("ix_order_index_order_date", order_index.c.order_date)

# 订单变了的客户；每个标记自成一个版本，由修好它的运行删去：那一天的运行，没有日子的随便哪个
stale_customers = sa.Table(
    "stale_customers",
    etl,
    sa.Column("mark_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("customer_key", sa.Text, nullable=False),
    sa.Column("day", sa.Date),
)
sa.Index("ix_stale_customers", stale_customers.c.target, stale_customers.c.asset, stale_customers.c.day)

# 一行一条拒收的原始行；没有业务日的，day 是 NULL
rejected_rows = _of_target(
    "rejected_rows",
    sa.Column("raw_id", sa.BigInteger, primary_key=True),
    sa.Column("import_id", sa.Uuid, nullable=False),
    sa.Column("day", sa.Date),
    sa.Column("rule", sa.Text, nullable=False),
)
sa.Index("ix_rejected_rows_import", rejected_rows.c.target, rejected_rows.c.import_id)
sa.Index("ix_rejected_rows_day", rejected_rows.c.target, rejected_rows.c.day)

# 一天的原始行各去了哪里：整天做的数出来，只做变了的接着算
day_accounts = _of_target(
    "day_accounts",
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("account", pg.JSONB, nullable=False),
)

# 一天的账上，一个导入有几行
counted_imports = _of_target(
    "counted_imports",
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("rows", sa.Integer, nullable=False),
)

# 在数据事务里写下的完成事件；NATS 存下了就删去
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
)

# 进程旁边的活出了什么事；status 与 doctor 给人看
troubles = sa.Table(
    "troubles",
    etl,
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("times", sa.Integer, nullable=False, server_default=sa.text("1")),
    sa.Column("first_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("last_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
)

# 只有一行：过了保留期的由谁正在清（到期前归他），上次何时清完；在那之前处理的导入，台账的簿记可能已经忘了
retention = sa.Table(
    "retention",
    etl,
    sa.Column("is_only", sa.Boolean, sa.CheckConstraint("is_only"), primary_key=True, server_default=sa.true()),
    sa.Column("claimed_until", TIMESTAMP),
    sa.Column("finished_at", TIMESTAMP),
    sa.Column("forgotten_until", TIMESTAMP),
)

# 失败的运行里没做成的资产与缘由；过几天由记下一个的人删去，账还不平的留着
failed_runs = _of_target(
    "failed_runs",
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("first_day", sa.Date, nullable=False),
    sa.Column("last_day", sa.Date, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("failed_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
)
sa.Index("ix_failed_runs_failed_at", failed_runs.c.target, failed_runs.c.failed_at)

# 一行一件不对的事：said 是告诉了哪些 webhook，当时多大；over_at 是过去了、还没有都告诉
alerts = _of_target(
    "alerts",
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("en", sa.Text, nullable=False),
    sa.Column("zh", sa.Text, nullable=False),
    sa.Column("remedy", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("settle_seconds", sa.Double, nullable=False),
    sa.Column("since", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("over_at", TIMESTAMP),
    sa.Column("said", pg.JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("said_at", TIMESTAMP),
)

# 几个监听器里只有一个在看、在说
alert_watches = _of_target(
    "alert_watches",
    sa.Column("watcher", sa.Text, nullable=False),
    sa.Column("watched_until", TIMESTAMP, nullable=False),
)
