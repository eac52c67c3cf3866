"""索引写得更快，放得下任意长的文字：客户用散列，主键不再以 target 开头；raw_orders 的索引只取订单号的前 501 个字。"""

from __future__ import annotations

from alembic import op

# 与 0001 的索引用的同一串；迁移不随代码变，所以照抄
_WHITE_SPACE = (
    r"\u0009\u000A\u000B\u000C\u000D\u0020\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004"
    r"\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000"
)

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        DROP INDEX etl.ix_order_index_customer;
        DROP INDEX etl.ix_order_index_day;
        ALTER TABLE etl.order_index
            DROP CONSTRAINT order_index_pkey,
            ADD PRIMARY KEY (shop_id, order_id, target);
        CREATE INDEX ix_order_index_customer ON etl.order_index USING hash (customer_key);
        CREATE INDEX ix_order_index_day ON etl.order_index (order_date);
        """
    )
    # 应用自己的 raw_orders 不归我们改；只换 init-db 建过的那个索引
    if op.get_bind().exec_driver_sql("SELECT to_regclass('public.ix_raw_orders_order')").scalar():
        op.get_bind().exec_driver_sql(
            f"""
            DROP INDEX public.ix_raw_orders_order;
            CREATE INDEX ix_raw_orders_order ON public.raw_orders ("left"(btrim(order_id, E'{_WHITE_SPACE}'), 501));
            """
        )
