"""结果表里有哪些店铺：配置里改了名、删去了的也在。"""

from __future__ import annotations

import sqlalchemy as sa


def shops_of(orders: sa.Table) -> sa.CTE:
    """orders 里的店铺（shop_id）：沿着主键一个一个跳过去，不读每一行。"""
    first = sa.select(orders.c.shop_id).order_by(orders.c.shop_id).limit(1)
    shops = sa.select(first.scalar_subquery().label("shop_id")).cte("shops", recursive=True)
    following = first.where(orders.c.shop_id > shops.c.shop_id).scalar_subquery()
    return shops.union_all(sa.select(following).where(shops.c.shop_id.is_not(None)))
