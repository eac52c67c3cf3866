"""等着导入的事件、没有人公布的导入看到哪里、发不出去的完成事件、进程旁边的活出了什么事。"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        CREATE TABLE etl.waiting_events (
            target TEXT NOT NULL,
            import_id UUID NOT NULL,
            event_id UUID NOT NULL,
            allow_deletes BOOLEAN DEFAULT false NOT NULL,
            stream_sequence BIGINT NOT NULL,
            stored_at TIMESTAMP WITH TIME ZONE NOT NULL,
            looks INTEGER DEFAULT 0 NOT NULL,
            look_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
            PRIMARY KEY (target, import_id, event_id)
        );
        CREATE INDEX ix_waiting_events_look_at ON etl.waiting_events (target, look_at);
        COMMENT ON TABLE etl.waiting_events IS 'events whose import is not completed yet: taken in with it, or dead-lettered';

        CREATE TABLE etl.import_watches (
            target TEXT NOT NULL PRIMARY KEY,
            watched_from TIMESTAMP WITH TIME ZONE NOT NULL,
            watched_until TIMESTAMP WITH TIME ZONE NOT NULL
        );
        COMMENT ON TABLE etl.import_watches IS 'imports completed between these moments were announced, or taken in without an event';

        ALTER TABLE etl.outbox ADD COLUMN problem TEXT, ADD COLUMN retry_at TIMESTAMP WITH TIME ZONE;

        CREATE TABLE etl.troubles (
            process TEXT NOT NULL,
            task TEXT NOT NULL,
            message TEXT NOT NULL,
            times INTEGER DEFAULT 1 NOT NULL,
            first_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
            last_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
            PRIMARY KEY (process, task)
        );
        COMMENT ON TABLE etl.troubles IS 'what went wrong beside the work of a process; shown by status and doctor';
        """
    )
    # 应用自己的表不归我们改；init-db 建的才加索引
    if op.get_bind().exec_driver_sql("SELECT to_regclass('public.ix_raw_orders_import_id')").scalar():
        op.get_bind().exec_driver_sql(
            "CREATE INDEX IF NOT EXISTS ix_import_tasks_completed_at ON public.import_tasks (completed_at)"
        )
