"""时刻的写法由整列定：一种写法的文件读回来分毫不差，看不出的要人说。"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.imports.files import encoding
from bridge.imports.orders.conventions import GivenConventions
from bridge.imports.rules.errors import ColumnReading, ProfileError, SeenCell
from bridge.imports.rules.profile import Profile
from bridge.imports.rules.times import DateOrder

from .import_columns import ROW, read_column, read_file, refusal, write_column

EXAMPLES = max(200, settings.default.max_examples)
SEVEN_PAST_ONE = datetime(2026, 3, 2, 1, 5, tzinfo=UTC)


def order(first: DateOrder) -> GivenConventions:
    return GivenConventions(date_order=first)


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-02 09:05:00",
        "2026-03-02 09:05",
        "2026-03-02T09:05:00",
        "2026/3/2 9:05",
        "2026.03.02 09:05",
        "2026-03-02 09:05:00.000",
        "2026-03-02T01:05:00Z",
        "2026-03-02T01:05:00.000Z",
        "2026-03-02 01:05:00 UTC",
        "2026-03-02 02:05:00+01:00",
        "2026-03-01 17:05:00 -0800",
        "2026-03-02 09:05:00 +08",
        "2026-03-02 09:05:00 GMT+08:00",
        "2026年3月2日 上午9:05",
        "2026年03月02日 9:05:00",
        "2026/3/2 上午 9:05",
        "2026/3/2 9:05 AM",
        "2026-03-02 9:05:00 a.m.",
        "\uff12\uff10\uff12\uff16\uff0f\uff13\uff0f\uff12 \uff19\uff1a\uff10\uff15",
        "02.03.2026 09:05",
        "2.3.2026, 9:05:00",
        "46083.3784722222",
        "46083.378472222219",
        "1772413500",
        "1772413500000",
        "1772413500.000",
    ],
)
def test_every_notation_is_read_for_what_it_means(tmp_path: Path, text: str) -> None:
    assert read_column(tmp_path, "ordered_at", [text]) == [SEVEN_PAST_ONE]


@pytest.mark.parametrize(
    ("text", "hour", "minute"),
    [
        ("12:00 AM", 0, 0),
        ("12:30 PM", 12, 30),
        ("1:05 PM", 13, 5),
        ("11:59 pm", 23, 59),
        ("下午3:20", 15, 20),
        ("上午12:05", 0, 5),
        ("下午12:05", 12, 5),
    ],
)
def test_the_twelve_hour_clock(tmp_path: Path, text: str, hour: int, minute: int) -> None:
    assert read_column(tmp_path, "ordered_at", [f"2026-03-02 {text}"], time_zone="UTC") == [
        datetime(2026, 3, 2, hour, minute, tzinfo=UTC)
    ]


@pytest.mark.parametrize(
    ("text", "first", "day"),
    [
        ("03/04/2026", "day-first", "2026-04-03"),
        ("03/04/2026", "month-first", "2026-03-04"),
        ("3-4-2026 9:05", "day-first", "2026-04-03"),
        ("03/04/05", "day-first", "2005-04-03"),
        ("03/04/05", "month-first", "2005-03-04"),
        ("03/04/05", "year-first", "2003-04-05"),
        ("26/3/2", "year-first", "2026-03-02"),
        ("01.02.69", "day-first", "1969-02-01"),
        ("01.02.68", "day-first", "2068-02-01"),
    ],
)
def test_an_order_that_the_values_leave_open_is_asked_about(
    tmp_path: Path, text: str, first: DateOrder, day: str
) -> None:
    said = refusal(tmp_path, "ordered_at", [text])
    if "69" not in text and "68" not in text and text != "26/3/2":
        assert said is not None
        assert said.startswith(f"orders.csv, row 2, column 'ordered_at': {text!r} is ")
        assert f"{day} {first}" in said
        assert f"--{first}" in said
    (read,) = read_column(tmp_path, "ordered_at", [text], given=order(first), time_zone="UTC")
    assert read.date().isoformat() == day


@pytest.mark.parametrize(
    ("values", "days"),
    [
        (["03/04/2026", "13/04/2026"], ["2026-04-03", "2026-04-13"]),
        (["03/04/2026", "04/13/2026"], ["2026-03-04", "2026-04-13"]),
        (["05/05/2026"], ["2026-05-05"]),
        (["13.04.2026", "03.04.2026"], ["2026-04-13", "2026-04-03"]),
        (["03.04.2026"], ["2026-04-03"]),
        (["26/3/31", "26/3/2"], ["2026-03-31", "2026-03-02"][:2]),
    ],
)
def test_the_values_of_the_column_decide_the_order(tmp_path: Path, values: list[str], days: list[str]) -> None:
    if values[0].startswith("26"):
        values = ["99/12/31", *values]
        days = ["1999-12-31", *days]
    read = read_column(tmp_path, "ordered_at", values, time_zone="UTC")
    assert [moment.date().isoformat() for moment in read] == days


def test_a_date_far_behind_decides_for_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 512)
    values = [*["03/04/2026"] * 200, "13/04/2026"]
    assert read_column(tmp_path, "ordered_at", values, time_zone="UTC")[0] == datetime(2026, 4, 3, tzinfo=UTC)
    said = refusal(tmp_path, "ordered_at", [*values, "04/13/2026"])
    assert said is not None
    assert "row 203" in said
    assert "'13/04/2026' in row 202" in said


@pytest.mark.parametrize(
    ("first", "second"), [("13/02/2026", "2026-02-13"), ("2026-02-13 9:05 PM", "2026-02-13 09:05:00")]
)
def test_the_other_way_may_begin_in_another_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 512)
    said = refusal(tmp_path, "ordered_at", [*[first] * 100, *[second] * 100])
    assert said is not None
    assert said.startswith(f"orders.csv, row 102, column 'ordered_at': {second!r} is read as ")


@pytest.mark.parametrize("text", ["2026030209", "2026030209.5", "2603020905", "2026030209051"])
def test_digits_of_a_date_are_no_unix_time(tmp_path: Path, text: str) -> None:
    assert f"{text!r} is not a possible date and time" in str(refusal(tmp_path, "ordered_at", [text]))


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (
            "2026-03-02",
            "13/02/2026",
            "is read as a date in another order, but '2026-03-02' in row 2 as a date that begins",
        ),
        (
            "46083.5",
            "2026-03-02",
            "is read as a date that begins with a four-digit year, but '46083.5' in row 2 as an Excel serial",
        ),
        ("1772413500", "46083.5", "is read as an Excel serial number, but '1772413500' in row 2 as Unix seconds"),
        (
            "2026-03-02 9:05 AM",
            "2026-03-02 9:05",
            "is read as a time without, but '2026-03-02 9:05 AM' in row 2 as a time with AM or PM",
        ),
        ("13/04/2026", "04/13/2026", "cannot be read in the order of day and month of '13/04/2026' in row 2"),
    ],
)
def test_a_column_in_two_conventions_is_refused(tmp_path: Path, first: str, second: str, problem: str) -> None:
    said = refusal(tmp_path, "ordered_at", [first, second])
    assert said is not None
    assert said.startswith(f"orders.csv, row 3, column 'ordered_at': {second!r} {problem}")
    assert "nothing was imported: write the column in one way" in said


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-029:05",
        "2026-02-30",
        "13:05 PM",
        "2026-03-02 13:05 PM",
        "2026-03-02 0:05 AM",
        "2026-03-02 9:65",
        "31/04/2026",
        "4608",
        "177241350",
        "2026-03-02 09:05 +99:00",
        "2026-03-02 25:00",
    ],
)
def test_what_is_no_time_is_a_bad_row(tmp_path: Path, text: str) -> None:
    said = refusal(tmp_path, "ordered_at", [text])
    assert said is not None
    assert "is not a possible date and time" in said


def test_a_time_that_is_not_there_may_be_written_as_a_dash(tmp_path: Path) -> None:
    assert read_column(tmp_path, "ordered_at", ["2026-03-02 09:05:00", "-", " — "]) == [SEVEN_PAST_ONE, None, None]


@pytest.mark.parametrize("given_by", ["format", "value"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "2026-03-29 02:30",
            "does not exist in Europe/Berlin, where clocks go forward: 2026-03-29T00:30:00Z or 2026-03-29T01:30:00Z may be meant",
        ),
        (
            "2026-10-25 02:30",
            "exists twice in Europe/Berlin, where clocks go back: it is 2026-10-25T00:30:00Z or 2026-10-25T01:30:00Z",
        ),
    ],
)
def test_a_local_time_that_the_clocks_skip_or_repeat_is_a_bad_row(
    tmp_path: Path, text: str, problem: str, given_by: str
) -> None:
    orders: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    if given_by == "format":
        orders["ordered_at"]["format"] = "%Y-%m-%d %H:%M"
    profile = Profile.model_validate({"orders": orders})
    said = refusal(
        tmp_path,
        "ordered_at",
        ["2026-03-29 01:30", text],
        profile=profile,
        given=GivenConventions(time_zone="Europe/Berlin"),
    )
    assert said is not None
    assert said.startswith(f"orders.csv, row 3, column 'ordered_at': '{text}' {problem}")
    assert read_column(tmp_path, "ordered_at", [f"{text}:00 +0100"], given=GivenConventions(time_zone="Europe/Berlin"))


def test_the_zone_of_the_command_line_comes_before_that_of_the_profile(tmp_path: Path) -> None:
    orders: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    orders["ordered_at"]["time_zone"] = "Europe/London"
    profile = Profile.model_validate({"orders": orders})
    times = [
        read_column(
            tmp_path, "ordered_at", ["2026-03-02 09:05"], profile=profile, given=GivenConventions(time_zone=zone)
        )[0].hour
        for zone in (None, "America/New_York")
    ]
    assert times == [9, 14]


@pytest.mark.parametrize(
    ("expression", "moment"),
    [
        ("CAST(amount AS BIGINT) + 1772413499", SEVEN_PAST_ONE),
        ("DATE(ordered_at)", datetime(2026, 3, 1, 16, tzinfo=UTC)),
        ("'2026-03-02 ' || '9:05'", SEVEN_PAST_ONE),
    ],
)
def test_times_that_an_expression_computes(tmp_path: Path, expression: str, moment: datetime) -> None:
    orders: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    orders["ordered_at"] = {"expression": expression}
    assert read_column(tmp_path, "ordered_at", ["2026-03-02"], profile=Profile.model_validate({"orders": orders})) == [
        moment
    ]


def test_an_order_beside_a_format_is_refused(tmp_path: Path) -> None:
    orders: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    orders["ordered_at"]["format"] = "%Y-%m-%d"
    with pytest.raises(ProfileError, match="--day-first: the profile gives ordered_at a format"):
        read_column(
            tmp_path,
            "ordered_at",
            ["2026-03-02"],
            profile=Profile.model_validate({"orders": orders}),
            given=order("day-first"),
        )


def test_what_was_chosen_is_told_with_its_reason(tmp_path: Path) -> None:
    def told(values: list[str], options: GivenConventions) -> list[ColumnReading]:
        return read_file(write_column(tmp_path, "ordered_at", values), given=options)[1]

    none = GivenConventions()
    assert told(["2026-03-02 09:05:00"], none) == []
    assert told(["3/4/26 9:05 PM", "13/4/26 9:05 AM"], order("day-first")) == [
        ColumnReading("ordered_at", "dates day-first", None),
        ColumnReading("ordered_at", "a 12-hour clock", SeenCell(2, "3/4/26 9:05 PM")),
        ColumnReading("ordered_at", "two-digit years as 1969 to 2068", SeenCell(2, "3/4/26 9:05 PM")),
    ]
    assert told(["3/4/2026", "13/4/2026"], none) == [
        ColumnReading("ordered_at", "dates day-first", SeenCell(3, "13/4/2026"))
    ]
    assert told(["46083.5"], none) == [
        ColumnReading("ordered_at", "times as Excel serial numbers (days since 1899-12-30)", SeenCell(2, "46083.5"))
    ]


def twelve(moment: datetime) -> tuple[int, bool]:
    return (moment.hour % 12 or 12), moment.hour >= 12


def offset_of(moment: datetime) -> str:
    minutes = int((moment.utcoffset() or timedelta()).total_seconds()) // 60
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}{abs(minutes) % 60:02d}"


# 与产品无关的写法：逐段写出来；名字里的先后是人会说的
WRITERS: dict[str, tuple[DateOrder | None, Callable[[datetime], str]]] = {
    "iso": (None, lambda t: f"{t.year}-{t.month:02d}-{t.day:02d} {t.hour:02d}:{t.minute:02d}:{t.second:02d}"),
    "slashes": (None, lambda t: f"{t.year}/{t.month}/{t.day} {t.hour}:{t.minute:02d}:{t.second:02d}"),
    "chinese": (
        None,
        lambda t: (
            f"{t.year}年{t.month}月{t.day}日 {'下午' if twelve(t)[1] else '上午'}{twelve(t)[0]}:{t.minute:02d}:{t.second:02d}"
        ),
    ),
    "offset": (
        None,
        lambda t: f"{t.year}-{t.month:02d}-{t.day:02d} {t.hour:02d}:{t.minute:02d}:{t.second:02d} {offset_of(t)}",
    ),
    "dots": ("day-first", lambda t: f"{t.day:02d}.{t.month:02d}.{t.year} {t.hour:02d}:{t.minute:02d}:{t.second:02d}"),
    "day/month": ("day-first", lambda t: f"{t.day}/{t.month}/{t.year} {t.hour}:{t.minute:02d}:{t.second:02d}"),
    "month/day": (
        "month-first",
        lambda t: (
            f"{t.month}/{t.day}/{t.year} {twelve(t)[0]}:{t.minute:02d}:{t.second:02d} {'PM' if twelve(t)[1] else 'AM'}"
        ),
    ),
    "day-month short": (
        "day-first",
        lambda t: f"{t.day:02d}-{t.month:02d}-{t.year % 100:02d} {t.hour}:{t.minute:02d}:{t.second:02d}",
    ),
    "month/day short": (
        "month-first",
        lambda t: f"{t.month}/{t.day}/{t.year % 100:02d} {t.hour}:{t.minute:02d}:{t.second:02d}",
    ),
    "year/month/day short": (
        "year-first",
        lambda t: f"{t.year % 100:02d}/{t.month}/{t.day} {t.hour}:{t.minute:02d}:{t.second:02d}",
    ),
    "serial": (None, lambda t: repr((t.replace(tzinfo=UTC) - datetime(1899, 12, 30, tzinfo=UTC)) / timedelta(days=1))),
    "unix": (None, lambda t: str(int(t.timestamp()))),
    "milliseconds": (None, lambda t: str(int(t.timestamp()) * 1000)),
}


def is_possible(moment: datetime) -> bool:
    return (
        moment.astimezone(UTC).astimezone(moment.tzinfo).replace(fold=0) == moment
        and moment.utcoffset() == moment.replace(fold=1).utcoffset()
    )


@settings(max_examples=EXAMPLES)
@given(
    moments=st.lists(
        # 读得懂的 Unix 时间到 2033 年为止
        st.datetimes(*(datetime(year, 1, 1, tzinfo=UTC).replace(tzinfo=None) for year in (2002, 2033))),
        min_size=1,
        max_size=6,
    ),
    how=st.sampled_from(sorted(WRITERS)),
    zone=st.sampled_from(["Asia/Shanghai", "Europe/Berlin", "America/Los_Angeles"]),
)
def test_times_in_one_convention_come_back_exactly_or_are_asked_about(
    tmp_path_factory: pytest.TempPathFactory, moments: list[datetime], how: str, zone: str
) -> None:
    first, write = WRITERS[how]
    local = [moment.replace(microsecond=0, tzinfo=ZoneInfo(zone)) for moment in moments]
    values = [write(moment) for moment in local]
    folder = tmp_path_factory.mktemp("times")
    said = refusal(folder, "ordered_at", values, time_zone=zone)
    expected = [moment.astimezone(UTC) for moment in local]
    if not all(is_possible(moment) for moment in local):
        assert how in ("offset", "unix", "milliseconds") or said is not None
        return
    if said is None:
        assert read_column(folder, "ordered_at", values, time_zone=zone) == expected
    else:
        assert "no value of the column tells which it is" in said
    if first is not None:
        assert read_column(folder, "ordered_at", values, given=order(first), time_zone=zone) == expected
