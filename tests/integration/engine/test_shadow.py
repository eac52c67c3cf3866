"""影子：另一个 schema 里的一份结果，表由 init-db 建，台账是它自己的，正式的结果一个字节也不动。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from etl_assets.comparison.comparing import ComparisonRequest, compare_schemas
from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import PermanentError, TableContractError
from etl_assets.core.etl_tables import ledger, order_index
from etl_assets.core.tables import target_tables
from etl_assets.services.target_schema import prepare_target
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.reference.oracle import actual, differences, expected
from tests.the_three import graph

FIRST, LAST = date(2026, 1, 1), date(2026, 1, 6)
SHADOW = "Shadow 影"


@pytest.fixture
def shadow(chain: Chain) -> Iterator[Chain]:
    shadow = Chain(chain.engine, chain.settings.model_copy(update={"target_schema": SHADOW}))
    shadow.use_graph(graph)
    yield shadow
    chain.execute(sa.schema.DropSchema(SHADOW, cascade=True, if_exists=True))


def read_all(chain: Chain, schema: str) -> list[Any]:
    tables = target_tables(schema)
    return [sorted(chain.rows(sa.select(table)), key=str) for table in (tables.orders, tables.customers, tables.leads)]


def fill_raw(raw_data: RawData) -> None:
    rows = [{"order_id": f"O-{number}", "customer_name": f"客户 {number % 7}"} for number in range(30)]
    raw_data.add_import([*rows, {"quantity": -1}])


def test_tables_are_created_once(shadow: Chain) -> None:
    assert prepare_target(shadow.engine, shadow.settings).created_tables
    assert not prepare_target(shadow.engine, shadow.settings).created_tables


def test_shadow_writes_its_own_schema_only_and_equals_the_result_of_a_run(
    chain: Chain, shadow: Chain, raw_data: RawData
) -> None:
    fill_raw(raw_data)
    prepare_target(shadow.engine, shadow.settings)
    shadow.run(FIRST, LAST)
    assert read_all(chain, "public") == [[], [], []]
    assert (
        set(chain.rows(sa.select(ledger.c.target))) == set(chain.rows(sa.select(order_index.c.target))) == {(SHADOW,)}
    )
    with chain.engine.connect() as connection:
        assert not differences(
            expected(connection, chain.reference_settings, target_schema=SHADOW),
            actual(connection, target_schema=SHADOW),
        )
    written = read_all(chain, SHADOW)
    chain.run(FIRST, LAST)
    assert read_all(chain, SHADOW) == written
    assert compare_schemas(chain.engine, chain.settings, ComparisonRequest(left="public", right=SHADOW)).equal


def test_share_of_a_shadow_is_a_share_too(chain: Chain, shadow: Chain, raw_data: RawData) -> None:
    fill_raw(raw_data)
    prepare_target(shadow.engine, shadow.settings)
    Chain(chain.engine, shadow.settings.model_copy(update={"rollout": 50})).run(FIRST, LAST)
    orders, customers, _ = read_all(chain, SHADOW)
    assert 0 < len(customers) < 7
    assert 0 < len(orders) < 30
    shadow.run(FIRST, LAST)
    assert len(read_all(chain, SHADOW)[0]) == 30


def test_run_without_the_tables_is_refused(shadow: Chain) -> None:
    with pytest.raises(TableContractError, match=r"Shadow 影\.orders is missing"):
        shadow.run(FIRST)


def test_some_of_the_tables_are_not_completed_silently(shadow: Chain) -> None:
    prepare_target(shadow.engine, shadow.settings)
    shadow.execute(sa.text(f'DROP TABLE "{SHADOW}".customers'))
    with pytest.raises(TableContractError, match=r"Shadow 影\.customers is missing"):
        prepare_target(shadow.engine, shadow.settings)


def test_role_without_the_right_is_told_what_to_do(chain: Chain) -> None:
    role = f"reader_{uuid4().hex[:8]}"
    chain.execute(sa.text(f"CREATE ROLE {role} LOGIN PASSWORD 'x'"))
    url = normalize_url(chain.settings.database_url).set(username=role, password="x")
    settings = chain.settings.model_copy(
        update={"database_url": url.render_as_string(hide_password=False), "target_schema": "not_allowed"}
    )
    engine = build_engine(settings)
    try:
        with pytest.raises(
            PermanentError, match="cannot create the result tables in ETL_TARGET_SCHEMA=not_allowed: permission denied"
        ):
            prepare_target(engine, settings)
    finally:
        engine.dispose()
        chain.execute(sa.text(f"DROP ROLE {role}"))
