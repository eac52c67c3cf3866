"""列的对应：表头的常用名、--map、--shop 与配置；不能用的配置说出是哪个键。"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from bridge.imports.files.cells import Source
from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.rules.errors import ImportFileError, ProfileError
from bridge.imports.rules.profile import TARGETS, FileFormat, load_profile

HEADER = "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at"
ORDERS = """
[orders]
order_id = { column = "id" }
customer_name = { column = "who" }
ordered_at = { column = "when" }
"""


def open_text(folder: Path, text: str, file: FileFormat | None = None) -> Source:
    path = folder / "orders.csv"
    path.write_text(text, encoding="utf-8")
    return open_source(path, file or FileFormat())


def columns_read(source: Source, **overrides: str) -> dict[str, list[str]]:
    mapped = map_columns(source, None, overrides=overrides, shop=None)
    return {name: expression.meta.root_names() for name, expression in mapped.sources.items()}


def write_profile(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def build(source: Source, profile_path: Path, *, shop: str | None = None, **overrides: str) -> pl.DataFrame:
    mapped = map_columns(source, load_profile(profile_path), overrides=overrides, shop=shop)
    return pl.concat([OrderBuilder(source, mapped, "Asia/Shanghai").build(block).orders for block in source.blocks])


def test_headers_named_like_the_table_need_no_mapping(tmp_path: Path) -> None:
    source = open_text(tmp_path, HEADER.upper() + "\n")
    assert columns_read(source) == {name: [name.upper()] for name in TARGETS}


def test_headers_of_the_platforms_are_known(tmp_path: Path) -> None:
    source = open_text(
        tmp_path,
        "备注,付款时间,订单创建时间,订单编号,店铺名称,买家会员名,订单状态,总金额,买家实际支付金额,宝贝总数量\n",
    )
    assert columns_read(source) == {
        "order_id": ["订单编号"],
        "shop": ["店铺名称"],
        "customer_name": ["买家会员名"],
        "order_status": ["订单状态"],
        "amount": ["买家实际支付金额"],
        "quantity": ["宝贝总数量"],
        "ordered_at": ["订单创建时间"],
    }


def test_map_overrides_headers_and_may_decline_a_column(tmp_path: Path) -> None:
    source = open_text(tmp_path, HEADER + ",Net\n")
    mapped = columns_read(source, amount="net", quantity="")
    assert mapped["amount"] == ["Net"]
    assert "quantity" not in mapped


def test_shop_is_constant_when_given(tmp_path: Path) -> None:
    source = open_text(tmp_path, HEADER + "\n1,店,张,,,,,\n")
    mapped = map_columns(source, None, overrides={}, shop="'; DROP TABLE raw_orders; --")
    orders = OrderBuilder(source, mapped, "UTC").build(next(source.blocks)).orders
    assert orders["shop"].to_list() == ["'; DROP TABLE raw_orders; --"]


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "order_type"])
def test_a_missing_column_is_named_with_the_closest_and_the_present_ones(tmp_path: Path, name: str) -> None:
    source = open_text(tmp_path, HEADER.replace(name, f"{name}x") + "\n")
    with pytest.raises(ImportFileError) as caught:
        columns_read(source)
    message = str(caught.value)
    assert message.startswith(
        f"orders.csv: there is no column for {name}, the closest is '{name}x'; the file has 'order_id"
    )
    assert f"name it with --map {name}={name}x (--map NAME= if the file has none)" in message


def test_all_missing_columns_are_one_message_with_a_proposal_for_each() -> None:
    source = open_source(Path(__file__).parents[1] / "exports" / "shopify_orders_export.csv", FileFormat())
    with pytest.raises(ImportFileError) as caught:
        columns_read(source)
    message = str(caught.value)
    assert message.startswith(
        "shopify_orders_export.csv: there are no columns for order_id (the closest is 'Id'), for shop, "
        "for customer_name (the closest is 'Email'), "
        "for order_status (the closest is 'Financial Status'), for amount (the closest is 'Total'), "
        "for quantity (the closest is 'Lineitem quantity'), for ordered_at (the closest is 'Created at'); the file has 'Name', 'Email'"
    )
    assert message.endswith(
        "name them with --map order_id=Id --map shop=COLUMN --map customer_name=Email --map 'order_status=Financial Status' "
        "--map amount=Total --map 'quantity=Lineitem quantity' --map 'ordered_at=Created at' (--map NAME= if the file has none), "
        "or give --shop NAME"
    )


def test_the_columns_that_a_profile_names_and_the_file_lacks_are_one_message(tmp_path: Path) -> None:
    source = open_text(tmp_path, "id,whom,at\n1,张,2024-01-05\n")
    wrong = write_profile(tmp_path, ORDERS + 'amount = { expression = "prize * 2" }\nshop = { constant = "s" }\n')
    with pytest.raises(
        ImportFileError, match=r"there are no columns 'who' \(the closest is 'whom'\), 'when', 'prize'; the file has"
    ):
        build(source, wrong)


def test_map_names_are_checked_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="raw_orders has no column 'amout'"):
        columns_read(open_text(tmp_path, HEADER + "\n"), amout="amount")
    with pytest.raises(ImportFileError, match="there is no column 'amuont', the closest is 'amount'"):
        columns_read(open_text(tmp_path, HEADER + "\n"), amount="amuont")
    with pytest.raises(ImportFileError, match=r"there is no column '\*'"):
        columns_read(open_text(tmp_path, HEADER + "\n"), amount="*")
    with pytest.raises(ImportFileError, match="has the column 'amount' more than once"):
        columns_read(open_text(tmp_path, HEADER + ",amount\n"))


def test_a_profile_says_column_constant_expression_and_extra(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path,
        """
        keep_extra = true
        [file]
        separator = ";"
        header = false
        columns = ["id", "who", "when", "price", "count", "the note"]
        numbers = ["price", "count"]
        [orders]
        order_id = { expression = "id || '-' || row_number" }
        shop = { constant = "总店" }
        customer_name = { column = 2 }
        order_status = { expression = "CASE WHEN count < 0 THEN 'refunded' ELSE 'completed' END" }
        amount = { expression = "price * count * 0.05", round = true }
        ordered_at = { column = "when", format = "%d.%m.%Y" }
        """,
    )
    source = open_text(
        tmp_path, 'A;张;05.01.2024;1,234.50;1;x"y\nB;李;06.01.2024;0.1;-1;\n', load_profile(profile).file
    )
    assert build(source, profile).drop("ordered_at").rows() == [
        (1, "A-1", "总店", "张", "completed", pl.Series(["61.73"]).cast(pl.Decimal(14, 2))[0], '{"the note":"x\\"y"}'),
        (2, "B-2", "总店", "李", "refunded", pl.Series(["-0.01"]).cast(pl.Decimal(14, 2))[0], '{"the note":null}'),
    ]


def test_map_and_shop_override_a_profile_but_keep_its_format(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path, ORDERS.replace('{ column = "when" }', '{ expression = "when", format = "%Y%m%d" }')
    )
    source = open_text(tmp_path, "id,who,when,paid\n1,张,x,20240105\n")
    orders = build(source, profile, shop="店", ordered_at="paid")
    assert orders.select("shop", pl.col("ordered_at").dt.to_string("%Y-%m-%dT%H")).rows() == [("店", "2024-01-04T16")]


def test_a_profile_without_shop_needs_one(tmp_path: Path) -> None:
    source = open_text(tmp_path, "id,who,when\n1,张,2024-01-05\n")
    with pytest.raises(
        ImportFileError, match="the profile mine does not say which shop it is; nothing was imported: give --shop NAME"
    ):
        build(source, write_profile(tmp_path, ORDERS))


def test_a_column_may_have_several_names_and_values_may_be_translated(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path,
        """
        [file]
        optional = ["店名", "退"]
        [orders]
        order_id = { column = ["单号", "ID"] }
        shop = { column = "店名" }
        customer_name = { column = ["买家（昵称）", "谁"] }
        order_status = { expression = "COALESCE(退, 状态)", values = { "Done" = "completed" } }
        ordered_at = { column = "when", format = ["%d.%m.%Y", "%b-%d-%y"] }
        """,
    )
    source = open_text(
        tmp_path, "id,买家(昵称),状态,when\n1,张, DONE ,05.01.2024\n2,李,open,Jan-06-24\n", load_profile(profile).file
    )
    orders = build(source, profile, shop="店")
    assert orders.select("order_id", "shop", "customer_name", "order_status").rows() == [
        ("1", "店", "张", "completed"),
        ("2", "店", "李", "open"),
    ]
    assert orders["ordered_at"].dt.convert_time_zone("Asia/Shanghai").dt.day().to_list() == [5, 6]
    with pytest.raises(ImportFileError, match="does not say which shop it is"):
        build(source, profile)


def test_a_wrong_date_names_the_format_of_the_profile(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path, ORDERS.replace('column = "when"', 'column = "when", format = "%Y%m%d"') + 'shop = { constant = "s" }'
    )
    mapped = map_columns(
        open_text(tmp_path, "id,who,when\n1,张,2024-01-05\n"), load_profile(profile), overrides={}, shop=None
    )
    source = open_text(tmp_path, "id,who,when\n1,张,2024-01-05\n")
    problems = OrderBuilder(source, mapped, "Asia/Shanghai").build(next(source.blocks)).problems
    said = (
        "is not a possible date and time written as %Y%m%d, the format of ordered_at in the profile, in Asia/Shanghai"
    )
    assert problems.rows() == [(2, "when", said, "2024-01-05")]


def test_cells_that_stand_on_the_first_line_only_are_filled_down(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path,
        """
        [file]
        fill_down = ["单号", "谁", "付"]
        footers = ["共 "]
        [group]
        by = ["单号"]
        leave_out = "退 = '是'"
        [orders]
        order_id = { column = "单号" }
        shop = { constant = "s" }
        customer_name = { column = "谁" }
        amount = { column = "付" }
        quantity = { column = "件", aggregate = "sum" }
        ordered_at = { column = "时" }
        """,
    )
    rows = "A,张,9.50,1,,2024-01-05\n,,,2,是,2024-01-05\n,,,4,,2024-01-05\nB,李,3.00,5,是,2024-01-06\n,共 2 单,,,,\n"
    source = open_text(tmp_path, "单号,谁,付,件,退,时\n" + rows, load_profile(profile).file)
    orders = build(source, profile)
    # B 整单都退了，照旧算；A 的第二行不计
    assert [
        (row["order_id"], row["customer_name"], str(row["amount"]), row["quantity"]) for row in orders.to_dicts()
    ] == [
        ("A", "张", "9.50", 5),
        ("B", "李", "3.00", 5),
    ]
    assert source.shape.total_rows == 1


def test_columns_of_a_profile_must_exist(tmp_path: Path) -> None:
    source = open_text(tmp_path, "id,who,when\n")
    wrong = ORDERS + 'amount = { expression = "prize * 2" }\nshop = { constant = "s" }\n'
    with pytest.raises(ImportFileError, match="there is no column 'prize'"):
        build(source, write_profile(tmp_path, wrong))
    with pytest.raises(ImportFileError, match="the file has 3 columns, amount should be column 4"):
        build(source, write_profile(tmp_path, wrong.replace('expression = "prize * 2"', "column = 4")))
    with pytest.raises(ImportFileError, match="there is no column 'prize'"):
        build(source, write_profile(tmp_path, '[file]\nnumbers = ["prize"]\n' + ORDERS + 'shop = { constant = "s" }\n'))
    with pytest.raises(ImportFileError, match="the first row has 3 columns, the profile names 2: a, b"):
        open_text(tmp_path, "1,2,3\n", FileFormat(header=False, columns=("a", "b")))


def test_an_expression_that_cannot_be_computed_is_named(tmp_path: Path) -> None:
    source = open_text(tmp_path, "id,who,when\n1,张,2024-01-05\n")
    wrong = ORDERS + 'shop = { constant = "s" }\namount = { expression = "CAST(who AS INTEGER)" }\n'
    with pytest.raises(
        ImportFileError, match=r"orders\.csv: amount cannot be computed .*correct its expression in the profile"
    ):
        build(source, write_profile(tmp_path, wrong))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[orders", r"the profile .*mine\.toml cannot be read"),
        ("", r"mine\.toml is not usable: orders: Field required"),
        (ORDERS + 'amout = { column = "x" }', r"unknown key orders\.amout \(known: order_id, shop, .*ordered_at\)"),
        (ORDERS + 'amount = { colum = "x" }', r"unknown key orders\.amount\.colum \(known: .*column, .*round\)"),
        ("[file]\nencodin = 'x'\n" + ORDERS, r"unknown key file\.encodin \(known: format, encoding"),
        ("skip = 1\n" + ORDERS, r"unknown key skip \(known: platform, file, group, keep_extra, orders\)"),
        (ORDERS + 'amount = { column = "x", constant = "y" }', r"orders\.amount: give exactly one of column, constant"),
        (ORDERS + "amount = {}", r"orders\.amount: give exactly one of"),
        (ORDERS + 'amount = { expression = "x +" }', r"orders\.amount\.expression: is not a usable SQL expression"),
        (ORDERS + 'amount = { expression = "x - MAX(x)" }', r"orders\.amount\.expression: must use one line at a time"),
        (
            ORDERS + 'amount = { expression = "SUM(x) OVER ()" }',
            r"orders\.amount\.expression: must use one line at a time",
        ),
        (
            ORDERS + 'amount = { column = "x", aggregate = "sum" }',
            r"orders\.amount aggregates, but there is no \[group\]",
        ),
        (
            ORDERS.replace('column = "when"', 'column = "when", time_zone = "Mars"'),
            r"orders\.ordered_at\.time_zone: must be an IANA",
        ),
        ('[orders]\norder_id = { column = "id" }', r"\[orders\] lacks customer_name, ordered_at"),
        ("[file]\nencoding = 'base64'\n" + ORDERS, r"file\.encoding: must be a text encoding"),
        ("[file]\nheader = false\nheader_row = 3\n" + ORDERS, r"file: header_row names the row of the header, but"),
        ("[file]\nencoding = 'klingon'\n" + ORDERS, r"file\.encoding: must be a text encoding"),
        ("[file]\nseparator = '\"'\n" + ORDERS, r"file\.separator: must not be a quote"),
        ("[file]\nheader = 'yes'\n" + ORDERS, r"file\.header: Input should be a valid boolean"),
        ("[file]\ncolumns = ['a']\n" + ORDERS, r"file: columns names the columns of a file without a header"),
        ("[group]\nby = []\n" + ORDERS, r"group\.by"),
        ("[group]\nby = ['id']\nleave_out = 'SUM(x) > 1'\n" + ORDERS, r"group\.leave_out: must use one line at a time"),
        ("[platform]\nname = 'x'\nsource = 'y'\nheaders = ['a']\n" + ORDERS, r"platform\.headers"),
        ("keep_extra = true\n[group]\nby = ['id']\n" + ORDERS, r"keep_extra cannot be used with \[group\]"),
    ],
)
def test_an_unusable_profile_names_the_key(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ProfileError, match=problem):
        load_profile(write_profile(tmp_path, text))


def test_profiles_are_found_by_path_or_by_shipped_name(tmp_path: Path) -> None:
    assert load_profile("cdnow").file.format == "whitespace"
    assert load_profile(write_profile(tmp_path, ORDERS)).group is None
    with pytest.raises(ProfileError, match=r"there is no profile 'nothing'.* cdnow, .*, online_retail"):
        load_profile("nothing")


def test_headers_that_differ_in_case_alone_are_not_chosen_from(tmp_path: Path) -> None:
    source = open_text(tmp_path, HEADER + ",Amount\n1,店,张,,,5,1,2026-01-05,6\n")
    with pytest.raises(ImportFileError, match="the header has 'amount' and 'Amount', either could be amount"):
        columns_read(source)
