"""orders 该是什么样：唯一的键、引用、非负的数量、账。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import LookedAt, TableCheck
from etl_assets.core.tables import import_tasks, shop_configs
from etl_assets.orders.recount import find_wrong_days


def _repeated(looked_at: LookedAt) -> sa.Select[Any]:
    orders = looked_at.tables.orders.c
    return looked_at.rows.group_by(orders.shop_id, orders.order_id).having(sa.func.count() > 1)


def _unreferred(looked_at: LookedAt) -> sa.Select[Any]:
    """联接而不是两个 EXISTS：它们的「或」只能一行一行地查。"""
    orders = looked_at.tables.orders
    referred = (
        looked_at.rows.select_from(orders)
        .outerjoin(shop_configs, shop_configs.c.shop_id == orders.c.shop_id)
        .outerjoin(import_tasks, import_tasks.c.import_id == orders.c.import_id)
    )
    return referred.where(sa.or_(shop_configs.c.shop_id.is_(None), import_tasks.c.import_id.is_(None)))


def _negative(looked_at: LookedAt) -> sa.Select[Any]:
    return looked_at.rows.where(looked_at.tables.orders.c.quantity < 0)


def _wrong_days(looked_at: LookedAt) -> Sequence[date]:
    return find_wrong_days(looked_at.connection, looked_at.settings, looked_at.days)


CHECKS = {
    "unique_keys": TableCheck("No order (shop_id, order_id) is there twice.", _repeated),
    "references": TableCheck("Every order names a shop of shop_configs and an import of import_tasks.", _unreferred),
    "non_negative": TableCheck("No order has a negative quantity.", _negative),
    "accounts": TableCheck(
        "The account of every day (raw rows, loaded, rejected) is what the tables say; if not: `etl backfill` the day.",
        _wrong_days,
    ),
}
