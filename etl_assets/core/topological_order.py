"""上游在前的次序。"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import TopologicalSorter


def upstreams_first(upstreams: Mapping[str, Collection[str]]) -> list[str]:
    """名字 → 紧排在它前面的；同一层的按名字，谁来排都一样。

    :raises graphlib.CycleError: 有几个互相在前面；args[1] 是它们。
    """
    sorter = TopologicalSorter(upstreams)
    sorter.prepare()
    in_order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        in_order += ready
        sorter.done(*ready)
    return in_order
