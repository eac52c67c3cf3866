"""nats-server 说不行时，是哪一种不行：暂时的、满了、太大、别的。"""

from __future__ import annotations

import nats.errors
import nats.js.errors

from bridge.errors import BridgeError, PayloadTooLargeError, StreamConflictError, StreamFullError
from bridge.jetstream.headers import header_text

# 服务器的错误码：nats-server 的 server/errors.json
MESSAGE_NOT_FOUND = 10037
SEQUENCE_NOT_FOUND = 10043
NAME_IN_USE = 10058
NOT_CLUSTERED = 10074
_STORE_FAILED = 10077
# 账号的、服务器的上限到了
_NO_ROOM = (10002, 10028, 10047)
_MESSAGE_TOO_LARGE = 10054
_NO_JETSTREAM = (10035, 10039, 10076)
# 集群正在选领导者、在等不在的节点、忙不过来：过一会儿就好，谁也没说"没有"
PASSING = (10004, 10005, 10007, 10008, 10009, 10041, 10118, 10119, 10167)
AWAY = (
    nats.errors.TimeoutError,
    nats.errors.NoRespondersError,
    nats.errors.OutboundBufferLimitError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
)


def is_passing(error: nats.errors.Error) -> bool:
    """没有回答，或者答的是现在不行：不是"没有"，也不是"不许"。没有 JetStream 的服务器立刻就说。"""
    if isinstance(error, nats.js.errors.APIError):
        is_away = isinstance(error, nats.js.errors.ServiceUnavailableError) and error.err_code not in _NO_JETSTREAM
        return is_away or error.err_code in PASSING
    return isinstance(error, AWAY) and not isinstance(error, nats.errors.NoRespondersError)


def refusal(subject: str, size_bytes: int, error: nats.js.errors.APIError) -> BridgeError | None:
    """服务器不肯存的原因；None 表示只是暂时不行。"""
    if error.err_code in _NO_ROOM or (error.err_code == _STORE_FAILED and "exceeded" in (error.description or "")):
        return StreamFullError(subject)
    if error.err_code == _MESSAGE_TOO_LARGE:
        return PayloadTooLargeError(subject, size_bytes=size_bytes, limit="the max_msg_size of its stream")
    if is_passing(error):
        return None
    return StreamConflictError(
        subject, header_text(error.description), "look into the stream's settings and the server's log"
    )
