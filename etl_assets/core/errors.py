"""错误的基类与重试分类：类告诉调度者重试有没有用，消息告诉操作者下一步做什么。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

FailureKind = Literal["transient", "refused", "permanent", "unknown"]
"""refused 也是 transient 的一种：数据库在，却不让做。"""

DO_NOT_ADD_UP = "the rows do not add up"
"""运行失败的缘由里有这一句的，是账不平。"""

_SHOWN_DEVIATIONS = 5
_SHOWN_SHOPS = 5


class EtlError(Exception):
    """本包所有错误的基类。消息用英文一句话，说明发生了什么、该怎么办。

    不属于下面两类的是说不准的：重试几次，还不成就要人来看。
    """

    kind: ClassVar[FailureKind] = "unknown"
    """是谁的错、重试有没有用；随着错误走，也写进 Dagster 记下的失败里。"""


class TransientError(EtlError):
    """原因在外面，它过去了就会成功：数据库暂时不在、锁等待超时、磁盘满了、缺表缺权限；一直重试，不计次数。"""

    kind: ClassVar[FailureKind] = "transient"


class StatementTimeoutError(EtlError):
    """一条语句超过了时限，或被人取消：可能就是太大了，小一些会成。"""


class PermanentError(EtlError):
    """重试没有用，要人来改：设置错、数据违约。"""

    kind: ClassVar[FailureKind] = "permanent"


class SettingsError(PermanentError):
    """某个 ETL_* 设置的值不可用；消息含变量名、收到的值、允许的值。命令遇到就结束，但不是哪个事件、任务、日子的错。"""

    kind: ClassVar[FailureKind] = "transient"


class DatabaseUnavailableError(TransientError):
    """连不上 PostgreSQL，或版本太旧；消息不含密码。"""


class DatabaseRefusedError(TransientError):
    """PostgreSQL 在，却不让我们做：缺表、缺权限、只读、口令不对、文件坏了。要人来改，改好就自己接着做。"""

    kind: ClassVar[FailureKind] = "refused"


@dataclass(frozen=True)
class TableDeviation:
    """一处与约定不符：place 是 `schema.table`、`schema.table.column` 或 `schema.table (column, …)`。"""

    place: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.place} is {self.found}, it must be {self.wanted}"


class TableContractError(DatabaseRefusedError):
    """目标表或要读的表与约定不符；什么也没写。不是哪一天的错。"""

    def __init__(self, deviations: Sequence[TableDeviation]) -> None:
        self.deviations = tuple(deviations)
        shown = "; ".join(map(str, deviations[:_SHOWN_DEVIATIONS]))
        more = len(deviations) - _SHOWN_DEVIATIONS
        super().__init__(
            f"the tables differ from the contract, nothing was written: {shown}{f'; and {more} more' if more > 0 else ''}; "
            "correct the tables (or ETL_TARGET_SCHEMA), days that are due are then made by themselves"
        )


class TooManyDeletesError(PermanentError):
    """一次运行要删除的订单超过 ETL_MAX_DELETE_SHARE，或只因店铺改了名才要删，而没有人明确允许。"""

    def __init__(
        self, *, deletes: int, orders: int, first_day: str, last_day: str, vanished_shops: Sequence[str] = ()
    ) -> None:
        self.deletes = deletes
        self.orders = orders
        self.first_day = first_day
        self.last_day = last_day
        self.vanished_shops = tuple(vanished_shops)
        shown = ", ".join(map(repr, self.vanished_shops[:_SHOWN_SHOPS]))
        more = len(self.vanished_shops) - _SHOWN_SHOPS
        why = (
            f"shop_configs no longer knows {shown}{f' and {more} more shops' if more > 0 else ''}, whose raw rows are still in scope; "
            "name it there again, or"
            if self.vanished_shops
            else "more than ETL_MAX_DELETE_SHARE allows;"
        )
        super().__init__(
            f"refusing to delete {deletes} of {orders} orders of {first_day}..{last_day}: {why} if it is meant, run "
            f"`etl backfill --from {first_day} --to {last_day} --allow-deletes`"
        )


class RunCancelledError(PermanentError):
    """有人取消了这个运行；什么也没写。"""

    def __init__(self) -> None:
        super().__init__(
            "the run was cancelled, what was not committed is undone; its days wait until something asks for them again"
        )


class LeaseLostError(TransientError):
    """本次运行的租约已过期或归了别人，数据事务必须回滚。"""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        super().__init__(
            f"the lease of run {run_id} has expired or gone to another worker; nothing was written, the new holder does the work"
        )
