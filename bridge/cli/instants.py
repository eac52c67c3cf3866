"""命令行上的时刻：ISO 的日期与时刻，或者多久以前。"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import click

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_instant(text: str, *, zone: ZoneInfo, option: str) -> datetime:
    """`2026-03-05`（那天零点）、`2026-03-05T10:00`、带时区的、`90m`、`2h`、`3d`；没有时区的按 zone。

    在命令里调，不做成 click 的类型：解析参数时栈的地址还没有放进环境变量，那时读设置就读早了。
    """
    try:
        if ago := re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip()):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        instant = datetime.fromisoformat(text.strip())
        return (instant if instant.tzinfo else instant.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is not a time: write 2026-03-05, 2026-03-05T10:00, 2026-03-05T10:00+08:00, or how long ago: 90m, 2h, 3d",
            param_hint=option,
        ) from error
