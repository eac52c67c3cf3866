"""leads（表 business_leads）是怎样的一张表。"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from etl_assets.core.asset_description import ApplicationTable, AssetDescription, Lookup, probe
from etl_assets.core.tables import LATE, SOURCES_OF_FIGURES, TIMESTAMP, figure_columns, left_behind, timestamp_columns

if TYPE_CHECKING:
    from etl_assets.core.business_day import DayRange


def define_leads(metadata: sa.MetaData, schema: str) -> sa.Table:
    leads = sa.Table(
        "business_leads",
        metadata,
        sa.Column("lead_id", sa.Uuid, primary_key=True),
        sa.Column("customer_global_id", sa.Uuid),
        sa.Column("lead_no", sa.Integer),
        sa.Column("current_stage", sa.Text),
        sa.Column("opened_at", TIMESTAMP),
        sa.Column("last_order_at", TIMESTAMP),
        sa.Column("closed_at", TIMESTAMP),
        sa.Column("closed_by", sa.Text),
        *figure_columns(),
        sa.Column("owner", sa.Text),
        sa.Column("notes", sa.Text),
        *timestamp_columns(),
        sa.UniqueConstraint("customer_global_id", "lead_no"),
        schema=schema,
    )
    sa.Index(
        "ix_business_leads_unclosed",
        leads.c.current_stage,
        leads.c.last_order_at,
        postgresql_where=leads.c.closed_at.is_(None),
    )
    sa.Index("ix_business_leads_left_behind", leads.c.customer_global_id, postgresql_where=left_behind(leads))
    return leads


WRITTEN_BY_PEOPLE = frozenset({"owner", "notes"})
_TIMES = ("opened_at", "last_order_at", "closed_at")
_DEALING = ("orders.ordered_at", "orders.order_id", "orders.latest_status", "orders.system_order_type")


def lookups(leads: sa.Table, _partitions: DayRange) -> list[Lookup]:
    stage, last_order_at = leads.c.current_stage, leads.c.last_order_at
    is_open = sa.and_(leads.c.closed_at.is_(None), leads.c.lead_no.is_not(None), stage == "OPEN", last_order_at < LATE)
    unclosed = "current_stage and last_order_at of leads without closed_at"
    released = "what the ETL does not leave like that (a closing taken back)"
    return [
        Lookup(leads, unclosed, "unclosed", {"current_stage", "last_order_at"}, [probe(is_open, last_order_at)]),
        Lookup(leads, released, "left_behind", (), [probe(left_behind(leads))]),
    ]


DESCRIPTION = AssetDescription(
    define_table=define_leads,
    application_table=ApplicationTable(
        not_written=WRITTEN_BY_PEOPLE,
        written_as_null=frozenset({*_TIMES, "closed_by"}),
        longest_text={"current_stage": len("OPEN"), "closed_by": len("etl")},
        lookups=lookups,
    ),
    dated_by="last_order_at",
    by_customer=True,
    key=("customer_key", "lead_no"),
    shown=("customer_nickname", "lead_no", "current_stage", *_TIMES, "closed_by", "owner", "lead_id"),
    previewed=("customer_global_id", "lead_no", "current_stage", "opened_at", "last_order_at", "closed_by"),
    counted=("stage", "current_stage"),
    sources={
        "lead_id": ("customers.customer_key", *_DEALING),
        "customer_global_id": ("customers.customer_global_id",),
        "lead_no": _DEALING,
        "current_stage": (*_DEALING, "orders.order_date"),
        **dict.fromkeys((*_TIMES, "closed_by"), _DEALING),
        **SOURCES_OF_FIGURES,
    },
)
