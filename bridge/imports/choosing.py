"""文件由表头认出是哪个平台的导出，就用随包的那个配置。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bridge.imports.files.cells import Source
from bridge.imports.files.completing import complete
from bridge.imports.files.source import open_source
from bridge.imports.orders.headers import find_column, fold_name
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import (
    FileFormat,
    Platform,
    Profile,
    as_names,
    load_profile,
    override_format,
    shipped_platforms,
    shipped_profiles,
)

# 只管打开之后的键；别的键与打开时的一样，就不必再打开一次
_AFTER_OPENING = {"optional", "fill_down", "numbers", "decimal"}


@dataclass(frozen=True)
class Opened:
    """打开了的文件、用的配置、合在一起的样子；chosen：配置是由表头认出来的。"""

    source: Source
    profile: Profile | None
    file: FileFormat
    chosen: bool = False


def open_file(path: Path, file: FileFormat, profile: Profile | None, *, choose: bool) -> Opened:
    """打开文件；choose 而表头合得上一个随包的配置，就用它。人自己说了一单的几行是什么（lines）的，不再认。

    :param file: 命令行说了的样子；有配置时已经合在一起。
    :raises ImportFileError: 文件不能读，或者有两个配置同样合得上。
    """
    if profile is not None or not choose or not file.header or file.lines:
        return Opened(open_source(path, file), profile, file)
    try:
        source = open_source(path, file)
    except ImportFileError:
        found = _choose_unread(path, file)
        if found is None:
            raise
        return found
    chosen = choose_profile(source)
    if chosen is None:
        return Opened(source, None, file)
    wanted = _with_options(chosen, file)
    if wanted.model_dump(exclude=_AFTER_OPENING) == file.model_dump(exclude=_AFTER_OPENING):
        return Opened(complete(source, wanted), chosen, wanted, chosen=True)
    return Opened(open_source(path, wanted), chosen, wanted, chosen=True)


def choose_profile(source: Source) -> Profile | None:
    """认得最细的那个配置。

    :raises ImportFileError: 两个同样细。
    """
    fitting = {name: _detail(platform) for name, platform in shipped_platforms().items() if fits(source, platform)}
    names = [name for name, detail in fitting.items() if detail == max(fitting.values())]
    if len(names) > 1:
        raise ImportFileError(
            source.path,
            f"the headers fit the profiles {' and '.join(names)}",
            advice="say which with --profile NAME, or --profile none",
        )
    return load_profile(shipped_profiles()[names[0]]) if names else None


def _choose_unread(path: Path, file: FileFormat) -> Opened | None:
    """认不出引号之类算不算数的文件：说了样子的配置照它的样子读，表头合得上就是它的。"""
    for name in shipped_platforms():
        profile = load_profile(shipped_profiles()[name])
        if profile.file.separator is None:
            continue
        wanted = _with_options(profile, file)
        try:
            source = open_source(path, wanted)
        except ImportFileError:
            continue
        chosen = choose_profile(source)
        if chosen is not None and chosen.name == name:
            return Opened(source, profile, wanted, chosen=True)
    return None


def _with_options(profile: Profile, file: FileFormat) -> FileFormat:
    return override_format(profile.file, file.model_dump(exclude_defaults=True))


def _detail(platform: Platform) -> int:
    return len(platform.headers) + len(platform.where)


def fits(source: Source, platform: Platform) -> bool:
    real = {fold_name(column) for column in source.columns if column not in source.added}
    if not all(any(fold_name(name) in real for name in as_names(names)) for names in platform.headers):
        return False
    return all(_holds(source, column, words) for column, words in platform.where.items())


def _holds(source: Source, name: str, words: Iterable[str]) -> bool:
    """文件开头的一块里，那一列有没有这些值之一。"""
    column = find_column(source.columns, name)
    block = next(iter(source.reread()), None)
    if column is None or block is None:
        return False
    wanted = {fold_name(word) for word in words}
    return any(fold_name(value) in wanted for value in block.cells[column].drop_nulls().unique())
