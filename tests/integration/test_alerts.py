"""告警，对真 PostgreSQL、真 NATS、真 HTTP 服务器：一件事说一次，好了说一次；地址坏了不碍别的，也不说自己的失败。"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
import structlog
from click.testing import CliRunner

from bridge.alerts import rules, watch, webhooks
from bridge.alerts.messages import Message, messages_for
from bridge.alerts.watch import AlertWatch
from bridge.alerts.webhooks import NotTakenError, channels_of
from bridge.cli.commands import cli
from bridge.events.streams import DEAD_LETTERS
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream
from bridge.operations import queues
from bridge.queue.streams import task_letters
from bridge.settings import BridgeSettings
from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import alert_watches, failed_runs, ledger
from etl_assets.core.log import RepeatedWarning
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.alerts import note_checks
from etl_assets.ledger.failures import note_failed_run

from .commands import use_in_commands
from .conftest import NatsServer
from .webhook_server import Answer, WebhookServer

Watch = Callable[..., AlertWatch]
REASON = "a shop has no name"


@pytest.fixture
def server() -> Iterator[WebhookServer]:
    with WebhookServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY", Backoff(first_seconds=0.01, longest_seconds=0.02))
    monkeypatch.setattr(watch, "_not_taken", RepeatedWarning(watch.logger, "not taken"))  # 上一个测试说过的也再说
    monkeypatch.setattr(queues, "_LOOK_AGAIN_SECONDS", 0.01)


@pytest.fixture
def look(
    engine: sa.Engine, etl_settings: EtlSettings, nats_server: NatsServer, server: WebhookServer, tmp_path: Path
) -> Watch:
    """`look(地址…)`：一个监听器的看守，没有说地址的告诉 server。"""

    def make(*urls: str, patience_seconds: float = 0, **settings: Any) -> AlertWatch:
        given = {"alert_urls": urls or (f"json://{server.host}/",), **settings}
        bridge_settings = BridgeSettings(nats_url=nats_server.url, **given)
        return AlertWatch(engine, etl_settings, bridge_settings, state_dir=tmp_path, patience_seconds=patience_seconds)

    return make


@pytest.fixture
async def connection(nats_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    settings = BridgeSettings(nats_url=nats_server.url)
    link = JetStreamConnection(settings, name="test")
    await link.open()
    for config in (DEAD_LETTERS, task_letters(settings)):
        await ensure_stream(link, config)
    yield link
    await link.close()


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def hold(engine: sa.Engine, *assets: str, day: date = date(2026, 1, 5)) -> None:
    for asset in assets:
        values = {"target": "public", "asset": asset, "day": day, "requested": 1, "held_reason": REASON}
        with engine.begin() as connection:
            connection.execute(sa.insert(ledger).values(requested_at=sa.func.now(), **values))


def insert_due(engine: sa.Engine, day: date) -> None:
    values = {"target": "public", "asset": "orders", "day": day, "requested": 1}
    with engine.begin() as connection:
        connection.execute(sa.insert(ledger).values(requested_at=sa.func.now(), **values))


def grow_old(engine: sa.Engine, *, hours: int) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(failed_runs).values(failed_at=sa.func.now() - timedelta(hours=hours)))


def mend(engine: sa.Engine) -> None:
    execute(engine, "UPDATE etl.ledger SET materialized = requested, held_reason = NULL")


async def test_one_message_per_trouble_with_the_command_that_mends_it_and_one_when_it_is_over(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    watching = look()
    await watching.look()
    assert server.received == []
    hold(engine, "orders")
    for _ in range(3):
        await watching.look()
    ((_, told),) = server.received
    assert told["title"].startswith("dayline 出了问题")
    assert told["message"] == (
        f"orders 有 1 天搁置了，最早的是 2026-01-05：{REASON}；缘由没了就再要求一次\n"
        "怎么办：`etl backfill --asset orders --from 2026-01-05 --to 2026-01-05`"
    )
    mend(engine)
    for _ in range(3):
        await watching.look()
    assert [title.partition("（")[0] for title in server.titles()] == ["dayline 出了问题", "dayline 好了"]
    with engine.connect() as reading:
        assert reading.exec_driver_sql("SELECT count(*) FROM etl.alerts WHERE said <> '{}'").scalar() == 0


async def test_many_at_once_are_one_message_in_the_language_that_was_chosen(
    look: Watch, server: WebhookServer, engine: sa.Engine, connection: JetStreamConnection
) -> None:
    hold(engine, "orders", "customers", "leads")
    await connection.publish("events_dlq.x", b"{}", message_id="1")
    watching = look(alert_language="en")
    await watching.look()
    await watching.look()
    ((_, told),) = server.received
    assert told["title"].startswith("dayline: 4 things are wrong")
    assert "1 dead letters in EVENTS_DLQ\nWhat to do: `etl dlq list`" in told["message"]
    assert all(f"1 days of {asset} are held" in told["message"] for asset in ("orders", "customers", "leads"))
    mend(engine)
    await connection.ask("STREAM.PURGE.EVENTS_DLQ")
    await watching.look()
    await watching.look()
    assert [title.partition(" (")[0] for title in server.titles()[1:]] == ["dayline: 4 things are over"]


async def test_more_of_it_is_told_again_but_not_within_the_hour(
    look: Watch, server: WebhookServer, engine: sa.Engine, connection: JetStreamConnection
) -> None:
    watching = look()
    for number in (1, 2):
        await connection.publish("events_dlq.x", b"{}", message_id=str(number))
        await watching.look()
    assert len(server.received) == 1
    execute(engine, "UPDATE etl.alerts SET said_at = said_at - interval '2 hours'")
    await watching.look()
    await watching.look()
    assert [body["message"].partition("\n")[0] for _, body in server.received] == [
        "EVENTS_DLQ 里有 1 封死信",
        "EVENTS_DLQ 里有 2 封死信",
    ]


async def test_two_listeners_say_it_once_and_one_takes_over(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    hold(engine, "orders")
    watches = [look() for _ in range(4)]
    barrier = threading.Barrier(len(watches))

    def look_often(each: AlertWatch) -> None:
        barrier.wait()
        for _ in range(3):
            asyncio.run(each.look())

    await asyncio.gather(*(asyncio.to_thread(look_often, each) for each in watches))
    assert len(server.received) == 1
    mend(engine)
    expire_watch(engine)  # 看着的那个死了
    await look().look()
    assert len(server.received) == 2


def expire_watch(engine: sa.Engine, *, seconds: int = 1) -> None:
    gone = sa.func.now() - timedelta(seconds=seconds)
    with engine.begin() as connection:
        connection.execute(sa.update(alert_watches).values(watched_until=gone))


async def test_worker_takes_over_only_when_no_listener_does(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    await look().look()
    hold(engine, "orders")
    worker = look(patience_seconds=watch.WORKER_PATIENCE_SECONDS)
    expire_watch(engine)
    await worker.look()
    assert server.received == []
    expire_watch(engine, seconds=61)
    await worker.look()
    assert len(server.received) == 1


_LOOK_ONCE = """
import asyncio, pathlib
from bridge.alerts.watch import AlertWatch
from bridge.settings import get_bridge_settings
from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import get_settings
asyncio.run(AlertWatch(get_engine(), get_settings(), get_bridge_settings(), state_dir=pathlib.Path.cwd()).look())
"""


async def test_what_was_sent_by_a_process_that_died_before_it_noted_it_is_repeated_once(
    look: Watch,
    server: WebhookServer,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    tmp_path: Path,
) -> None:
    hold(engine, "orders")
    server.let_go.clear()
    addresses = {
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_NATS_URL": nats_server.url,
        "ETL_ALERT_URLS": f"json://{server.host}/",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _LOOK_ONCE],
        env={**os.environ, **addresses, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
    )
    await asyncio.to_thread(server.wait_for, 1)
    process.kill()
    process.wait()
    server.let_go.set()
    watching = look()
    await watching.look()
    assert len(server.received) == 1  # 它也许还活着
    expire_watch(engine)
    for _ in range(3):
        await watching.look()
    assert len(server.received) == 2


async def test_address_that_fails_is_tried_again_and_neither_delays_the_others_nor_is_told_its_own_failure(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    server.answers["/broken"] = Answer(status=500)
    watching = look(f"json://{server.host}/broken", f"json://{server.host}/")
    hold(engine, "orders")
    with structlog.testing.capture_logs() as logs:
        for _ in range(4):
            await watching.look()
            await asyncio.sleep(0.05)
    assert len(server.titles("/")) == 1
    assert len(server.titles("/broken")) == 4
    assert len({json.dumps(body) for path, body in server.received}) == 1  # 每次都是同一件事，没有一条说送不到
    assert [(line["channel"], line["error"]) for line in logs if line["log_level"] == "warning"] == [
        ("json-1", "it answered HTTP 500")
    ]
    del server.answers["/broken"]
    await watching.look()
    await watching.look()
    assert (len(server.titles("/")), len(server.titles("/broken"))) == (1, 5)


async def test_pauses_between_the_attempts_grow(
    look: Watch, server: WebhookServer, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RETRY", Backoff(first_seconds=60, longest_seconds=900))
    server.answers["/"] = Answer(status=500)
    watching = look()
    hold(engine, "orders", "customers")
    for _ in range(3):
        await watching.look()
    assert len(server.received) == 1


@pytest.mark.parametrize("kind", ["silent", "dripping"])
async def test_address_that_does_not_answer_holds_up_nothing(
    look: Watch, server: WebhookServer, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 0.5 if kind == "silent" else 10.0)
    monkeypatch.setattr(webhooks, "DEADLINE_SECONDS", 10.0 if kind == "silent" else 0.5)
    if kind == "silent":
        server.let_go.clear()
    else:
        server.answers["/slow"] = Answer(dripping=True)
    watching = look(f"json://{server.host}/slow", *([] if kind == "silent" else [f"json://{server.host}/"]))
    hold(engine, "orders")
    started_at = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        await watching.look()
    assert time.monotonic() - started_at < 9
    (line,) = (line for line in logs if line["log_level"] == "warning")
    assert line["error"] in (
        "it cannot be reached, or did not answer in time",
        "it gave no answer within 0 s",
    )
    if kind == "dripping":
        assert len(server.titles("/")) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirect_elsewhere_is_not_followed(
    look: Watch, server: WebhookServer, engine: sa.Engine, status: int
) -> None:
    with WebhookServer() as elsewhere:
        server.answers["/"] = Answer(status=status, headers={"Location": f"http://{elsewhere.host}/"})
        hold(engine, "orders")
        with structlog.testing.capture_logs() as logs:
            await look().look()
        assert (len(server.received), elsewhere.received) == (1, [])
    assert [line["error"] for line in logs if line["log_level"] == "warning"] == [f"it answered HTTP {status}"]


async def test_nothing_listens_is_told_when_it_lasts(
    look: Watch, server: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = look()
    await watching.look()
    assert server.received == []  # 也许正在重起
    monkeypatch.setattr(rules, "RESTART_SECONDS", 0.0)
    await watching.look()
    assert sorted(body["message"].partition("，")[0] for _, body in server.received) == [
        "没有工人在运行",
        "没有监听器在运行",
    ]


async def test_while_nats_is_away_it_is_not_known_whether_its_troubles_are_over(
    look: Watch,
    server: WebhookServer,
    connection: JetStreamConnection,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watching = look(connect_timeout_seconds=1)
    await connection.publish("events_dlq.x", b"{}", message_id="1")
    await watching.look()
    nats_server.stop()
    monkeypatch.setattr(rules, "RESTART_SECONDS", 0.0)
    await watching.look()
    monkeypatch.undo()
    await asyncio.to_thread(nats_server.start)
    await watching.look()
    told = [body["message"].partition("：")[0].partition("\n")[0] for _, body in server.received]
    assert told == ["EVENTS_DLQ 里有 1 封死信", "NATS", "NATS"]


async def test_database_that_is_away_is_told_by_the_one_who_watched_and_by_no_other(
    look: Watch, server: WebhookServer, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, other = look(), look()
    await watching.look()
    await other.look()
    monkeypatch.setattr(rules, "RESTART_SECONDS", 0.0)
    database = engine.url.database
    execute(engine, f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
    engine.dispose()
    for each in (watching, other, watching, other):
        await each.look()
    ((_, told),) = server.received
    assert told["message"].startswith("数据库：")
    assert "read-only" in told["message"]
    admin = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        connection.exec_driver_sql(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
    admin.dispose()
    engine.dispose()
    monkeypatch.setattr(rules, "RESTART_SECONDS", 60.0)
    for each in (watching, other, watching, other):
        await each.look()
    assert [title.partition("（")[0] for title in server.titles()] == ["dayline 出了问题", "dayline 好了"]


async def test_check_of_a_table_that_fails_is_told_until_the_check_passes(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    watching = look()
    for violations in (2, 2, 0):
        with engine.begin() as connection:
            note_checks(connection, "public", "orders", {"accounts": violations, "unique_keys": 0})
        await watching.look()
    assert [body["message"].partition("：")[0] for _, body in server.received] == [
        "orders 的检查 accounts 发现 2 处不对"
    ] * 2


async def test_accounts_that_do_not_add_up_are_told_until_their_day_is_made(
    look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    """过了一天、一周，又有许多别的失败，有人再次要求：都还不算好。"""
    watching, days = look(), [DayRange(date(2026, 1, day), date(2026, 1, day)) for day in (5, 6)]
    for each in days:
        insert_due(engine, each.first)

    def fail(days: DayRange, run_id: str, reason: str) -> None:
        with engine.begin() as connection:
            note_failed_run(connection, "public", days, asset="orders", run_id=run_id, reason=reason)

    fail(days[0], "broken", "AccountingError: the rows do not add up, so nothing was written: 1 raw rows on 2026-01-05")
    await watching.look()
    for hours in (25, 8 * 24):
        grow_old(engine, hours=hours)
        for number in range(11):
            fail(days[1], f"{hours} {number}", "TransientError: another run holds the rows")
        await watching.look()
        await watching.look()
    execute(engine, "UPDATE etl.ledger SET requested = requested + 1")
    await watching.look()
    assert [body["message"].partition("：")[0] for _, body in server.received] == [
        "orders 在 2026-01-05 的账不平，什么也没有写"
    ]
    execute(engine, "UPDATE etl.ledger SET materialized = requested, materialized_at = now() WHERE day = '2026-01-05'")
    execute(engine, "UPDATE etl.ledger SET requested = requested + 1")
    await watching.look()
    await watching.look()
    assert [title.partition("（")[0] for title in server.titles()] == ["dayline 出了问题", "dayline 好了"]
    grow_old(engine, hours=8 * 24)
    fail(days[1], "last", "TransientError: another run holds the rows")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT run_id FROM etl.failed_runs").scalars().all() == ["last"]


def test_digest_fits_into_what_wecom_takes_and_says_how_many_are_left_out() -> None:
    row = {"zh": "坏" * 500, "remedy": "`etl doctor`", "said": {}, "over_at": None, "is_due": True, "may_grow": False}
    (message,) = messages_for([row] * 40, "json-1", language="zh", where="host", zone=ZoneInfo("UTC"))
    assert len(f"{message.title}\r\n{message.body}".encode()) <= 2_048
    assert message.body.splitlines()[-1] == "… +36: `etl alerts list`"
    assert len(message.said) == 40


# ---- 钉钉、企业微信、飞书 ----------------------------------------------------------

TOKEN = "0123456789abcdefSECRET"
MESSAGE = Message("标题", "正文", is_over=False)
TEXTS = {
    "dingtalk": ("https://oapi.dingtalk.com", lambda body: (body["msgtype"], str(body))),
    "wecombot": ("https://qyapi.weixin.qq.com", lambda body: (body["msgtype"], body["text"]["content"])),
    "feishu": ("https://open.feishu.cn", lambda body: (body["msg_type"], body["content"]["text"])),
}


@pytest.fixture(params=list(TEXTS))
def platform(request: pytest.FixtureRequest, server: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """apprise 的插件，主机换成 server。"""
    channels_of([f"{request.param}://{TOKEN}"])[0].check()  # 载入 apprise
    module = sys.modules[f"apprise.plugins.{request.param}"]
    plugin = next(
        found
        for name, found in vars(module).items()
        if name.startswith("Notify") and hasattr(found, "notify_url") and found.__module__ == module.__name__
    )
    real, _ = TEXTS[request.param]
    assert plugin.notify_url.startswith(real)
    monkeypatch.setattr(plugin, "notify_url", plugin.notify_url.replace(real, f"http://{server.host}"))
    return request.param


def test_platforms_are_spoken_to_as_they_want(platform: str, server: WebhookServer) -> None:
    channels_of([f"{platform}://{TOKEN}"])[0].send(MESSAGE)
    ((_, body),) = server.received
    kind, text = TEXTS[platform][1](body)
    assert kind == "text"
    assert "标题" in text
    assert "正文" in text


def test_platform_that_refuses_with_status_200_has_not_taken_it(platform: str, server: WebhookServer) -> None:
    code = "code" if platform == "feishu" else "errcode"
    refused = Answer(body=json.dumps({code: 310000, "errmsg": f"keywords not in content {TOKEN}"}).encode())
    channel = channels_of([f"{platform}://{TOKEN}"])[0]
    server.answers = dict.fromkeys(
        ("/robot/send", "/cgi-bin/webhook/send", f"/open-apis/bot/v2/hook/{TOKEN}/"), refused
    )
    with pytest.raises(NotTakenError) as caught:
        channel.send(MESSAGE)
    assert TOKEN not in str(caught.value)
    if platform != "feishu":
        assert "310000 keywords not in content" in str(caught.value)


# ---- 命令 ----------------------------------------------------------------------


@pytest.fixture
def run(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))

    def invoke(*arguments: str, **settings: Any) -> Any:
        bridge_settings = BridgeSettings(nats_url=nats_server.url, **settings)
        use_in_commands(monkeypatch, engine=engine, settings=etl_settings, bridge_settings=bridge_settings)
        return CliRunner().invoke(cli, ["alerts", *arguments])

    return invoke


def test_command_says_of_each_address_whether_it_took_the_test_and_shows_no_secret(
    run: Callable[..., Any], server: WebhookServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.answers["/hook/token-of-two"] = Answer(status=403)
    urls = (
        f"json://user:s3cret@{server.host}/hook/token-of-one",
        f"json://{server.host}/hook/token-of-two",
        "dingtalk://",
    )
    result = run("test", alert_urls=urls)
    assert result.exit_code == 1
    one, two, three = result.output.splitlines()
    assert (one, two) == ("json-1 (json://***): taken", "json-2 (json://***): not taken, it answered HTTP 403")
    assert three.startswith("dingtalk-3 (dingtalk://***): not taken, ETL_ALERT_URLS: dingtalk-3")
    assert not [secret for secret in ("s3cret", "token-of") if secret in result.output + caplog.text]
    assert server.titles("/hook/token-of-one")[0].startswith("dayline 测试")


async def test_list_says_what_is_wrong_since_when_and_who_was_told(
    run: Callable[..., Any], look: Watch, engine: sa.Engine
) -> None:
    hold(engine, "orders")
    assert "no process looks for alerts now" in (await asyncio.to_thread(run, "list")).stderr
    untold = {row["key"]: row for row in json.loads((await asyncio.to_thread(run, "list", "--json")).stdout)}
    assert (untold["held orders"]["told"], untold["held orders"]["since"]) == ("no", None)
    await look().look()
    listed = {row["key"]: row for row in json.loads((await asyncio.to_thread(run, "list", "--json")).stdout)}
    assert listed["held orders"]["told"] == "json-1"
    assert listed["held orders"]["since"] is not None
    assert listed["listener"]["told"] == "no"
    table = (await asyncio.to_thread(run, "list")).output
    assert REASON in " ".join(table.replace("│", " ").split())
    assert "no process looks" not in table


async def test_alerts_that_nobody_took_are_said_by_status_and_not_sent(
    run: Callable[..., Any], look: Watch, server: WebhookServer, engine: sa.Engine
) -> None:
    server.answers["/"] = Answer(status=500)
    hold(engine, "orders")
    watching = look()
    await watching.look()
    execute(engine, "UPDATE etl.alerts SET since = since - interval '10 minutes' WHERE key = 'held orders'")
    listed = {row["key"]: row for row in json.loads((await asyncio.to_thread(run, "list", "--json")).stdout)}
    assert "没有一个 webhook 收下" in listed["unsaid"]["problem"]
    del server.answers["/"]
    await asyncio.sleep(0.05)
    await watching.look()
    await watching.look()
    assert len(server.received) == 2
    assert all("搁置" in body["message"] for _, body in server.received)


# ---- 进程 ----------------------------------------------------------------------


def test_listener_watches_beside_its_work_and_logs_no_secret(
    engine: sa.Engine, etl_settings: EtlSettings, nats_server: NatsServer, server: WebhookServer, tmp_path: Path
) -> None:
    hold(engine, "orders")
    addresses = {
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_NATS_URL": nats_server.url,
        "ETL_STATE_DIR": str(tmp_path),
        "ETL_ALERT_URLS": f"nonsense://token-one, json://{server.host}/token-two",
    }
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bridge.cli.main", "listen"], env={**os.environ, **addresses}, stderr=log
        )
        try:
            server.wait_for(1)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
    assert [path for path, _ in server.received] == ["/token-two"]
    assert "nonsense-1 (nonsense://***) is no address" in text
    assert '"message": "told what is wrong"' in text
    assert "token-" not in text
    assert "Traceback" not in text
