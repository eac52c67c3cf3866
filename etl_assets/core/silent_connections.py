"""哑了的连接：服务器或路由器不再回话，也不断开。等在上面的线程自己永远醒不来，由这里从外面切断。

一条线哑了，就是两头都在等对方：我们等了好几秒，一个字节也没有进出；而服务器在一条新的连接上说，它在等我们，或者没有这个会话了。
真在做的、在等锁的、客户端自己停下来的 COPY，都不是这样；问不到服务器（停了、冻住了）的时候也不动：换一条连接也做不了什么。
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

_PATIENCE: Mapping[str, int] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    # 毫秒。不能再短：对方的接收窗口关着（磁盘慢的服务器不读 COPY）也算在里面
    "tcp_user_timeout": 30_000,
}

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
"""没有一个字节进出这么久，才去问服务器。"""
_PROBE_SECONDS = 5
LAST_CHANCE_SECONDS = 1.0
"""问过之后再等这么久：回答也许正在路上。"""
_TCP_INFO = getattr(socket, "TCP_INFO", 0)
_MOVED = slice(120, 136)
"""struct tcp_info 里的 tcpi_bytes_acked 与 tcpi_bytes_received：对方确认了多少字节，我们收到了多少。"""

# 年纪相符才是我们的会话：服务器重启之后，别人的会话可能有同样的 pid
_SESSIONS = """
FROM unnest(%(pids)s::int[], %(ages)s::float8[]) AS own (pid, age) {join} JOIN pg_stat_activity AS session
    ON session.pid = own.pid AND extract(epoch FROM clock_timestamp() - session.backend_start) > own.age - 10
"""
# 连自己的 pid 也对不上，就是中间有连接池：它给的 pid 都不是真的，什么也问不出来
_ASK = f"""
SELECT own.pid, session.pid IS NULL OR session.wait_event_type = 'Client' {_SESSIONS.format(join="LEFT")}
WHERE pg_backend_pid() = %(own_pid)s
"""
# 服务器还在等我们，占着锁，要到 idle_in_transaction_session_timeout 才会自己走
_END = f"SELECT pg_terminate_backend(own.pid) {_SESSIONS.format(join='')}"

Result = TypeVar("Result")
_wait = psycopg.Connection.wait


def libpq_patience(url: sa.URL) -> dict[str, int]:
    """连不上的、对方的内核没有回音的，libpq 与这一边的内核自己放弃；地址里写明了的听地址的。"""
    return {name: value for name, value in _PATIENCE.items() if name not in url.query}


class WatchedConnection(psycopg.Connection[Any]):
    """看得出有没有线程正等在驱动里：COPY 中途停下来准备下一块的客户端，libpq 也说它忙。"""

    is_waiting = False
    waits = 0
    """等过几次：没有变，就没有人用过它。"""

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """COPY 读出的每一行都经过这里：抛错时不收尾也不要紧，那时 libpq 不忙了。"""
        self.is_waiting = True
        self.waits += 1
        result = _wait(self, gen, interval, timeout)
        self.is_waiting = False
        return result


@dataclass(frozen=True)
class _Wait:
    """一次等待：连接没换，进出的字节数没变，就还是它。"""

    connection: Any
    moved: bytes
    since: float

    def is_still(self, later: _Wait | None) -> bool:
        return later is not None and later.connection is self.connection and later.moved == self.moved


class SilenceWatch:
    """一个引擎的守望者；psycopg 3 与 psycopg2 的引擎都行。有连接时才有它的线程。

    :param limit_seconds: 等了这么久，这么久什么也问不出来（没有回答，或者中间有连接池），就切断。服务器说在等锁、在做的，等多久
        都不切断：它照样做下去，再做一次就是两次。
    :param is_hasty: 等了 limit_seconds 就切断，不管服务器怎么说：里面的语句做两次也无妨。
    """

    def __init__(self, engine: sa.Engine, *, limit_seconds: float, is_hasty: bool = False) -> None:
        self._limit_seconds = limit_seconds
        self._is_hasty = is_hasty
        self._answered_at = float("-inf")
        self._errors = engine.dialect.loaded_dbapi.Error
        self._connected_at: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._waits: dict[Any, _Wait] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_connected = False
        self._silent_at = 0.0
        self._cannot_ask = RepeatedWarning(logger, "the server cannot be asked about silent connections now")
        sa.event.listen(engine, "do_connect", self._connect)
        sa.event.listen(engine, "checkout", self._check)

    def _connect(
        self, dialect: sa.Dialect, record: Any, arguments: Sequence[Any], parameters: Mapping[str, Any]
    ) -> Any:
        """刚连上就开始看：SQLAlchemy 借出之前还要问几句，那几句也可能没有回音。"""
        connect: Callable[..., Any] = WatchedConnection.connect if dialect.driver == "psycopg" else dialect.connect
        self._open_another = partial(connect, *arguments, **parameters)
        connection = self._open_another()
        with self._lock:
            self._connected_at[record] = time.monotonic()
            self._has_connected = True
            if self._thread is None or not self._thread.is_alive():  # fork 之后的子进程里它不在了
                self._thread = threading.Thread(target=self._watch, name="silence-watch", daemon=True)
                self._thread.start()
        return connection

    def _check(self, _connection: Any, record: Any, _proxy: Any) -> None:
        """一条哑了，同时的别的多半也哑了：不一条一条地再等一遍。"""
        if self._connected_at[record] < self._silent_at:
            raise sa.exc.InvalidatePoolError

    def _watch(self) -> None:
        while self._is_needed():
            time.sleep(min(LOOK_SECONDS, self._limit_seconds / 4))
            try:
                self._look()
            except Exception:
                logger.exception("cannot look after the database connections")

    def _is_needed(self) -> bool:
        """没有连接了、上一眼以来也没有新的，线程就结束；下一个连接再起一个。"""
        with self._lock:
            needed = self._has_connected or any(record.dbapi_connection is not None for record in self._connected_at)
            self._has_connected = False
            if not needed:
                self._thread = None
        return needed

    def _look(self) -> None:
        with self._lock:
            connected = list(self._connected_at)
        now = time.monotonic()
        waits = {record: wait for record in connected if (wait := self._wait_on(record.dbapi_connection, now))}
        before = self._waits
        self._waits = {
            record: before[record] if record in before and before[record].is_still(wait) else wait
            for record, wait in waits.items()
        }
        late = {record: wait for record, wait in self._waits.items() if now - wait.since > self._limit_seconds}
        quiet = {
            record: wait
            for record, wait in self._waits.items()
            if now - wait.since > PATIENCE_SECONDS and record not in late
        }
        if self._is_hasty:
            self._cut(late.values())
            late = {}
        if quiet or late:
            self._ask({**quiet, **late})
        if time.monotonic() - self._answered_at > self._limit_seconds:
            self._cut([wait for record, wait in late.items() if self._is_same(record, wait)])

    def _wait_on(self, connection: Any, now: float) -> _Wait | None:
        """有线程正等在这条连接上；不是 Linux 的 TCP 连接看不出来，也是 None。"""
        if connection is None or connection.info.transaction_status != TransactionStatus.ACTIVE:
            return None
        if not getattr(connection, "is_waiting", True):
            return None
        with suppress(OSError, self._errors), _socket_of(connection) as own:
            return _Wait(connection, own.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _MOVED.stop)[_MOVED], now)
        return None

    def _is_same(self, record: Any, wait: _Wait) -> bool:
        """问着的时候它没有动。"""
        return wait.is_still(self._wait_on(record.dbapi_connection, 0))

    def _ask(self, waits: Mapping[Any, _Wait]) -> None:
        """在一条新的连接上问服务器；问不到就下一眼再问。"""
        try:
            with closing(self._open_another(connect_timeout=_PROBE_SECONDS)) as probe, _at_most(_PROBE_SECONDS, probe):
                self._ask_on(probe, waits)
        except self._errors as error:
            self._cannot_ask.say(type(error).__name__, error=str(error).strip())

    def _ask_on(self, probe: Any, waits: Mapping[Any, _Wait]) -> None:
        pids = {record: wait.connection.info.backend_pid for record, wait in waits.items()}
        ages = {record: time.monotonic() - self._connected_at[record] for record in waits}
        with closing(probe.cursor()) as cursor:
            asked = {"pids": list(pids.values()), "ages": list(ages.values())}
            cursor.execute(_ASK, {"own_pid": probe.info.backend_pid, **asked})
            is_silent = dict(cursor.fetchall())
            if is_silent:
                self._answered_at = time.monotonic()
            if not any(is_silent.values()):
                return
            time.sleep(LAST_CHANCE_SECONDS)
            silent = {
                record: wait
                for record, wait in waits.items()
                if is_silent[pids[record]] and self._is_same(record, wait)
            }
            try:
                cursor.execute(
                    _END, {"pids": [pids[record] for record in silent], "ages": [ages[record] for record in silent]}
                )
            finally:
                self._cut(silent.values())

    def _cut(self, waits: Collection[_Wait]) -> None:
        if waits:
            self._silent_at = time.monotonic()
        for wait in waits:
            logger.warning(
                "a database connection fell silent and is cut", seconds=round(time.monotonic() - wait.since, 1)
            )
            _shut(wait.connection)


@contextmanager
def _socket_of(connection: Any) -> Iterator[socket.socket]:
    """复制的描述符；它的线程恰好这时关了连接，号码已归了别的文件，就不碰。"""
    with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as own:
        if connection.closed:
            raise OSError("the connection was closed just now")
        yield own


def _shut(connection: Any) -> None:
    """等在上面的线程立刻得到“连接断了”。"""
    with suppress(Exception), _socket_of(connection) as own:
        own.shutdown(socket.SHUT_RDWR)


@contextmanager
def _at_most(seconds: float, connection: Any) -> Iterator[None]:
    """问的这条也可能哑。"""
    timer = threading.Timer(seconds, _shut, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
