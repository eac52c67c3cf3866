"""一个订单号的来历：点到它的每一条原始行成了什么，为什么；此刻在 orders 里的样子。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import local_day
from etl_assets.core.etl_tables import imported_files, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, shop_configs, target_tables, trimmed
from etl_assets.core.text import WHITE_SPACE
from etl_assets.reports.reports import shown_status
from etl_assets.services.shops import shops_of

Record = dict[str, Any]

MOST_VERSIONS = 1_000
"""占位的号（`-`、`合计`）有几万行，不是一个订单。"""
SHOWN_VERSIONS = 20
MOST_PLACES = 200_000
"""导入的行多于这么多，就不数一行在它里面的位置。"""

_NO_PLACE: Record = {"place": None, "file_row": None}

VALUES = ("day", "customer_name", "order_type", "order_status", "amount", "quantity", "ordered_at")


@dataclass
class FoundOrder:
    """一个店的一个订单号。

    row 是 orders 里的那一行；versions 一行一条原始行，旧的在前，至多 SHOWN_VERSIONS 条（另有 more 条更旧的），列是
    raw_id、import_id、place、file_row、`VALUES`、shop、state（loaded、superseded、rejected、waiting、withdrawn、failed、pending）、
    rule、superseded_by，与 changed：比前一条有效的变了的列 → 前后的值。
    """

    order_id: str
    shop: str | None
    shop_id: UUID | None
    row: Record | None = None
    versions: list[Record] = field(default_factory=list)
    more: int = 0

    @property
    def days(self) -> set[Any]:
        found = {version["day"] for version in self.versions} | {self.row["order_date"] if self.row else None}
        return found - {None}


def find_orders(
    connection: sa.Connection, settings: EtlSettings, order_id: str, shop: str | None
) -> tuple[list[FoundOrder], bool]:
    """这个订单号在每个店（或只在叫 shop 的店）里的来历；与是不是多得只看了 MOST_VERSIONS 行。"""
    wanted, shop = order_id.strip(WHITE_SPACE), shop.strip(WHITE_SPACE) if shop is not None else None
    versions = _read_versions(connection, settings, wanted, shop)
    rows = _read_rows(connection, settings, wanted, shop)
    found = {row["shop_id"]: FoundOrder(wanted, row.pop("shop"), row["shop_id"], row) for row in rows}
    for version in versions[:MOST_VERSIONS]:
        key = version.pop("shop_id") or version["shop"]
        found.setdefault(key, FoundOrder(wanted, version["shop"], key if isinstance(key, UUID) else None))
        found[key].versions.append(version)
    for order in found.values():
        _judge(order)
        order.more = max(0, len(order.versions) - SHOWN_VERSIONS)
        order.versions = order.versions[-SHOWN_VERSIONS:]
    places = _read_places(connection, [version for order in found.values() for version in order.versions])
    for order in found.values():
        order.versions = [version | places.get(version["raw_id"], _NO_PLACE) for version in order.versions]
    in_order = sorted(found.values(), key=lambda order: (order.row is None, order.shop or ""))
    return in_order, len(versions) > MOST_VERSIONS


def _read_rows(connection: sa.Connection, settings: EtlSettings, order_id: str, shop: str | None) -> list[Record]:
    orders = target_tables(settings.target_schema).orders
    shops = shops_of(orders)
    statement = (
        sa.select(orders, shop_configs.c.shop_name.label("shop"))
        .select_from(shops)
        .join(orders, sa.and_(orders.c.shop_id == shops.c.shop_id, orders.c.order_id == order_id))
        .outerjoin(shop_configs, shop_configs.c.shop_id == orders.c.shop_id)
        .where(sa.true() if shop is None else shop_configs.c.shop_name == shop)
        .order_by(shop_configs.c.shop_name)
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def _read_versions(connection: sa.Connection, settings: EtlSettings, order_id: str, shop: str | None) -> list[Record]:
    """旧的在前；多的是任意 MOST_VERSIONS + 1 条。时刻是文本：可能正是装不下的那个。"""
    raw = raw_orders.c
    named = sa.select(raw_orders).where(
        order_id_key(raw.order_id) == order_id_key(sa.literal(order_id)),
        sa.true() if shop is None else trimmed(raw.shop) == shop,
    )
    rows = named.limit(MOST_VERSIONS + 1).subquery("rows")
    statement = (
        sa.select(
            *rows.c["raw_id", "import_id"],
            sa.func.nullif(trimmed(rows.c.shop), "").label("shop"),
            shop_configs.c.shop_id,
            shown_status(import_tasks).label("import_status"),
            *import_tasks.c["row_count", "completed_at"],
            local_day(rows.c.ordered_at, settings.timezone).label("day"),
            *rows.c["customer_name", "order_type", "order_status", "amount", "quantity"],
            sa.cast(rows.c.ordered_at, sa.Text).label("ordered_at"),
            rejected_rows.c.rule,
        )
        .outerjoin(import_tasks, import_tasks.c.import_id == rows.c.import_id)
        .outerjoin(shop_configs, shop_configs.c.shop_name == trimmed(rows.c.shop))
        .outerjoin(
            rejected_rows,
            sa.and_(rejected_rows.c.target == settings.target_schema, rejected_rows.c.raw_id == rows.c.raw_id),
        )
        .order_by(import_tasks.c.completed_at.nulls_first(), rows.c.raw_id)
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def _judge(order: FoundOrder) -> None:
    """每一条成了什么：先后与 DOMAIN 第 3 节选赢家的一样，拒收的照台账记的。"""
    winner_id = order.row["raw_id"] if order.row else None
    is_past = any(version["raw_id"] == winner_id for version in order.versions)
    before: Record | None = None
    for version in order.versions:
        version["state"] = state = _state(version, winner_id, is_older=is_past)
        version["superseded_by"] = winner_id if state == "superseded" else None
        version["changed"] = {}
        is_past = is_past and version["raw_id"] != winner_id
        if state in ("loaded", "superseded", "waiting"):
            changed = {name for name in VALUES if before is not None and before[name] != version[name]}
            version["changed"] = {name: [before[name], version[name]] for name in VALUES if before and name in changed}
            before = version


def _state(version: Record, winner_id: int | None, *, is_older: bool) -> str:
    match version["import_status"]:
        case "completed" if version["rule"] is not None:
            return "rejected"
        case "completed" if version["raw_id"] == winner_id:
            return "loaded"
        case "completed":
            return "superseded" if is_older else "waiting"
        case "withdrawn" | "failed" as status:
            return str(status)
    return "pending"


def _read_places(connection: sa.Connection, versions: Iterable[Record]) -> dict[int, Record]:
    """原始行 → 它是所在导入的第几行（place，从 1 起）、文件的第几行（file_row）；太大的导入没有。

    COPY 照文件的次序，raw_id 也就照它；由 place 找到文件里接着的那一段。
    """
    given = unnest("given", raw_id=array("raw_ids", sa.BigInteger), import_id=array("import_ids", sa.Uuid))
    row = raw_orders.alias("row")
    place = sa.select(sa.func.count()).where(row.c.import_id == given.c.import_id, row.c.raw_id <= given.c.raw_id)
    placed = sa.select(*given.c, place.scalar_subquery().label("place")).subquery("placed")
    part = (
        sa.func.unnest(imported_files.c.first_places, imported_files.c.first_rows)
        .table_valued("place", "row")
        .render_derived()
    )
    file_row = (
        sa.select(part.c.row + placed.c.place - part.c.place)
        .select_from(imported_files.join(part, sa.true()))
        .where(imported_files.c.import_id == placed.c.import_id, part.c.place <= placed.c.place)
        .order_by(part.c.place.desc())
        .limit(1)
    )
    statement = sa.select(*placed.c["raw_id", "place"], file_row.scalar_subquery().label("file_row"))
    small = [version for version in versions if 0 < (version["row_count"] or 0) <= MOST_PLACES]
    parameters = {name + "s": [version[name] for version in small] for name in ("raw_id", "import_id")}
    found = connection.execute(statement, parameters)
    return {row.raw_id: {"place": row.place, "file_row": row.file_row} for row in found}
