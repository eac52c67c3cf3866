"""人写的列：owner、notes 与关闭。ETL 从不写它们；这里是认出它们的 SQL。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.tables import trimmed

_CLOSED_BY_PERSON = "({row}.closed_by IS NOT DISTINCT FROM 'user' AND {row}.closed_at IS NOT NULL)"

PROTECTED_COLUMNS = dict.fromkeys(("current_stage", "closed_at", "closed_by"), _CLOSED_BY_PERSON)
"""upsert 的保护条件：人关闭的商机，这几列归人。"""


def closed_by_person(leads: sa.Table) -> sa.ColumnElement[bool]:
    """人关闭的商机；只有 closed_by 而没有 closed_at 不算。"""
    return sa.and_(sa.func.coalesce(leads.c.closed_by, "") == "user", leads.c.closed_at.is_not(None))


def touched(leads: sa.Table) -> sa.ColumnElement[bool]:
    """人碰过的商机：关闭过，或写了 owner、notes。"""
    written = [sa.func.coalesce(trimmed(leads.c[name]), "") != "" for name in ("owner", "notes")]
    return sa.or_(closed_by_person(leads), *written)
