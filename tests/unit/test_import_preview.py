"""试运行：头几行、各列为什么是那一列、会被拒收的行。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl

from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import trim
from bridge.imports.orders.mapping import MappedColumn, map_columns
from bridge.imports.rejections import count_rejected
from bridge.imports.rules.profile import FileFormat, Profile
from etl_assets.core.settings import EtlSettings


def rows(**changed: list[object]) -> pl.DataFrame:
    height = len(next(iter(changed.values())))
    frame = pl.DataFrame(
        {
            "order_id": ["A"] * height,
            "shop": ["店"] * height,
            "customer_name": ["张三"] * height,
            "quantity": [1] * height,
            "ordered_at": [datetime(2026, 1, 5, 4, tzinfo=UTC)] * height,
        },
        schema_overrides={"ordered_at": pl.Datetime("us", "UTC")},
    )
    return frame.with_columns(pl.Series(name, values, dtype=frame.schema[name]) for name, values in changed.items())


def rejected(frame: pl.DataFrame) -> dict[str, int]:
    return dict(count_rejected(frame, trim(frame, ["order_id", "shop", "customer_name"])))


def test_rows_are_judged_as_the_etl_judges_them() -> None:
    assert rejected(rows(order_id=["A", " "])) == {"missing_order_id": 1}
    assert rejected(rows(shop=["店", "新店", None])) == {"missing_shop": 1}
    assert rejected(rows(quantity=[1, -1])) == {"negative_quantity": 1}
    assert rejected(rows(ordered_at=[datetime(2026, 1, 31, tzinfo=UTC), None])) == {"missing_ordered_at": 1}
    assert rejected(rows(order_id=["A"]).drop("customer_name")) == {"missing_customer_name": 1}


def test_days_without_a_partition_are_counted_in_the_zone_of_the_days() -> None:
    settings = EtlSettings(partitions_start=date(2026, 1, 5), timezone="Asia/Shanghai")
    moments = [datetime(2026, 1, 4, 15, 59, tzinfo=UTC), datetime(2026, 1, 4, 16, tzinfo=UTC)]
    far = datetime(2126, 1, 4, 16, tzinfo=UTC)
    frame = rows(ordered_at=[*moments, None, far])
    texts = trim(frame, ["order_id", "shop", "customer_name"])
    assert count_rejected(frame, texts, settings) == {"outside_partitions": 2, "missing_ordered_at": 1}
    assert count_rejected(frame.head(2).tail(1), texts.head(2).tail(1), settings) == {}
    # 一行只按头一条规则拒收
    nameless = rows(ordered_at=[far], customer_name=[""])
    assert count_rejected(nameless, trim(nameless, ["order_id", "shop", "customer_name"]), settings) == {
        "missing_customer_name": 1
    }


def test_every_column_says_where_it_comes_from_and_why(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("订单编号,Name,实付金额,下单时间,备注\n1,a,2,2026-01-05,x\n", encoding="utf-8")
    source = open_source(path, FileFormat())
    overrides = {"customer_name": "Name", "quantity": "", "order_status": ""}
    mapping = map_columns(source, None, overrides=overrides, shop="旗舰店")
    assert mapping.describe() == [
        MappedColumn("order_id", "订单编号", "known header"),
        MappedColumn("shop", "'旗舰店'", "--shop"),
        MappedColumn("customer_name", "Name", "--map"),
        MappedColumn("order_type", None, "no column for it"),
        MappedColumn("order_status", None, "--map"),
        MappedColumn("amount", "实付金额", "known header"),
        MappedColumn("quantity", None, "--map"),
        MappedColumn("ordered_at", "下单时间", "known header"),
    ]


def test_a_profile_is_a_reason_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("no,who,when,paid\n1,a,2026-01-05,2\n", encoding="utf-8")
    profile = Profile.model_validate(
        {
            "orders": {
                "order_id": {"column": 1},
                "customer_name": {"expression": "UPPER(who)"},
                "ordered_at": {"column": "when"},
                "shop": {"constant": "店"},
            }
        }
    )
    mapping = map_columns(open_source(path, FileFormat()), profile, overrides={"ordered_at": "when"}, shop=None)
    assert [(each.name, each.source, each.because) for each in mapping.describe() if each.source] == [
        ("order_id", "no", "profile"),
        ("shop", "'店'", "profile"),
        ("customer_name", "UPPER(who)", "profile"),
        ("ordered_at", "when", "--map"),
    ]
