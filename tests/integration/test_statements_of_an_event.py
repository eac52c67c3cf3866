"""一个事件从领取到 SUCCESS 发多少条语句，由服务器数：它日志里的一行，就是它收到并做完的一条，BEGIN、COMMIT、COPY 都算。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterRunStatus

from bridge.runs.worker import RunWorker
from bridge.warm_dagster.code_location import CodeLocation
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded import embedded_postgres
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.testing.databases import initialize_database
from etl_assets.testing.raw_data import RawData
from tests.the_three import graph

from .warm_postgres import warm_postgres_worker
from .warm_runs import announce, status

MOST_STATEMENTS = 44
"""每一条都是一次往返。几条语句装在一条消息里的算一条。"""
_SENT = re.compile(r"^(\d+) LOG:  (?:statement|execute [^:]+): (.*)$")
_BY_THE_CLOCK = (";", "SELECT")
"""隔了一会儿才发的：借出闲置过的连接之前先试一试，替闲着的事务问一声。"""


@pytest.fixture
def talkative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """一台把每条语句都写进日志的服务器：地址与日志。"""
    talking = {"log_statement": "all", "log_line_prefix": "%p "}
    monkeypatch.setattr(embedded_postgres, "_SETTINGS", embedded_postgres._SETTINGS | talking)
    with EmbeddedPostgres(tmp_path / "server", durable=False) as url:
        yield url, tmp_path / "server" / "postgres.log"


@pytest.fixture
def warm(talkative: tuple[str, Path], location: CodeLocation, tmp_path: Path) -> Iterator[RunWorker]:
    """一个工人，数据与 Dagster 的存储都在那台服务器上。"""
    settings = EtlSettings(database_url=talkative[0])
    engine = build_engine(settings)
    initialize_database(engine, graph)
    with warm_postgres_worker(location, engine, settings, tmp_path) as worker:
        yield worker
    engine.dispose()


def test_one_order_from_claim_to_success(warm: RunWorker, talkative: tuple[str, Path]) -> None:
    _, log = talkative
    raw_data = RawData(warm.engine)
    for number in range(8):  # 头几次驱动还要预备语句、建暂存表
        announce(
            warm.engine,
            warm.settings,
            raw_data.add_import([{"order_id": f"A-{number}", "customer_name": f"客户{number}"}]),
        )
        start = log.stat().st_size
        claim = warm.claim()
        assert claim is not None
        held = warm.start(claim)
        assert warm.execute(held).succeeded
        sent = statements(log, start)
        assert status(warm, held.run.run_id) is DagsterRunStatus.SUCCESS
    assert len(sent) <= MOST_STATEMENTS, "\n".join(f"{session} {text}" for session, text in sent)


def statements(log: Path, start: int) -> list[tuple[str, str]]:
    """日志里从 start 起的：会话与语句的头一行。"""
    with log.open(encoding="utf-8") as lines:
        lines.seek(start)
        found = [(match[1], match[2]) for line in lines if (match := _SENT.match(line))]
    return [(session, text) for session, text in found if text not in _BY_THE_CLOCK]
