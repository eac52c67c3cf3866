"""一个事件只做变了的：台账记下哪些要求说得出变了什么，每天的账记下来接着算，标记有了日子。"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        ALTER TABLE etl.ledger
            ADD COLUMN changed_since bigint NOT NULL DEFAULT 0,
            ADD COLUMN changed_until bigint NOT NULL DEFAULT 0,
            ADD COLUMN fingerprint text,
            ADD COLUMN scope text;
        ALTER TABLE etl.stale_customers ADD COLUMN day date;
        DROP INDEX etl.ix_stale_customers;
        CREATE INDEX ix_stale_customers ON etl.stale_customers (target, asset, day);
        CREATE TABLE etl.day_accounts (
            target text NOT NULL,
            day date NOT NULL,
            account jsonb NOT NULL,
            PRIMARY KEY (target, day)
        );
        CREATE TABLE etl.counted_imports (
            target text NOT NULL,
            day date NOT NULL,
            import_id uuid NOT NULL,
            rows integer NOT NULL,
            PRIMARY KEY (target, day, import_id)
        );
        """
    )
