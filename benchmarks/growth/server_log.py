"""服务器数出来的语句：让内嵌的 PostgreSQL 把每条语句写进日志（轮子里没有 pg_stat_statements），数一个工人进程的。"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"\S+ \S+ UTC \[(\d+)\] \S*?\((\d+)\) (\S+) LOG:  (?:statement|execute [^:]*): ?(.*)")
_TRANSACTION = re.compile(r"BEGIN|COMMIT|ROLLBACK|SAVEPOINT|RELEASE|SET default_transaction_isolation|;$")
_DATA = "etl"
"""数据一侧的引擎的 application_name；Dagster 的存储没有名字。"""
_CLAIM, _HEARTBEAT, _END = (
    "INSERT INTO etl.leases",
    "UPDATE etl.leases SET expires_at",
    "UPDATE runs SET status='SUCCESS'",
)
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Statements:
    """从领取到运行 SUCCESS，一个工人进程发出的语句，一条消息里的几条算一条；心跳的连接、闲着也发的不算，它们只看时间。"""

    data: int
    """数据一侧的，开始与结束事务的除外。"""
    data_transactions: int
    """数据一侧开始与结束事务、保存点的。"""
    dagster: int
    """Dagster 的存储的，全部。"""

    @property
    def all(self) -> int:
        return self.data + self.data_transactions + self.dagster


class ServerLog:
    """一台内嵌 PostgreSQL 的日志。"""

    def __init__(self, server_folder: Path) -> None:
        self._data = server_folder / "data"
        self._log = server_folder / "postgres.log"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """期间每条语句都写日志。"""
        self._set_log_statement("all")
        try:
            yield
        finally:
            self._set_log_statement("none")

    def size(self) -> int:
        return self._log.stat().st_size

    def texts(self, start: int, worker_pid: int) -> set[str]:
        """日志的第 start 个字节之后，这个工人发出的语句的第一行。"""
        return {text for _, _, text, _ in self._sent(start, worker_pid)}

    def count(self, start: int, worker_pid: int, beside: Set[str]) -> Statements:
        """日志的第 start 个字节之后，这个工人从领取到 SUCCESS 的语句。

        :param beside: 不算的语句的第一行。
        :raises RuntimeError: 日志里没有一头一尾。
        """
        sent = self._sent(start, worker_pid)
        claims = [place for place, (_, _, _, whole) in enumerate(sent) if _CLAIM in whole]
        ends = [place for place, (_, _, text, _) in enumerate(sent) if text.startswith(_END)]
        if not claims or not ends:
            raise RuntimeError(f"no claim, or no end of a run, by process {worker_pid} in {self._log}")
        beating = {backend for backend, _, text, _ in sent if text.startswith(_HEARTBEAT)}
        counted: dict[str, int] = defaultdict(int)
        for backend, application, text, _ in sent[claims[0] : ends[0] + 1]:
            is_transaction = bool(_TRANSACTION.match(text))
            if backend not in beating and (is_transaction or text not in beside):
                of_data = "data_transactions" if is_transaction else "data"
                counted[of_data if application == _DATA else "dagster"] += 1
        return Statements(**counted)

    def _sent(self, start: int, worker_pid: int) -> list[tuple[str, str, str, str]]:
        """后端的 pid、application_name、语句的第一行（空行不算）与全文；日志里续行以制表符开头。"""
        ports = _ports_of(worker_pid)
        sent: list[tuple[str, str, str, str]] = []
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(start)
            is_ours = False
            for line in log:
                if match := _LINE.match(line):
                    is_ours = int(match[2]) in ports
                    if is_ours:
                        sent.append((match[1], match[3], match[4].strip(), match[4].strip()))
                elif is_ours and line.startswith("\t"):
                    backend, application, text, whole = sent[-1]
                    sent[-1] = (backend, application, text or line.strip(), f"{whole} {line.strip()}")
                elif not line.startswith("\t"):
                    is_ours = False
        return sent

    def _set_log_statement(self, value: str) -> None:
        """改设置文件，让服务器再读一遍：应用的角色不是超级用户。"""
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"\nlog_statement = '{value}'\nlog_line_prefix = '%m [%p] %r %a '\n")
        os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), signal.SIGHUP)
        time.sleep(_SETTLE_SECONDS)


def _ports_of(pid: int) -> set[int]:
    """这个进程在本机的 TCP 端口：由此认出它的连接。"""
    sockets = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in sockets}
