"""期间真正发出的每条语句的计划：就地 EXPLAIN ANALYZE，再退回去；暂存表、锁与参数都是它们自己的。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.pq import TransactionStatus

_NOT_DATA = ("pg_", "information_schema")
"""系统表与临时表的 schema。"""
_STATEMENT = re.compile(r"(?:'[^']*'|[^';])+")
_EXPLAINABLE = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b")
_COPY_OUT = re.compile(r"COPY \((.*)\) TO STDOUT", re.DOTALL)


@dataclass(frozen=True)
class ExplainedStatement:
    """一条语句与它的计划。"""

    text: str
    plan: dict[str, Any]

    def rows_read(self, table: str) -> int:
        """从这张表里读出的行，滤掉的也算。"""
        return sum(_rows(node) for node in _nodes(self.plan) if node.get("Relation Name") == table)

    def rows_read_of_tables(self) -> int:
        """从各张表里一共读出的行；临时表与系统表不算。"""
        return sum(_rows(node) for node in _nodes(self.plan) if not node.get("Schema", "pg_").startswith(_NOT_DATA))

    @property
    def asks_for_each_row(self) -> bool:
        """有没有哪一行都要问一遍的子查询，散列过的也算：装不下就散列不了。"""
        return any(node.get("Parent Relationship") == "SubPlan" for node in _nodes(self.plan))

    @property
    def pages(self) -> int:
        """碰过的页，在不在缓存里都算。"""
        return int(self.plan["Shared Hit Blocks"] + self.plan["Shared Read Blocks"])


@contextmanager
def explained(
    engine: sa.Engine | type[sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[ExplainedStatement]]:
    """:param engine: sa.Engine 就是全部引擎，Dagster 的（psycopg2）也在内。"""
    found: list[ExplainedStatement] = []

    def explain(cursor: Any, statement: str, parameters: Any) -> None:
        if isinstance(parameters, list):
            return
        # 一条消息里有几条语句的，参数已经写在里面了
        parts = [statement] if parameters else _STATEMENT.findall(statement)
        if not any(map(_EXPLAINABLE.match, parts)):
            return
        own = cursor.connection.cursor()
        is_within = (
            cursor.connection.info.transaction_status != TransactionStatus.IDLE or not cursor.connection.autocommit
        )
        own.execute("SAVEPOINT explained" if is_within else "BEGIN")
        for part in parts:
            if not _EXPLAINABLE.match(part):
                own.execute(part)
                continue
            own.execute(f"EXPLAIN (ANALYZE, BUFFERS, VERBOSE, FORMAT JSON) {part}", parameters or None)
            found.append(ExplainedStatement(part, own.fetchone()[0][0]["Plan"]))
        own.execute("ROLLBACK TO SAVEPOINT explained" if is_within else "ROLLBACK")

    def execute_message(cursor: Any, query: bytes) -> Any:
        explain(cursor, query.decode(), None)
        return original_execute(cursor, query)

    def execute(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if isinstance(cursor, psycopg.ClientCursor):  # execute_message 来说
            return
        explain(getattr(cursor, "_cursor", cursor), statement, parameters)

    def copy(cursor: psycopg.Cursor[Any], statement: bytes, parameters: Any = None, **options: Any) -> Any:
        if query := _COPY_OUT.match(statement.decode()):
            bound = psycopg.ClientCursor(cursor.connection).mogrify(query[1], parameters) if parameters else query[1]
            explain(cursor, bound, None)
        return original(cursor, statement, parameters, **options)

    original, original_execute = psycopg.Cursor.copy, psycopg.ClientCursor.execute
    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Cursor, "copy", copy)
        patch.setattr(psycopg.ClientCursor, "execute", execute_message)
        sa.event.listen(engine, "before_cursor_execute", execute)
        yield found
        sa.event.remove(engine, "before_cursor_execute", execute)


def _rows(node: dict[str, Any]) -> int:
    if not node["Node Type"].endswith("Scan") or node["Node Type"] == "Bitmap Index Scan":
        return 0
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return round((node["Actual Rows"] + removed) * node["Actual Loops"])


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)
