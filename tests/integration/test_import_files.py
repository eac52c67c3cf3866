"""导入进真 PostgreSQL：一个事务，要么全有，要么全无；文件里的文字一字不差。"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import polars as pl
import pytest
import sqlalchemy as sa
from sqlalchemy import event

from bridge.imports.files import encoding
from bridge.imports.loading import import_file
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import Profile, load_profile
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs

DATA = Path(__file__).parents[3] / "shared" / "data"
HEADER = "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at\n"
GOOD = "A{n},旗舰店,张三,大货,已完成,12.50,2,2024-01-05 08:05:06\n"
STORED = [column for column in raw_orders.c if column.name not in ("raw_id", "import_id", "extra")]


def write(folder: Path, *rows: str, name: str = "orders.csv") -> Path:
    path = folder / name
    path.write_text(HEADER + "".join(rows), encoding="utf-8", newline="")
    return path


def shared(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"../shared/data/{name} is not there")
    return DATA / name


def stored_rows(engine: sa.Engine, *columns: sa.ColumnElement[Any]) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*(columns or STORED)).order_by(raw_orders.c.raw_id))]


def count(engine: sa.Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def add_shop(engine: sa.Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(shop_configs).values(shop_id=sa.func.gen_random_uuid(), shop_name=name, platform="test")
        )


def test_a_file_becomes_one_completed_import(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.format(n=1), " A2 ,旗舰店 ,,,,,,\n")
    seen: list[tuple[int, int]] = []
    report = import_file(
        engine, path, settings=etl_settings, on_progress=lambda done, total: seen.append((done, total))
    )
    assert stored_rows(engine) == [
        ("A1", "旗舰店", "张三", "大货", "已完成", Decimal("12.50"), 2, datetime(2024, 1, 5, 0, 5, 6, tzinfo=UTC)),
        (" A2 ", "旗舰店 ", None, None, None, None, None, None),
    ]
    with engine.connect() as connection:
        task = connection.execute(sa.select(import_tasks)).one()
    assert (task.import_id, task.source_name, task.status, task.row_count) == (
        report.import_id,
        "orders.csv",
        "completed",
        2,
    )
    assert task.completed_at > task.created_at
    assert stored_rows(engine, raw_orders.c.import_id) == [(report.import_id,)] * 2
    assert (report.rows, report.source_rows, report.skipped_rows, report.rejected_file) == (2, 2, 0, None)
    assert report.first_ordered_at == report.last_ordered_at == datetime(2024, 1, 5, 0, 5, 6, tzinfo=UTC)
    assert seen == [(path.stat().st_size, path.stat().st_size)]


def test_text_reaches_the_database_unchanged(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    names = ["'; DROP TABLE raw_orders; --", 'a"b', "x,y", "two\nlines", "\\.", "\\N", "NULL", "𝄞 é", "\tspaced "]
    path = tmp_path / "orders.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["order_id", "customer_name"], *([str(n), name] for n, name in enumerate(names))])
    declined = dict.fromkeys(("order_status", "amount", "quantity", "ordered_at"), "")
    import_file(engine, path, settings=etl_settings, shop="'); --", mapping=declined)
    assert stored_rows(engine, raw_orders.c.customer_name, raw_orders.c.shop) == [(name, "'); --") for name in names]


def test_the_order_of_the_file_is_the_order_of_raw_ids_across_blocks(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 4096)
    path = write(tmp_path, *(GOOD.format(n=n) for n in range(2000)))
    seen: list[int] = []
    report = import_file(engine, path, settings=etl_settings, on_progress=lambda done, _: seen.append(done))
    assert stored_rows(engine, raw_orders.c.order_id) == [(f"A{n}",) for n in range(2000)]
    assert report.rows == 2000
    assert len(seen) > 10
    assert seen == sorted(seen)


def test_the_same_file_twice_differs_only_in_its_ids(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    path = write(tmp_path, GOOD.format(n=1), GOOD.format(n=2))
    first = import_file(engine, path, settings=etl_settings).import_id
    second = import_file(engine, path, settings=etl_settings, again=True).import_id
    rows = stored_rows(engine, raw_orders.c.import_id, *STORED)
    assert [row[0] for row in rows] == [first, first, second, second]
    assert [row[1:] for row in rows[:2]] == [row[1:] for row in rows[2:]]


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_bad_rows_stop_the_import_or_are_set_aside(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad_rows: bool
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 256)
    bad = GOOD.format(n="bad").replace("12.50", "1O")
    path = write(
        tmp_path, *(GOOD.format(n=n) for n in range(20)), bad, *(GOOD.format(n=n) for n in range(20, 40)), "A,店\n"
    )
    if not skip_bad_rows:
        with pytest.raises(ImportFileError) as caught:
            import_file(engine, path, settings=etl_settings)
        assert str(caught.value) == (
            "orders.csv, row 22, column 'amount': '1O' is not a number (1 more bad row); nothing was imported: "
            "correct the file, or import the other rows with --skip-bad-rows"
        )
        assert (count(engine, raw_orders), count(engine, import_tasks)) == (0, 0)
        assert list(tmp_path.iterdir()) == [path]
        return
    report = import_file(engine, path, settings=etl_settings, skip_bad_rows=True)
    assert (report.rows, report.source_rows, report.skipped_rows) == (40, 42, 2)
    assert stored_rows(engine, raw_orders.c.order_id) == [(f"A{n}",) for n in range(40)]
    assert report.rejected_file == tmp_path / "orders.csv.rejected.csv"
    assert report.rejected_file.read_bytes().startswith(b"\xef\xbb\xbfrow,column,problem,order_id,shop")
    rejected = pl.read_csv(report.rejected_file, infer_schema=False)
    assert rejected.select("row", "column", "problem", "order_id", "amount").rows() == [
        ("22", "amount", "is not a number", "Abad", "1O"),
        ("43", "customer_name", "is missing: the row has 2 fields instead of 8", "A", None),
    ]


def test_rejected_rows_never_overwrite_a_file(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.format(n=1), GOOD.replace("12.50", "x"))
    written = [
        import_file(engine, path, settings=etl_settings, skip_bad_rows=True, again=True).rejected_file for _ in range(3)
    ]
    assert [file.name for file in written if file] == [
        "orders.csv.rejected.csv",
        "orders.csv.rejected-2.csv",
        "orders.csv.rejected-3.csv",
    ]


def test_a_file_of_bad_rows_only_is_not_imported(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("2024-01-05", "2024-02-30"))
    with pytest.raises(
        ImportFileError, match=r"row 2, column 'ordered_at': '2024-02-30 08:05:06' is not a possible date"
    ):
        import_file(engine, path, settings=etl_settings, skip_bad_rows=True)
    assert count(engine, import_tasks) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_without_rows_is_not_an_import(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="the file has a header but no rows"):
        import_file(engine, write(tmp_path), settings=etl_settings)
    assert count(engine, import_tasks) == 0


def test_nothing_is_visible_before_everything_is(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 4096)
    path = write(tmp_path, *(GOOD.format(n=n) for n in range(500)))
    visible: list[tuple[int, int]] = []

    def look(_done: int, _total: int) -> None:
        visible.append((count(engine, raw_orders), count(engine, import_tasks)))

    import_file(engine, path, settings=etl_settings, on_progress=look)
    assert set(visible) == {(0, 0)}
    assert (count(engine, raw_orders), count(engine, import_tasks)) == (500, 1)


def test_a_failure_at_commit_leaves_nothing_behind(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    path = write(tmp_path, GOOD.format(n=1), GOOD.replace("12.50", "x"))

    @event.listens_for(engine, "commit")
    def refuse(_connection: sa.Connection) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        import_file(engine, path, settings=etl_settings, skip_bad_rows=True)
    assert (count(engine, raw_orders), count(engine, import_tasks)) == (0, 0)
    assert list(tmp_path.iterdir()) == [path]


def test_a_dry_run_reads_all_and_writes_nothing(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.format(n=1), GOOD.replace("12.50", "x"))
    report = import_file(engine, path, settings=etl_settings, dry_run=True, skip_bad_rows=True, create_shops=True)
    assert (report.import_id, report.rows, report.skipped_rows, report.unknown_shops) == (None, 1, 1, {"旗舰店": 1})
    assert [count(engine, table) for table in (raw_orders, import_tasks, shop_configs)] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_shops_are_reported_and_created_on_request(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    add_shop(engine, "旗舰店")
    rows = [
        GOOD.format(n=n).replace("旗舰店", shop)
        for n, shop in enumerate(["旗舰店", " 新店 ", "新店", "Robert'); --", "", " "])
    ]
    path = write(tmp_path, *rows)
    report = import_file(engine, path, settings=etl_settings)
    assert (report.unknown_shops, report.created_shops) == ({"新店": 2, "Robert'); --": 1}, [])
    again = import_file(engine, path, settings=etl_settings, create_shops=True, again=True)
    assert (again.unknown_shops, again.created_shops) == ({}, ["Robert'); --", "新店"])
    with engine.connect() as connection:
        created = connection.execute(
            sa.select(shop_configs.c.shop_id, shop_configs.c.platform).where(shop_configs.c.shop_name == "新店")
        ).one()
    # 由店名算出的 id：每处安装都一样
    assert created == (UUID("32d66db0-c09d-5cda-affe-b0cd32a4db8f"), "import")


def test_columns_without_a_target_can_be_kept(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text('id,who,when,备注,note\n1,张,2024-01-05,"红, ""大""",\n', encoding="utf-8")
    orders = {"order_id": {"column": "id"}, "customer_name": {"column": "who"}, "ordered_at": {"column": "when"}}
    profile = Profile.model_validate({"keep_extra": True, "orders": orders})
    import_file(engine, path, settings=etl_settings, profile=profile, shop="店")
    assert stored_rows(engine, raw_orders.c.extra) == [({"备注": '红, "大"', "note": None},)]


def test_cdnow_is_imported_by_its_shipped_profile(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    path = shared("cdnow_sample.txt")
    report = import_file(engine, path, settings=etl_settings, profile=load_profile("cdnow"), create_shops=True)
    expected = [line.split() for line in path.read_text().splitlines()]
    local = sa.func.to_char(sa.func.timezone(etl_settings.timezone, raw_orders.c.ordered_at), "YYYYMMDD HH24MI")
    columns = ("order_id", "shop", "customer_name", "order_type", "order_status", "amount", "quantity")
    assert stored_rows(engine, *(raw_orders.c[name] for name in columns), local) == [
        (str(number), "CDNOW", customer, None, "completed", Decimal(dollars), int(cds), f"{day} 0000")
        for number, (customer, _, day, cds, dollars) in enumerate(expected, 1)
    ]
    assert (report.rows, report.created_shops) == (6919, ["CDNOW"])


def test_online_retail_lines_become_orders_by_the_shipped_profile(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    path = shared("online_retail_sample.csv")
    report = import_file(engine, path, settings=etl_settings, profile=load_profile("online_retail"))
    expected: dict[str, list[Any]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in csv.DictReader(file):
            invoice = line["InvoiceNo"]
            order = expected.setdefault(
                invoice, [invoice, line["Country"], line["CustomerID"] or None, Decimal(0), 0, line["InvoiceDate"]]
            )
            order[3] += Decimal(line["UnitPrice"]) * int(line["Quantity"])
            order[4] += int(line["Quantity"])
    for order in expected.values():
        order.append("cancelled" if order[0].startswith("C") else "completed")
    local = sa.func.to_char(sa.func.timezone("Europe/London", raw_orders.c.ordered_at), "MM-DD-YYYY HH24:MI")
    columns = [raw_orders.c[name] for name in ("order_id", "shop", "customer_name", "amount", "quantity")]
    assert stored_rows(engine, *columns, local, raw_orders.c.order_status) == [
        tuple(order) for order in expected.values()
    ]
    assert (report.rows, report.source_rows) == (len(expected), 2139)
    assert sum(report.unknown_shops.values()) == report.rows


def test_a_database_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    path = write(tmp_path, GOOD)
    nobody = build_engine(
        EtlSettings(database_url="postgresql://etl:s3cret@127.0.0.1:1/etl", connect_timeout_seconds=1)
    )
    with pytest.raises(
        DatabaseUnavailableError, match="cannot reach the PostgreSQL of ETL_DATABASE_URL, nothing was written"
    ) as caught:
        import_file(nobody, path, settings=etl_settings)
    assert "s3cret" not in str(caught.value)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE raw_orders DROP COLUMN quantity")
    with pytest.raises(DatabaseRefusedError, match=r"run `etl init-db` .*column \"quantity\""):
        import_file(engine, path, settings=etl_settings)
    assert count(engine, import_tasks) == 0


def test_a_file_whose_name_is_no_text_is_imported(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.format(n=1), name=os.fsdecode("订单.csv".encode("gbk")))
    import_file(engine, path, settings=etl_settings)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(import_tasks.c.source_name)) == r"\xb6\xa9\xb5\xa5.csv"


def test_a_file_without_order_numbers_is_imported(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> None:
    report = import_file(engine, write(tmp_path, GOOD.format(n=1)), settings=etl_settings, mapping={"order_id": ""})
    assert report.rejected == {"missing_order_id": 1}


@pytest.mark.parametrize("change", [lambda path: path.touch(), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_not_imported(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = write(tmp_path, GOOD.format(n=1))
    with pytest.raises(ImportFileError, match="changed while it was read"):
        import_file(engine, path, settings=etl_settings, on_progress=lambda _done, _total: change(path))
    assert count(engine, raw_orders) == 0
