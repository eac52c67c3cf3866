"""同一个文件再来一次，更旧的导出后来：认得出来，说得清楚，人说了才再导入。"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa

from bridge.imports import known_files
from bridge.imports.known_files import KnownFileError
from bridge.imports.loading import import_file
from etl_assets.core.etl_tables import imported_files
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.intake.withdrawal import mark_withdrawn

from .engine.plans import explained
from .etl_import import Import

HEADER = "order_id,shop,customer_name,order_status,amount,quantity,ordered_at\n"
Order = tuple[str, str, str]


def write(path: Path, *orders: Order) -> Path:
    """一行一个订单：号、状态、一月的哪一天。"""
    rows = [f"{order_id},旗舰店,张三,{status},12.50,1,2026-01-{day} 09:00:00\n" for order_id, status, day in orders]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return path


def imports(engine: sa.Engine) -> Sequence[UUID]:
    with engine.connect() as connection:
        return connection.scalars(sa.select(import_tasks.c.import_id).order_by(import_tasks.c.completed_at)).all()


def withdraw(engine: sa.Engine, import_id: UUID) -> None:
    with engine.begin() as connection:
        mark_withdrawn(connection, import_id)


OLD = [("A1", "已付款", "05"), ("A2", "已付款", "06"), ("A3", "已付款", "07")]
NEW = [("A1", "已完成", "05"), ("A2", "已取消", "06"), ("A3", "已付款", "07"), ("A4", "已付款", "09")]


def test_the_same_content_is_refused_whatever_its_name_and_options(
    engine: sa.Engine, etl_import: Import, tmp_path: Path
) -> None:
    first = etl_import(write(tmp_path / "january.csv", *OLD))
    assert first.exit_code == 0
    copy = shutil.copy(tmp_path / "january.csv", tmp_path / "download (1).csv")
    for arguments in ([copy], [copy, "--shop", "别的店"], [copy, "--map", "quantity="]):
        said = etl_import(*arguments)
        assert (said.exit_code, said.out) == (2, "")
        assert said.err.startswith("error: download (1).csv: this content was imported on 20")
        assert f" as {first.out.strip()} (file 'january.csv'), and its orders are still the newest versions" in said.err
        assert said.err.endswith("; nothing was imported: --again imports it all the same\n")
        assert said.err.count("\n") == 1
    assert len(imports(engine)) == 1


def test_it_is_said_what_became_of_its_orders(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.csv", *OLD), write(tmp_path / "new.csv", *NEW[:2])
    assert [etl_import(old).exit_code, etl_import(new).exit_code] == [0, 0]
    assert (
        ", its orders are now older versions in 2 cases of 3, and would be turned back; nothing was imported"
        in etl_import(old).err
    )
    withdraw(engine, imports(engine)[1])
    assert ", and its orders are still the newest versions; nothing was imported" in etl_import(old).err


def test_again_imports_it_and_says_so(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "orders.csv", *OLD)
    first = etl_import(path).out.strip()
    said = etl_import(path, "--again")
    assert said.exit_code == 0
    assert "warning: imported again: this content was imported on " in said.err
    assert [str(import_id) for import_id in imports(engine)] == [first, said.out.strip()]
    report = json.loads(etl_import(path, "--again", "--json").out)
    assert report["imported_before"]["import_id"] == said.out.strip()
    assert (report["imported_before"]["superseded"], report["imported_before"]["looked_at"]) == (0, 3)


def test_a_withdrawn_import_does_not_count(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "orders.csv", *OLD)
    assert etl_import(path, "--map", "amount=quantity").exit_code == 0
    withdraw(engine, imports(engine)[0])
    said = etl_import(path)
    assert said.exit_code == 0
    assert "imported again" not in said.err
    with engine.connect() as connection:
        hashes = connection.scalars(sa.select(imported_files.c.content_hash)).all()
    assert len(hashes) == 2
    assert len(set(hashes)) == 1


def test_a_dry_run_warns_of_it(etl_import: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "orders.csv", *OLD)
    assert "imported on" not in etl_import(path, "--dry-run").err
    assert etl_import(path, "--create-shops").exit_code == 0
    said = etl_import(path, "--dry-run")
    assert said.exit_code == 0
    assert "warning: this content was imported on " in said.err
    assert "still the newest versions; without --again it is refused\n" in said.err


def test_a_file_that_was_refused_is_not_known(etl_import: Import, tmp_path: Path) -> None:
    path = write(tmp_path / "orders.csv", ("A1", "已付款", "05"), ("A2", "已付款", "35"))
    assert etl_import(path).exit_code == 2
    assert "is not a possible date" in etl_import(path).err
    assert etl_import(path, "--skip-bad-rows").exit_code == 0
    assert "this content was imported on" in etl_import(path, "--skip-bad-rows").err


@pytest.mark.parametrize("fails", [False, True])
def test_of_two_imports_at_once_one_is_told_what_the_other_did(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """后来的等先来的：先来的成了就拒绝，没成就由它导入。"""
    path = write(tmp_path / "orders.csv", *OLD)
    is_loading, is_waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(known_files.time, "sleep", lambda _: is_waiting.set())

    def wait(_done: int, _total: int) -> None:
        is_loading.set()
        assert is_waiting.wait(20)
        if fails:
            raise InterruptedError

    with ThreadPoolExecutor(1) as other:
        first = other.submit(import_file, engine, path, settings=etl_settings, on_progress=wait)
        assert is_loading.wait(20)
        if fails:
            second = import_file(engine, path, settings=etl_settings).import_id
            with pytest.raises(InterruptedError):
                first.result()
            assert imports(engine) == [second]
        else:
            with pytest.raises(KnownFileError) as caught:
                import_file(engine, path, settings=etl_settings)
            assert imports(engine) == [caught.value.known.import_id] == [first.result().import_id]


def test_an_older_export_after_a_newer_one_is_warned_of(etl_import: Import, tmp_path: Path) -> None:
    newer = etl_import(write(tmp_path / "new.csv", *NEW)).out.strip()
    old = write(tmp_path / "old.csv", *OLD)
    dry = etl_import(old, "--dry-run")
    said = etl_import(old)
    assert (dry.exit_code, said.exit_code) == (0, 0)
    start = "turned back, such as 'A1' (order_status '已完成' → '已付款'); what they were came from 'new.csv', imported on 20"
    assert f"warning: 2 orders would be {start}" in dry.err
    assert f"warning: 2 orders were {start}" in said.err
    assert (
        f" as {newer}: is this file an older export? Then `etl withdraw` with the id of this import takes it back\n"
        in said.err
    )


def test_in_json_it_is_told_which_orders_turn_back(etl_import: Import, tmp_path: Path) -> None:
    newer = json.loads(etl_import(write(tmp_path / "new.csv", *NEW), "--json").out)
    assert newer["turned_back"] is None
    turned = json.loads(etl_import(write(tmp_path / "old.csv", *OLD), "--json").out)["turned_back"]
    assert (turned["orders"], turned["looked_at"], turned["is_sample"]) == (2, 3, False)
    assert turned["changes"] == {"order_status": ["'已完成'", "'已付款'"]}
    assert turned["import_id"] == newer["import_id"]


def test_what_an_earlier_export_said_is_a_step_back_whatever_the_statuses_mean(
    etl_import: Import, tmp_path: Path
) -> None:
    first = [("A1", "待付款", "05"), ("A2", "待付款", "06")]
    later = [("A1", "待发货", "05"), ("A2", "待发货", "06"), ("A3", "待付款", "08")]
    saved_again = [*first, ("A0", "待付款", "04")]
    assert "turned back" not in etl_import(write(tmp_path / "1.csv", *first)).err
    assert "turned back" not in etl_import(write(tmp_path / "2.csv", *later)).err
    assert "warning: 2 orders were turned back, such as 'A1'" in etl_import(write(tmp_path / "3.csv", *saved_again)).err


@pytest.mark.parametrize(
    "later",
    [
        pytest.param([*NEW, ("A5", "已付款", "10")], id="new orders"),
        pytest.param([("A1", "已付款", "05"), ("A5", "已付款", "10")], id="reopened, with newer orders"),
        pytest.param([("B1", "已付款", "02")], id="other orders"),
        pytest.param([("A1", "售后中", "05"), ("A3", "已完成", "07"), ("A4", "已取消", "09")], id="more go forward"),
        pytest.param([("A1", "已完成", "05"), ("A2", "已取消", "06")], id="the same"),
    ],
)
def test_a_newer_export_is_not_warned_of(etl_import: Import, tmp_path: Path, later: list[Order]) -> None:
    etl_import(write(tmp_path / "old.csv", *OLD))
    assert "turned back" not in etl_import(write(tmp_path / "new.csv", *NEW)).err
    assert "turned back" not in etl_import(write(tmp_path / "later.csv", *later)).err


def test_a_withdrawn_newer_export_turns_nothing_back(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    etl_import(write(tmp_path / "new.csv", *NEW))
    withdraw(engine, imports(engine)[0])
    assert "turned back" not in etl_import(write(tmp_path / "old.csv", *OLD)).err


@pytest.mark.parametrize("has_statistics", [True, False])
def test_the_history_is_not_read_to_find_it(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_statistics: bool
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            INSERT INTO import_tasks SELECT gen_random_uuid(), 'history', 'completed', 10, now(), now() FROM generate_series(1, 5000);
            INSERT INTO raw_orders (import_id, order_id, shop, customer_name, order_status, amount, quantity, ordered_at)
            SELECT import_id, 'H-' || row_number() OVER (), '旗舰店', '客户', 'paid', 1, 1, '2026-01-08'
            FROM import_tasks, generate_series(1, 10);
        """)
        connection.exec_driver_sql("ANALYZE raw_orders; ANALYZE import_tasks" if has_statistics else "SELECT")
    import_file(engine, write(tmp_path / "new.csv", *NEW), settings=etl_settings)
    with explained(engine, monkeypatch) as statements:
        report = import_file(engine, write(tmp_path / "old.csv", *OLD), settings=etl_settings)
        with pytest.raises(KnownFileError, match="the newest versions"):
            import_file(engine, tmp_path / "old.csv", settings=etl_settings)
    assert report.turned_back is not None
    assert max(statement.rows_read("raw_orders") for statement in statements) < 50
    assert max(statement.rows_read("import_tasks") for statement in statements) < 50


def test_without_the_index_nobody_looks(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    """应用的表上没有索引时，每次查找都是读整张表。"""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_raw_orders_order")
    import_file(engine, write(tmp_path / "new.csv", *NEW), settings=etl_settings)
    assert import_file(engine, write(tmp_path / "old.csv", *OLD), settings=etl_settings).turned_back is None
    with pytest.raises(KnownFileError, match=r"\(file 'old.csv'\); nothing was imported"):
        import_file(engine, tmp_path / "old.csv", settings=etl_settings)


def test_rows_that_would_be_rejected_are_no_versions(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    old = write(tmp_path / "old.csv", *OLD)
    import_file(engine, old, settings=etl_settings)
    import_file(engine, write(tmp_path / "new.csv", *NEW), settings=etl_settings, mapping={"customer_name": ""})
    with pytest.raises(KnownFileError, match="still the newest versions"):
        import_file(engine, old, settings=etl_settings)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(raw_orders)) == 7
