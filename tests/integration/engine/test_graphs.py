"""台账走任意的图：要求、做、失败、重跑、别处做、补做、换图怎样交错，最后都跟上，导入都走完，谁也不抢在上游前面。

没有数据：一个资产一天的内容就是它做的时候上游的内容，记在内存里。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import FailureKind
from etl_assets.core.etl_tables import import_events, import_requests, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.claims import Claim, claim_due_days, has_claimable_days
from etl_assets.ledger.failures import record_failure
from etl_assets.ledger.graph import Asset, AssetGraph
from etl_assets.ledger.leases import release_lease
from etl_assets.ledger.marking import Revisions, read_revisions
from etl_assets.ledger.requests import ensure_days, request_days, request_downstream
from etl_assets.reports.progress import import_progress
from etl_assets.services.fingerprints import fingerprint
from tests.integration.engine.chain import Chain, mark_materialized

pytestmark = pytest.mark.timeout(3_600 if settings().max_examples >= 2_000 else 300)
TARGET = "public"
AT_ONCE = Backoff(first_seconds=0.0, longest_seconds=0.0)
FIRST = date(2026, 1, 5)
DAYS = [FIRST + timedelta(days=number) for number in range(2)]
NAMES = ("a", "b", "c", "d")


# ---- 会发生的事 ------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """一次导入要求这些天。"""

    days: tuple[date, ...]


@dataclass(frozen=True)
class Work:
    """工人做几个领到的运行；fails 里的资产做不成，kind 是怎样的失败。"""

    runs: int
    fails: frozenset[str]
    kind: FailureKind


@dataclass(frozen=True)
class Rerun:
    """人重跑一天的几个资产；meanwhile 在它读了台账之后、写之前发生。"""

    day: date
    assets: frozenset[str]
    meanwhile: Import | Backfill | None


@dataclass(frozen=True)
class Elsewhere:
    """别处做完了一个资产的一天。"""

    day: date
    asset: str


@dataclass(frozen=True)
class Backfill:
    """从一个资产起补做。"""

    days: tuple[date, ...]
    asset: str


@dataclass(frozen=True)
class Deploy:
    """换一张图。"""

    graph: AssetGraph


Event = Import | Work | Rerun | Elsewhere | Backfill | Deploy


@st.composite
def graphs(draw: st.DrawFn) -> AssetGraph:
    """至多四个资产，上游是排在前面的几个；至少有一个没有上游。"""
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    upstreams = [
        draw(st.frozensets(st.sampled_from(names[:number]), max_size=3)) if number else frozenset()
        for number in range(len(names))
    ]
    return AssetGraph.of(Asset(name, of) for name, of in zip(names, upstreams, strict=True))


_DAY = st.sampled_from(DAYS)
_SOME_DAYS = st.sampled_from([(DAYS[0],), tuple(DAYS)])
_ASSET = st.sampled_from(NAMES)
_SOME = st.frozensets(_ASSET, max_size=2)
_IMPORTS = st.builds(Import, _SOME_DAYS)
_BACKFILLS = st.builds(Backfill, _SOME_DAYS, _ASSET)


def _one(event: st.SearchStrategy[Event]) -> st.SearchStrategy[tuple[Event, ...]]:
    return st.tuples(event)


_WORK = st.builds(Work, st.integers(1, 2), _SOME, st.sampled_from(["unknown", "permanent", "permanent"]))
_EVENTS = st.one_of(
    st.tuples(_IMPORTS, _WORK),
    st.tuples(_IMPORTS, _WORK, _IMPORTS, _WORK),
    _one(_WORK),
    _one(st.builds(Rerun, _DAY, st.frozensets(_ASSET, min_size=1), st.one_of(st.none(), _IMPORTS, _BACKFILLS))),
    _one(st.builds(Elsewhere, _DAY, _ASSET)),
    _one(_BACKFILLS),
)


def _histories(most: int) -> st.SearchStrategy[list[Event]]:
    return st.lists(_EVENTS, min_size=1, max_size=most).map(lambda parts: [event for part in parts for event in part])


# ---- 世界 ------------------------------------------------------------------------


@dataclass
class Ledgers:
    """一个数据库上的台账，与每个资产每一天的内容。"""

    chain: Chain
    graph: AssetGraph
    contents: dict[tuple[str, date], Any] = field(default_factory=dict)
    inputs: Counter[date] = field(default_factory=Counter)
    imports: list[UUID] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain.empty_database()
        self.deploy(self.graph)

    def deploy(self, graph: AssetGraph) -> None:
        self.graph = graph
        self.chain.use_graph(graph)

    @contextmanager
    def connected(self) -> Iterator[sa.Connection]:
        with self.chain.engine.begin() as connection:
            yield connection

    def happen(self, event: Event) -> None:
        match event:
            case Import(days):
                self.take_in(days)
            case Work(runs, fails, kind):
                for _ in range(runs):
                    self.work(fails, kind)
            case Rerun(day, assets, meanwhile):
                self.rerun(day, assets, meanwhile)
            case Elsewhere(day, asset) if asset in self.graph.names:
                with self.connected() as connection:
                    self.contents[asset, day] = uuid4()
                    request_downstream(connection, TARGET, asset, [day])
                self.settle_elsewhere(asset, day)
            case Backfill(days, asset) if asset in self.graph.names:
                with self.connected() as connection:
                    request_days(connection, TARGET, days, asset=asset)
            case Deploy(graph):
                self.deploy(graph)

    def take_in(self, days: Sequence[date]) -> UUID:
        import_id = uuid4()
        self.imports.append(import_id)
        self.inputs.update(days)
        with self.connected() as connection:
            revisions = request_days(connection, TARGET, days, changed_only=True)
            assert revisions.keys() == set(days)
            rows = [
                {"target": TARGET, "import_id": import_id, "day": day, "revision": revision}
                for day, revision in revisions.items()
            ]
            connection.execute(sa.insert(import_requests), rows)
            connection.execute(sa.insert(import_events).values(target=TARGET, import_id=import_id, event_id=uuid4()))
        return import_id

    def settle_elsewhere(self, asset: str, day: date) -> None:
        """别处的内容不是我们算的：再要求它一次，免得比不了。"""
        with self.connected() as connection:
            request_days(connection, TARGET, [day], asset=asset)

    def work(self, fails: frozenset[str] = frozenset(), kind: FailureKind = "unknown") -> Claim | None:
        """领一个运行，做完；做不成的与它后面的记下，别的照样做。"""
        with self.connected() as connection:
            due = self.due(connection)
            claim = claim_due_days(connection, TARGET, run_id=str(uuid4()), owner="test", lease_seconds=60)
            assert (claim is not None) or not has_claimable_days(connection, TARGET)
        if claim is None:
            return None
        self.assert_nobody_is_ahead(claim, due)
        failed: set[str] = set()
        for asset in claim.assets:
            if asset in fails or self.graph.upstreams(asset) & failed:
                failed.add(asset)
            else:
                self.make(asset, claim.days)
        with self.connected() as connection:
            release_lease(connection, claim.lease)
            for asset in sorted(failed & fails):
                behind = [name for name in claim.assets if name == asset or name in self.graph.descendants(asset)]
                record_failure(connection, TARGET, behind, claim.days, reason="no luck", kind=kind, backoff=AT_ONCE)
        return claim

    def assert_nobody_is_ahead(self, claim: Claim, due: dict[date, set[str]]) -> None:
        for day in claim.days:
            for asset in claim.assets:
                left_out = self.graph.ancestors(asset) & due[day] - set(claim.assets)
                assert not left_out, f"expected to wait: {asset} of {day} is claimed while {left_out} is due"
        named = list(claim.assets)
        assert named == list(self.graph.ordered(named))

    def rerun(self, day: date, assets: frozenset[str], meanwhile: Import | Backfill | None) -> None:
        days = DayRange(day, day)
        for asset in self.graph.ordered(assets):
            seen = self.read(asset, days)
            content = self.content(asset, day)
            if meanwhile is not None:
                self.happen(meanwhile)
            self.mark(asset, days, seen, {day: content})

    def make(self, asset: str, days: DayRange) -> None:
        seen = self.read(asset, days)
        self.mark(asset, days, seen, {day: self.content(asset, day) for day in days})

    def read(self, asset: str, days: DayRange) -> Revisions:
        with self.connected() as connection:
            return read_revisions(connection, TARGET, asset, days, fingerprint(EtlSettings()))

    def mark(self, asset: str, days: DayRange, seen: Revisions, contents: dict[date, Any]) -> None:
        with self.connected() as connection:
            mark_materialized(connection, TARGET, asset, days, seen, run_id="run", scope="changed")
        self.contents |= {(asset, day): content for day, content in contents.items()}

    def content(self, asset: str, day: date) -> Any:
        upstreams = self.graph.upstreams(asset)
        if not upstreams:
            return self.inputs[day]
        return tuple(self.contents.get((upstream, day)) for upstream in sorted(upstreams))

    def due(self, connection: sa.Connection) -> dict[date, set[str]]:
        found: dict[date, set[str]] = {day: set() for day in DAYS}
        statement = sa.select(ledger.c.day, ledger.c.asset).where(ledger.c.requested > ledger.c.materialized)
        for day, asset in connection.execute(statement):
            if asset in self.graph.names:
                found[day].add(asset)
        return found

    # ---- 结束 --------------------------------------------------------------------

    def settle(self) -> None:
        """把等着的放行，做到没有一天到期。"""
        with self.connected() as connection:
            connection.execute(sa.update(ledger).values(held_reason=None, retry_at=None))
        for _ in range(len(DAYS) * len(NAMES) * 4):
            if self.work() is None:
                break
        else:
            raise AssertionError("expected an end: there is always something due")
        with self.connected() as connection:
            assert self.due(connection) == {day: set() for day in DAYS}

    def assert_settled(self, days: Sequence[date]) -> None:
        for day in days:
            for asset in self.graph.names:
                found, wanted = self.contents.get((asset, day)), self.content(asset, day)
                assert found == wanted, f"expected {asset} of {day} to be {wanted}, not {found}"
        with self.connected() as connection:
            for import_id in self.imports:
                progress = import_progress(connection, self.chain.settings, import_id)
                assert progress.handled
                assert progress.done == progress.days > 0, f"expected import {import_id} to be done"

    def asked_days(self) -> list[date]:
        return [day for day in DAYS if self.inputs[day]]


def live_through(chain: Chain, graph: AssetGraph, events: Sequence[Event]) -> Ledgers:
    ledgers = Ledgers(chain, graph)
    for event in events:
        ledgers.happen(event)
    ledgers.settle()
    ledgers.assert_settled(ledgers.asked_days())
    return ledgers


@given(graph=graphs(), events=_histories(8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_history_on_any_graph_ends_with_everything_up_to_date(
    chain: Chain, graph: AssetGraph, events: Sequence[Event]
) -> None:
    live_through(chain, graph, events)


@given(graph=graphs(), wider=graphs(), events=_histories(4), later=_histories(4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_another_graph_in_the_middle_loses_nothing(
    chain: Chain, graph: AssetGraph, wider: AssetGraph, events: Sequence[Event], later: Sequence[Event]
) -> None:
    """换图之后，先前的导入照样走完；新资产的旧日子补做一遍就都有了。"""
    ledgers = Ledgers(chain, graph)
    for event in [*events, Deploy(wider), *later]:
        ledgers.happen(event)
    ledgers.settle()
    for asset in wider.names:
        ledgers.happen(Backfill(tuple(DAYS), asset))
        ledgers.settle()
    ledgers.assert_settled(DAYS)


@given(graph=graphs(), away=_ASSET, events=_histories(4), meanwhile=_histories(4), later=_histories(2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_assets_that_come_back_catch_up_by_themselves(
    chain: Chain,
    graph: AssetGraph,
    away: str,
    events: Sequence[Event],
    meanwhile: Sequence[Event],
    later: Sequence[Event],
) -> None:
    """一个资产与它后面的拿走了又放回来：什么也不必补做。"""
    rest = AssetGraph.of(asset for asset in graph.assets if away not in {asset.name, *graph.ancestors(asset.name)})
    assume(0 < len(rest.assets) < len(graph.assets))
    live_through(chain, graph, [*events, Deploy(rest), *meanwhile, Deploy(graph), *later])


# ---- 领到的是什么 ------------------------------------------------------------------

State = Literal["done", "due", "held"]
_STATES = st.fixed_dictionaries({name: st.sampled_from(["done", "due", "held"]) for name in NAMES})


def claim_of(chain: Chain, graph: AssetGraph, states: Mapping[str, State]) -> tuple[str, ...]:
    """台账是这样时，领到的运行的资产；没有可领的是空的。"""
    chain.empty_database()
    chain.use_graph(graph)
    with chain.engine.begin() as connection:
        ensure_days(connection, TARGET, [FIRST])
        for name in graph.names:
            state = states[name]
            values = {
                "requested": 2,
                "materialized": 2 if state == "done" else 1,
                "held_reason": "held" if state == "held" else None,
            }
            connection.execute(
                sa.update(ledger).where(ledger.c.asset == name).values(**values, requested_at=sa.func.now())
            )
        claim = claim_due_days(connection, TARGET, run_id="run", owner="test", lease_seconds=60)
    return () if claim is None else claim.assets


def ruled_claim(graph: AssetGraph, states: Mapping[str, State]) -> tuple[str, ...]:
    """规则一步一步地走：没有到期的上游的才领；后面的跟着，除非排在领不到的后面。"""
    made: set[str] = set()
    for name in graph.names:
        due_above = {above for above in graph.ancestors(name) if states[above] != "done"}
        if not due_above and states[name] == "due":
            made.add(name)
        elif states[name] != "held" or due_above:
            made |= {name} if graph.ancestors(name) & made and due_above <= made else set()
    return graph.ordered(made)


@given(graph=graphs(), states=_STATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_claim_takes_what_has_no_due_upstream_and_what_follows(
    chain: Chain, graph: AssetGraph, states: Mapping[str, State]
) -> None:
    assert claim_of(chain, graph, states) == ruled_claim(graph, states)


# ---- 拿掉一处保护，同一个性质就找到反例 ---------------------------------------------


def search_for_a_counterexample(chain: Chain) -> None:
    """两个性质，找到第一个反例就停。"""
    options = settings(
        phases=[Phase.generate],
        max_examples=300,
        derandomize=False,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )

    @seed(1)
    @options
    @given(graph=graphs(), states=_STATES)
    def every_claim_is_by_the_rule(graph: AssetGraph, states: Mapping[str, State]) -> None:
        assert claim_of(chain, graph, states) == ruled_claim(graph, states), "expected the rule"

    @seed(1)
    @options
    @given(graph=graphs(), events=_histories(8))
    def any_history_ends_up_to_date(graph: AssetGraph, events: Sequence[Event]) -> None:
        live_through(chain, graph, events)

    every_claim_is_by_the_rule()
    any_history_ends_up_to_date()


JOIN_FORGETS_ITS_UPSTREAMS = """
    CREATE FUNCTION etl.tamper() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF cardinality(NEW.upstreams) > 1 THEN NEW.ancestors := '{}'; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER tamper BEFORE INSERT ON etl.assets FOR EACH ROW EXECUTE FUNCTION etl.tamper();
"""
SECOND_DOWNSTREAM_IS_NOT_RAISED = """
    CREATE FUNCTION etl.tamper() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.requested > OLD.requested AND NEW.materialized = OLD.materialized AND EXISTS (
            SELECT FROM etl.assets own JOIN etl.assets other ON other.upstreams && own.upstreams AND other.position < own.position
            WHERE own.asset = NEW.asset
        ) THEN NEW.requested := OLD.requested; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER tamper BEFORE UPDATE ON etl.ledger FOR EACH ROW EXECUTE FUNCTION etl.tamper();
"""


@pytest.mark.parametrize(
    "tampering",
    [JOIN_FORGETS_ITS_UPSTREAMS, SECOND_DOWNSTREAM_IS_NOT_RAISED],
    ids=["a join claimed while an upstream is due", "the second downstream of a fork is not raised"],
)
def test_missing_protection_is_found(chain: Chain, tampering: str) -> None:
    with chain.engine.begin() as connection:
        connection.exec_driver_sql(tampering)
    try:
        with pytest.raises((AssertionError, FlakyFailure), match="expected"):
            search_for_a_counterexample(chain)
    finally:
        chain.execute(sa.text("DROP FUNCTION etl.tamper() CASCADE"))
