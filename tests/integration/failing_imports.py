"""一次要求不了的导入。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import sqlalchemy as sa


@contextmanager
def fails_on(engine: sa.Engine, import_id: UUID, sqlstate: str) -> Iterator[None]:
    """其间这次导入的日子一要求就错。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"""
            CREATE FUNCTION etl.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.import_id = '{import_id}' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER fail BEFORE INSERT ON etl.import_requests FOR EACH ROW EXECUTE FUNCTION etl.fail();
            """
        )
    yield
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP FUNCTION etl.fail CASCADE")
