"""一个订单、客户、商机、导入、业务日的来历：`etl why … --json` 印的就是这些，docs/why.md 说每一项是什么。"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from bridge.errors import NothingFoundError
from bridge.operations.why.elsewhere import Elsewhere
from etl_assets.core.business_day import partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.orders.of_lead import find_lead_no, read_of_lead
from etl_assets.reports.reports import import_accounting
from etl_assets.reports.why import customers as why_customers
from etl_assets.reports.why.days import SHOWN_DAYS, count_rejected, read_day, read_ledger, read_running
from etl_assets.reports.why.imports import read_days, read_imports, read_waiting
from etl_assets.reports.why.orders import MOST_VERSIONS, FoundOrder, find_orders

Record = dict[str, Any]

_SHOWN_SHOPS, _SHOWN_RUNS, _SHOWN_ORDERS = 20, 10, 20


def of_order(
    connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, *, order_id: str, shop: str | None
) -> Record:
    """:raises NothingFoundError: 哪个店也没有过这个订单号。"""
    found, is_partial = find_orders(connection, settings, order_id, shop)
    if not found:
        where = f" in shop {shop!r}" if shop is not None else ""
        raise NothingFoundError(
            f"an order {order_id!r}{where}",
            "raw_orders (every row of every import) and orders, by the exact id"
            + (f"; `etl why order {order_id}` looks in every shop" if shop is not None else ""),
        )
    if is_partial:
        elsewhere.notes.append(
            f"more than {MOST_VERSIONS:,} raw rows have this id, only some were looked at: it stands for a missing id or a total"
        )
    if len(found) > _SHOWN_SHOPS:
        elsewhere.notes.append(
            f"{len(found)} shops have this id, the first {_SHOWN_SHOPS} are shown: choose with --shop"
        )
    orders = [_order(connection, settings, elsewhere, order) for order in found[:_SHOWN_SHOPS]]
    return {"order_id": found[0].order_id, "orders": orders}


def _order(connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, order: FoundOrder) -> Record:
    _name_customers(connection, settings, order)
    own = {order.row["import_id"]} if order.row else set()
    import_ids = {version["import_id"] for version in order.versions} | own
    imports = elsewhere.stored(read_imports(connection, settings, import_ids - {None}))
    key = None
    if order.shop_id is not None:
        key = why_customers.key_of_order(connection, settings, order.shop_id, order.order_id)
    keys = [key] if key else []
    keys += [of_version for version in order.versions if (of_version := version.pop("customer_key"))]
    customers = why_customers.read_customers(connection, settings, dict.fromkeys(keys))
    for customer in customers:
        customer["is_current"] = customer["customer_key"] == key
        if customer["is_current"]:
            customer["lead_no_of_order"] = _lead_no(connection, settings, elsewhere, customer, order)
    return {
        "order_id": order.order_id,
        "shop": order.shop,
        "shop_id": order.shop_id,
        "row": elsewhere.written(order.row, "orders", order.days) if order.row else None,
        "versions": [_explained(version, order.versions, imports) for version in order.versions],
        "older_versions": order.more,
        "imports": imports,
        "customers": customers,
        **_days(connection, settings, elsewhere, order.days),
    }


def _name_customers(connection: sa.Connection, settings: EtlSettings, order: FoundOrder) -> None:
    """每条原始行说的客户 customer_key；等着的，他若不归我们写（ETL_ROLLOUT），就等不到：outside。"""
    named = [version for version in order.versions if order.shop_id is not None and version["customer_name"]]
    keys = why_customers.keys_of((order.shop_id, version["customer_name"]) for version in named if order.shop_id)
    outside = why_customers.keys_outside(connection, settings, keys)
    of_rows = {version["raw_id"]: key for version, key in zip(named, keys, strict=True)}
    for version in order.versions:
        version["customer_key"] = of_rows.get(version["raw_id"])
        if version["state"] == "waiting" and version["customer_key"] in outside:
            version["state"] = "outside"


def _lead_no(
    connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, customer: Record, order: FoundOrder
) -> int | None:
    if (customer["order_count"] or 0) > why_customers.MOST_ORDERS or order.shop_id is None:
        elsewhere.notes.append(
            f"which lead has the order was not looked up: its customer has {customer['order_count']:,} orders"
        )
        return None
    return find_lead_no(connection, settings, customer["customer_key"], order.shop_id, order.order_id)


def _explained(version: Record, versions: Iterable[Record], imports: Iterable[Record]) -> Record:
    """加一句话 because：它为什么成了这样。"""
    files = {task["import_id"]: task["source_name"] for task in imports}
    winner = next((other["import_id"] for other in versions if other["raw_id"] == version["superseded_by"]), None)
    match version["state"]:
        case "loaded":
            because = "the newest valid row of this order"
        case "superseded" if winner is None:
            because = f"a newer row, raw_id {version['superseded_by']}, wins"
        case "superseded" if winner == version["import_id"]:
            because = "a later row of the same import wins"
        case "superseded":
            because = f"import {winner} ({files.get(winner)}), completed later, wins"
        case "rejected":
            because = f"rule {version['rule']}"
        case "outside":
            because = "its customer is not in the share of ETL_ROLLOUT"
        case "waiting":
            because = "no run has taken it yet, see its day"
        case "withdrawn":
            because = "its import was taken back"
        case "failed":
            because = "its import failed in the application that made it"
        case _:
            because = "its import is not completed"
    of_order = ("shop", "import_status", "row_count", "completed_at")  # 订单与它的导入说了
    return {name: value for name, value in version.items() if name not in of_order} | {"because": because}


def of_customer(
    connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, *, name: str, shop: str | None
) -> Record:
    """:raises NothingFoundError: 哪个店也没有叫这个名字的客户。"""
    keys = why_customers.keys_of_name(connection, settings, name, shop)
    found = why_customers.read_customers(connection, settings, keys)
    if not found:
        raise NothingFoundError(
            f"a customer {name!r}{f' in shop {shop!r}' if shop is not None else ''}",
            f"customers of {len(keys)} shops, by the whole name (a customer whose last order was renamed, withdrawn or moved to another is "
            f"deleted); `etl show customers --customer {name}` finds parts of names, `etl why order ID` finds earlier names",
        )
    return {
        "customer": name,
        "customers": [_customer(connection, settings, elsewhere, customer) for customer in found[:_SHOWN_SHOPS]],
    }


def _customer(connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, customer: Record) -> Record:
    orders = why_customers.read_newest_orders(connection, settings, customer["customer_key"])
    days = {order["order_date"] for order in orders} - {None}
    customer.update(newest_orders=orders, **_days(connection, settings, elsewhere, days))
    return elsewhere.written(customer, "customers", days)


def of_lead(connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, *, lead_id: UUID) -> Record:
    """:raises NothingFoundError: 没有这个商机。"""
    found = why_customers.read_lead(connection, settings, lead_id)
    if found is None:
        raise NothingFoundError(
            f"lead {lead_id}",
            "business_leads (a lead without orders that nobody touched is deleted); `etl show leads` lists them with their lead_id",
        )
    lead, customer = found
    orders: list[Record] = []
    if customer is not None and (customer["order_count"] or 0) > why_customers.MOST_ORDERS:
        elsewhere.notes.append(f"its orders were not looked up: its customer has {customer['order_count']:,} orders")
    elif customer is not None:
        orders = read_of_lead(connection, settings, lead_id)
    newest = orders[-_SHOWN_ORDERS:]
    days = {order["order_date"] for order in newest} - {None}
    shown = ("order_id", "order_date", "latest_status", "system_order_type", "amount", "quantity", "import_id")
    names = ("shop", "customer_key", "customer_global_id", "customer_nickname", "order_count", "total_amount")
    return {
        "lead": elsewhere.written(lead, "leads", days),
        "customer": {name: customer[name] for name in names} if customer else None,
        "orders": [{name: order[name] for name in shown} for order in newest],
        "earlier_orders": max(0, len(orders) - _SHOWN_ORDERS),
        **_days(connection, settings, elsewhere, days),
    }


def of_import(connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, *, import_id: UUID) -> Record:
    """:raises NothingFoundError: 没有这次导入，也没有它的事件。"""
    waiting = read_waiting(connection, settings, import_id)
    found = elsewhere.stored(read_imports(connection, settings, [import_id]))
    if not found and not waiting:
        raise NothingFoundError(
            f"import {import_id}", "import_tasks and the events that wait for an import; `etl imports` lists them"
        )
    days = read_days(connection, settings, import_id)
    event = found[0]["event"] if found else None
    names = ("raw", "loaded", "superseded", "rejected", "waiting")
    accounting = import_accounting(connection, settings, import_id=import_id)
    report = {
        "import_id": import_id,
        "import": found[0] if found else None,
        "waiting_events": waiting,
        "rows": {name: accounting[0][name] for name in names} if accounting else None,
        "rejected": count_rejected(connection, settings, import_id=import_id),
        "asked_days": len(days),
        **_days(connection, settings, elsewhere, days),
    }
    elsewhere.taken_in(report, "orders", days[-SHOWN_DAYS:] if event else [], event["handled_at"] if event else None)
    return report


def of_day(connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, *, day: date) -> Record:
    """:raises NothingFoundError: 没有导入要求过它，没有运行做过它。"""
    found = read_day(connection, settings, day)
    if found is None:
        raise NothingFoundError(
            f"day {day}",
            "the ledger, the imports that asked for days, running runs and rejected rows; partitions are "
            f"{partition_range(settings)} (ETL_PARTITIONS_START to today)",
        )
    found["assets"], found["running"] = (elsewhere.addressed(found[name]) for name in ("assets", "running"))
    elsewhere.stored(found["imports"])
    elsewhere.made(found, [asset["asset"] for asset in found["assets"]], day, limit=_SHOWN_RUNS)
    return found


def _days(
    connection: sa.Connection, settings: EtlSettings, elsewhere: Elsewhere, days: Iterable[date]
) -> dict[str, list[Record]]:
    """这些天各资产做到了哪里，正做着它们的运行。"""
    wanted = sorted(set(days))
    return {
        "days": elsewhere.addressed(read_ledger(connection, settings, wanted)),
        "running": elsewhere.addressed(read_running(connection, settings, wanted[-SHOWN_DAYS:])),
    }
