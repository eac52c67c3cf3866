"""各命令共用的选项与准备：连哪个栈、怎样输出。"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec

import click
import sqlalchemy as sa
from rich.console import Console

from bridge.cli.output import say_csv, say_json
from bridge.cli.tables import in_zone, table_of
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir, read_addresses
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine, normalize_url
from etl_assets.core.errors import SettingsError
from etl_assets.core.secret_files import read_secret

P = ParamSpec("P")
Format = Literal["table", "csv", "json"]
Decorator = Callable[[Callable[..., None]], Callable[..., None]]
DAGSTER_URL = "DAGSTER_POSTGRES_URL"
_PIPE_WIDTH = 200
_INSTEAD = {"ETL_NATS_URL": ("ETL_NATS_CONTEXT",)}
"""给了这个，就不必给那个。"""


class _Day(click.DateTime):
    """一个日子；click 自己印的 `[%Y-%m-%d]` 是给 Python 看的。"""

    def __init__(self) -> None:
        super().__init__(["%Y-%m-%d"])

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002  # click 规定的签名，下同
        return "YYYY-MM-DD"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not a day, write it as 2026-03-20", param, ctx)


DAY = _Day()


def with_stack(command: Callable[P, None]) -> Callable[P, None]:
    """加上 --state-dir：没有设的 ETL_* 地址取自正在运行的栈。"""

    @click.option(
        "--state-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="State folder of the stack to talk to [default: ETL_STATE_DIR or ~/.local/state/dayline].",
    )
    @wraps(command)
    def prepared(*args: P.args, **kwargs: P.kwargs) -> None:
        chosen = kwargs.pop("state_dir", None)
        use_stack(chosen if isinstance(chosen, Path) else None)
        command(*args, **kwargs)

    return prepared


def use_stack(state_dir: Path | None) -> None:
    """把栈的地址放进环境变量；自己设了的不动。明确指了文件夹而那里没有栈，就说出来。"""
    if state_dir is not None:
        os.environ["ETL_STATE_DIR"] = str(state_dir)
    use_dagster_url()
    addresses = read_addresses(default_state_dir())
    if addresses is None:
        if state_dir is not None:
            raise SettingsError(f"no stack is up in {state_dir}: start one with `etl up --state-dir {state_dir}`")
        return
    for name, value in addresses.environment().items():
        if state_dir is not None or not any(map(os.environ.get, (name, f"{name}_FILE", *_INSTEAD.get(name, ())))):
            os.environ[name] = value


def use_dagster_url() -> None:
    """Dagster 自己读 DAGSTER_POSTGRES_URL，不知道文件，也不懂 libpq 的几个主机。"""
    path = os.environ.get(f"{DAGSTER_URL}_FILE")
    if path and not os.environ.get(DAGSTER_URL):
        os.environ[DAGSTER_URL] = read_secret(Path(path), setting=f"{DAGSTER_URL}_FILE")
    if url := os.environ.get(DAGSTER_URL):
        parsed = normalize_url(url, setting=DAGSTER_URL).set(drivername="postgresql+psycopg2")
        os.environ[DAGSTER_URL] = parsed.render_as_string(hide_password=False)


def start_metrics_if_wanted(state_dir: Path | None = None, *, records: bool) -> None:
    """没有设 ETL_METRICS_PORT 的，什么也不载入。"""
    if get_bridge_settings().metrics_port:
        from bridge.operations.metrics_endpoint import start_metrics

        start_metrics(state_dir or default_state_dir(), records=records)


def timeout_option(default_seconds: float) -> Decorator:
    help_text = "Stop waiting after this many seconds."
    kind = click.FloatRange(min=0)
    return click.option(
        "--timeout", "timeout_seconds", type=kind, default=default_seconds, show_default=True, help=help_text
    )


@contextmanager
def transaction() -> Iterator[sa.Connection]:
    """ETL 的数据库里的一个事务；它不在、不让做，是一句说得出怎么办的错误。"""
    with translated_errors(), get_engine().begin() as connection:
        yield connection


def console() -> Console:
    """不在终端里（管道、日志）就不按 80 列折行。"""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    how: Format,
    *,
    title: str | None = None,
    cut: str | None = None,
) -> None:
    """同样的行，三种样子；表格给人看，CSV 与 JSON 给程序。时刻都按业务时区，给程序的带着时差。

    :param cut: 表格里放不下就截短、不折行的那一列。
    """
    records = [{column: in_zone(row[column]) for column in columns} for row in rows]
    if how == "json":
        say_json(records)
    elif how == "csv":
        say_csv(records, columns)
    else:
        console().print(table_of(records, columns, title=title, cut=cut))


def confirm(question: str, *, yes: bool) -> None:
    """在终端上问一句，不要就结束；没有人可问的地方要写明 --yes。"""
    if not yes and not ask(question):
        raise click.Abort


def ask(question: str) -> bool:
    """:raises click.UsageError: 没有终端可问。"""
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: add --yes")
    return click.confirm(question, err=True)
