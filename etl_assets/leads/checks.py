"""leads 该是什么样：唯一的键、引用、非负的笔数，不论客户欠不欠着；合计，只看没有欠着的客户。没有编号的归人，里面是什么都行。"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import LookedAt, TableCheck
from etl_assets.services.figures import COUNTS, FIGURES
from etl_assets.services.table_checks import settled_customers


def _repeated(looked_at: LookedAt) -> sa.Select[Any]:
    leads = looked_at.tables.leads.c
    numbers = looked_at.rows.with_only_columns(leads.lead_no).where(leads.lead_no.is_not(None))
    return numbers.group_by(leads.customer_global_id, leads.lead_no).having(sa.func.count() > 1)


def _orphaned(looked_at: LookedAt) -> sa.Select[Any]:
    customers, leads = looked_at.tables.customers.c, looked_at.tables.leads.c
    owner = sa.select(customers.customer_key).where(customers.customer_global_id == leads.customer_global_id)
    return looked_at.rows.where(~owner.exists())


def _negative(looked_at: LookedAt) -> sa.Select[Any]:
    leads = looked_at.tables.leads.c
    return looked_at.rows.where(leads.lead_no.is_not(None), sa.or_(*[leads[name] < 0 for name in COUNTS]))


def _wrong_totals(looked_at: LookedAt) -> sa.Select[Any]:
    customers, leads = looked_at.tables.customers.c, looked_at.tables.leads.c
    keys = settled_customers(looked_at, "leads")
    at_hand = (
        sa.select(customers.customer_global_id, *[customers[name] for name in FIGURES])
        .where(customers.customer_key.in_(sa.select(keys.c.customer_key)))
        .subquery("at_hand")
    )
    theirs = leads.customer_global_id.in_(sa.select(at_hand.c.customer_global_id))
    of_leads = (
        sa.select(leads.customer_global_id, *[sa.func.sum(leads[name]).label(name) for name in FIGURES])
        .where(theirs, leads.lead_no.is_not(None))
        .group_by(leads.customer_global_id)
        .subquery("of_leads")
    )
    same_customer = of_leads.c.customer_global_id == at_hand.c.customer_global_id
    wrong = sa.or_(*[sa.func.coalesce(of_leads.c[name], 0).is_distinct_from(at_hand.c[name]) for name in FIGURES])
    return sa.select(at_hand.c.customer_global_id).outerjoin(of_leads, same_customer).where(wrong)


CHECKS = {
    "unique_keys": TableCheck("No lead (customer_global_id, lead_no) is there twice.", _repeated),
    "references": TableCheck("Every lead belongs to a customer that is there.", _orphaned),
    "non_negative": TableCheck("No lead has a negative count.", _negative),
    "totals": TableCheck(
        "The leads of a customer add up to the customer's counts and amounts of each order type.",
        _wrong_totals,
        by_customer=True,
    ),
}
