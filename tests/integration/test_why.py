"""`etl why`：一个订单重新导入、换了日子、改了客户的名字、拒收过一回、撤回过一回，商机被人关闭，都说得出来。"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from dagster import AssetKey, AssetRecordsFilter

from bridge.cli.commands import cli, run_command
from bridge.cli.exit_codes import ExitCode
from bridge.errors import NothingFoundError
from bridge.events import DataImportCompleted
from bridge.events.publish import publish_event
from bridge.events.streams import ensure_event_streams
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.imports.loading import import_file
from bridge.jetstream.connection import JetStreamConnection
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.warm_dagster.code_location import CodeLocation
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import raw_orders, target_tables
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.ledger.requests import request_days
from etl_assets.reports.why.orders import MOST_VERSIONS, SHOWN_VERSIONS
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME, RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .warm_postgres import warm_postgres_worker

ROOT = Path(__file__).parents[2]
UI = "http://127.0.0.1:3000"
HEADER = "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at"
OTHER_SHOP = UUID(int=2)
FIRST, SECOND, OTHER = "2026-01-05", "2026-01-06", "2026-01-20"


@dataclass
class Story:
    """一个安装，与里面的订单 A-1002 的一生。"""

    worker: RunWorker
    bridge_settings: BridgeSettings
    raw_data: RawData
    folder: Path
    imports: dict[str, UUID] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)

    def take_in(self, name: str, *rows: str) -> None:
        """导入一个文件，做完它。"""
        path = self.folder / f"{name}.csv"
        path.write_text("\n".join([HEADER, *rows]))
        report = import_file(self.worker.engine, path, settings=self.worker.settings)
        assert report.import_id is not None
        self.imports[name] = report.import_id
        self.announce(name)

    def announce(self, name: str, *, as_name: str | None = None) -> None:
        """真的发布，像监听器那样处理，做完它要的日子。"""
        event = DataImportCompleted(import_id=self.imports[name], event_id=uuid4(), status="completed")
        stored = asyncio.run(publish_event(DATA_IMPORT_COMPLETED, event, settings=self.bridge_settings))
        asked = ImportEvent(event.import_id, event.event_id, sequence=stored.sequence)
        assert request_imports(self.worker.engine, self.worker.settings, [asked]) == ["requested"]
        while (claim := self.worker.claim()) is not None:
            assert self.worker.execute(self.worker.start(claim)).succeeded
            self.runs[as_name or name] = claim.lease.run_id

    def execute(self, statement: str, **parameters: Any) -> None:
        with self.worker.engine.begin() as connection:
            connection.execute(sa.text(statement), parameters)


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeSettings]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield BridgeSettings(nats_url=server.url, connect_timeout_seconds=5)
    server.kill()


async def prepare_streams(settings: BridgeSettings) -> None:
    async with JetStreamConnection(settings, name="test") as connection:
        await ensure_event_streams(connection, settings, [DATA_IMPORT_COMPLETED])


@pytest.fixture(scope="module")
def story(
    postgres_url: str,
    database_template: str,
    location: CodeLocation,
    nats: BridgeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    with cloned_database(postgres_url, database_template) as url:
        settings = EtlSettings(database_url=url)
        engine = build_engine(settings)
        with warm_postgres_worker(location, engine, settings, folder) as worker:
            told = Story(worker, nats, RawData(engine), folder)
            told.raw_data.add_shop(OTHER_SHOP, "分店")
            asyncio.run(prepare_streams(nats))
            shop = SAMPLE_SHOP_NAME
            told.take_in(
                "first",
                f"A-1001,{shop},王五,大货订单,new,10,1,{FIRST} 09:00",
                f"A-1002,{shop},张三,大货订单,new,100.50,2,{FIRST} 10:00",
                f"A-1002,分店,赵六,大货订单,new,7,1,{FIRST} 11:00",
            )
            # 人关闭了张三的商机，此后订单改在别的客户名下
            told.execute(
                "UPDATE business_leads SET closed_by = 'user', closed_at = :at, current_stage = 'LOST', owner = '小王' "
                "FROM customers WHERE customers.customer_global_id = business_leads.customer_global_id "
                "AND customer_nickname = '张三'",
                at="2026-01-07 00:00+00",
            )
            told.take_in("moved", f"A-1002,{shop},李四,大货订单,paid,100.50,2,{SECOND} 10:00")
            told.take_in("nameless", f"A-1002,{shop},,大货订单,paid,1,2,{SECOND} 10:00")
            told.take_in("mistake", f"A-1002,{shop},李四,大货订单,completed,999,2,{SECOND} 10:00")
            told.raw_data.set_status(told.imports["mistake"], "failed")
            told.announce("mistake", as_name="withdrawal")
            yield told
        engine.dispose()


@pytest.fixture
def ask(story: Story, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`etl …`，给出它印的。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(
        monkeypatch, engine=story.worker.engine, settings=story.worker.settings, bridge_settings=story.bridge_settings
    )

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)

    return run


def test_order_tells_all_that_happened_to_it(story: Story, ask: Any) -> None:
    answer = json.loads(ask("why", "order", "A-1002", "--shop", SAMPLE_SHOP_NAME, "--url", UI, "--json").stdout)
    assert answer["notes"] == []
    (order,) = answer["orders"]
    names = {str(import_id): name for name, import_id in story.imports.items()}
    told = [(names[row["import_id"]], row["state"], row["file_row"]) for row in order["versions"]]
    # 拒收的、撤回了的不挡路：moved 又赢了
    assert told == [
        ("first", "superseded", 3),
        ("moved", "loaded", 2),
        ("nameless", "rejected", 2),
        ("mistake", "withdrawn", 2),
    ]
    first, moved, nameless, mistake = order["versions"]
    assert first["because"] == f"import {story.imports['moved']} (moved.csv), completed later, wins"
    assert moved["changed"]["day"] == [FIRST, SECOND]
    assert moved["changed"]["customer_name"] == ["张三", "李四"]
    assert (nameless["rule"], mistake["amount"]) == ("missing_customer_name", "999.00")
    assert (order["row"]["order_date"], order["row"]["customer_nickname"]) == (SECOND, "李四")
    run = order["row"]["run"]
    assert run["run_id"] == story.runs["withdrawal"]
    assert run["url"] == f"{UI}/runs/{story.runs['withdrawal']}"
    assert (run["trigger"], run["status"], run["worker"]) == ("event", "SUCCESS", story.worker.owner)
    events = [task["event"] for task in order["imports"]]
    assert [event["stream_sequence"] for event in events] == [1, 2, 3, 5]
    assert all(event["stored_at"] <= event["handled_at"] for event in events)
    current, earlier = order["customers"]
    assert (current["customer_nickname"], current["is_current"], current["lead_no_of_order"]) == ("李四", True, 1)
    assert (earlier["customer_nickname"], earlier["is_current"]) == ("张三", False)
    (closed,) = earlier["leads"]
    assert (closed["closed_by_person"], closed["current_stage"], closed["owner"]) == (True, "LOST", "小王")
    assert {(row["day"], row["asset"], row["state"]) for row in order["days"]} == {
        (day, asset, "done") for day in (FIRST, SECOND) for asset in ("orders", "customers", "leads")
    }


def test_order_as_text(story: Story, ask: Any) -> None:
    said = ask("why", "order", "A-1002", "--url", UI).stdout
    assert "\x1b" not in said
    # 两个店都有：都说
    assert f"order A-1002 of {SAMPLE_SHOP_NAME}\n" in said
    assert "order A-1002 of 分店\n" in said
    for part in (
        f"in orders on {SECOND}: 李四 · paid · BULK · 100.50 · × 2",
        f"by run {UI}/runs/{story.runs['withdrawal']} (event, SUCCESS, worker {story.worker.owner}, ",
        "superseded: row 3 of first.csv: ",
        f"changed: day {FIRST} → {SECOND}, customer_name 张三 → 李四, ",
        "rejected: row 2 of nameless.csv: rule missing_customer_name",
        "withdrawn: row 2 of mistake.csv: its import was taken back",
        "sequence 2 of EVENTS, stored 20",
        "earlier customer 张三: ",
        "a person closed it on 2026-01-07",
        "a person wrote its owner",
        f"day {FIRST}: nothing is due\n    orders, customers, leads: made 20",
    ):
        assert part in said, said


def test_day_whose_run_failed_for_good(story: Story, ask: Any) -> None:
    import_id = story.raw_data.add_import(
        [{"order_id": "D-1", "customer_name": "钱七", "ordered_at": f"{OTHER} 04:00+00"}]
    )
    asked = [ImportEvent(import_id, uuid4(), sequence=1)]  # 那个序号是别的事件的
    story.execute("ALTER TABLE orders ADD CONSTRAINT no_d CHECK (order_id <> 'D-1')")
    try:
        assert request_imports(story.worker.engine, story.worker.settings, asked) == ["requested"]
        claim = story.worker.claim()
        assert claim is not None
        assert not story.worker.execute(story.worker.start(claim)).succeeded
        (order,) = json.loads(ask("why", "order", "D-1", "--url", UI, "--json").stdout)["orders"]
        assert (order["row"], [version["state"] for version in order["versions"]]) == (None, ["waiting"])
        assert order["imports"][0]["event"]["stored_at"] is None
        assert [row["state"] for row in order["days"]] == ["held", "idle", "idle"]
        said = ask("why", "order", "D-1", "--url", UI).stdout
        assert "not in orders: it waits to be made" in said
        assert f"day {OTHER}: due\n    orders: due since 20" in said
        assert "no_d" in said
        assert f"failed 1 times, last in run {UI}/runs/{claim.lease.run_id}; never made" in said
    finally:
        story.execute("ALTER TABLE orders DROP CONSTRAINT no_d")
        with story.worker.engine.begin() as connection:
            request_days(connection, "public", [date.fromisoformat(OTHER)])
        while (claim := story.worker.claim()) is not None:
            assert story.worker.execute(story.worker.start(claim)).succeeded


def test_customer_outside_the_share_waits_for_nothing(story: Story, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    story.raw_data.add_import([{"order_id": "R-1"}])
    share = story.worker.settings.model_copy(update={"rollout": ("分店",)})
    states = []
    for settings in (story.worker.settings, share):
        use_in_commands(monkeypatch, settings=settings)
        (order,) = json.loads(ask("why", "order", "R-1", "--json").stdout)["orders"]
        states += [version["state"] for version in order["versions"]]
    assert states == ["waiting", "outside"]
    assert "not in orders: it is left to the other system (ETL_ROLLOUT)" in ask("why", "order", "R-1").stdout


def test_id_that_is_no_order_is_looked_at_in_part(story: Story, ask: Any) -> None:
    import_id = story.raw_data.add_import([])
    story.execute(
        "INSERT INTO raw_orders (import_id, order_id, shop) SELECT :import_id, '-', '分店' FROM generate_series(1, 3000)",
        import_id=import_id,
    )
    answer = json.loads(ask("why", "order", "-", "--json").stdout)
    (order,) = answer["orders"]
    assert (len(order["versions"]), order["older_versions"]) == (SHOWN_VERSIONS, MOST_VERSIONS - SHOWN_VERSIONS)
    assert "it stands for a missing id" in answer["notes"][0]


def test_customer_and_lead(ask: Any) -> None:
    answer = json.loads(ask("why", "customer", " 李四 ", "--url", UI, "--json").stdout)
    (customer,) = answer["customers"]
    assert [(row["order_id"], row["source_name"]) for row in customer["newest_orders"]] == [("A-1002", "moved.csv")]
    assert customer["run"]["url"].startswith(f"{UI}/runs/")
    (lead,) = customer["leads"]
    said = ask("why", "lead", lead["lead_id"]).stdout
    assert said.startswith("lead 1: OPEN, 1 orders, ")
    assert f"A-1002: {SECOND} · paid · BULK · 100.50 · × 2" in said
    told = json.loads(ask("why", "lead", lead["lead_id"], "--json").stdout)
    assert (told["customer"]["customer_nickname"], told["orders"][0]["order_id"]) == ("李四", "A-1002")
    kept = ask("why", "customer", "张三").stdout
    assert "a person closed it on 2026-01-07" in kept


def test_import(story: Story, ask: Any) -> None:
    answer = json.loads(ask("why", "import", story.imports["first"], "--json").stdout)
    assert answer["rows"] == {"raw": 3, "loaded": 2, "superseded": 1, "rejected": 0, "waiting": 0}
    assert answer["import"]["event"]["stream_sequence"] == 1
    assert {row["day"] for row in answer["days"]} == {FIRST}
    assert [(run["run_id"], run["worker"]) for run in answer["runs"]] == [(story.runs["first"], story.worker.owner)]
    said = ask("why", "import", story.imports["mistake"]).stdout
    assert "withdrawn, 1 rows" in said
    assert "1 rows, none of them counts" in said
    assert (
        "rejected by missing_customer_name: 1 rows, such as A-1002"
        in ask("why", "import", story.imports["nameless"]).stdout
    )


def test_event_whose_import_is_not_there_yet(story: Story, ask: Any) -> None:
    import_id = uuid4()
    story.execute(
        "INSERT INTO etl.waiting_events (target, import_id, event_id, stream_sequence, stored_at) "
        "VALUES ('public', :import_id, :import_id, 9, now())",
        import_id=import_id,
    )
    assert "waits for this import to be completed" in ask("why", "import", import_id).stdout


def test_day_is_the_same_as_status_of_the_day(story: Story, ask: Any) -> None:
    answer = json.loads(ask("why", "day", SECOND, "--url", UI, "--json").stdout)
    asked = {row["import_id"] for row in answer["imports"]}
    assert asked == {str(story.imports[name]) for name in ("moved", "nameless", "mistake")}
    assert [(rule["rule"], rule["rows"]) for rule in answer["rejected"]] == [("missing_customer_name", 1)]
    assert answer["account"] == {"raw": 2, "loaded": 1, "superseded": 0, "outside": 0, "rejected": 1}
    made = {run["run_id"]: run for run in answer["runs"]}
    assert story.runs["withdrawal"] in made
    assert made[story.runs["withdrawal"]]["worker"] == story.worker.owner
    assert made[story.runs["withdrawal"]]["assets"] == ["orders", "customers", "leads"]
    said = ask("why", "day", SECOND).stdout
    assert said == ask("status", "--day", SECOND).stdout
    assert f"day {SECOND}" in said
    assert "rejected by missing_customer_name: 1 rows, such as A-1002" in said


def test_run_page_has_the_command(story: Story) -> None:
    of_day = AssetRecordsFilter(AssetKey("orders"), [FIRST])
    records = story.worker.instance.fetch_materializations(of_day, limit=100).records
    said = {record.run_id: record.asset_materialization.metadata["why"].value for record in records}  # type: ignore[union-attr]
    assert said[story.runs["first"]] == f"etl why day {FIRST}"
    assert said[story.runs["withdrawal"]] == f"etl why day {FIRST}"


@pytest.mark.parametrize("page", ["why.md", "why.zh-CN.md"])
def test_page_names_everything_that_is_in_the_json(story: Story, ask: Any, page: str) -> None:
    leads = json.loads(ask("why", "customer", "李四", "--json").stdout)["customers"][0]["leads"]
    asked = [
        ("order", "A-1002"),
        ("customer", "李四"),
        ("lead", leads[0]["lead_id"]),
        ("import", story.imports["first"]),
        ("day", SECOND),
    ]
    names = set().union(*(names_in(json.loads(ask("why", *question, "--json").stdout)) for question in asked))
    columns = {column.name for table in target_tables("public").of_asset.values() for column in table.c}
    rows = {column.name for column in raw_orders.c}
    said = set(re.findall(r"`(\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert names - columns - rows <= said


def names_in(value: Any) -> set[str]:
    """一段 JSON 里全部的名字。"""
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return set(value).union(*map(names_in, value.values())) if isinstance(value, dict) else set()


@pytest.mark.parametrize(
    ("arguments", "looked_at"),
    [
        (["order", "A-9999"], "raw_orders"),
        (["order", "A-1002", "--shop", "没有的店"], "looks in every shop"),
        (["customer", "没有的人"], "customers of 2 shops"),
        (["lead", "d5f4d24e-9dd7-4fe0-9c1a-4b6d2f3a0001"], "business_leads"),
        (["import", "d5f4d24e-9dd7-4fe0-9c1a-4b6d2f3a0001"], "import_tasks"),
        (["day", "2025-12-31"], "the ledger"),
    ],
)
def test_what_never_existed(ask: Any, arguments: list[str], looked_at: str) -> None:
    with pytest.raises(NothingFoundError, match=looked_at):
        ask("why", *arguments)


@pytest.mark.usefixtures("ask")
def test_what_never_existed_has_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(["why", "order", "A-9999"])
    assert ended.value.code == ExitCode.NO_ANSWER
    assert capsys.readouterr().err.startswith("error: there is no trace of an order 'A-9999': looked at ")


def test_servers_that_are_away_are_a_note(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    away = BridgeSettings(nats_url="nats://127.0.0.1:1", connect_timeout_seconds=1)
    use_in_commands(monkeypatch, bridge_settings=away)
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://nobody@127.0.0.1:1/nowhere")
    said = ask("why", "order", "A-1001").output
    assert "in orders on 2026-01-05: 王五" in said
    assert "by a run that is not known" in said
    assert "note: when events were stored is not known: " in said
    assert re.search("note: runs are those that the ledger knows: .* Connection refused", said)
    monkeypatch.delenv("DAGSTER_POSTGRES_URL")
    assert "note: runs are those that the ledger knows: Dagster" in ask("why", "order", "A-1001").output
    monkeypatch.delenv("DAGSTER_HOME")
    assert "note: runs are those that the ledger knows: DAGSTER_HOME" in ask("why", "order", "A-1001").output
