"""来源的列对应 raw_orders 的哪一列：表头的常用名、--map、--shop 与配置，合成一份核对过的对应关系。"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import polars as pl

from bridge.imports.files.cells import Source
from bridge.imports.orders.headers import HEADERS, find_column
from bridge.imports.orders.proposals import propose_columns
from bridge.imports.rules.errors import ImportFileError, ProfileError
from bridge.imports.rules.profile import (
    NEEDED_TARGETS,
    NO_PROFILE,
    ROW_NUMBER,
    TARGETS,
    Alternatives,
    AmountTarget,
    Profile,
    TextTarget,
    TimeTarget,
    as_names,
    parse_expression,
)

# 多数平台没有订单类型；没有时 ETL 当作大货
_OPTIONAL = ("order_type",)


@dataclass(frozen=True)
class MappedColumn:
    """raw_orders 的一列从来源的哪里来：列名、固定的值或表达式；没有的是 None。because 是为什么。"""

    name: str
    source: str | None
    because: str


@dataclass(frozen=True)
class ColumnMapping:
    """核对过的对应关系：targets 里提到的来源列都存在。

    :param sources: 每个 target 读来源列的表达式；constant 与 aggregate_expression 也在内。
    :param used: 用到了的来源列。
    :param reasons: 每个 target（连说了没有的）为什么是那一列。
    :param group_by: 相同就合成一单的来源列；不合并时是空的。
    :param leave_out: 一单里不计的行。
    """

    targets: Mapping[str, TextTarget]
    sources: Mapping[str, pl.Expr]
    used: frozenset[str]
    profile: Profile
    reasons: Mapping[str, str]
    group_by: tuple[str, ...] = ()
    leave_out: pl.Expr | None = None

    def describe(self) -> list[MappedColumn]:
        """raw_orders 的每一列。"""
        return [
            MappedColumn(name, self._shown_source(name), self.reasons.get(name, "no column for it")) for name in TARGETS
        ]

    def _shown_source(self, name: str) -> str | None:
        target = self.targets.get(name)
        if target is None:
            return None
        if target.column is not None:
            return self.shown_column(name)
        return (
            repr(target.constant) if target.constant is not None else target.expression or target.aggregate_expression
        )

    def shown_column(self, name: str) -> str:
        """消息里的列名：直接读的是来源的列，算出来的是 raw_orders 的列。"""
        return self.sources[name].meta.root_names()[0] if self.targets[name].column is not None else name


@dataclass(frozen=True)
class _Lacking:
    """没有的列：raw_orders 的 target 没有来源，或者人写的名字 column 不在文件里。"""

    target: str | None
    column: str | None = None


def map_columns(
    source: Source, profile: Profile | None, *, overrides: Mapping[str, str], shop: str | None
) -> ColumnMapping:
    """合成对应关系：--shop 与 --map 盖过配置，配置盖过表头。`--map amount=`（空的）表示文件里没有这一列。

    :raises ProfileError: --map 的左边不是 raw_orders 的列。
    :raises ImportFileError: 缺列（一次说全），或一个名字指着好几列。
    """
    unknown = [name for name in overrides if name not in TARGETS]
    if unknown:
        raise ProfileError(
            f"--map {unknown[0]}=…: raw_orders has no column {unknown[0]!r}; it has {', '.join(TARGETS)}"
        )
    targets = dict(profile.orders.targets()) if profile else {}
    reasons = {**dict.fromkeys(targets, "profile"), **dict.fromkeys(overrides, "--map")}
    for name, column in overrides.items():
        targets.pop(name, None) if not column else targets.update({name: _redirect(profile, name, column)})
    if shop is not None:
        targets["shop"] = TextTarget(constant=shop)
        reasons["shop"] = "--shop"
    given = profile or NO_PROFILE
    lacking: list[_Lacking] = []
    if profile is None:
        targets, lacking = _map_headers(
            source, targets, declined=[name for name, column in overrides.items() if not column]
        )
    found: dict[str, TextTarget] = {}
    for name, target in targets.items():
        chosen = _choose_column(source, target)
        if chosen is not None:
            found[name] = chosen
        elif (
            name in overrides or name in NEEDED_TARGETS or not set(as_names(_names(target))) <= set(given.file.optional)
        ):
            lacking.append(_Lacking(name, as_names(_names(target))[0]))
    if "shop" not in found and "shop" not in overrides and not any(gap.target == "shop" for gap in lacking):
        lacking.append(_Lacking("shop"))
    expressions = {name: _source_expression(source, name, target) for name, target in found.items()}
    by = [
        find_column(source.columns, name) or name
        for name in (_first_present(source, names) for names in _group_by(given))
    ]
    leave_out = parse_expression(given.group.leave_out) if given.group and given.group.leave_out else None
    read = [*expressions.values(), *([] if leave_out is None else [leave_out])]
    used = {root for expression in read for root in expression.meta.root_names()} | set(by)
    wanted = [*sorted(used - {ROW_NUMBER}), *given.file.numbers, *given.file.fill_down]
    lacking += [_Lacking(None, column) for column in dict.fromkeys(wanted) if column not in source.columns]
    if lacking:
        raise _explain(source, profile, lacking)
    repeated = next((column for column in wanted if column in source.repeated), None)
    if repeated is not None:
        raise ImportFileError(
            source.path, f"the header has the column {repeated!r} more than once", advice="rename one of them"
        )
    return ColumnMapping(
        targets={name: found[name] for name in TARGETS if name in found},
        sources=expressions,
        used=frozenset(used),
        profile=given,
        group_by=tuple(by),
        leave_out=leave_out,
        reasons={
            **dict.fromkeys(found, "known header"),
            **{name: why for name, why in reasons.items() if name in found or name in overrides},
        },
    )


def _redirect(profile: Profile | None, name: str, column: str) -> TextTarget:
    """改读另一列，配置里的格式与进位照旧。"""
    configured: TextTarget | None = getattr(profile.orders, name) if profile else None
    return configured.from_column(column) if configured else _target_kind(name)(column=column)


def _target_kind(name: str) -> type[TextTarget]:
    kinds: dict[str, type[TextTarget]] = {"amount": AmountTarget, "ordered_at": TimeTarget}
    return kinds.get(name, TextTarget)


def _map_headers(
    source: Source, targets: Mapping[str, TextTarget], *, declined: Iterable[str]
) -> tuple[dict[str, TextTarget], list[_Lacking]]:
    """没有配置时，其余各列按表头的常用名找。"""
    present = {column.casefold(): column for column in reversed(source.columns)}
    found, lacking = dict(targets), []
    for name in TARGETS:
        if name in targets or name in declined:
            continue
        column = next((present[header] for header in HEADERS[name] if header in present), None)
        alike = [other for other in source.columns if column is not None and other.casefold() == column.casefold()]
        if len(alike) > 1:
            raise ImportFileError(
                source.path,
                f"the header has {' and '.join(map(repr, alike))}, either could be {name}",
                advice=f"say which with --map {name}=COLUMN",
            )
        if column is not None:
            found[name] = _target_kind(name)(column=column)
        elif name not in _OPTIONAL:
            lacking.append(_Lacking(name))
    return found, lacking


def _names(target: TextTarget) -> Alternatives | None:
    return None if isinstance(target.column, int) else target.column


def _group_by(profile: Profile) -> tuple[Alternatives, ...]:
    return profile.group.by if profile.group else ()


def _first_present(source: Source, names: Alternatives) -> str:
    """几个名字里文件有的第一个；都没有就是第一个。"""
    real = [column for column in source.columns if column not in source.added]
    return next((name for name in as_names(names) if find_column(real, name)), as_names(names)[0])


def _choose_column(source: Source, target: TextTarget) -> TextTarget | None:
    """几个名字换成文件里的那一列；没有这样的列就是 None。"""
    names = _names(target)
    if names is None:
        return target
    column = find_column(
        [column for column in source.columns if column not in source.added], _first_present(source, names)
    )
    return target.from_column(column) if column is not None else None


def _source_expression(source: Source, name: str, target: TextTarget) -> pl.Expr:
    if target.constant is not None:
        return pl.lit(target.constant)
    text = target.expression or target.aggregate_expression
    if text is not None:
        expression = parse_expression(text)
    elif isinstance(target.column, int):
        if target.column > len(source.columns):
            raise ImportFileError(
                source.path, f"the file has {len(source.columns)} columns, {name} should be column {target.column}"
            )
        expression = pl.col(source.columns[target.column - 1])
    else:
        expression = pl.col(str(target.column))
    return _translate(expression, target.values) if target.values else expression


def _translate(expression: pl.Expr, values: Mapping[str, str]) -> pl.Expr:
    """平台的叫法换成存的叫法；不在表里的照旧。"""
    text = expression.cast(pl.String)
    folded = {word.casefold(): stored for word, stored in values.items()}
    return text.str.strip_chars().str.to_lowercase().replace_strict(folded, default=text, return_dtype=pl.String)


def _explain(source: Source, profile: Profile | None, lacking: Sequence[_Lacking]) -> ImportFileError:
    """缺的列一次说全，各带一个最像的。"""
    if profile is not None and list(lacking) == [_Lacking("shop")]:
        problem = f"there is no column for shop: the profile {profile.name}".rstrip() + " does not say which shop it is"
        return ImportFileError(source.path, problem, advice="give --shop NAME")
    proposed = propose_columns(source, [gap.target for gap in lacking if gap.target and gap.column is None])
    hints = {
        gap: proposed.get(gap.target or "") if gap.column is None else _closest(source, gap.column) for gap in lacking
    }
    names = {gap: repr(gap.column) if gap.column is not None else f"for {gap.target}" for gap in lacking}
    if len(lacking) == 1:
        hint = f", the closest is {hints[lacking[0]]!r}" if hints[lacking[0]] else ""
        problem = f"there is no column {names[lacking[0]]}{hint}"
    else:
        shown = [names[gap] + (f" (the closest is {hints[gap]!r})" if hints[gap] else "") for gap in lacking]
        problem = f"there are no columns {', '.join(shown)}"
    problem += f"; the file has {', '.join(map(repr, source.columns[:50]))}"
    advice = [_map_option(gap.target, hints[gap]) for gap in lacking if gap.target and gap.column is None]
    if not advice:
        return ImportFileError(source.path, problem, advice="correct the name, or give another with --map")
    said = f"name {'it' if len(lacking) == 1 else 'them'} with {' '.join(advice)} (--map NAME= if the file has none)"
    return ImportFileError(source.path, problem, advice=said + _shop_advice(lacking))


def _map_option(target: str, proposed: str | None) -> str:
    return f"--map {shlex.quote(f'{target}={proposed}')}" if proposed else f"--map {target}=COLUMN"


def _shop_advice(lacking: Sequence[_Lacking]) -> str:
    return ", or give --shop NAME" if any(gap.target == "shop" for gap in lacking) else ""


def _closest(source: Source, wanted: str) -> str | None:
    folded = {column.casefold(): column for column in source.columns}
    close = get_close_matches(wanted.casefold(), folded, n=1)
    return folded[close[0]] if close else None
