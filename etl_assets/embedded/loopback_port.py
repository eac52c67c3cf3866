"""本机端口：只在 127.0.0.1 上，用过的先试。

找到空闲的再用，中间隔着一段时间，别人（同时起的另一个栈）也找到它。所以能占住的就占住：自己监听（listen_on），
或者替子进程留着（reserve_port）；留不住的（find_free_port）由用的人发现被抢走了再换一个。
"""

from __future__ import annotations

import errno
import os
import random
import socket

# 低于 Linux 的临时端口区（32768 起）：在临时端口区里，别人的外出连接会占走我们重启时要用的端口，
# 反复重连的客户端甚至会连上自己
_CANDIDATES = range(20000, 32768)
_BACKLOG = 128


def is_free(port: int) -> bool:
    """能不能在 127.0.0.1 上监听这个端口。"""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def accepts_connections(port: int) -> bool:
    """127.0.0.1 上有没有谁在这个端口应答。"""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def listen_on(port: int | None, *, preferred: int) -> socket.socket:
    """监听着的套接字，交给子进程去应答。

    :param port: 非它不可；None 表示 `preferred`，被占了就另找。
    :raises OSError: 占不了。
    """
    try:
        return socket.create_server(("127.0.0.1", preferred if port is None else port), backlog=_BACKLOG)
    except OSError:
        if port is not None:
            raise
    return listen_on(None, preferred=find_free_port())


def reserve_port() -> socket.socket:
    """绑定而不监听：直到关闭，别的栈找不到这个端口，而用 SO_REUSEPORT 的 gRPC 能在上面监听。

    先绑定后设选项，次序要紧：设了再绑定，别人设了也绑得上。
    """
    for port in random.sample(_CANDIDATES, len(_CANDIDATES)):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            holder.close()
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return holder
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def find_free_port(preferred: int | None = None) -> int:
    """:param preferred: 空闲就用它。"""
    if preferred is not None and is_free(preferred):
        return preferred
    # 不是安全用途：随机只为并排启动的两个栈少撞车
    return next(port for port in random.sample(_CANDIDATES, len(_CANDIDATES)) if is_free(port))
