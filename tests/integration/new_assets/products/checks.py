"""products 该是什么样。"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import LookedAt, TableCheck


def _empty(looked_at: LookedAt) -> sa.Select[Any]:
    return looked_at.rows.where(looked_at.tables.products.c.order_count < 1)


CHECKS = {"positive": TableCheck("No day and type is there without an order.", _empty)}
