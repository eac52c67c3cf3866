"""etl import 读数与时刻：写法由整列定，看不出就问；弄丢了的不导入。一句话、退出码 2、库里什么也没有。"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.imports.files import encoding
from etl_assets.core.tables import import_tasks, raw_orders

from .etl_import import Import

EXPORTS = Path(__file__).parents[1] / "exports"
HEADER = "order_id,shop,customer_name,order_status,amount,quantity,ordered_at"
ROW = "{n},店,张三,已完成,{amount},1,{time}"


def write(folder: Path, *cells: tuple[str, str]) -> Path:
    path = folder / "orders.csv"
    rows = [ROW.format(n=f"A{n}", amount=f'"{amount}"', time=time) for n, (amount, time) in enumerate(cells)]
    path.write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return path


def stored(engine: sa.Engine) -> list[tuple[str, Decimal, datetime]]:
    columns = (raw_orders.c.order_id, raw_orders.c.amount, raw_orders.c.ordered_at)
    with engine.connect() as connection:
        return [
            (row[0], row[1], row[2]) for row in connection.execute(sa.select(*columns).order_by(raw_orders.c.raw_id))
        ]


def is_empty(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return all(
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0
            for table in (raw_orders, import_tasks)
        )


MONDAY = "2026-03-02 09:05:00"
REFUSED = [
    pytest.param(
        ("85.500", MONDAY),
        ("12", MONDAY),
        "row 2, column 'amount': '85.500' is ",
        "--decimal-point or --decimal-comma",
        id="open",
    ),
    pytest.param(
        ("0,125", MONDAY),
        ("12.5", MONDAY),
        "row 3, column 'amount': '12.5' has a decimal point, '0,125' in row 2",
        "one way",
        id="two",
    ),
    pytest.param(
        ("#N/A", MONDAY), ("12", MONDAY), "row 2, column 'amount': '#N/A' is an error value", "export again", id="error"
    ),
    pytest.param(
        ("1e5", MONDAY),
        ("12", MONDAY),
        "row 2, column 'amount': '1e5' is not a number",
        "correct the file",
        id="number",
    ),
    pytest.param(
        ("1", "03/04/2026"),
        ("1", "05/04/2026"),
        "row 2, column 'ordered_at': '03/04/2026' is ",
        "--day-first or --month-first",
        id="day",
    ),
    pytest.param(
        ("1", MONDAY),
        ("1", "13/02/2026"),
        "row 3, column 'ordered_at': '13/02/2026' is read as",
        "one way",
        id="swapped",
    ),
    pytest.param(
        ("1", MONDAY),
        ("1", "1990-09-16 01:30:00"),
        "row 3, column 'ordered_at': '1990-09-16 01:30:00' exists twice",
        "correct",
        id="twice",
    ),
    pytest.param(
        ("1", MONDAY),
        ("1", "1990-04-15 02:30:00"),
        "row 3, column 'ordered_at': '1990-04-15 02:30:00' does not exist",
        "correct",
        id="never",
    ),
    pytest.param(
        ("1", MONDAY),
        ("1", "2026-03-029:05"),
        "row 3, column 'ordered_at': '2026-03-029:05' is not",
        "correct the file",
        id="run on",
    ),
]


@pytest.mark.parametrize(("first", "second", "place", "way_out"), REFUSED)
def test_what_cannot_be_read_for_certain_is_refused_in_one_sentence(
    engine: sa.Engine,
    etl_import: Import,
    tmp_path: Path,
    first: tuple[str, str],
    second: tuple[str, str],
    place: str,
    way_out: str,
) -> None:
    said = etl_import(write(tmp_path, first, second))
    assert (said.exit_code, said.out) == (2, "")
    assert said.err.startswith(f"error: orders.csv, {place}")
    assert "; nothing was imported: " in said.err
    assert way_out in said.err
    assert said.err.count("\n") == 1
    assert is_empty(engine)


def test_ids_that_excel_rounded_are_refused(engine: sa.Engine, etl_import: Import) -> None:
    said = etl_import(EXPORTS / "excel_resaved.csv", "--create-shops")
    assert said.exit_code == 2
    assert said.err.startswith(
        "error: excel_resaved.csv, row 2, column '订单编号': '2.51236E+18' is a longer number that a spreadsheet has rounded: its last "
        "digits are lost (rows 2, 3, 4, 5, 6, …) (11 more bad rows); nothing was imported: export again, or format the column as text"
    )
    assert is_empty(engine)


def test_formulas_without_values_are_refused(engine: sa.Engine, etl_import: Import) -> None:
    said = etl_import(EXPORTS / "formulas.xlsx", "--create-shops")
    assert said.exit_code == 2
    assert said.err.startswith(
        "error: formulas.xlsx, row 2, column '实付金额': is a formula without a stored value (rows 2, 3, 4, 5, 6, …)"
    )
    assert is_empty(engine)


def test_protected_ids_are_stored_without_their_protection(engine: sa.Engine, etl_import: Import) -> None:
    assert etl_import(EXPORTS / "douyin.csv", "--profile", EXPORTS / "douyin.toml", "--create-shops").exit_code == 0
    rows = stored(engine)
    assert (len(rows), sum(amount for _, amount, _ in rows)) == (9, Decimal("2630.25"))
    assert all(order_id.isdigit() for order_id, _, _ in rows)


def test_what_was_chosen_is_said_and_reported(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    path = write(tmp_path, ("85.500", "3/4/2026 9:05"), ("4.711,98 €", "13/4/2026 21:05"))
    said = etl_import(path, "--create-shops", "--timezone", "Europe/Berlin")
    assert said.exit_code == 0
    assert "column 'amount': numbers with a decimal comma (row 3: '4.711,98 €')\n" in said.err
    assert "column 'ordered_at': dates day-first (row 3: '13/4/2026 21:05')\n" in said.err
    assert stored(engine) == [
        ("A0", Decimal("85500.00"), datetime(2026, 4, 3, 7, 5, tzinfo=UTC)),
        ("A1", Decimal("4711.98"), datetime(2026, 4, 13, 19, 5, tzinfo=UTC)),
    ]
    report = json.loads(etl_import(path, "--json", "--dry-run").out)
    assert report["conventions"][0] == {
        "column": "amount",
        "convention": "numbers with a decimal comma",
        "because": {"row": 3, "value": "4.711,98 €"},
    }


@pytest.mark.parametrize(
    ("option", "amount"), [("--decimal-comma", Decimal(85500)), ("--decimal-point", Decimal("85.5"))]
)
def test_the_way_out_works(engine: sa.Engine, etl_import: Import, tmp_path: Path, option: str, amount: Decimal) -> None:
    said = etl_import(write(tmp_path, ("85.500", "03/04/2026")), "--create-shops", option, "--month-first")
    assert said.exit_code == 0, said.err
    assert stored(engine) == [("A0", amount, datetime(2026, 3, 3, 16, tzinfo=UTC))]
    assert "(as asked for)" in said.err


def test_an_unknown_zone_is_refused(engine: sa.Engine, etl_import: Import, tmp_path: Path) -> None:
    said = etl_import(write(tmp_path, ("1", MONDAY)), "--timezone", "Mars/Base")
    assert said.exit_code == 2
    assert "'Mars/Base' is not an IANA time zone name" in said.err
    assert is_empty(engine)


def test_a_contradiction_behind_a_million_bytes_takes_everything_back(
    engine: sa.Engine, etl_import: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 4096)
    path = write(tmp_path, *[("12.50", MONDAY)] * 2000, ("12,50", MONDAY))
    said = etl_import(path, "--create-shops", "--skip-bad-rows")
    assert said.exit_code == 2
    assert said.err.startswith(
        "error: orders.csv, row 2002, column 'amount': '12,50' has a decimal comma, '12.50' in row 2 a decimal point"
    )
    assert is_empty(engine)
