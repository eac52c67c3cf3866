"""我们写在运行上的标签。

`dagster/` 开头的，网页的运行列表不列出来，「View all tags」、运行页与筛选里都有：编号与给机器看的在那里，一行才只有一行高。
"""

from __future__ import annotations

from collections.abc import Mapping

ALLOW_DELETES_TAG = "etl/allow_deletes"
"""人写的。"""
PREFIX, _FORMERLY = "dagster/dayline/", "etl/"
TRIGGER_TAG = f"{PREFIX}trigger"
EVENT = "event"


def read_tag(tags: Mapping[str, str], name: str) -> str | None:
    """我们的一个标签，先看它在 0.1 里的名字。

    升级以前的运行只有旧名；人重新执行它，标签照抄，旧版本的网页只改旧名，`renamed` 两个都改：所以旧名在，就以它为准。
    """
    return tags.get(_former(name)) or tags.get(name)


def renamed(tags: Mapping[str, str], changed: Mapping[str, str]) -> dict[str, str]:
    """要改的标签，连同这个运行上有旧名的那些。"""
    return {**changed, **{_former(name): value for name, value in changed.items() if _former(name) in tags}}


def _former(name: str) -> str:
    return _FORMERLY + name.removeprefix(PREFIX)
