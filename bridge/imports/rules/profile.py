"""导入配置：一个 TOML 文件，说明 raw_orders 的每一列从来源文件的哪里来。随包的配置在 profiles/ 里，也是写法的示范。"""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import polars as pl
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from bridge.imports.rules.errors import ProfileError
from bridge.imports.rules.numbers import DecimalMark
from bridge.imports.rules.times import DateOrder
from etl_assets.core.settings import is_time_zone

SHIPPED_PROFILES = Path(__file__).parents[1] / "profiles"
TARGETS = ("order_id", "shop", "customer_name", "order_type", "order_status", "amount", "quantity", "ordered_at")
# ETL 对没有这几列的行一律拒绝，所以配置里不能没有它们（shop 可以由 --shop 给出）
NEEDED_TARGETS = ("order_id", "customer_name", "ordered_at")
ROW_NUMBER = "row_number"

_ACROSS_LINES = re.compile(
    r"\b(?:over|sum|min|max|avg|count|median|mode|first|last|corr|covar|quantile_cont|quantile_disc|array_agg|string_agg|listagg"
    r"|(?:covar|stddev|var)_(?:pop|samp)|std|stddev|stdev|var|variance|(?:bit|bool)_(?:and|or|xor)|every)\s*\(",
    re.IGNORECASE,
)

# Python 的编码里不是写文件用的
_NO_TEXT_FILES = {"idna", "punycode", "unicode-escape", "raw-unicode-escape"}

Aggregate = Literal["first", "last", "sum", "min", "max"]
LineRule = Literal["items", "newest-wins"]
Names = Annotated[tuple[str, ...], Strict(strict=False)]  # TOML 的数组是 list
# 一列的名字，或它在各年、各语言的导出里的几个名字：文件里有的第一个
Alternatives = str | Annotated[Names, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextTarget(_Table):
    """raw_orders 的一列；column、constant、expression、aggregate_expression 四者取一。values：平台的叫法 → 存的叫法，不分大小写。"""

    column: Alternatives | Annotated[int, Field(ge=1)] | None = None
    constant: str | None = None
    expression: str | None = None
    aggregate_expression: str | None = None
    aggregate: Aggregate = "first"
    values: Mapping[str, str] = Field(default_factory=dict)

    @field_validator("expression")
    @classmethod
    def _by_line(cls, value: str | None) -> str | None:
        return by_line(value)

    @field_validator("aggregate_expression")
    @classmethod
    def _parsable(cls, value: str | None) -> str | None:
        if value is not None:
            parse_expression(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = (self.column, self.constant, self.expression, self.aggregate_expression)
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of column, constant, expression, aggregate_expression")
        return self

    def from_column(self, column: str) -> Self:
        """换成读这一列，其余（格式、时区、进位、汇总）不变。"""
        return self.model_copy(
            update={"column": column, "constant": None, "expression": None, "aggregate_expression": None}
        )


class AmountTarget(TextTarget):
    """金额；round = true 时四舍五入（远离零）到分，否则多于两位小数是错误。"""

    round: bool = False


class TimeTarget(TextTarget):
    """时间。

    :ivar format: strptime 写法，可以有几种；没有它时，日期的先后由 date_order 定。
    :ivar time_zone: 用于没有时区的时间，默认 ETL_TIMEZONE。
    """

    format: Alternatives | None = None
    date_order: DateOrder | None = None
    time_zone: str | None = None

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and not is_time_zone(value):
            raise ValueError("must be an IANA time zone name such as Asia/Shanghai or Europe/London")
        return value

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.format is not None and self.date_order is not None:
            raise ValueError("give format or date_order, not both: the format has an order")
        return self

    @property
    def formats(self) -> tuple[str, ...]:
        return as_names(self.format)


class FileFormat(_Table):
    """来源文件的样子；没写的由内容认出。

    :ivar header_row: 文件里的行号。
    :ivar keep_totals: 合计行也当作订单。
    :ivar footers: 表下面的行里有的文字；有它的行不是订单。
    :ivar optional: 文件里可以没有的列；没有就是空的。
    :ivar fill_down: 只写在一单第一行（或与下面几行合并）的列；空的单元格取上一行的。
    :ivar lines: 订单号相同的几行是一单的商品，还是一单的几个版本；没写时，除状态外还有不同就停下来问。
    """

    format: Literal["csv", "whitespace", "excel"] | None = None
    encoding: str | None = None
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    quotes: bool | None = None
    header: bool = True
    header_row: Annotated[int, Field(ge=1)] | None = None
    keep_totals: bool = False
    columns: Names = ()
    sheet: str | None = None
    footers: Names = ()
    optional: Names = ()
    fill_down: Names = ()
    numbers: Names = ()
    decimal: DecimalMark | None = None
    lines: LineRule | None = None

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            usable = value is None or (
                codecs.lookup(value).name not in _NO_TEXT_FILES
                and "\n".encode(value).decode(value) == "\n"
                and codecs.getincrementaldecoder(value)("strict") is not None
            )
        except (LookupError, UnicodeError):
            usable = False
        if not usable:
            raise ValueError("must be a text encoding such as utf-8, gb18030, big5, cp932, cp1252, utf-16")
        return value

    @field_validator("separator")
    @classmethod
    def _not_special(cls, value: str | None) -> str | None:
        if value is not None and value in '"\n\r':
            raise ValueError("must not be a quote or a line break")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.header and self.columns:
            raise ValueError("columns names the columns of a file without a header: add header = false")
        if self.header_row and not self.header:
            raise ValueError("header_row names the row of the header, but header = false says that there is none")
        return self


class Grouping(_Table):
    """一行是一件商品时：by 相同的行合成一个订单。by 为空的行各成一单。

    :ivar leave_out: 对一行算的条件：成立的行（关闭了的子订单）不计，除非整单都是这样的行。
    """

    by: Annotated[tuple[Alternatives, ...], Strict(strict=False)] = Field(min_length=1)
    leave_out: str | None = None

    @field_validator("leave_out")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        return by_line(value)


class Platform(_Table):
    """哪个平台的导出：headers 都在表头里的文件就是；where 说某一列的值里还要有这些之一。source：表头从哪里知道的。"""

    name: str
    headers: Annotated[tuple[Alternatives, ...], Strict(strict=False)] = Field(min_length=5)
    where: Mapping[str, Annotated[Names, Field(min_length=1)]] = Field(default_factory=dict)
    source: str


class Orders(_Table):
    """raw_orders 的各列；没写的列是 NULL。"""

    order_id: TextTarget | None = None
    shop: TextTarget | None = None
    customer_name: TextTarget | None = None
    order_type: TextTarget | None = None
    order_status: TextTarget | None = None
    amount: AmountTarget | None = None
    quantity: TextTarget | None = None
    ordered_at: TimeTarget | None = None

    def targets(self) -> dict[str, TextTarget]:
        return {name: target for name in TARGETS if (target := getattr(self, name)) is not None}


class Profile(_Table):
    """一个配置文件的全部内容。"""

    platform: Platform | None = None
    file: FileFormat = FileFormat()
    group: Grouping | None = None
    keep_extra: bool = False
    orders: Orders
    _name: str = PrivateAttr(default="")

    @property
    def name(self) -> str:
        """文件名，不带 .toml。"""
        return self._name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        targets = self.orders.targets()
        missing = [name for name in NEEDED_TARGETS if name not in targets]
        if missing:
            raise ValueError(f"[orders] lacks {', '.join(missing)}: every row would be rejected without it")
        if self.group is None and self.file.lines != "items":
            grouped = [
                name for name, target in targets.items() if target.aggregate != "first" or target.aggregate_expression
            ]
            if grouped:
                raise ValueError(
                    f'orders.{grouped[0]} aggregates, but there is no [group] and no lines = "items" under [file]'
                )
        check_lines(self, self.file.lines)
        return self


NO_PROFILE = Profile.model_construct(orders=Orders())
"""没有配置：各列由表头与命令行的选项来。"""
NO_PROFILE_NAME = "none"


def check_lines(profile: Profile, lines: LineRule | None) -> None:
    """几行合成一单的两种说法只能用一种；合成的订单没有哪一行的原文可留。

    :raises ValueError: 与配置矛盾。
    """
    if profile.group and lines:
        option = {"items": "--lines-are-items", "newest-wins": "--newest-line-wins"}[lines]
        raise ValueError(
            f"{option} (lines under [file]) and [group] both say what becomes of an order's lines: leave one out (--profile none)"
        )
    if profile.keep_extra and (profile.group or lines == "items"):
        raise ValueError(
            "keep_extra cannot be used with [group] or --lines-are-items: an order has no single source line"
        )


def parse_expression(text: str) -> pl.Expr:
    """一个 Polars SQL 表达式。

    :raises ValueError: 语法不对，或用了不支持的函数。
    """
    try:
        expression = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"is not a usable SQL expression: {error}") from error
    if expression.meta.has_multiple_outputs():
        raise ValueError("must give one column")
    return expression


def by_line(text: str | None) -> str | None:
    """对一行算的表达式。文件是分块算的，把多行合成一个值的写法会随块的大小变。

    :raises ValueError: 不能用。
    """
    if text is not None:
        parse_expression(text)
        if _ACROSS_LINES.search(text):
            raise ValueError("must use one line at a time; SUM, MAX … belong in aggregate_expression")
    return text


def load_profile(name: str | Path) -> Profile:
    """读一个配置：文件路径，或随包配置的名字（taobao、shopify……）。

    :raises ProfileError: 找不到、不是 TOML、有不认识的键或不合格的值。
    """
    path = _find_profile(name)
    try:
        return parse_profile(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"the profile {path} cannot be read: {error}") from error


def parse_profile(text: str, path: Path) -> Profile:
    """:raises ProfileError: 不是 TOML、有不认识的键或不合格的值；path 只用在消息里。"""
    try:
        profile = Profile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"the profile {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise ProfileError(
            f"the profile {path.name} is not usable: {_first_problem(error)}; correct the file"
        ) from error
    profile._name = path.stem
    return profile


def shipped_profiles() -> dict[str, Path]:
    """随包的配置：名字 → 文件。"""
    return {path.stem: path for path in sorted(SHIPPED_PROFILES.glob("*.toml"))}


@cache
def shipped_platforms() -> dict[str, Platform]:
    """随包的、由表头认得出的配置；只读 [platform]，别的表达式用到了才看。"""
    tables = {
        name: tomllib.loads(path.read_text(encoding="utf-8")).get("platform")
        for name, path in shipped_profiles().items()
    }
    return {name: Platform.model_validate(table) for name, table in tables.items() if table}


def as_names(names: Alternatives | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else names


def override_format(file: FileFormat, given: Mapping[str, Any]) -> FileFormat:
    """命令行给的盖过配置的 [file]；没给的是 None。

    :raises ProfileError: 值不合格，或与配置矛盾。
    """
    options = {name: value for name, value in given.items() if value is not None}
    try:
        return FileFormat.model_validate({**file.model_dump(), **options})
    except ValidationError as error:
        raise ProfileError(f"the options do not fit: {_first_problem(error)}") from error


def _find_profile(name: str | Path) -> Path:
    shipped = shipped_profiles()
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    raise ProfileError(
        f"there is no profile {str(name)!r}: give the path of a TOML file, or one of {', '.join(shipped)}"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key} (known: {', '.join(_known_keys(problem['loc'][:-1]))})"
    return (
        f"{key}: {problem['msg'].removeprefix('Value error, ')}"
        if key
        else problem["msg"].removeprefix("Value error, ")
    )


def _known_keys(location: tuple[int | str, ...]) -> Mapping[str, Any]:
    model: Any = Profile
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    fields: Mapping[str, Any] = model.model_fields
    return fields
