"""汇总各组命令，把错误变成一句话与退出码。"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli import abort
from bridge.cli.exit_codes import ExitCode
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, EtlError, SettingsError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# 命令 → (模块, 帮助的第一行)：列帮助时不必导入模块
_COMMANDS = {
    "up": ("bridge.cli.stack", "Start the stack in the foreground: servers, UI, listener, workers."),
    "env": ("bridge.cli.stack", "Print the addresses of the stack that is up."),
    "init-db": ("bridge.cli.stack", "Create or upgrade the schema."),
    "listen": ("bridge.cli.processes", "Run the event listener in the foreground."),
    "worker": ("bridge.cli.processes", "Run warm workers in the foreground."),
    "import": ("bridge.cli.imports", "Import a CSV or Excel file into raw_orders and announce it."),
    "profiles": ("bridge.cli.profiles", "List the profiles for the platforms' exports; write one for a new file."),
    "types": ("bridge.cli.types", "List, set or remove what the platforms' order types count as."),
    "imports": ("bridge.cli.imports", "List the imports and what became of their rows."),
    "show": ("bridge.cli.show", "Show rows of the result tables, or rejected raw rows."),
    "publish": ("bridge.cli.events", "Publish one event, validated."),
    "wait": ("bridge.cli.events", "Wait until an import is in the tables."),
    "backfill": ("bridge.cli.backfill", "Materialize a range of days again, through the same queue."),
    "withdraw": ("bridge.cli.withdraw", "Take an import back: its rows leave the tables."),
    "replay": ("bridge.cli.replay", "Ask again for the days of events in the stream."),
    "dlq": ("bridge.cli.dlq", "List, show, retry or drop dead letters of events and tasks."),
    "prune": ("bridge.cli.prune", "Delete what is kept long enough: old runs, events, bookkeeping."),
    "compare": ("bridge.cli.compare", "Compare the results in two schemas, column by column."),
    "status": ("bridge.cli.status", "Say whether all is well; what is due, running, held, queued, rejected."),
    "why": ("bridge.cli.why", "Say where a row comes from: file, import, event, run, versions, people."),
    "alerts": ("bridge.cli.alerts", "List what is wrong and who was told; send a test message."),
    "doctor": ("bridge.cli.doctor", "Look at everything; say what is wrong and what to do."),
    "nats-accounts": ("bridge.cli.nats_accounts", "Write users of least privilege for NATS, one per role."),
    "grants": ("bridge.cli.grants", "Print the SQL that gives each role what it needs in PostgreSQL."),
    "demo": ("bridge.cli.demo", "Run the whole flow on sample data, check it, and stop."),
    "completion": ("bridge.cli.completion", "Print the script that completes commands with Tab in your shell."),
}


class _LazyGroup(click.Group):
    """用到的命令才导入它的模块。"""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click 规定的签名，下同
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), f"{cmd_name.replace('-', '_')}_command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Polars 自己也听着 Ctrl-C
            abort.wait_for_the_end()
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=summary)
            for name, (_, summary) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dayline", prog_name="etl")
def cli() -> None:
    """Vectorized, queued and visible ETL: orders, customers and leads by day."""


def _return_to_where_pdm_was_called() -> None:
    """`pdm run` 先去了项目的根；人给的文件名是从他所在的文件夹说的。

    变量会传给它的子孙：已不在项目的根里的那一个，自己换过文件夹。
    """
    called_in = os.environ.get("PDM_RUN_CWD")
    if called_in and os.environ.get("PDM_PROJECT_ROOT") == str(Path.cwd()):
        os.chdir(called_in)


def run_command(arguments: Sequence[str] | None = None) -> None:
    """运行一个命令；已知的错误只印一句话，不印栈。"""
    _return_to_where_pdm_was_called()
    name = "dayline" if sys.argv[0].endswith("dayline") else "etl"
    try:
        cli.main(args=list(arguments) if arguments is not None else None, prog_name=name)
    except EtlError as error:
        sys.exit(_say_error(error))
    except BrokenPipeError:
        # `etl show … | head`：读的人走了，安静地结束
        _write_no_more()
        sys.exit(ExitCode.FAILED)
    except OSError as error:
        # `etl show … > FILE` 写到一半；别的 OSError 是程序的错，要看栈
        if error.errno not in _FULL:
            raise
        _write_no_more()
        sys.stderr.write(f"error: {error.strerror}: what was printed is cut off; free some space, then try again\n")
        sys.exit(ExitCode.FAILED)


def _write_no_more() -> None:
    """不然解释器收尾时还要写一次，再错一次。"""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_error(error: EtlError) -> ExitCode:
    """这几个模块带来 SQLAlchemy 与 structlog：出错的命令早就导入了，`etl --help` 不该等它们。"""
    from bridge.cli.output import say
    from bridge.errors import BridgeError
    from etl_assets.core.log import redact

    say(f"error: {redact(str(error))}", err=True)
    is_unanswered = isinstance(error, SettingsError | DatabaseUnavailableError | DatabaseRefusedError | BridgeError)
    return ExitCode.NO_ANSWER if is_unanswered else ExitCode.FAILED
