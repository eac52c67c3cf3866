"""来源的列对应 raw_orders 的哪一列：表头的常用名、--map、--shop 与配置，合成一份核对过的对应关系。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import polars as pl

from bridge.imports.cells import Source
from bridge.imports.errors import ImportFileError, ProfileError
from bridge.imports.profile import NO_PROFILE, ROW_NUMBER, TARGETS, AmountTarget, Profile, TextTarget, TimeTarget, parse_expression

# 淘宝、天猫、京东、抖音导出的表头；一个文件里有好几个时取前面的
HEADERS: dict[str, tuple[str, ...]] = {
    "order_id": ("order_id", "订单编号", "订单号", "主订单编号", "order id", "order number"),
    "shop": ("shop", "店铺名称", "店铺", "店铺名", "shop name", "store"),
    "customer_name": (
        "customer_name",
        "买家会员名",
        "买家昵称",
        "客户名称",
        "客户昵称",
        "下单帐号",
        "下单账号",
        "用户昵称",
        "买家",
        "客户",
    ),
    "order_type": ("order_type", "订单类型"),
    "order_status": ("order_status", "订单状态", "交易状态"),
    "amount": ("amount", "实付金额", "买家实际支付金额", "买家实付金额", "订单应付金额", "应付金额", "订单金额", "总金额", "金额"),
    "quantity": ("quantity", "数量", "宝贝总数量", "商品总数量", "商品数量", "订购数量", "购买数量"),
    "ordered_at": ("ordered_at", "下单时间", "订单创建时间", "订单提交时间", "创建时间", "付款时间", "订单付款时间"),
}
# 多数平台没有订单类型；没有时 ETL 当作大货
_OPTIONAL = ("order_type",)


@dataclass(frozen=True)
class ColumnMapping:
    """核对过的对应关系：targets 里提到的来源列都存在。

    :param sources: 每个 target 读来源列的表达式；constant 与 aggregate_expression 也在内。
    :param used: 用到了的来源列。
    """

    targets: Mapping[str, TextTarget]
    sources: Mapping[str, pl.Expr]
    used: frozenset[str]
    profile: Profile


def map_columns(source: Source, profile: Profile | None, *, overrides: Mapping[str, str], shop: str | None) -> ColumnMapping:
    """合成对应关系：--shop 与 --map 盖过配置，配置盖过表头。`--map amount=`（空的）表示文件里没有这一列。

    :raises ProfileError: --map 的左边不是 raw_orders 的列。
    :raises ImportFileError: 缺列，或一个名字指着好几列。
    """
    unknown = [name for name in overrides if name not in TARGETS]
    if unknown:
        raise ProfileError(f"--map {unknown[0]}=…: raw_orders has no column {unknown[0]!r}; it has {', '.join(TARGETS)}")
    targets = dict(profile.orders.targets()) if profile else {}
    for name, column in overrides.items():
        targets.pop(name, None) if not column else targets.update({name: _redirect(profile, name, column)})
    if shop is not None:
        targets["shop"] = TextTarget(constant=shop)
    if profile is None:
        targets = _map_headers(source, targets, declined=[name for name, column in overrides.items() if not column])
    if "shop" not in targets and "shop" not in overrides:
        raise _no_column(source, "shop", ("shop",))
    given = profile or NO_PROFILE
    expressions = {name: _source_expression(source, name, target) for name, target in targets.items()}
    used = {root for expression in expressions.values() for root in expression.meta.root_names()}
    used.update(given.group.by if given.group else ())
    for column in (*sorted(used - {ROW_NUMBER}), *given.file.numbers):
        _require(source, column)
    return ColumnMapping(
        targets={name: targets[name] for name in TARGETS if name in targets},
        sources=expressions,
        used=frozenset(used),
        profile=given,
    )


def _redirect(profile: Profile | None, name: str, column: str) -> TextTarget:
    """改读另一列，配置里的格式与进位照旧。"""
    configured: TextTarget | None = getattr(profile.orders, name) if profile else None
    return configured.from_column(column) if configured else _target_kind(name)(column=column)


def _target_kind(name: str) -> type[TextTarget]:
    kinds: dict[str, type[TextTarget]] = {"amount": AmountTarget, "ordered_at": TimeTarget}
    return kinds.get(name, TextTarget)


def _map_headers(source: Source, targets: Mapping[str, TextTarget], *, declined: Iterable[str]) -> dict[str, TextTarget]:
    """没有配置时，其余各列按表头的常用名找。"""
    present = {column.casefold(): column for column in reversed(source.columns)}
    found = dict(targets)
    for name in TARGETS:
        if name in targets or name in declined:
            continue
        column = next((present[header] for header in HEADERS[name] if header in present), None)
        if column is not None:
            found[name] = _target_kind(name)(column=column)
        elif name not in _OPTIONAL:
            raise _no_column(source, name, HEADERS[name])
    return found


def _source_expression(source: Source, name: str, target: TextTarget) -> pl.Expr:
    if target.constant is not None:
        return pl.lit(target.constant)
    text = target.expression or target.aggregate_expression
    if text is not None:
        return parse_expression(text)
    if isinstance(target.column, int):
        if target.column > len(source.columns):
            raise ImportFileError(source.path, f"the file has {len(source.columns)} columns, {name} should be column {target.column}")
        return pl.col(source.columns[target.column - 1])
    column = _find_column(source, str(target.column))
    _require(source, column)
    return pl.col(column)


def _find_column(source: Source, wanted: str) -> str:
    """先按原样找，再不分大小写找。"""
    if wanted in source.columns:
        return wanted
    folded = [column for column in source.columns if column.casefold() == wanted.strip().casefold()]
    return folded[0] if len(folded) == 1 else wanted


def _require(source: Source, column: str) -> None:
    if column in source.repeated:
        raise ImportFileError(source.path, f"the header has the column {column!r} more than once", advice="rename one of them")
    if column not in source.columns:
        raise _missing(source, f"there is no column {column!r}", (column,))


def _no_column(source: Source, name: str, known: tuple[str, ...]) -> ImportFileError:
    advice = f"name it with --map {name}=COLUMN (--map {name}= if the file has none)"
    return _missing(source, f"there is no column for {name}", known, advice + (", or give --shop NAME" if name == "shop" else ""))


def _missing(
    source: Source, problem: str, wanted: tuple[str, ...], advice: str = "correct the name, or give another with --map"
) -> ImportFileError:
    folded = {column.casefold(): column for column in source.columns}
    close = next((match[0] for name in wanted if (match := get_close_matches(name.casefold(), folded, n=1))), None)
    hint = f", the closest is {folded[close]!r}" if close else ""
    return ImportFileError(source.path, f"{problem}{hint}; the file has {', '.join(map(repr, source.columns[:50]))}", advice=advice)
