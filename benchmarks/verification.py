"""三张表对不对：从全部原始行另算一遍，只用 SQL，不用产品的任何一条语句。

只认基准自己的数据：一家店，名字、订单号、状态都是修剪好的。
"""

from __future__ import annotations

import sqlalchemy as sa

_WINNERS = """
    CREATE TEMPORARY TABLE winners ON COMMIT DROP AS
    SELECT DISTINCT ON (order_id) order_id, customer_name, amount, ordered_at, raw_id, order_status,
           order_status <> 'cancelled' AS is_counted, order_status = 'completed' AND order_type = '大货订单' AS wins
    FROM public.raw_orders JOIN public.import_tasks USING (import_id)
    WHERE status = 'completed' AND btrim(customer_name) <> ''
    ORDER BY order_id, completed_at DESC, raw_id DESC
"""

_WRONG = {
    "orders": """
        SELECT count(*) FROM winners FULL JOIN public.orders AS o USING (order_id)
        WHERE (o.raw_id, o.amount, o.ordered_at, o.latest_status, o.customer_nickname)
              IS DISTINCT FROM (winners.raw_id, winners.amount, winners.ordered_at, winners.order_status, winners.customer_name)
    """,
    "customers": """
        SELECT count(*) FROM (
            SELECT customer_name AS customer_nickname, count(*) FILTER (WHERE is_counted) AS orders,
                   coalesce(sum(amount) FILTER (WHERE is_counted), 0) AS total, max(ordered_at) FILTER (WHERE is_counted) AS last_order_at
            FROM winners GROUP BY customer_name
        ) AS own FULL JOIN public.customers AS c USING (customer_nickname)
        WHERE (c.order_count, c.total_amount, c.last_order_at) IS DISTINCT FROM (own.orders, own.total, own.last_order_at)
    """,
    "business_leads": """
        SELECT count(*) FROM (
            SELECT customer_name AS customer_nickname, count(*) AS orders, sum(amount) AS total, count(*) FILTER (WHERE wins) AS won
            FROM winners WHERE is_counted GROUP BY customer_name
        ) AS own FULL JOIN (
            SELECT customer_nickname, sum(l.sample_count + l.proof_count + l.bulk_count) AS orders,
                   sum(l.sample_amount + l.proof_amount + l.bulk_amount) AS total, count(*) FILTER (WHERE current_stage = 'WON') AS won
            FROM public.business_leads AS l JOIN public.customers USING (customer_global_id) GROUP BY customer_nickname
        ) AS leads USING (customer_nickname)
        WHERE (leads.orders, leads.total, leads.won) IS DISTINCT FROM (own.orders, own.total, own.won)
    """,
}


def count_wrong(engine: sa.Engine) -> dict[str, int]:
    """每张表有几行不对：缺的、多的、数字不对的；商机按客户合起来看。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(_WINNERS)
        return {table: connection.exec_driver_sql(statement).scalar_one() for table, statement in _WRONG.items()}
