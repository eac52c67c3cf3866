"""告警说过什么、谁在看；失败的运行与头一句；事件何时进的流，事件到数据的延迟由此算出。"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        ALTER TABLE etl.import_events ADD COLUMN stored_at timestamptz;

        CREATE TABLE etl.failed_runs (
            target text NOT NULL,
            run_id text NOT NULL,
            asset text NOT NULL,
            first_day date NOT NULL,
            last_day date NOT NULL,
            reason text NOT NULL,
            failed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (target, run_id, asset)
        );
        CREATE INDEX ix_failed_runs_failed_at ON etl.failed_runs (target, failed_at);
        COMMENT ON TABLE etl.failed_runs IS 'runs that failed in the last days, and why';

        CREATE TABLE etl.alerts (
            target text NOT NULL,
            key text NOT NULL,
            source text NOT NULL,
            severity text NOT NULL,
            en text NOT NULL,
            zh text NOT NULL,
            remedy text NOT NULL,
            size integer NOT NULL,
            settle_seconds double precision NOT NULL,
            since timestamptz NOT NULL DEFAULT clock_timestamp(),
            over_at timestamptz,
            said jsonb NOT NULL DEFAULT '{}'::jsonb,
            said_at timestamptz,
            PRIMARY KEY (target, key)
        );
        COMMENT ON TABLE etl.alerts IS 'what is wrong now, and which webhooks were told';

        CREATE TABLE etl.alert_watches (
            target text NOT NULL PRIMARY KEY,
            watcher text NOT NULL,
            watched_until timestamptz NOT NULL
        );
        COMMENT ON TABLE etl.alert_watches IS 'the one process that looks and sends alerts';
        """
    )
