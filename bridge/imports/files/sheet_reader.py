"""子进程：用 fastexcel 把一张工作表读成文字。

读坏了的文件时，原生的读取器会 panic，甚至让分配器终止整个进程；那时结束的只是这个子进程。
标准输入是文件，参数是工作表的名字；标准输出先是一行 JSON，再是 Arrow IPC。
"""

from __future__ import annotations

import json
import resource
import sys

import fastexcel

MAX_MEMORY_BYTES = 4 << 30


def main(wanted: str | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        book = fastexcel.read_excel(sys.stdin.buffer.read())
        names = book.sheet_names
        # 不跳过开头的空行，否则行号不是工作表的行号
        sheets = {
            name: book.load_sheet(name, header_row=None, skip_rows=0, dtypes="string")
            for name in names
            if wanted in (None, name)
        }
    except fastexcel.FastExcelError as error:
        _answer(error=str(error).splitlines()[0])
        return
    filled = [name for name, sheet in sheets.items() if sheet.height and sheet.visible == "visible"]
    chosen = wanted or (filled[0] if len(filled) == 1 else None)
    _answer(names=names, filled=filled)
    if chosen in sheets:
        sheets[chosen].to_polars().write_ipc(sys.stdout.buffer)


def _answer(**facts: object) -> None:
    sys.stdout.buffer.write(json.dumps(facts).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
