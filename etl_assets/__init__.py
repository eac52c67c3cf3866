"""Dagster 代码位置：把 raw_orders 变成 orders、customers、business_leads。只懂数据，不懂 NATS。"""
