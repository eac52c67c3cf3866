"""资产图：上游在前，谁在谁前面；不成立的图是一句话。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from dagster import AssetsDefinition, AssetSpec, DailyPartitionsDefinition, WeeklyPartitionsDefinition, asset

from etl_assets.definitions import defs, graph
from etl_assets.ledger.graph import Asset, AssetGraph, GraphError
from etl_assets.orchestration.graph import BY_CUSTOMER, graph_of
from tests import the_three

DAILY = DailyPartitionsDefinition("2026-01-01")
DIAMOND = AssetGraph.of(
    [
        Asset("report", frozenset(["customers", "products"])),
        Asset("products", frozenset(["orders"])),
        Asset("customers", frozenset(["orders"])),
        Asset("orders"),
        Asset("leads", frozenset(["customers"])),
    ]
)


def made(name: str, *upstreams: str, partitions: Any = DAILY, **metadata: object) -> AssetsDefinition:
    @asset(name=name, deps=list(upstreams), partitions_def=partitions, metadata=metadata)
    def nothing() -> None:
        return

    return nothing


def test_upstreams_come_first_whoever_lists_them() -> None:
    assert DIAMOND.names == ("orders", "customers", "products", "leads", "report")
    assert AssetGraph.of(reversed(DIAMOND.assets)) == DIAMOND
    assert DIAMOND.ordered({"report", "orders", "unknown"}) == ("orders", "report")


def test_who_is_above_and_below() -> None:
    assert DIAMOND.ancestors("report") == {"orders", "customers", "products"}
    assert DIAMOND.descendants("customers") == {"leads", "report"}
    assert DIAMOND.downstreams("orders") == {"customers", "products"}
    assert (DIAMOND.ancestors("orders"), DIAMOND.descendants("report")) == (frozenset(), frozenset())


def test_graph_of_the_code_is_read_from_its_definitions() -> None:
    assert graph_of(defs.assets or ()) == graph
    assert [(one.name, one.upstreams, one.by_customer) for one in the_three.graph.assets] == [
        ("orders", frozenset(), False),
        ("customers", frozenset({"orders"}), True),
        ("leads", frozenset({"customers"}), True),
    ]


def test_tables_of_the_application_are_no_upstreams() -> None:
    found = graph_of([AssetSpec("raw"), made("a", "raw"), made("b", "a", "raw", **{BY_CUSTOMER: True})])
    assert found.assets == (Asset("a"), Asset("b", frozenset(["a"]), by_customer=True))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: [made("a", "c"), made("b", "a"), made("c", "b")], "the assets depend on each other in a cycle: "),
        (lambda: [made("a"), made("a")], "two assets are named a: rename one of them"),
        (lambda: [made("a", "b")], "asset a depends on b, which does not exist: correct its deps"),
        (lambda: [made("a", partitions=None)], "asset a has no daily partitions: give it "),
        (
            lambda: [made("a", partitions=WeeklyPartitionsDefinition("2026-01-01"))],
            "asset a has no daily partitions: give it ",
        ),
    ],
    ids=["a cycle", "two of one name", "an unknown upstream", "no partitions", "weekly partitions"],
)
def test_graph_that_does_not_hold_is_one_sentence(bad: Callable[[], list[AssetsDefinition]], says: str) -> None:
    with pytest.raises(GraphError) as caught:
        graph_of(bad())
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
