"""几行的 CSV 读写与 Polars 的读写器一模一样。"""

from __future__ import annotations

import io
from datetime import UTC, date, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from etl_assets.services import few_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
SPECIAL = st.sampled_from(
    ["", '"', '""', ",", "\n", "\r\n", "\\N", "\\.", "null", "true", "\ufeff", " a ", '","', '"\n']
)
VALUES: dict[str, tuple[pl.DataType, st.SearchStrategy[object]]] = {
    "text": (pl.String(), TEXT | SPECIAL),
    "small": (pl.Int16(), st.integers(-(2**15), 2**15 - 1)),
    "number": (pl.Int32(), st.integers(-(2**31), 2**31 - 1)),
    "large": (pl.Int64(), st.integers(-(2**63), 2**63 - 1)),
    "float": (pl.Float64(), st.floats(allow_nan=False, allow_infinity=False)),
    "flag": (pl.Boolean(), st.booleans()),
    "amount": (pl.Decimal(14, 2), st.decimals(-(10**12) + 1, 10**12 - 1, places=2)),
    "day": (pl.Date(), st.dates(date(1, 1, 1), date(9999, 12, 31))),
    "at": (pl.Datetime("us", "UTC"), st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))),  # noqa: DTZ001  # 界要不带时区的
}
SCHEMA = {name: dtype for name, (dtype, _) in VALUES.items()}
ROWS = st.lists(st.tuples(*[st.none() | values for _, values in VALUES.values()]), max_size=5)


def frame_of(rows: list[tuple[object, ...]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def written_by_polars(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_csv(buffer, include_header=False, datetime_format="%Y-%m-%d %H:%M:%S%.6f+00")
    return buffer.getvalue()


@given(ROWS)
def test_what_polars_wrote_is_read_as_polars_reads_it(rows: list[tuple[object, ...]]) -> None:
    frame = frame_of(rows)
    data = written_by_polars(frame)
    assert_frame_equal(few_rows.decode(data, SCHEMA), frame)


@given(ROWS)
def test_what_is_written_is_read_back_by_both(rows: list[tuple[object, ...]]) -> None:
    frame = frame_of(rows)
    data = few_rows.encode(frame)
    assert_frame_equal(few_rows.decode(data, SCHEMA), frame)
    texts = frame.select("text", "number")
    if data:
        read = pl.read_csv(few_rows.encode(texts), has_header=False, schema=dict(texts.schema))
        assert_frame_equal(read, texts)


def test_years_that_python_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="10000"):
        few_rows.decode(b"10000-01-01\n", {"day": pl.Date()})
