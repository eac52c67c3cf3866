"""`etl why` 在数据库里找的：从结果的一行回到原始行、导入、事件，与它的日子做到了哪里。只读；都有界，都走索引。"""

from __future__ import annotations

import sqlalchemy as sa

# 只在这个事务里：表达式没有统计时，规划器以为有 LIMIT 的查找扫表更快
BY_INDEX = sa.select(*[sa.func.set_config(name, "off", True) for name in ("enable_seqscan", "jit")])
