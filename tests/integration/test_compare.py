"""两个 schema 的比较，在真 PostgreSQL 上：差一分、缺行、多行、NULL、不同的 id，都说得出是哪一行哪一列。"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from etl_assets.comparison.comparing import ComparisonRequest, TableComparison, ValueSample, compare_schemas
from etl_assets.comparison.sides import NotComparableError
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.errors import DatabaseUnavailableError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables

SHOP = UUID("00000000-0000-4000-8000-000000000001")
KEY = f"{SHOP}:张三"
CUSTOMER, LEAD = uuid4(), uuid4()
ORDER = {
    "shop_id": SHOP,
    "order_id": "A-1",
    "customer_nickname": "张三",
    "latest_status": "completed",
    "raw_order_type": None,
    "system_order_type": "BULK",
    "amount": Decimal("120.50"),
    "quantity": 2,
    "ordered_at": "2026-01-05 04:00:00+00",
    "order_date": date(2026, 1, 5),
    "import_id": uuid4(),
    "raw_id": 1,
}
LAST_ORDER_AT = "2026-01-05 16:00:00+00"  # 业务日是 1 月 6 日

Compare = Callable[..., dict[str, TableComparison]]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def schemas(engine: sa.Engine) -> sa.Engine:
    """public 与 shadow 各有同样的一个订单、一个客户、一个商机。"""
    execute(engine, "CREATE SCHEMA shadow")
    for table in target_tables("public").of_asset.values():
        execute(engine, f"CREATE TABLE shadow.{table.name} (LIKE public.{table.name} INCLUDING ALL)")
    for schema in ("public", "shadow"):
        insert(engine, schema, "orders", ORDER)
        insert(engine, schema, "customers", customer())
        insert(engine, schema, "leads", lead())
    return engine


@pytest.fixture
def compare(schemas: sa.Engine, etl_settings: EtlSettings) -> Compare:
    def run(left: str = "public", right: str = "shadow", **options: Any) -> dict[str, TableComparison]:
        comparison = compare_schemas(schemas, etl_settings, ComparisonRequest(left=left, right=right, **options))
        assert comparison.equal == all(table.equal for table in comparison.tables)
        return {table.table: table for table in comparison.tables}

    return run


@pytest.fixture
def etl_compare(schemas: sa.Engine, tmp_path: Path) -> Run:
    """`etl compare --left public --right shadow …` 在子进程里。"""

    def run(
        *arguments: str, left: str = "public", right: str = "shadow", exit_code: int
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
        address = {
            "ETL_DATABASE_URL": schemas.url.render_as_string(hide_password=False),
            "ETL_STATE_DIR": str(tmp_path),
        }
        command = [sys.executable, "-m", "bridge.cli.main", "compare", "--left", left, "--right", right, *arguments]
        result = subprocess.run(
            command,
            env={**environment, **address},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == exit_code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


def execute(engine: sa.Engine, statement: str, *, schema: str = "public", **values: Any) -> None:
    """没有写明 schema 的表在 schema 里。"""
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.set_config("search_path", schema, True)))
        connection.execute(sa.text(statement), values)


def insert(engine: sa.Engine, schema: str, name: str, row: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(getattr(target_tables(schema), name)).values(row))


def customer(**values: Any) -> dict[str, Any]:
    row = {
        "customer_global_id": CUSTOMER,
        "customer_key": KEY,
        "shop_id": SHOP,
        "customer_nickname": "张三",
        "last_order_at": LAST_ORDER_AT,
    }
    return {**row, "order_count": 1, "total_amount": Decimal("120.50"), **values}


def lead(**values: Any) -> dict[str, Any]:
    row = {
        "lead_id": LEAD,
        "customer_global_id": CUSTOMER,
        "lead_no": 1,
        "current_stage": "OPEN",
        "last_order_at": LAST_ORDER_AT,
    }
    return {**row, "bulk_amount": Decimal("120.50"), **values}


def order_key(order_id: str = "A-1") -> dict[str, Any]:
    return {"shop_id": SHOP, "order_id": order_id}


def differing(table: TableComparison) -> dict[str, int]:
    return {column.column: column.differing for column in table.columns if column.differing}


def largest(table: TableComparison, column: str) -> Decimal | None:
    return next(each.largest_difference for each in table.columns if each.column == column)


def test_same_rows_are_equal_whatever_their_timestamps_of_writing(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "UPDATE shadow.orders SET created_at = now() - interval '1 day', updated_at = NULL")
    tables = compare()
    assert list(tables) == list(descriptions())
    assert all(table.equal for table in tables.values())
    for table in (tables["orders"], tables["customers"], tables["leads"]):
        assert (table.rows_left, table.rows_right, table.missing, table.extra, table.differing) == (1, 1, 0, 0, 0)


@pytest.mark.parametrize("name", ["orders", "customers", "leads"])
def test_every_column_of_the_contract_is_compared(schemas: sa.Engine, compare: Compare, name: str) -> None:
    table = getattr(target_tables("shadow"), name)
    keys = {"shop_id", "order_id"} if name == "orders" else {"customer_key", "lead_no", "customer_global_id"}
    values = {sa.Uuid: uuid4(), sa.Text: "changed", sa.Date: date(1999, 1, 1), sa.DateTime: "1999-01-01 00:00:00+00"}
    changed = {column.name: values.get(type(column.type), 999) for column in table.c if column.name not in keys}
    with schemas.begin() as connection:
        connection.execute(sa.update(table).values(changed))
    compared = compare()[name]
    assert compared.differing == 1
    assert differing(compared) == dict.fromkeys(changed.keys() - {"created_at", "updated_at"}, 1)


def test_one_changed_cent_among_many_is_found_with_its_row(schemas: sa.Engine, compare: Compare) -> None:
    many = "INSERT INTO orders (shop_id, order_id, amount, raw_id) SELECT :shop, 'N-' || n, n / 100.0, n FROM generate_series(1, 20000) n"
    execute(schemas, f"{many} ORDER BY n", schema="public", shop=SHOP)
    execute(schemas, f"{many} ORDER BY -n", schema="shadow", shop=SHOP)
    execute(schemas, "UPDATE shadow.orders SET amount = amount + 0.01 WHERE order_id = 'N-12345'")
    statements: list[str] = []
    sa.event.listen(schemas, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    orders = compare(tables=["orders"])["orders"]
    assert (orders.rows_left, orders.missing, orders.extra, orders.differing) == (20_001, 0, 0, 1)
    assert orders.equal_share == 20_000 / 20_001
    assert differing(orders) == {"amount": 1}
    assert largest(orders, "amount") == Decimal("0.01")
    assert list(orders.samples.differing) == [ValueSample(order_key("N-12345"), "amount", "123.45", "123.46")]
    assert len(statements) == 6  # work_mem、时刻、列、行数、JOIN、样本：与行数无关


def test_missing_and_extra_rows_are_counted_and_named(schemas: sa.Engine, compare: Compare) -> None:
    insert(schemas, "public", "orders", {**ORDER, "order_id": "only-left"})
    insert(schemas, "shadow", "orders", {**ORDER, "order_id": "only-right"})
    insert(schemas, "shadow", "leads", lead(lead_id=uuid4(), lead_no=2))
    tables = compare()
    orders = tables["orders"]
    assert (orders.rows_left, orders.rows_right, orders.missing, orders.extra, orders.differing) == (2, 2, 1, 1, 0)
    assert list(orders.samples.missing) == [order_key("only-left")]
    assert list(orders.samples.extra) == [order_key("only-right")]
    assert list(tables["leads"].samples.extra) == [{"customer_key": KEY, "lead_no": 2}]
    assert tables["customers"].equal


def test_null_empty_string_and_blank_are_three_values(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "UPDATE shadow.orders SET raw_order_type = ''")
    assert list(compare()["orders"].samples.differing) == [ValueSample(order_key(), "raw_order_type", None, "")]
    execute(schemas, "UPDATE public.orders SET raw_order_type = ' '")
    assert list(compare()["orders"].samples.differing) == [ValueSample(order_key(), "raw_order_type", " ", "")]
    execute(schemas, "UPDATE shadow.orders SET raw_order_type = NULL, amount = NULL")
    orders = compare(tolerance=Decimal(1_000_000))["orders"]  # NULL 与任何数都差得太多
    assert differing(orders) == {"raw_order_type": 1, "amount": 1}
    assert largest(orders, "amount") is None


def test_other_ids_are_differences_of_columns_not_of_rows(schemas: sa.Engine, compare: Compare) -> None:
    other = uuid4()
    execute(schemas, "UPDATE shadow.customers SET customer_global_id = :other", other=other)
    execute(
        schemas,
        "UPDATE shadow.business_leads SET customer_global_id = :other, lead_id = gen_random_uuid()",
        other=other,
    )
    tables = compare()
    assert differing(tables["customers"]) == {"customer_global_id": 1}
    assert differing(tables["leads"]) == {"lead_id": 1, "customer_global_id": 1}
    assert (tables["leads"].missing, tables["leads"].extra) == (0, 0)
    assert tables["customers"].samples.differing[0] == ValueSample(
        {"customer_key": KEY}, "customer_global_id", str(CUSTOMER), str(other)
    )
    ignoring = compare(ignored=["customer_global_id", "lead_id"])
    assert all(table.equal for table in ignoring.values())


def test_lead_without_customer_is_found_by_its_customer_id(schemas: sa.Engine, compare: Compare) -> None:
    orphan = uuid4()
    for schema, notes in (("public", "old"), ("shadow", "new")):
        insert(schemas, schema, "leads", lead(lead_id=orphan, customer_global_id=orphan, notes=notes))
    leads = compare()["leads"]
    assert (leads.missing, leads.extra) == (0, 0)
    assert list(leads.samples.differing) == [
        ValueSample({"customer_key": str(orphan), "lead_no": 1}, "notes", "old", "new")
    ]


@pytest.mark.parametrize(("tolerance", "equal"), [("0", False), ("0.01", False), ("0.02", True)])
def test_amounts_within_the_tolerance_are_the_same(
    schemas: sa.Engine, compare: Compare, tolerance: str, equal: bool
) -> None:
    execute(schemas, "UPDATE shadow.customers SET total_amount = total_amount - 0.02")
    assert compare(tolerance=Decimal(tolerance))["customers"].equal is equal


def test_tolerance_is_for_amounts_only(schemas: sa.Engine, compare: Compare) -> None:
    execute(
        schemas,
        "UPDATE shadow.customers SET order_count = order_count + 1, last_order_at = last_order_at + interval '1 s'",
    )
    customers = compare(tolerance=Decimal(10))["customers"]
    assert differing(customers) == {"order_count": 1, "last_order_at": 1}
    assert (largest(customers, "order_count"), largest(customers, "last_order_at")) == (1, 1)


@pytest.mark.parametrize(("seconds", "equal"), [("1.499999", False), ("1.5", True)])
def test_times_within_the_tolerance_are_the_same(
    schemas: sa.Engine, compare: Compare, seconds: str, equal: bool
) -> None:
    execute(schemas, "UPDATE shadow.orders SET ordered_at = ordered_at + interval '1.5 s'")
    assert compare(time_tolerance_seconds=Decimal(seconds))["orders"].equal is equal


def test_values_that_no_arithmetic_holds_are_compared(schemas: sa.Engine, compare: Compare) -> None:
    execute(
        schemas,
        "UPDATE public.orders SET amount = 'NaN', ordered_at = 'infinity', order_date = '4000-01-01 BC', quantity = -2147483648",
    )
    execute(
        schemas,
        "UPDATE shadow.orders SET amount = 'NaN', ordered_at = 'infinity', order_date = '4000-01-01 BC', quantity = -2147483648",
    )
    tolerances = {"tolerance": Decimal("0.01"), "time_tolerance_seconds": Decimal(1)}
    assert compare()["orders"].equal
    assert compare(**tolerances)["orders"].equal
    execute(
        schemas,
        "UPDATE shadow.orders SET amount = 1, ordered_at = '-infinity', order_date = 'infinity', quantity = 2147483647",
    )
    for options in ({}, tolerances):
        orders = compare(**options)["orders"]
        assert differing(orders) == {"amount": 1, "quantity": 1, "ordered_at": 1, "order_date": 1}
        assert {(sample.left, sample.right) for sample in orders.samples.differing} == {
            ("NaN", "1.00"),
            ("-2147483648", "2147483647"),
            ("infinity", "-infinity"),
            ("4000-01-01 BC", "infinity"),
        }


def test_since_takes_rows_that_are_late_enough_on_either_side(schemas: sa.Engine, compare: Compare) -> None:
    for order_id, left_day, right_day in (("old", "2026-01-01", "2026-01-01"), ("moved", "2026-01-01", "2026-01-09")):
        insert(schemas, "public", "orders", {**ORDER, "order_id": order_id, "order_date": left_day, "raw_id": 2})
        insert(schemas, "shadow", "orders", {**ORDER, "order_id": order_id, "order_date": right_day, "raw_id": 3})
    insert(schemas, "public", "orders", {**ORDER, "order_id": "gone", "order_date": "2026-01-04"})
    orders = compare(since=date(2026, 1, 5))["orders"]
    assert (orders.rows_left, orders.rows_right, orders.missing, orders.differing) == (2, 2, 0, 1)
    assert [sample.key["order_id"] for sample in orders.samples.differing] == ["moved", "moved"]
    assert (compare(since=date(2026, 1, 4))["orders"].missing, compare()["orders"].missing) == (1, 1)


def test_since_is_a_business_day_for_customers_and_leads(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "UPDATE shadow.customers SET order_count = 9")
    execute(schemas, "UPDATE shadow.business_leads SET current_stage = 'COLD'")
    insert(
        schemas,
        "public",
        "customers",
        customer(customer_global_id=uuid4(), customer_key="no order", last_order_at=None),
    )
    included, excluded = compare(since=date(2026, 1, 6)), compare(since=date(2026, 1, 7))
    for table in ("customers", "leads"):
        assert (included[table].rows_left, included[table].differing) == (1, 1)
        assert (excluded[table].rows_left, excluded[table].differing) == (0, 0)


def test_row_that_is_late_enough_on_one_side_is_still_on_the_other(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "UPDATE public.customers SET last_order_at = NULL")
    customers = compare(since=date(2026, 1, 6))["customers"]
    assert (customers.rows_left, customers.rows_right, customers.extra) == (1, 1, 0)
    assert differing(customers) == {"last_order_at": 1}


def test_samples_are_the_first_of_each_kind_and_column_by_key(schemas: sa.Engine, compare: Compare) -> None:
    for number in range(30):
        insert(schemas, "public", "orders", {**ORDER, "order_id": f"L-{number:02}"})
        insert(schemas, "shadow", "orders", {**ORDER, "order_id": f"R-{number:02}"})
        for schema, raw_id in (("public", 1), ("shadow", 2)):
            insert(schemas, schema, "orders", {**ORDER, "order_id": f"B-{number:02}", "raw_id": raw_id})
    execute(schemas, "UPDATE shadow.orders SET amount = 1 WHERE order_id = 'B-29'")  # 前 30 行都不是它
    orders = compare(samples=3)["orders"]
    assert (orders.missing, orders.extra, orders.differing) == (30, 30, 30)
    assert [key["order_id"] for key in orders.samples.missing] == ["L-00", "L-01", "L-02"]
    assert [key["order_id"] for key in orders.samples.extra] == ["R-00", "R-01", "R-02"]
    shown = [(sample.column, sample.key["order_id"]) for sample in orders.samples.differing]
    assert shown == [("amount", "B-29"), ("raw_id", "B-00"), ("raw_id", "B-01"), ("raw_id", "B-02")]
    without = compare(samples=0)["orders"]
    assert (without.differing, without.samples.missing, without.samples.differing) == (30, (), ())


def test_lead_numbers_are_sampled_in_numeric_order(schemas: sa.Engine, compare: Compare) -> None:
    for number in (10, 9, 100):
        insert(schemas, "public", "leads", lead(lead_id=uuid4(), lead_no=number))
    assert [key["lead_no"] for key in compare()["leads"].samples.missing] == [9, 10, 100]


def test_views_of_other_types_and_collations_can_be_compared(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, 'ALTER TABLE shadow.orders ALTER order_id TYPE text COLLATE "C"')
    execute(schemas, "CREATE SCHEMA legacy")
    execute(schemas, "CREATE TYPE legacy.kind AS ENUM ('SAMPLE', 'PROOF', 'BULK')")
    execute(
        schemas,
        """
        CREATE VIEW legacy.orders AS
        SELECT shop_id, order_id::varchar(50) COLLATE ucs_basic AS order_id, customer_nickname::varchar, latest_status, raw_order_type,
            system_order_type::legacy.kind, amount::double precision, quantity::bigint, ordered_at, order_date, import_id, raw_id::numeric
        FROM public.orders
        """,
    )
    assert compare(left="legacy", tables=["orders"])["orders"].equal
    execute(schemas, "UPDATE public.orders SET amount = 120.51")
    legacy = compare(left="legacy", tables=["orders"], tolerance=Decimal("0.01"))["orders"]
    assert legacy.equal
    assert differing(compare(left="legacy", tables=["orders"])["orders"]) == {"amount": 1}


def test_repeated_keys_are_extra_rows(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "ALTER TABLE shadow.orders DROP CONSTRAINT orders_pkey")
    insert(schemas, "shadow", "orders", {**ORDER, "quantity": 3})
    orders = compare()["orders"]
    assert (orders.rows_left, orders.rows_right, orders.missing, orders.extra, orders.differing) == (1, 2, 0, 1, 0)
    assert list(orders.samples.extra) == [{**order_key(), "occurrence": 2}]
    execute(schemas, "ALTER TABLE public.orders DROP CONSTRAINT orders_pkey")
    execute(schemas, "TRUNCATE public.orders")
    execute(schemas, "INSERT INTO public.orders SELECT * FROM shadow.orders ORDER BY quantity DESC")
    assert compare()["orders"].equal


def test_row_without_a_key_is_never_taken_for_another(schemas: sa.Engine, compare: Compare) -> None:
    for schema in ("public", "shadow"):
        execute(schemas, "UPDATE customers SET customer_key = NULL", schema=schema)
        execute(schemas, "UPDATE business_leads SET lead_no = NULL", schema=schema)
    tables = compare()
    assert tables["customers"].equal  # 有 id 可认
    assert (tables["leads"].missing, tables["leads"].extra) == (1, 1)
    assert list(tables["leads"].samples.missing) == [{"customer_key": str(CUSTOMER), "lead_no": None}]


def test_columns_beyond_the_contract_are_not_compared(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "ALTER TABLE shadow.orders ADD COLUMN remark text DEFAULT 'x'")
    assert compare()["orders"].equal


def test_schema_names_that_need_quoting_are_quoted(schemas: sa.Engine, compare: Compare) -> None:
    name = 'Old "System" 100%(s); -- 旧'
    quoted = '"' + name.replace('"', '""') + '"'
    with schemas.begin() as connection:
        connection.connection.cursor().execute(f"ALTER SCHEMA shadow RENAME TO {quoted}")
    assert all(table.equal for table in compare(right=name).values())


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ("DROP SCHEMA shadow CASCADE", {}, "schema 'shadow' does not exist: "),
        ("DROP TABLE shadow.business_leads", {}, "table shadow.business_leads does not exist: .*--table"),
        ("DROP TABLE shadow.customers", {"tables": ["leads"]}, "table shadow.customers does not exist: "),
        (
            "ALTER TABLE shadow.orders DROP raw_id, DROP import_id",
            {},
            "shadow.orders has no column import_id, raw_id: .*--ignore import_id --ig",
        ),
        (
            "ALTER TABLE public.orders DROP order_date",
            {"ignored": ["order_date"], "since": date(2026, 1, 1)},
            "public.orders has no column or",
        ),
        (
            "ALTER TABLE shadow.customers DROP customer_key",
            {},
            r"shadow.customers has no column customer_key: add it \(a view will do\)$",
        ),
        (
            "ALTER TABLE shadow.orders ALTER ordered_at TYPE timestamp",
            {},
            "shadow.orders.ordered_at is timestamp, not timestamp with time zone: ",
        ),
        (
            "ALTER TABLE shadow.orders ALTER latest_status TYPE int USING 1",
            {},
            "shadow.orders.latest_status is int4, not text: ",
        ),
        ("ALTER TABLE public.orders ALTER amount TYPE text", {}, "public.orders.amount is text, not a number: "),
        (
            "ALTER TABLE shadow.orders ALTER shop_id TYPE text",
            {},
            "shadow.orders.shop_id is text, not uuid: convert it in a view$",
        ),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_sentence(
    schemas: sa.Engine, compare: Compare, change: str, options: dict[str, Any], sentence: str
) -> None:
    execute(schemas, change)
    with pytest.raises(NotComparableError, match=f"^{sentence}") as raised:
        compare(**options)
    assert "\n" not in str(raised.value)


def test_ignored_columns_may_be_missing(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "ALTER TABLE shadow.business_leads DROP owner, DROP notes")
    assert compare(ignored=["owner", "notes"])["leads"].equal


def test_comparison_reads_one_snapshot_and_may_not_write(schemas: sa.Engine, compare: Compare) -> None:
    execute(schemas, "CREATE SCHEMA told")
    execute(
        schemas,
        """
        CREATE VIEW told.orders AS
        SELECT shop_id, order_id, customer_nickname, raw_order_type, system_order_type, amount, quantity, ordered_at, order_date, import_id,
            raw_id,
            current_setting('transaction_read_only') || ', ' || current_setting('transaction_isolation') AS latest_status
        FROM public.orders
        """,
    )
    other = sa.create_engine(schemas.url, poolclass=sa.pool.NullPool)

    def change_after_the_orders(*arguments: Any) -> None:
        if "FULL OUTER JOIN" in arguments[2] and "order_id" in arguments[2]:
            execute(other, "UPDATE shadow.customers SET order_count = 2")

    sa.event.listen(schemas, "after_cursor_execute", change_after_the_orders)
    tables = compare(tables=["orders", "customers"])
    assert tables["customers"].equal
    assert differing(compare()["customers"]) == {"order_count": 1}  # 现在才看到
    read_only = compare(right="told", tables=["orders"])["orders"]
    assert [sample.right for sample in read_only.samples.differing] == ["on, repeatable read"]


def test_connection_is_given_back_able_to_write(schemas: sa.Engine, compare: Compare) -> None:
    compare()
    execute(schemas, "UPDATE shadow.orders SET amount = 1")
    assert differing(compare()["orders"]) == {"amount": 1}


def test_unreachable_server_is_one_sentence(etl_settings: EtlSettings) -> None:
    engine = sa.create_engine("postgresql+psycopg://etl@127.0.0.1:1/etl")
    with pytest.raises(DatabaseUnavailableError):
        compare_schemas(engine, etl_settings, ComparisonRequest(left="public", right="shadow"))


def test_equal_schemas_exit_0(etl_compare: Run) -> None:
    assert etl_compare(exit_code=0).stdout.splitlines()[-1] == "public and shadow are equal"


def test_difference_exits_1_and_is_shown_literally(schemas: sa.Engine, etl_compare: Run, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>[red]:smile:🎁שלום"
    for schema in ("public", "shadow"):
        insert(schemas, schema, "orders", {**ORDER, "order_id": "[/] \x1b[31m", "customer_nickname": name})
    execute(schemas, "UPDATE shadow.orders SET customer_nickname = '' WHERE order_id <> 'A-1'")
    report = tmp_path / "report.html"
    printed = etl_compare("--html", str(report), exit_code=1).stdout
    row = next(line for line in printed.splitlines() if "differs" in line)
    assert [cell.strip() for cell in row.split("│")[3:7]] == [r"'[/] \x1b[31m'", "customer_nickname", name, "''"]
    assert printed.splitlines()[-1] == "public and shadow differ: orders in 1 of 2 rows"
    page = report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]:smile:🎁שלום" in page
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", page)


def test_json_is_one_object_with_counts_and_samples(schemas: sa.Engine, etl_compare: Run) -> None:
    execute(schemas, "UPDATE shadow.orders SET amount = amount + 0.01")
    execute(schemas, "UPDATE shadow.customers SET customer_key = '别人'")
    result = json.loads(
        etl_compare("--json", "--table", "orders", "--table", "customers", "--since", "2026-01-05", exit_code=1).stdout
    )
    assert result["equal"] is False
    assert result["request"] == {
        "left": "public",
        "right": "shadow",
        "tables": ["orders", "customers"],
        "since": "2026-01-05",
        "tolerance": "0",
        "time_tolerance_seconds": "0",
        "ignored": [],
        "samples": 10,
    }
    orders, customers = result["tables"]
    assert {
        name: orders[name] for name in ("table", "equal", "rows_left", "rows_right", "missing", "extra", "differing")
    } == {
        "table": "orders",
        "equal": False,
        "rows_left": 1,
        "rows_right": 1,
        "missing": 0,
        "extra": 0,
        "differing": 1,
    }
    assert {"column": "amount", "differing": 1, "largest_difference": "0.01"} in orders["columns"]
    key = {"shop_id": str(SHOP), "order_id": "A-1"}
    assert orders["samples"]["differing"] == [{"key": key, "column": "amount", "left": "120.50", "right": "120.51"}]
    assert customers["samples"] == {
        "missing": [{"customer_key": KEY}],
        "extra": [{"customer_key": "别人"}],
        "differing": [],
    }


def test_what_cannot_be_compared_exits_2_with_a_sentence(etl_compare: Run) -> None:
    result = etl_compare(right="nowhere", exit_code=2)
    assert (
        result.stderr == "error: schema 'nowhere' does not exist: name a schema of the database of ETL_DATABASE_URL\n"
    )
    assert not result.stdout


def test_report_that_cannot_be_written_exits_2(etl_compare: Run) -> None:
    assert "cannot write /dev/full: No space left on device" in etl_compare("--html", "/dev/full", exit_code=2).stderr
