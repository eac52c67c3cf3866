"""数组当作一张表：一条语句找或写许多行，参数的个数与行数无关。"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


def unnest(name: str, **arrays: sa.BindParameter[Any]) -> sa.TableValuedAlias:
    """几个一样长的数组并成一张表，一个数组一列，列的类型是它的元素的。"""
    columns = [sa.column(column, array.type.item_type) for column, array in arrays.items()]  # type: ignore[attr-defined]  # 都是数组
    return sa.func.unnest(*arrays.values()).table_valued(*columns, name=name).render_derived()
