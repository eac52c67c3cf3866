"""整批读写：古怪的值原样来回，没变的行一个字节也不写。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from sqlalchemy.dialects.postgresql import JSONB

from etl_assets.core.database_sync import MAX_IDLE_STAGED_BYTES
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TIMESTAMP, trimmed
from etl_assets.core.text import WHITE_SPACE
from etl_assets.services import copy_out, few_rows, raw_rows, vectorized_queries
from etl_assets.services.vectorized_queries import (
    Upsert,
    WriteCounts,
    copy_into,
    read_batches,
    read_frame,
    reading_ahead,
    release_staging,
    stage_frame,
    upsert_frame,
)
from etl_assets.testing.raw_data import RawData

# 每一段都曾让某个 CSV 读写器出过错
NASTY_TEXTS: list[str | None] = [
    None,
    "",
    " ",
    "NULL",
    "null",
    "\\N",
    "\\.",
    '"',
    '""',
    'a"b',
    "'",
    "Robert'); DROP TABLE nasty;--",
    "a,b",
    "a;b\tc",
    "\n",
    "\r",
    "a\r\nb",
    "\\n",
    "back\\slash\\",
    "100 % %s %(x)s %% :y",
    "{row}",
    "\ufeffmark",
    "#comment",
    "1.50",
    "true",
    "2026-01-05",
    "张三　李四",
    "e\u0301",
    "\U0001f469\u200d\U0001f4bb",
    "\x01\x1f\x7f",
    "x" * 100_000,
]

nasty = sa.Table(
    "nasty",
    sa.MetaData(),
    sa.Column("text", sa.Text),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("big", sa.BigInteger),
    sa.Column("small", sa.SmallInteger),
    sa.Column("amount", sa.Numeric(14, 2)),
    sa.Column("precise", sa.Numeric(38, 20)),
    sa.Column("ratio", sa.Float),
    sa.Column("flag", sa.Boolean),
    sa.Column("day", sa.Date),
    sa.Column("at", TIMESTAMP),
    sa.Column("local", sa.DateTime()),
    sa.Column("uuid", sa.Uuid),
    sa.Column("document", JSONB(none_as_null=True)),
)
SCHEMA: dict[str, pl.DataType] = {
    "text": pl.String(),
    "id": pl.Int32(),
    "big": pl.Int64(),
    "small": pl.Int16(),
    "amount": pl.Decimal(14, 2),
    "precise": pl.Decimal(38, 20),
    "ratio": pl.Float64(),
    "flag": pl.Boolean(),
    "day": pl.Date(),
    "at": pl.Datetime("us", "UTC"),
    "local": pl.Datetime("us"),
    "uuid": pl.String(),
    "document": pl.String(),
}
VALUES: dict[str, list[Any]] = {
    "big": [2**63 - 1, -(2**63), 0, None],
    "small": [32767, -32768, None],
    "amount": [Decimal("999999999999.99"), Decimal("-999999999999.99"), Decimal("0.00"), Decimal("-0.05"), None],
    "precise": [Decimal("123456789012345678.00000000000000000001"), Decimal("0E-20"), None],
    "ratio": [0.1, -1.5e-300, float("inf"), None],
    "flag": [True, False, None],
    "day": [date(1, 1, 1), date(9999, 12, 31), date(2024, 2, 29), None],
    "at": [
        datetime(2, 1, 1, tzinfo=UTC),
        datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2026, 1, 5, 4, tzinfo=UTC),
        None,
    ],
    "local": [datetime(1999, 12, 31, 23, 59, 59, 1), None],  # noqa: DTZ001  # 正是没有时区的列
    "uuid": ["fa55f60f-e32c-5a53-a54e-925cf73a97da", None],
    "document": ['{"a": "\\"x\\",\\n"}', "null", "[]", None],
}


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    """一个开着的事务，里面有一张空的 nasty 表；测试完就回滚。"""
    with engine.connect() as connection, connection.begin() as transaction:
        nasty.create(connection)
        yield connection
        transaction.rollback()


def nasty_frame() -> pl.DataFrame:
    """每种古怪的文字一行，其余各列轮着取古怪的值。"""
    rows = [
        {"id": number, "text": text} | {name: values[number % len(values)] for name, values in VALUES.items()}
        for number, text in enumerate(NASTY_TEXTS)
    ]
    return pl.DataFrame(rows, schema=SCHEMA)


def texts(*values: str | None, start: int = 0) -> pl.DataFrame:
    return pl.DataFrame(
        {"id": range(start, start + len(values)), "text": values}, schema={"id": pl.Int32, "text": pl.String}
    )


def in_order(connection: sa.Connection) -> pl.DataFrame:
    return read_frame(connection, sa.select(nasty).order_by(nasty.c.id))


def row_versions(connection: sa.Connection) -> list[tuple[Any, ...]]:
    """每一行的物理版本：只要写过，ctid 就变，即使值相同。"""
    statement = sa.select(nasty.c.id, sa.literal_column("ctid::text"), sa.literal_column("xmax::text"))
    return [tuple(row) for row in connection.execute(statement.order_by(nasty.c.id))]


def by_number(connection: sa.Connection) -> dict[int, str | None]:
    return {number: text for number, text in connection.execute(sa.select(nasty.c.id, nasty.c.text))}  # noqa: C416  # Row 不是 tuple[K, V]


# ---- 修剪 ------------------------------------------------------------------------


def test_trimming_is_the_same_in_sql_in_polars_and_in_python(connection: sa.Connection) -> None:
    kept = "\x1c\x1d\x1e\x1f\u180e\u200b\u200c\u200d\u2060\ufeff"  # 看着像空白而不是 White_Space 的
    samples = [f"{character}a {character} b{character}" for character in (*WHITE_SPACE, *kept, WHITE_SPACE)]
    samples += ["", WHITE_SPACE, kept, "a", f"{WHITE_SPACE}'\\u0020E"]
    copy_into(connection, texts(*samples), nasty)
    in_sql = [
        trimmed_text for (trimmed_text,) in connection.execute(sa.select(trimmed(nasty.c.text)).order_by(nasty.c.id))
    ]
    in_polars = pl.Series(samples).str.strip_chars().to_list()
    in_python = [sample.strip(WHITE_SPACE) for sample in samples]
    assert in_sql == in_polars == in_python
    assert in_python[: len(WHITE_SPACE)] == [f"a {character} b" for character in WHITE_SPACE]
    assert in_python[len(WHITE_SPACE) : -6] == samples[len(WHITE_SPACE) : -6]


# ---- 读与写 ----------------------------------------------------------------------


@pytest.fixture(params=["few rows", "polars"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """两种读写器都要一样：行数只决定哪一种快。"""
    most = 1 << 30 if request.param == "few rows" else -1
    monkeypatch.setattr(few_rows, "FEW_BYTES", most)
    monkeypatch.setattr(few_rows, "FEW_CELLS", most)


@pytest.mark.usefixtures("codec")
def test_every_value_comes_back_as_it_was_written(connection: sa.Connection) -> None:
    frame = nasty_frame()
    copy_into(connection, frame, nasty)
    assert_frame_equal(in_order(connection), frame.sort("id"))


@pytest.mark.usefixtures("codec")
def test_what_was_written_is_what_the_driver_reads(connection: sa.Connection) -> None:
    """写与读若错得对称，来回比较就看不出来：让 psycopg 读一遍。"""
    frame = nasty_frame().drop("document")
    copy_into(connection, frame, nasty)
    read = [
        tuple(row)
        for row in connection.execute(sa.select(*[nasty.c[name] for name in frame.columns]).order_by(nasty.c.id))
    ]
    plain = [tuple(str(value) if isinstance(value, UUID) else value for value in row) for row in read]
    assert plain == frame.rows()


def test_long_results_are_read_and_written_in_pieces(
    connection: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = nasty_frame()
    monkeypatch.setattr(vectorized_queries, "_WRITE_CHUNK_ROWS", 3)
    copy_into(connection, frame, nasty)
    monkeypatch.setattr(copy_out, "_READ_CHUNK_BYTES", 200)
    batches = list(read_batches(connection, sa.select(nasty).order_by(nasty.c.id)))
    assert len(batches) > 5
    assert_frame_equal(pl.concat(batches), frame)


def test_result_that_is_read_ahead_arrives_whole(connection: sa.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = nasty_frame()
    copy_into(connection, frame, nasty)
    monkeypatch.setattr(copy_out, "_READ_CHUNK_BYTES", 200)
    with reading_ahead(connection, sa.select(nasty).order_by(nasty.c.id)) as batches:
        read = list(batches)
    assert len(read) > 5
    assert_frame_equal(pl.concat(read), frame)


def test_reading_ahead_that_is_given_up_is_cancelled(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_out, "_READ_CHUNK_BYTES", 200)
    endless = sa.select(sa.func.generate_series(1, 10**9, type_=sa.Integer).label("number"))

    def give_up(batches: Iterator[pl.DataFrame]) -> None:
        next(batches)
        raise ZeroDivisionError

    with engine.connect() as connection:
        transaction = connection.begin()
        with pytest.raises(ZeroDivisionError), reading_ahead(connection, endless) as batches:
            give_up(batches)
        transaction.rollback()
        assert connection.scalar(sa.select(sa.literal(1))) == 1


def test_error_while_reading_ahead_reaches_the_reader(
    connection: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_out, "_READ_CHUNK_BYTES", 200)
    number = sa.func.generate_series(1, 1_000, type_=sa.Integer).column_valued("number")
    failing = sa.select(sa.cast(1 / (500 - number), sa.Integer).label("quotient"))
    with pytest.raises(psycopg.errors.DivisionByZero), reading_ahead(connection, failing) as batches:
        list(batches)


@pytest.mark.usefixtures("codec")
def test_empty_result_keeps_its_columns_and_types(connection: sa.Connection) -> None:
    assert_frame_equal(in_order(connection), pl.DataFrame(schema=SCHEMA))


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("values", [["\ufeffa", "b"], [None], ["", None], ["\n"]], ids=repr)
def test_single_text_column_is_read_as_it_is(connection: sa.Connection, values: list[str | None]) -> None:
    """一列时 NULL 是一个空行，BOM 在最前面：都是 read_csv 会改掉的东西。"""
    copy_into(connection, texts(*values), nasty)
    assert read_frame(connection, sa.select(nasty.c.text).order_by(nasty.c.id))["text"].to_list() == values


def test_bound_values_and_percent_signs_reach_the_server_unchanged(connection: sa.Connection) -> None:
    copy_into(connection, texts("50%", "%s'"), nasty)
    with_value = sa.select(nasty.c.id).where(nasty.c.text == "%s'")
    without_value = sa.select(nasty.c.id).where(sa.literal_column("nasty.text = '50%'"))
    assert read_frame(connection, with_value)["id"].to_list() == [1]
    assert read_frame(connection, without_value)["id"].to_list() == [0]


def test_numeric_without_a_scale_is_refused_before_it_is_read(connection: sa.Connection) -> None:
    with pytest.raises(TypeError, match="numeric without precision and scale"):
        read_frame(connection, sa.select(sa.func.sum(nasty.c.amount, type_=sa.Numeric())))


@pytest.mark.usefixtures("codec")
def test_nul_character_is_refused_by_the_server(connection: sa.Connection) -> None:
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        copy_into(connection, texts("a\x00b"), nasty)


@pytest.mark.usefixtures("codec")
def test_nan_amounts_and_impossible_times_are_read_as_marks(
    etl_settings: EtlSettings, engine: sa.Engine, raw_data: RawData
) -> None:
    """Polars 装不下它们：scope 换成 NULL 加标记，别的行照样读得出来。"""
    times = ["infinity", "-infinity", "4713-01-01 00:00:00+00 BC", "10000-01-01 00:00:00+00", "0001-01-01 00:00:00+00"]
    raw_data.add_import([{}, {"amount": "NaN"}, *[{"ordered_at": time} for time in times]])
    rows = raw_rows.scope(etl_settings)
    columns = [rows.c[name] for name in ("amount", "amount_rule", "ordered_at", "day", "time_rule")]
    with engine.connect() as connection:
        frame = read_frame(connection, sa.select(*columns).order_by(rows.c.raw_id))
    moment = datetime(2026, 1, 5, 4, tzinfo=UTC)
    amount = Decimal("120.50")
    assert frame.rows() == [
        (amount, None, moment, date(2026, 1, 5), None),
        (None, "bad_amount", moment, date(2026, 1, 5), None),
        *[(amount, None, None, None, "bad_ordered_at")] * 4,
        (amount, None, None, date(1, 1, 1), "outside_partitions"),
    ]


# ---- upsert ----------------------------------------------------------------------


def test_upsert_writes_new_and_changed_rows_and_leaves_the_others_alone(connection: sa.Connection) -> None:
    how = Upsert(key=("id",))
    assert upsert_frame(connection, texts("a", "b", None), nasty, how) == WriteCounts(rows=3, inserted=3)
    before = row_versions(connection)
    counts = upsert_frame(connection, texts("a", "B", "", "d"), nasty, how)
    assert counts == WriteCounts(rows=4, inserted=1, updated=2)
    assert by_number(connection) == {0: "a", 1: "B", 2: "", 3: "d"}
    after = row_versions(connection)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_upsert_of_unchanged_nasty_values_touches_no_row(connection: sa.Connection) -> None:
    how = Upsert(key=("id",))
    upsert_frame(connection, nasty_frame(), nasty, how)
    before = row_versions(connection)
    assert upsert_frame(connection, nasty_frame(), nasty, how) == WriteCounts(rows=len(NASTY_TEXTS))
    assert row_versions(connection) == before


def test_upsert_of_nothing_is_nothing(connection: sa.Connection) -> None:
    assert upsert_frame(connection, texts(), nasty, Upsert(key=("id",))) == WriteCounts()


def test_insert_only_columns_keep_their_first_value(connection: sa.Connection) -> None:
    how = Upsert(key=("id",), insert_only=("text",))
    frame = texts("first").with_columns(big=pl.lit(1))
    upsert_frame(connection, frame, nasty, how)
    assert upsert_frame(connection, frame.with_columns(text=pl.lit("second")), nasty, how) == WriteCounts(rows=1)
    assert upsert_frame(connection, frame.with_columns(text=pl.lit("second"), big=pl.lit(2)), nasty, how).updated == 1
    assert connection.execute(sa.select(nasty.c.text, nasty.c.big)).one() == ("first", 2)


def test_protected_columns_keep_their_value_while_the_condition_holds(connection: sa.Connection) -> None:
    how = Upsert(key=("id",), protected={"text": "({row}.flag IS TRUE)"})
    connection.execute(
        sa.insert(nasty), [{"id": 0, "text": "hers", "flag": True}, {"id": 1, "text": "old", "flag": False}]
    )
    assert upsert_frame(connection, texts("new", "new"), nasty, how) == WriteCounts(rows=2, updated=1)
    assert by_number(connection) == {0: "hers", 1: "new"}


def test_touched_column_shows_when_a_row_changed(connection: sa.Connection) -> None:
    how = Upsert(key=("id",), touch="at")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    connection.execute(sa.insert(nasty), [{"id": number, "text": "a", "at": long_ago} for number in (0, 1)])
    upsert_frame(connection, texts("a", "b"), nasty, how)
    touched = dict(connection.execute(sa.select(nasty.c.id, nasty.c.at == long_ago)).tuples().all())
    assert touched == {0: True, 1: False}


def test_key_that_is_twice_in_a_frame_is_refused(connection: sa.Connection) -> None:
    twice = pl.concat([texts("a"), texts("b")])
    with pytest.raises(sa.exc.IntegrityError, match="duplicate key value"):
        upsert_frame(connection, twice, nasty, Upsert(key=("id",)))


def test_names_that_need_quotes_are_quoted(connection: sa.Connection) -> None:
    odd = sa.Table(
        'odd "table"; --',
        sa.MetaData(),
        sa.Column("Select", sa.Integer, primary_key=True),
        sa.Column('a"b', sa.Text),
        prefixes=["TEMPORARY"],
    )
    odd.create(connection)
    frame = pl.DataFrame({"Select": [1], 'a"b': ["x"]}, schema={"Select": pl.Int32, 'a"b': pl.String})
    assert upsert_frame(connection, frame, odd, Upsert(key=("Select",))).inserted == 1
    assert (
        upsert_frame(connection, frame.with_columns(pl.lit("y").alias('a"b')), odd, Upsert(key=("Select",))).updated
        == 1
    )
    assert_frame_equal(read_frame(connection, sa.select(odd)), frame.with_columns(pl.lit("y").alias('a"b')))


def test_staging_table_has_the_types_of_its_model(connection: sa.Connection) -> None:
    frame = pl.DataFrame({"uuid": ["fa55f60f-e32c-5a53-a54e-925cf73a97da"], "amount": [Decimal("1.5")]})
    staging = stage_frame(connection, frame, name="staged", like=nasty)
    assert connection.execute(sa.select(staging.c.uuid, staging.c.amount)).one() == (
        UUID(frame["uuid"][0]),
        Decimal("1.50"),
    )


@pytest.mark.parametrize("rows", [1, 5_000])
def test_rows_of_an_earlier_transaction_are_not_in_a_staging_table(engine: sa.Engine, rows: int) -> None:
    with engine.connect() as connection:
        for first in (0, rows):
            with connection.begin():
                staging = stage_frame(connection, texts(*["x"] * rows, start=first), name="staged", like=nasty)
                (smallest, count) = connection.execute(sa.select(sa.func.min(staging.c.id), sa.func.count())).one()
                assert (smallest, count) == (first, rows)


def test_staging_table_in_use_is_not_given_out_again_until_it_is_released(connection: sa.Connection) -> None:
    staging = stage_frame(connection, texts("x"), name="staged", like=nasty)
    with pytest.raises(ValueError, match="in use"):
        stage_frame(connection, texts("y"), name="staged", like=nasty)
    release_staging(connection, staging)
    again = stage_frame(connection, texts("y"), name="staged", like=nasty)
    assert connection.scalars(sa.select(again.c.text)).all() == ["y"]


def test_staging_table_made_in_a_savepoint_that_was_rolled_back_is_made_again(connection: sa.Connection) -> None:
    savepoint = connection.begin_nested()
    staging = stage_frame(connection, texts("x"), name="in_savepoint", like=nasty)
    savepoint.rollback()
    release_staging(connection, staging)
    again = stage_frame(connection, texts("y"), name="in_savepoint", like=nasty)
    assert connection.scalars(sa.select(again.c.text)).all() == ["y"]


def test_idle_connection_keeps_no_large_staging_table(engine: sa.Engine) -> None:
    engine.dispose()  # 往后只有一个连接
    rows = MAX_IDLE_STAGED_BYTES // 1_000 + 1
    temporary = (
        sa.select(sa.func.count() > 0)
        .select_from(sa.table("pg_class"))
        .where(sa.column("relnamespace") == sa.func.pg_my_temp_schema())
    )
    pids, exists = [], []
    for count in (1, 1, rows, 1):
        with engine.begin() as connection:
            pids.append(connection.scalar(sa.func.pg_backend_pid()))
            exists.append(connection.scalar(temporary.where(sa.column("relname").like("staged%"))))
            stage_frame(connection, texts(*["x" * 1_000] * count), name="staged", like=nasty)
    assert len(set(pids)) == 1
    assert exists == [False, True, True, False]
