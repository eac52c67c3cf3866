"""桥的错误：NATS、流、事件、任务队列；每个都说明操作者下一步做什么，并归入暂时或永久。

装错了、设错了的（kind 是 transient 的 PermanentError）：命令遇到就结束，但不是哪个事件、任务、日子的错。
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar

from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, EtlError, FailureKind, PermanentError, TransientError
from etl_assets.core.log import RepeatedWarning


class BridgeError(EtlError):
    """桥的所有错误的基类。"""


class NatsUnavailableError(BridgeError, TransientError):
    """NATS 连不上、断开了或没有在限期内回答；消息不含密码。"""


class NatsRefusedError(BridgeError, PermanentError):
    """NATS 拒绝了我们：口令不对、没有 JetStream、版本太旧。"""

    kind: ClassVar[FailureKind] = "transient"


class StreamMissingError(BridgeError, PermanentError):
    """没有流保存这个主题，消息无处可存。"""

    kind: ClassVar[FailureKind] = "transient"

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(
            f"no JetStream stream stores subject {subject}: start `etl up` or `etl listen` once, or add it to your stream"
        )


class StreamConflictError(BridgeError, PermanentError):
    """流或消费者存在，但不是我们能用的样子。"""

    kind: ClassVar[FailureKind] = "transient"

    def __init__(self, stream: str, problem: str, remedy: str) -> None:
        self.stream = stream
        self.problem = problem
        super().__init__(f"JetStream stream {stream} cannot be used: {problem}; {remedy}")


class StreamFullError(BridgeError, TransientError):
    """流满了：新消息被拒，旧消息不丢。"""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(
            f"the stream of {subject} is full and nothing was stored: let the listener and the workers catch up, "
            "or raise its limits or its account's"
        )


class PayloadTooLargeError(BridgeError, PermanentError):
    """消息超过了服务器或流的上限。"""

    def __init__(self, subject: str, *, size_bytes: int, limit: str) -> None:
        """:param limit: 哪一个上限，多大；操作者改的就是它。"""
        self.subject = subject
        self.size_bytes = size_bytes
        super().__init__(
            f"a message of {size_bytes} bytes for {subject} exceeds {limit}: send references instead of data, or raise the limit"
        )


class UnknownLaneError(BridgeError, PermanentError):
    """任务指定了不存在的车道。"""

    def __init__(self, lane: str, known: tuple[str, ...]) -> None:
        self.lane = lane
        super().__init__(f"there is no task lane {lane!r}: use one of {', '.join(known)}")


class CodeLocationError(BridgeError, PermanentError):
    """工人载入不了代码：没有人执行运行，它们留在队列里。"""

    kind: ClassVar[FailureKind] = "transient"

    def __init__(self, module: str, cause: BaseException) -> None:
        self.module = module
        self.place = _place_in_package(module, cause)
        kind, text = (
            type(cause).__name__,
            " ".join((cause.msg if isinstance(cause, SyntaxError) else str(cause)).split()),
        )
        super().__init__(
            f"the code of {module} cannot be loaded: {kind}: {text}{f' ({self.place})' if self.place else ''}; "
            "correct it and start the workers again, until then runs stay queued"
        )


class InvalidEventError(BridgeError, PermanentError):
    """事件不合约定：重试没有用，进死信流。"""

    def __init__(self, reason: str, *, is_garbage: bool = False) -> None:
        """:param is_garbage: 哪个版本也读不了：不是 JSON 对象，或者太大。"""
        self.reason = reason
        self.is_garbage = is_garbage
        super().__init__(f"the event is not usable: {reason}; correct its publisher")


class InvalidSubjectError(BridgeError, PermanentError):
    """不是一个可以发布的主题：流会存下它，却没有监听器听得到。"""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(
            f"{subject!r} is not a subject to publish to: words joined by single dots, without blanks, * and >"
        )


class LetterError(BridgeError, PermanentError):
    """这封死信动不了。"""

    def __init__(self, letter_id: str, problem: str) -> None:
        self.letter_id = letter_id
        super().__init__(problem)


class UnknownLetterError(LetterError):
    """没有这封死信。"""

    def __init__(self, letter_id: str) -> None:
        super().__init__(
            letter_id,
            f"there is no dead letter {letter_id}: `etl dlq list` names them, for example events-17 or tasks-3",
        )


class TruncatedLetterError(LetterError):
    """死信的正文被截短过，放回去只会是一条坏消息。"""

    def __init__(self, letter_id: str, *, kept_bytes: int, original_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self.original_bytes = original_bytes
        super().__init__(
            letter_id,
            f"{letter_id} holds only the first {kept_bytes} of {original_bytes} bytes and cannot be retried: "
            "publish it again at its source, then drop it",
        )


class StrayLetterError(LetterError):
    """死信流里的一条不是我们埋下的，或者原来的主题不由我们处理：不能放回去。"""

    def __init__(self, letter_id: str, problem: str) -> None:
        super().__init__(
            letter_id,
            f"{letter_id} is not a letter of ours and cannot be retried: {problem}; look at it with `etl dlq show`, then drop it",
        )


class NothingFoundError(BridgeError, PermanentError):
    """`etl why` 问的东西从来没有过；说在哪里找过。"""

    def __init__(self, what: str, looked_at: str) -> None:
        super().__init__(f"there is no trace of {what}: looked at {looked_at}")


def _place_in_package(module: str, error: BaseException) -> str:
    """出错的那一行；库里的几层不算，写代码的人要找的是自己的文件。"""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    package = module.partition(".")[0]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if package in Path(frame.filename).parts]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def tolerate(error: Exception, warning: RepeatedWarning, **fields: object) -> None:
    """在旁边反复做的活失败了：不是自己的错就说一声、下次再来；别的错原样抛出，由看管它的记下。"""
    if isinstance(fault := fault_of(error), DatabaseRefusedError):
        say_refused(fault)
    elif is_transient(error):
        warning.say(type(error).__name__, error=str(error), **fields)
    else:
        raise error


def is_transient(error: BaseException) -> bool:
    """不是事件、任务、日子自己的错：原因没了就会成功，一直再试，不计次数。"""
    fault = fault_of(error)
    return fault is not None and fault.kind in ("transient", "refused")
