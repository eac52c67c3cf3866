"""消息头：什么放得进去，占多长。"""

from __future__ import annotations

from collections.abc import Mapping


def header_text(value: object, limit: int = 300) -> str:
    """能放进消息头的一行：空白折叠，控制字符去掉，超长截断。"""
    line = " ".join(str(value).split())
    return "".join(char for char in line if char.isprintable())[:limit]


def header_bytes(headers: Mapping[str, str]) -> int:
    """消息头在线上的长度；服务器的 max_payload 把它也算进去，超过就断开连接。"""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
