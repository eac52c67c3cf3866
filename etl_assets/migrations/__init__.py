"""Alembic 迁移与它们的入口：`upgrade_database` 建立或升级 schema。"""
