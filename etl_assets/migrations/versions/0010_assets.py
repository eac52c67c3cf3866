"""资产图写进数据库：台账按它走，不载入 Dagster 的进程也读它。先写下这一版之前的那条链，等着的事件不必等工人先载入代码。"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        CREATE TABLE etl.assets (
            target text NOT NULL,
            asset text NOT NULL,
            position integer NOT NULL,
            upstreams text[] NOT NULL,
            ancestors text[] NOT NULL,
            by_customer boolean NOT NULL,
            PRIMARY KEY (target, asset)
        );
        CREATE TABLE etl.graphs (
            target text NOT NULL,
            digest text NOT NULL,
            written_at timestamptz DEFAULT now() NOT NULL,
            PRIMARY KEY (target, digest)
        );
        INSERT INTO etl.assets (target, asset, position, upstreams, ancestors, by_customer)
        SELECT known.target, chain.*
        FROM (
            SELECT target FROM etl.ledger UNION SELECT target FROM etl.waiting_events UNION SELECT target FROM etl.import_watches
        ) AS known
        CROSS JOIN (
            VALUES ('orders', 0, '{}'::text[], '{}'::text[], false),
                   ('customers', 1, '{orders}', '{orders}', true),
                   ('leads', 2, '{customers}', '{orders,customers}', true)
        ) AS chain (asset, position, upstreams, ancestors, by_customer);
        """
    )
