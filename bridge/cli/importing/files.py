"""导入一个或好几个文件，各是一次导入：一个坏了，别的照样导入，最后说哪些导入了、哪些没有。"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bridge.cli.abort import say_on_abort
from bridge.cli.importing.announcing import announce
from bridge.cli.importing.report import say_report
from bridge.cli.output import cell, say, say_json
from bridge.imports.inputs import Input, Inputs
from bridge.imports.known_files import KnownFileError
from bridge.imports.reading import ImportReport
from bridge.imports.reading import Progress as OnProgress
from bridge.imports.rules.errors import ProfileError
from etl_assets.core.errors import PermanentError
from etl_assets.core.log import redact
from etl_assets.core.settings import EtlSettings

_SHOWN_LEFT_OUT = 20
ImportOne = Callable[[Input, OnProgress], ImportReport]


@dataclass
class ImportedFiles:
    """好几个文件各自怎样了；known 是文件夹里导入过的，不算失败。"""

    imported: list[ImportReport] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def summarize(self, files: Sequence[Input]) -> list[str]:
        done = len(self.imported) + len(self.known) + len(self.failed)
        orders = sum(report.rows for report in self.imported)
        was = "read" if all(report.import_id is None for report in self.imported) and self.imported else "imported"
        lines = [f"{len(self.imported)} of {len(files)} files {was}, {orders:,} orders"]
        lines += [f"imported before, left out: {', '.join(self.known)}"] if self.known else []
        lines += [f"not {was}: {', '.join(self.failed)}"] if self.failed else []
        left = [item.path.name for item in files[done:]]
        return lines + ([f"not imported, this ended before: {', '.join(left)}"] if left else [])


class FileImporter:
    """一个命令的导入：进度条按字节走过全部文件，只在终端上。

    :param import_one: 导入一个文件。
    """

    def __init__(self, import_one: ImportOne, settings: EtlSettings, *, as_json: bool) -> None:
        self._import_one = import_one
        self._settings = settings
        self._as_json = as_json
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        # 标准输出不改道：导入的 id 可能正被别的程序收着
        self._bar = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not sys.stderr.isatty(),
        )

    def run(self, inputs: Inputs) -> bool:
        """返回是否都好。只给了一个文件时，它的错误照样抛出。"""
        if inputs.left_out:
            more = len(inputs.left_out) - _SHOWN_LEFT_OUT
            say(
                f"left out: {', '.join(inputs.left_out[:_SHOWN_LEFT_OUT])}"
                + (f" and {more:,} others" if more > 0 else ""),
                err=True,
            )
        task = self._bar.add_task("", total=sum(item.size for item in inputs.files))
        if not inputs.is_single:
            return self._run_several(inputs.files, task)
        self._finish(self._import(inputs.files[0], task, before=0), indent=2)
        return True

    def _run_several(self, files: Sequence[Input], task: TaskID) -> bool:
        results, before = ImportedFiles(), 0
        try:
            for position, item in enumerate(files, 1):
                say(f"{item.path.name} ({position} of {len(files)})", err=True)
                if imported := ", ".join(str(report.import_id) for report in results.imported if report.import_id):
                    say_on_abort(
                        f"aborted, nothing of {item.path.name} was imported; imported and announced before: {imported}"
                    )
                self._import_next(item, task, before, results)
                before += item.size
        finally:
            for line in results.summarize(files):
                say(line, err=True)
        return not results.failed

    def _import_next(self, item: Input, task: TaskID, before: int, results: ImportedFiles) -> None:
        """:raises EtlError: 不是这个文件的事：别的也会一样。"""
        try:
            report = self._import(item, task, before)
        except ProfileError:
            raise
        except PermanentError as error:
            known = error.known if isinstance(error, KnownFileError) else None
            is_fine = known is not None and not item.is_named
            (results.known if is_fine else results.failed).append(item.path.name)
            said = redact(str(error))
            say(said if is_fine else f"error: {said}", err=True)
            if self._as_json:
                say_json(
                    {"file": item.path.name, "error": said, "imported_before": known and asdict(known)}, indent=None
                )
        else:
            results.imported.append(report)
            self._finish(report, indent=None)

    def _import(self, item: Input, task: TaskID, before: int) -> ImportReport:
        self._bar.update(task, description=cell(item.path.name).plain, completed=before)
        self._bar.start()
        try:
            return self._import_one(item, lambda done, total: self._advance(task, before, item.size, done, total))
        finally:
            self._bar.stop()

    def _advance(self, task: TaskID, before: int, size: int, done: int, total: int) -> None:
        """压缩包里的字节按压缩包的大小折算。"""
        self._bar.update(task, completed=before + (size * done // total if total else 0))

    def _finish(self, report: ImportReport, *, indent: int | None) -> None:
        if report.import_id is not None:
            announce(report.import_id)
        if self._as_json:
            say_json(asdict(report), indent=indent)
        else:
            say_report(report, self._settings)
