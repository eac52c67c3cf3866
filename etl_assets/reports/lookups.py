"""ETL 在应用的表上靠着的查找，各要一个索引。有没有，看计划：不看名字，也不看表有多大。

应用自己建的表没有 init-db 的索引；没有，每个事件、每个运行都读整张表，而谁也不说。
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.base import PGDialect

from etl_assets.core.asset_description import Lookup, probe
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.business_day import bound, may_fall_on_days, partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import EARLY, LATE, import_tasks, order_id_key, raw_orders, target_tables
from etl_assets.services.raw_rows import IS_SETTLED

_BUILDABLE = ("r", "m")


@dataclass(frozen=True)
class IndexWork:
    """一种查找要做的事：missing 没有索引走得成；broken 是中断的 CONCURRENTLY 留下的，占着名字，每次写都要养着它。

    :param name: 要建的索引的名字，没有人占着。
    :param kind: 表的 relkind。
    :param is_building: 这张表上正有人建着索引：broken 的可能就是它，不能动。
    """

    lookup: Lookup
    missing: bool
    broken: Sequence[str]
    name: str
    kind: str
    owner: str
    is_building: bool

    @property
    def table_name(self) -> str:
        return _name(self.lookup.table)

    @property
    def is_buildable(self) -> bool:
        """能用 CONCURRENTLY 建。"""
        return self.kind in _BUILDABLE and not self.is_building

    @property
    def statements(self) -> tuple[str, ...]:
        """一条一条地、在事务之外执行；正有人建着的、视图是空的。"""
        if self.is_building or self.kind not in (*_BUILDABLE, "p"):
            return ()
        concurrently = "CONCURRENTLY " if self.is_buildable else ""
        schema = _quoted(self.lookup.table.schema)
        drops = [f"DROP INDEX {concurrently}{schema}.{_quoted(name)}" for name in self.broken]
        if not self.missing:
            return tuple(drops)
        _, definition = str(sa.schema.CreateIndex(self.lookup.index).compile(dialect=_DIALECT)).split(" ON ", 1)
        create = f"CREATE INDEX {concurrently}{_quoted(self.name)} ON {definition}"
        # 表达式要有统计，规划器才知道一个订单只有几行
        has_expression = any(not isinstance(expression, sa.Column) for expression in self.lookup.index.expressions)
        return (*drops, create, *([f"ANALYZE {self.table_name}"] if has_expression else ()))

    @property
    def problem(self) -> str:
        table, found = self.table_name, []
        if self.missing:
            found.append(f"no index of {table} serves lookups by {self.lookup.by}, each of them reads the whole table")
        if self.broken:
            left = ", ".join(self.broken)
            found.append(
                f"{left} on {table} is INVALID, left by a CREATE INDEX CONCURRENTLY that did not end: writes keep it up in vain"
            )
        return "; ".join(found)

    @property
    def says(self) -> str:
        """哪里不对，该怎么办。"""
        todo = "; ".join(self.statements)
        if self.is_building:
            remedy = "one is being built on that table now, look again when it is done"
        elif self.is_buildable:
            remedy = f"run `etl init-db --create-indexes`, or as {self.owner}, one by one: {todo}"
        elif todo:
            remedy = f"PostgreSQL builds none CONCURRENTLY on a partitioned table, so in a quiet hour, as {self.owner}: {todo}"
        else:
            remedy = "it is no table, so give the tables behind it such an index"
        return f"{self.problem}: {remedy}"


def find_index_work(connection: sa.Connection, settings: EtlSettings) -> list[IndexWork]:
    """没有索引走得成的查找，与中断了的索引；只看目录与计划，一行数据也不读。"""
    relied_on = lookups(settings)
    facts = {
        row.name: row
        for row in connection.execute(_TABLES, {"names": sorted({_name(each.table) for each in relied_on})})
    }
    found = []
    for lookup in relied_on:
        fact = facts[_name(lookup.table)]
        own = re.compile(re.escape(str(lookup.index.name)) + r"(_\d+)?")
        broken = [name for name in fact.broken if own.fullmatch(name) and fact.kind in _BUILDABLE]
        missing = not is_served(connection, lookup)
        if missing or broken:
            name = _free_name(str(lookup.index.name), set(fact.taken) - set(broken))
            found.append(IndexWork(lookup, missing, broken, name, fact.kind, fact.owner, fact.is_building))
    return found


def lookups(settings: EtlSettings) -> list[Lookup]:
    """应用的表上、目标 schema 里，声明了的索引各管一种。"""
    partitions, written = partition_range(settings), target_tables(settings.target_schema).of_asset
    raw = raw_orders.c
    on_days = may_fall_on_days(raw.ordered_at).params(bound(partitions))
    return [
        Lookup(raw_orders, "import_id", "import_id", {"import_id"}, _equal(raw.import_id, [UUID(int=0), UUID(int=1)])),
        Lookup(raw_orders, "ordered_at", "ordered_at", {"ordered_at"}, [probe(on_days, raw.ordered_at)]),
        order_lookup(),
        completion_lookup(),
        *(
            lookup
            for asset, description in descriptions().items()
            if description.application_table
            for lookup in description.application_table.lookups(written[asset], partitions)
        ),
    ]


def order_lookup() -> Lookup:
    """一个订单的各个版本。"""
    return Lookup(
        raw_orders, "order_id (trimmed)", "order", {"order_id"}, _equal(order_id_key(raw_orders.c.order_id), ["A", "B"])
    )


def completion_lookup() -> Lookup:
    """没有人宣布的导入，按完成的时刻找。"""
    completed_at = import_tasks.c.completed_at
    stretch = sa.and_(IS_SETTLED, completed_at > EARLY, completed_at <= LATE)
    return Lookup(import_tasks, "completed_at", "completed_at", {"completed_at"}, [probe(stretch, completed_at)])


def is_served(connection: sa.Connection, lookup: Lookup) -> bool:
    """不许扫表、不许排序，看规划器走哪个索引：它知道表达式、排序规则、条件与有效与否合不合。

    表再小，也没有别的路比得过；真用的计划在小表上扫表是对的，所以不看那个。设置在保存点里，看完就退回。
    """
    with connection.begin_nested() as savepoint:
        connection.execute(_ONLY_INDEX_SCANS)
        plans = [_explain(connection, probe) for probe in lookup.probes]
        kind = connection.scalar(_KIND, {"name": _name(lookup.table)})
        scans = [[node for node in _nodes(plan) if "Relation Name" in node] for plan in plans]
        named = {(node["Schema"], node["Index Name"]) for nodes in scans for node in nodes if "Index Name" in node}
        keys = _read_keys(connection, named)
        savepoint.rollback()
    served = [[_serves(node, keys, lookup.keys) for node in nodes] for nodes in scans]
    every = any if kind == "v" else all  # 分区各有索引；视图后面别的小表不必有
    return any(nodes and every(nodes) for nodes in served)


def _serves(node: Mapping[str, Any], keys: Mapping[tuple[str, str], Sequence[str]], wanted: Collection[str]) -> bool:
    """扫描从索引的哪里开始、到哪里结束，由条件定：要的列在它前面的键都定死了的那一段里。

    (raw_id, import_id) 上的条件 import_id = … 也写作 Index Cond，却要读完整个索引。
    """
    if node["Node Type"] != "Index Scan":
        return False
    if not wanted:
        return "Filter" not in node
    condition = node.get("Index Cond", "")
    for alias in (node["Alias"], _quoted(node["Alias"])):
        condition = condition.replace(f"{alias}.", "")
    condition = _plain(condition)
    of_index = keys[node["Schema"], node["Index Name"]]
    fixed = list(takewhile(lambda key: f"({key} = " in condition or f"({key} IS NULL)" in condition, of_index))
    reached = [key for key in of_index[: len(fixed) + 1] if f"({key} " in condition]
    return all(any(re.search(rf"\b{column}\b", key) for key in reached) for column in wanted)


def _plain(expression: str) -> str:
    """去掉 varchar 的列上的转换：条件里有，索引的键没有。"""
    return re.sub(r"\((\w+)\)::text\b", r"\1", expression)


def _explain(connection: sa.Connection, statement: sa.Select[Any]) -> dict[str, Any]:
    compiled = statement.compile(dialect=connection.dialect)
    answer = connection.exec_driver_sql(
        f"EXPLAIN (VERBOSE, FORMAT JSON) {compiled}", compiled.construct_params()
    ).scalar_one()
    plan: dict[str, Any] = answer[0]["Plan"]
    return plan


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def _read_keys(connection: sa.Connection, indexes: Collection[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    schemas, names = [schema for schema, _ in indexes], [name for _, name in indexes]
    rows = connection.execute(_KEYS, {"schemas": schemas, "names": names})
    return {(row.schema, row.name): [_plain(key) for key in row.keys] for row in rows}


def _equal(key: sa.ColumnElement[Any], values: Sequence[Any]) -> list[sa.Select[Any]]:
    """散列索引排不了序，只认等于一个值。"""
    wanted = sa.bindparam("wanted", values, type_=sa.ARRAY(key.type))
    return [probe(key == sa.any_(wanted), key), probe(key == sa.bindparam("wanted", values[0], type_=key.type))]


def _free_name(name: str, taken: Collection[str]) -> str:
    """同名而走不成的索引不归我们删，名字让给它。"""
    candidates = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _name(table: sa.Table) -> str:
    """带 schema，引用过的。"""
    return _DIALECT.identifier_preparer.format_table(table)


def _quoted(name: str | None) -> str:
    return _DIALECT.identifier_preparer.quote(name or "")


_DIALECT = PGDialect()  # type: ignore[no-untyped-call]  # SQLAlchemy 没有给它类型
_ONLY_INDEX_SCANS = sa.select(
    *[
        sa.func.set_config(name, "off", True)
        for name in (
            "enable_seqscan",
            "enable_bitmapscan",
            "enable_indexonlyscan",
            "enable_sort",
            "enable_incremental_sort",
        )
    ]
)
_KIND = sa.text("SELECT relkind FROM pg_class WHERE oid = to_regclass(:name)")
_KEYS = sa.text("""
    SELECT n.nspname AS schema, c.relname AS name,
           ARRAY(SELECT pg_get_indexdef(c.oid, key, false) FROM generate_series(1, i.indnkeyatts) AS key ORDER BY key) AS keys
    FROM unnest(CAST(:schemas AS text[]), CAST(:names AS text[])) AS used (schema, name)
    JOIN pg_namespace n ON n.nspname = used.schema
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = used.name
    JOIN pg_index i ON i.indexrelid = c.oid""")
# 正建着的，从不属于我们的角色看来只有 pid：它占着表上的锁
_TABLES = sa.text("""
    SELECT wanted.name, t.relkind::text AS kind, pg_get_userbyid(t.relowner) AS owner,
           ARRAY(SELECT relname::text FROM pg_class WHERE relnamespace = t.relnamespace AND starts_with(relname, 'ix_')) AS taken,
           ARRAY(
               SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
               WHERE i.indrelid = t.oid AND NOT i.indisvalid ORDER BY c.relname
           ) AS broken,
           EXISTS (
               SELECT FROM pg_stat_progress_create_index p JOIN pg_locks l ON l.pid = p.pid
               WHERE p.datname = current_database() AND l.relation = t.oid AND l.granted
                     AND l.mode IN ('ShareUpdateExclusiveLock', 'ShareLock')
           ) AS is_building
    FROM unnest(CAST(:names AS text[])) AS wanted (name) JOIN pg_class t ON t.oid = to_regclass(wanted.name)""")
