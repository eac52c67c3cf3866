"""命令的退出码：脚本靠它们分辨，docs/shell.md 的表说的就是这些。"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    """有答案，是"不"：失败了、不相等、查出了错。"""
    NO_ANSWER = 2
    """没有答案：用法、设置或服务器不对，什么也没做；或者等不到了。"""
