"""一个资产说自己的话：表、键、哪一列是它的日子、给人看什么（description.py），该对得上什么（checks.py）。都不导入 Dagster。

台账、网页、命令与体检都从这里知道一个资产，没有哪一处写着它的名字；它的上游写在 asset.py 里，那是 Dagster 的。
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from etl_assets.core.business_day import DayRange
    from etl_assets.core.settings import EtlSettings
    from etl_assets.core.tables import TargetTables


@dataclass(frozen=True)
class LookedAt:
    """一个检查看的是什么：一个快照里的这些行。

    :param rows: 要看的行，主键的列；有 days 就只有那些天的。
    :param days: None 是整张表。
    :param hashes: 只看散列在这一段的客户；None 是全部，也是不按客户看的。
    """

    connection: sa.Connection
    settings: EtlSettings
    tables: TargetTables
    rows: sa.Select[Any]
    days: DayRange | None
    hashes: tuple[int, int] | None = None


@dataclass(frozen=True)
class TableCheck:
    """写出的表该是什么样：一句话，与违反它的行。

    :param violations: 查询，由 SQL 数它的行；数不了的自己查，给出违反的东西。
    :param by_customer: 客户太多，一口一口地看，每口一个快照。
    """

    says: str
    violations: Callable[[LookedAt], sa.Select[Any] | Sequence[object]]
    by_customer: bool = False


@dataclass(frozen=True)
class Lookup:
    """ETL 在应用的表上靠着的一种查找，要一个索引。

    :param by: 按什么找；说给人听的。
    :param index: init-db 会建的索引，名字的结尾。
    :param keys: 索引要按着它们找的列；没有就是部分索引的条件本身。
    :param probes: 与 ETL 真正发出的同样的条件，各在一张表上；有一条走得成就行。
    """

    table: sa.Table
    by: str
    index_ending: str
    keys: Collection[str]
    probes: Sequence[sa.Select[Any]]

    @property
    def index(self) -> sa.Index:
        (index,) = (index for index in self.table.indexes if str(index.name).endswith(f"_{self.index_ending}"))
        return index


def probe(condition: sa.ColumnElement[bool], *in_order: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """要它排好序：几行的表上各个索引一样便宜，只有打头的是它的才不必排。"""
    return sa.select(sa.literal(1)).where(condition).order_by(*in_order)


@dataclass(frozen=True, kw_only=True)
class ApplicationTable:
    """应用已有的表：结构是它的，够我们写就行。

    :param not_written: INSERT 不给值的列（人写的）。
    :param written_as_null: 有时写成 NULL 的列。
    :param longest_text: 文字列 → 写的最长字数；没有的，多长都会写。
    :param lookups: 在这张表上靠着的查找，此刻有这些分区。
    """

    not_written: frozenset[str] = frozenset()
    written_as_null: frozenset[str] = frozenset()
    longest_text: Mapping[str, float] = field(default_factory=dict)
    lookups: Callable[[sa.Table, DayRange], Sequence[Lookup]] = lambda _table, _partitions: ()


@dataclass(frozen=True, kw_only=True)
class AssetDescription:
    """一个资产，文件夹的名字就是它的名字。

    :param define_table: 在给定的 MetaData 与 schema 里定义它的结果表；还没有的由 `etl init-db` 建。
    :param application_table: 表是应用的：缺了不建，由人补齐。None 是 ETL 自己的。
    :param dated_by: 一行是什么时候的：业务日，或一个时刻。给人看时新的在前，`--day`、`--since` 按它选。
    :param by_customer: 一天的行是这一天有订单的客户的（表里有 customer_global_id）；否则 dated_by 是业务日，就是那一天的。
    :param key: 比较两个 schema 时认一行的列；缺省是主键。自己没有的 customer_key 取自 customers。
    :param then_by: 同一天里的次序，晚的在前；缺省按主键。
    :param shown: `etl show` 的列。按客户的，还可以有 customers 的 customer_nickname。
    :param previewed: 网页上样例的列；缺省是 shown。
    :param counted: 网页上的曲线：名字，与按它分别数一天的行的那一列。
    :param sources: 列 → 它由哪些列（“资产.列”）算出。
    """

    define_table: Callable[[sa.MetaData, str], sa.Table]
    dated_by: str
    shown: tuple[str, ...]
    application_table: ApplicationTable | None = None
    by_customer: bool = False
    key: tuple[str, ...] = ()
    then_by: str | None = None
    previewed: tuple[str, ...] = ()
    counted: tuple[str, str] | None = None
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
