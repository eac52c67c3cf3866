"""资产图：有哪些资产，谁紧排在谁前面。只在 Dagster 的定义里写着；这里是台账要知道的那一份。

代码位置把它写进 `etl.assets`，不载入 Dagster 的进程由那里读，台账的语句都连着它。
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from graphlib import CycleError

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array
from etl_assets.core.asset_folders import upstreams_first
from etl_assets.core.errors import DatabaseRefusedError, PermanentError
from etl_assets.core.etl_tables import absent_assets, assets, graphs, ledger

_WRITE_LOCK = 0x45544E


class GraphError(PermanentError):
    """资产图不成立。"""


@dataclass(frozen=True)
class Asset:
    """一个资产。by_customer：按客户计算，订单换了客户要给它留标记。"""

    name: str
    upstreams: frozenset[str] = frozenset()
    by_customer: bool = False


@dataclass(frozen=True)
class AssetGraph:
    """资产，上游在前。"""

    assets: tuple[Asset, ...]

    @classmethod
    def of(cls, assets: Iterable[Asset]) -> AssetGraph:
        """:raises GraphError: 有两个同名的，有不存在的上游，或者转着圈。"""
        by_name: dict[str, Asset] = {}
        for asset in assets:
            if asset.name in by_name:
                raise GraphError(f"two assets are named {asset.name}: rename one of them")
            by_name[asset.name] = asset
        for asset in by_name.values():
            if unknown := sorted(asset.upstreams - by_name.keys()):
                raise GraphError(f"asset {asset.name} depends on {unknown[0]}, which does not exist: correct its deps")
        try:
            in_order = upstreams_first({name: asset.upstreams for name, asset in by_name.items()})
        except CycleError as error:
            raise GraphError(f"the assets depend on each other in a cycle: {' -> '.join(error.args[1])}") from None
        return cls(tuple(by_name[name] for name in in_order))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(asset.name for asset in self.assets)

    def upstreams(self, name: str) -> frozenset[str]:
        """紧排在它前面的资产。"""
        return next(asset.upstreams for asset in self.assets if asset.name == name)

    def ancestors(self, name: str) -> frozenset[str]:
        """它依赖的全部资产，远近都算。"""
        return self._ancestors[name]

    def descendants(self, name: str) -> frozenset[str]:
        """依赖它的全部资产，远近都算。"""
        return frozenset(other for other, above in self._ancestors.items() if name in above)

    def downstreams(self, name: str) -> frozenset[str]:
        """紧跟在它后面的资产。"""
        return frozenset(asset.name for asset in self.assets if name in asset.upstreams)

    def ordered(self, names: Collection[str]) -> tuple[str, ...]:
        """其中图里有的，上游在前。"""
        return tuple(name for name in self.names if name in names)

    @property
    def digest(self) -> str:
        content = [[asset.name, sorted(asset.upstreams), asset.by_customer] for asset in self.assets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def _ancestors(self) -> Mapping[str, frozenset[str]]:
        found: dict[str, frozenset[str]] = {}
        for asset in self.assets:
            found[asset.name] = asset.upstreams.union(*(found[upstream] for upstream in asset.upstreams))
        return found


# ---- 在数据库里 ------------------------------------------------------------------


def read_graph(connection: sa.Connection, target: str) -> AssetGraph:
    """:raises DatabaseRefusedError: 还没有代码位置写下它。"""
    graph = _read(connection, target)
    if not graph.assets:
        raise no_graph(target)
    return graph


def _read(connection: sa.Connection, target: str) -> AssetGraph:
    rows = connection.execute(sa.select(assets).where(assets.c.target == target).order_by(assets.c.position))
    return AssetGraph(tuple(Asset(row.asset, frozenset(row.upstreams), by_customer=row.by_customer) for row in rows))


def no_graph(target: str) -> DatabaseRefusedError:
    return DatabaseRefusedError(
        f"no worker has written down the assets of target schema {target} yet: start one, or run `etl init-db`"
    )


IN_GRAPH = sa.and_(assets.c.target == ledger.c.target, assets.c.asset == ledger.c.asset)
"""SQL：台账的这一行是图里的这个资产的；图里没有的资产，它的行谁也不看。"""
LINE = sa.func.array_append(assets.c.ancestors, assets.c.asset, type_=pg.ARRAY(sa.Text))
"""SQL：这个资产与它依赖的全部。"""


def line_of(target: str, asset: str) -> sa.Select[tuple[str]]:
    """SQL：asset 与它依赖的全部。"""
    return sa.select(sa.func.unnest(LINE, type_=sa.Text())).where(assets.c.target == target, assets.c.asset == asset)


def write_graph(connection: sa.Connection, target: str, graph: AssetGraph, *, if_new: bool = False) -> bool:
    """让 `etl.assets` 就是这张图，台账认识的日子都有它的行；返回写了没有。

    :param if_new: 从没写过的才写：升级到一半，旧的工人重起，不把旧图写回来。要退回去，用旧版本的 init-db。
    """
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITE_LOCK)))
    was_written = sa.select(graphs.c.digest).where(graphs.c.target == target, graphs.c.digest == graph.digest)
    if if_new and connection.scalar(sa.select(was_written.exists())):
        return False
    # 图没有变也记下写过它：迁移写的那条链不在 graphs 里，不记，换图之后重起的旧工人会把它写回来
    connection.execute(pg.insert(graphs).values(target=target, digest=graph.digest).on_conflict_do_nothing())
    before = _read(connection, target)
    if before == graph:
        return False
    # 别人正补的行、正记的标记：要么在这之前，要么看得见新的图。也挡住 FOR UPDATE：先锁行后改行的，正好在我们两边等着
    connection.exec_driver_sql(_LOCK)
    connection.execute(sa.delete(assets).where(assets.c.target == target))
    connection.execute(sa.insert(assets), _rows(target, graph))
    returned = _note_absent(connection, target, before, graph)
    _bring_up(connection, target, returned)
    return True


def catch_up(connection: sa.Connection, target: str) -> bool:
    """0.1.0 的进程还在旁边的时候：它的监听器只给它那三个资产补行，它的工人只往它们交；落下的别的资产在这里到期。

    每一天的行写图时就齐了，后来的版本一次补全：少了的，是其间来的日子。返回有没有落下的。
    """
    if not connection.scalar(_IS_BEHIND, {"of_target": target, "days": None}):
        return False
    connection.exec_driver_sql(_LOCK)
    _bring_up(connection, target, _read(connection, target).names)
    return True


def catch_up_on(connection: sa.Connection, target: str, days: Sequence[date]) -> None:
    """同样，这几天的；行都有了，由调用者锁住了。推进没有到期的之前要先看：落下的看着也没有到期。"""
    connection.execute(_CATCH_UP, {"of_target": target, "days": days})


def _bring_up(connection: sa.Connection, target: str, returned: Sequence[str]) -> None:
    """每一天的行都补上，落在上游后面的都到期；表已经锁住。

    :param returned: 这些资产没有行的日子是其间来的，也到期。
    """
    of_all = {"of_target": target, "days": None}
    connection.execute(_FILL, of_all | {"returned": list(returned)})
    connection.execute(_CATCH_UP, of_all)


def _note_absent(connection: sa.Connection, target: str, before: AssetGraph, graph: AssetGraph) -> list[str]:
    """记下不在图里了的资产；返回回来了的。"""
    gone = [asset for asset in before.assets if asset.name not in graph.names]
    if gone:
        rows = [{"target": target, "asset": asset.name, "by_customer": asset.by_customer} for asset in gone]
        connection.execute(sa.insert(absent_assets), rows)
    back = sa.delete(absent_assets).where(absent_assets.c.target == target, absent_assets.c.asset.in_(graph.names))
    return list(connection.scalars(back.returning(absent_assets.c.asset)))


def _rows(target: str, graph: AssetGraph) -> list[dict[str, object]]:
    return [
        {
            "target": target,
            "asset": asset.name,
            "position": position,
            "upstreams": sorted(asset.upstreams),
            "ancestors": sorted(graph.ancestors(asset.name)),
            "by_customer": asset.by_customer,
        }
        for position, asset in enumerate(graph.assets)
    ]


_LOCK = f"LOCK TABLE {ledger.fullname} IN EXCLUSIVE MODE"
# 一行一个资产的一天；days 是 NULL 就是每一天。
# revision 是该做到或要求到的版本（上游都做到了的；没有上游的，这一天要求到了的），own 是台账里它要求到的
_REACHED = """
    SELECT a.asset, l.day, max(l.requested) FILTER (WHERE l.asset = a.asset) AS own,
           coalesce(
               CASE WHEN cardinality(a.ancestors) = 0 THEN max(l.requested)
                    ELSE min(l.materialized) FILTER (WHERE l.asset = ANY (a.ancestors)) END, 0
           ) AS revision
    FROM etl.assets a JOIN etl.ledger l ON l.target = a.target
    WHERE a.target = :of_target AND (CAST(:days AS date[]) IS NULL OR l.day = ANY (CAST(:days AS date[])))
    GROUP BY a.asset, a.ancestors, l.day"""

# 新资产遇见旧日子：既不到期，也没有人做过它；先前的导入不等它。回来的资产没有行的，是其间来的日子，到期
_FILL = sa.text(f"""
    INSERT INTO etl.ledger (target, asset, day, requested, requested_at, materialized)
    SELECT :of_target, asset, day, revision,
           CASE WHEN asset = ANY (:returned) THEN clock_timestamp() END,
           CASE WHEN asset = ANY (:returned) THEN 0 ELSE revision END
    FROM ({_REACHED}) AS reached WHERE own IS NULL""").bindparams(array("returned", sa.Text))  # noqa: S608  # 只拼接常量

# 换了上游的、拿走又放回来的资产：上游都做到了而它没有的，到期
_CATCH_UP = sa.text(f"""
    UPDATE etl.ledger SET requested = behind.revision, requested_at = clock_timestamp() FROM ({_REACHED}) AS behind
    WHERE target = :of_target AND ledger.asset = behind.asset AND ledger.day = behind.day AND own < revision""")  # noqa: S608  # 只拼接常量
_IS_BEHIND = sa.text(f"SELECT EXISTS (SELECT FROM ({_REACHED}) AS reached WHERE own IS NULL OR own < revision)")  # noqa: S608  # 只拼接常量
