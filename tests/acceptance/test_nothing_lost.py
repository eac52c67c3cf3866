"""etl withdraw、etl replay、etl dlq 对真的栈：收回一次导入，重放流里的事件，表与逐行参照一样。"""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID, uuid4

import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from etl_assets.core.etl_tables import import_events, import_requests, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, target_tables
from tests.acceptance.conftest import Etl
from tests.acceptance.test_main_flow import import_and_wait, write_csv
from tests.integration.host import eventually

DAY = "2026-08-08"


def add(etl: Etl, folder: Path, order_ids: list[str], amount: str, *, wait: bool = True) -> UUID:
    orders = [
        (order_id, "撤回店", f"客户{order_id}", "打样订单", "paid", amount, "1", f"{DAY} 10:00:00")
        for order_id in order_ids
    ]
    path = str(write_csv(folder / f"{uuid4()}.csv", orders))
    if wait:
        return UUID(import_and_wait(etl, path, "--create-shops")["import_id"])
    return UUID(json.loads(etl("import", path, "--create-shops", "--json").stdout)["import_id"])


def orders_of(engine: sa.Engine, import_id: UUID) -> int:
    orders = target_tables("public").orders
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).where(orders.c.import_id == import_id)).scalar_one()


def has_due_days(engine: sa.Engine) -> bool:
    due = sa.select(ledger.c.day).where(ledger.c.requested > ledger.c.materialized)
    with engine.connect() as connection:
        return bool(connection.execute(sa.select(due.exists())).scalar_one())


def set_failed(engine: sa.Engine, import_id: UUID) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(import_tasks).where(import_tasks.c.import_id == import_id).values(status="failed"))


def test_withdrawn_import_gives_way_to_older_versions_past_the_delete_guard(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    add(etl, tmp_path, [f"V{n}" for n in range(60)], "1.00")
    newer = add(etl, tmp_path, [f"V{n}" for n in range(20, 100)], "2.00")
    dry = etl("withdraw", str(newer), "--dry-run")
    assert f"80 orders come from import {newer}; days to materialize again: 1 ({DAY})" in dry.stderr
    assert "add --yes" in etl("withdraw", str(newer), exit_code=2).stderr
    assert orders_of(stack_engine, newer) == 80
    done = etl("withdraw", str(newer), "--yes", "--timeout", "90")
    assert done.stdout == "days materialized: 1; orders removed: 40; replaced by an older version: 40\n"
    assert orders_of(stack_engine, newer) == 0
    assert find_differences(stack_engine, stack_settings) == []
    again = etl("withdraw", str(newer), "--yes")
    assert again.stdout == f"import {newer} is withdrawn already, nothing of it is in the tables\n"


def test_withdrawal_that_died_before_its_event_is_finished_by_the_next(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    import_id = add(etl, tmp_path, ["D1", "D2"], "3.00")
    set_failed(stack_engine, import_id)
    assert (
        "orders removed: 2; replaced by an older version: 0"
        in etl("withdraw", str(import_id), "--yes", "--timeout", "90").stdout
    )
    assert orders_of(stack_engine, import_id) == 0
    assert find_differences(stack_engine, stack_settings) == []


def test_import_that_never_reached_the_tables_is_withdrawn_without_waiting(etl: Etl, stack_engine: sa.Engine) -> None:
    import_id = uuid4()
    with stack_engine.begin() as connection:
        connection.execute(sa.insert(import_tasks).values(import_id=import_id, status="pending"))
        connection.execute(sa.insert(raw_orders).values(import_id=import_id, order_id="P1", shop="撤回店"))
    assert "none of it had reached the tables" in etl("withdraw", str(import_id), "--yes").stdout


def test_unknown_import_is_one_sentence(etl: Etl) -> None:
    unknown = uuid4()
    assert (
        etl("withdraw", str(unknown), "--yes", exit_code=1).stderr
        == f"error: there is no import {unknown}: `etl imports` lists them\n"
    )


def test_ledger_of_a_restored_backup_is_filled_again_by_a_replay(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    import_id = add(etl, tmp_path, ["R1", "R2"], "4.00")
    with stack_engine.begin() as connection:
        for table in (ledger, import_requests, import_events):  # 备份里没有的
            connection.execute(sa.delete(table))
        connection.execute(
            sa.delete(target_tables("public").orders).where(target_tables("public").orders.c.import_id == import_id)
        )
    report = json.loads(etl("replay", "--since", "1d", "--json").stdout)
    assert DAY in report["partitions"]["orders"]
    assert report["skipped"] == report["invalid"] == 0
    etl("wait", "--import-id", str(import_id), "--timeout", "90")
    assert orders_of(stack_engine, import_id) == 2
    eventually(lambda: not has_due_days(stack_engine), "the imports of other tests are not done")
    again = etl(
        "replay", "--since", "1d", "--subject", DATA_IMPORT_COMPLETED, "--json"
    )  # 资产自己的事件每次都再要求一遍
    assert json.loads(again.stdout)["requested"] == 0
    assert find_differences(stack_engine, stack_settings) == []
    assert isinstance(json.loads(etl("dlq", "list", "--json").stdout), list)
