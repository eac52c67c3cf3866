"""随包的平台配置：各平台样子的文件由表头认出，订单读得一分不差。"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.imports.choosing import choose_profile, fits, open_file
from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.reading import Reading
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import FileFormat, shipped_platforms

from .platform_exports import CHINA, SHAPES, Expected, Line, Order, Shape, write_workbook

EXPORTS = Path(__file__).parents[1] / "exports"
# 平时每种 15 个例子；--hypothesis-profile=deep 时 200 个
EXAMPLES = max(15, settings().max_examples // 10)
COLUMNS = ("order_id", "customer_name", "order_status", "amount", "quantity", "ordered_at")
TITLES = [
    "手工皮具",
    'Patch "no. 1", round',
    '"限定" ﾏｸﾞｶｯﾌﾟ',
    "a, b; c",
    '12" Schallplatte',
    "多行\n标题",
    "'quoted'",
    "é",
]
CUSTOMERS = [
    "王小明",
    "Ida Brandt",
    "O'Neil, Pat",
    '"Bo" Lee',
    "佐藤 花子",
    "tb_77120",
    "周*",
    "ida@example.org",
    "a;b\\c",
]


def read(path: Path, shop: str = "店") -> tuple[str | None, list[Expected]]:
    """认出的配置，与读出的订单。"""
    opened = open_file(path, FileFormat(), None, choose=True)
    if opened.profile is None:
        return None, []
    builder = OrderBuilder(opened.source, map_columns(opened.source, opened.profile, overrides={}, shop=shop), CHINA)
    with BadRows(path, write=False) as bad_rows:
        orders = pl.concat(
            list(Reading(builder, bad_rows, skip_bad_rows=False, on_orders=lambda _: None, on_progress=None).orders())
        )
    absent = [pl.lit(None).alias(name) for name in COLUMNS if name not in orders.columns]
    return opened.profile.name, orders.with_columns(absent).select(COLUMNS).rows()


@st.composite
def some_orders(draw: st.DrawFn, shape: Shape) -> list[Order]:
    cents = st.integers(1, 9_999_999).map(lambda value: Decimal(value) / 100)
    lines = st.builds(
        Line,
        st.sampled_from(TITLES),
        cents,
        st.integers(1, 99),
        st.booleans() if shape.closed_state else st.just(value=True),
    )
    # 夏令时的钟点在别的测试里；这里的时刻各处都只有一次
    moments = st.datetimes(datetime(2021, 4, 10), datetime(2026, 10, 1))  # noqa: DTZ001  # 当地时刻
    numbers = draw(st.lists(st.integers(1_001, 999_999), min_size=1, max_size=12, unique=True))
    found: list[Order] = []
    # 长号码都以 0 结尾的文件是表格软件舍入过的，要拒绝
    for number in (number * 10 + 7 for number in numbers):
        moment = draw(moments).replace(microsecond=0)
        if shape.precise != "second":
            moment = moment.replace(second=0)
        if shape.precise == "day":
            moment = moment.replace(hour=0, minute=0)
        state = draw(st.integers(0, len(shape.states) - 1))
        items = draw(st.lists(lines, min_size=1, max_size=4))
        found.append(Order(number, draw(st.sampled_from(CUSTOMERS)), state, moment, items, draw(cents)))
    return found


@pytest.mark.parametrize("name", SHAPES)
@settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture], report_multiple_bugs=False
)
@given(data=st.data())
def test_random_orders_in_the_shape_of_a_platform_come_back_exactly(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    shape = SHAPES[name]
    orders = data.draw(some_orders(shape))
    path = tmp_path / "export.csv"
    path.write_bytes(shape.write(orders, data.draw(st.integers(0, 1_000))))
    profile, found = read(path)
    assert profile == shape.profile
    assert sorted(found) == sorted(map(shape.expected, orders))


@pytest.mark.parametrize("name", ["alibaba_1688", "xiaohongshu", "shopee", "youzan"])
def test_a_workbook_of_a_platform_is_read_like_its_text(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    lines = [Line("皮具", Decimal("12.50"), 2), Line("布贴", Decimal("0.30"), 1)]
    at = datetime(2026, 7, 1, 9, 5)  # noqa: DTZ001
    orders = [
        Order(10_001, "王小明", 0, at, lines),
        Order(10_002, "李", 2, at, lines[:1]),
        Order(10_003, "王小明", 1, at, lines),
    ]
    # 1688 把一单的各列在几行上合并
    columns = (
        [shape.header.index(column) for column in ("订单编号", "实付款(元)", "订单状态")]
        if name == "alibaba_1688"
        else []
    )
    merges = [f"{letter}{first}:{letter}{first + 1}" for letter in map(_letter, columns) for first in (2, 5)]
    profile, found = read(write_workbook(tmp_path / "export.xlsx", shape.table(orders), merges))
    assert profile == shape.profile
    assert found == list(map(shape.expected, orders))


def test_a_file_that_two_readings_of_quotes_fit_is_read_as_its_profile_says(tmp_path: Path) -> None:
    at, shape = datetime(2026, 7, 1, 9, 5), SHAPES["amazon_us"]  # noqa: DTZ001
    orders = [
        Order(number, "x", 0, at, [Line(title, Decimal("12.50"), 1)])
        for number, title in ((1, '"Mug'), (2, 'round"'), (3, "Cup"), (4, "Cup"))
    ]
    path = tmp_path / "export.txt"
    path.write_bytes(shape.write(orders))
    with pytest.raises(ImportFileError, match="with quotes around fields the file has 4 records, without 5"):
        open_source(path, FileFormat())
    assert read(path) == (shape.profile, list(map(shape.expected, orders)))


def test_two_profiles_that_fit_equally_are_named(tmp_path: Path) -> None:
    header = {*SHAPES["taobao"].header, *SHAPES["jd"].header}
    path = tmp_path / "both.csv"
    path.write_text(",".join(sorted(header)) + "\n", encoding="utf-8")
    with pytest.raises(
        ImportFileError,
        match="the headers fit the profiles jd and taobao; nothing was imported: say which with --profile",
    ):
        choose_profile(open_source(path, FileFormat()))


def _letter(position: int) -> str:
    assert position < 26
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[position]


def test_each_shape_fits_one_profile_only(tmp_path: Path) -> None:
    order = Order(10_001, "王", 0, datetime(2026, 7, 1), [Line("a", Decimal(1), 1)])  # noqa: DTZ001
    fitting: dict[str, list[str]] = {}
    for name, shape in SHAPES.items():
        path = tmp_path / f"{name}.csv"
        path.write_bytes(shape.write([order]))
        source = open_source(path, FileFormat())
        fitting[name] = [profile for profile, platform in shipped_platforms().items() if fits(source, platform)]
        chosen = choose_profile(source)
        assert chosen is not None
        assert chosen.name == shape.profile
    assert fitting == {name: [shape.profile] for name, shape in SHAPES.items()}
    assert {shape.profile for shape in SHAPES.values()} == set(shipped_platforms())
