"""本机端口：只在 127.0.0.1 上找空闲的，用过的先试。"""

from __future__ import annotations

import random
import socket

# 低于 Linux 的临时端口区（32768 起）：在临时端口区里，别人的外出连接会占走我们重启时要用的端口，
# 反复重连的客户端甚至会连上自己
_CANDIDATES = range(20000, 32768)


def is_free(port: int) -> bool:
    """能不能在 127.0.0.1 上监听这个端口。"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def accepts_connections(port: int) -> bool:
    """127.0.0.1 上有没有谁在这个端口应答。"""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def find_free_port(preferred: int | None = None) -> int:
    """:param preferred: 空闲就用它。"""
    if preferred is not None and is_free(preferred):
        return preferred
    # 不是安全用途：随机只为并排启动的两个栈少撞车
    return next(port for port in random.sample(_CANDIDATES, len(_CANDIDATES)) if is_free(port))
