"""数据库里没有的：事件何时存下（NATS），哪个运行、哪个工人写的（Dagster）。问不到的不妨碍答案，说一声。"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import stored_message
from bridge.nats_names import EVENTS_STREAM
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import check_dagster_database
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import EtlError
from etl_assets.core.log import redact

Record = dict[str, Any]

_MOST_EVENTS = 50


@dataclass
class Elsewhere:
    """答案里还空着的，数据库的事务结束以后一起补：别的服务器慢，不占着它。

    :param ui_url: Dagster 网页的地址；None 就不给运行的地址。
    """

    ui_url: str | None = None
    notes: list[str] = field(default_factory=list)
    _events: list[Record] = field(default_factory=list)
    _written: list[tuple[Record, str, set[date]]] = field(default_factory=list)
    _made: list[tuple[Record, list[str], date, int]] = field(default_factory=list)
    _taken_in: list[tuple[Record, str, list[date], datetime]] = field(default_factory=list)

    # ---- 记下要补的 -----------------------------------------------------------------

    def stored(self, imports: Iterable[Record]) -> list[Record]:
        """这些导入的事件何时存下：event 里的 stored_at，不知道是 None。"""
        known = list(imports)
        events = [task["event"] for task in known if task["event"] is not None]
        for event in events:
            event["stored_at"] = None
        self._events += [event for event in events if event["stream_sequence"]]
        return known

    def written(self, row: Record, asset: str, days: Iterable[date]) -> Record:
        """这一行是哪个运行写的：run；days 是它可能写在哪些天。"""
        row["run"] = None
        if row["updated_at"] is not None:  # 别的系统写的可以没有
            self._written.append((row, asset, set(days)))
        return row

    def made(self, report: Record, assets: list[str], day: date, *, limit: int) -> None:
        """做过这一天的运行，新的在前，每个资产看最新的 limit 次：runs。"""
        report["runs"] = []
        self._made.append((report, assets, day, limit))

    def taken_in(self, report: Record, asset: str, days: Iterable[date], since: datetime | None) -> None:
        """since（处理事件的时刻）之后，每一天头一个做它的运行：runs。"""
        report["runs"] = []
        if since is not None:
            self._taken_in.append((report, asset, list(days), since))

    def addressed(self, records: Iterable[Record]) -> list[Record]:
        """运行的网址：run_id 的是 url，failed_run_id 的是 failed_url。"""
        names = {"run_id": "url", "failed_run_id": "failed_url"}
        return [
            record | {url: self._url(record[name]) for name, url in names.items() if name in record}
            for record in records
        ]

    # ---- 补上 -----------------------------------------------------------------------

    def fill(self, bridge_settings: BridgeSettings) -> None:
        if self._events:
            try:
                asyncio.run(self._ask_nats(bridge_settings))
            except EtlError as error:
                self.notes.append(f"when events were stored is not known: {redact(str(error))}")
        if self._written or self._made or self._taken_in:
            try:
                with translated_errors():
                    self._ask_dagster()
            except Exception as error:  # noqa: BLE001  # 别人的存储、别人的设置：抛什么都不耽误已有的答案
                said = str(error) if isinstance(error, EtlError) else f"{type(error).__name__}: {error}"
                self.notes.append(f"runs are those that the ledger knows: {redact(' '.join(said.split()))}")

    async def _ask_nats(self, settings: BridgeSettings) -> None:
        async with JetStreamConnection(settings, name="why") as connection:
            for event in self._events[-_MOST_EVENTS:]:
                message = await stored_message(connection, EVENTS_STREAM, event["stream_sequence"])
                # 流重建过，序号就是别的事件的
                if message is not None and _event_id(message.data) == str(event["event_id"]):
                    event["stored_at"] = message.stored_at

    def _ask_dagster(self) -> None:
        from bridge.warm_dagster.instance import open_lean_instance
        from bridge.warm_dagster.materializations import (
            Materialization,
            describe_run,
            find_writer,
            read_materializations,
        )

        if url := os.environ.get("DAGSTER_POSTGRES_URL"):
            check_dagster_database(url)  # Dagster 自己试上几回，一回一句警告，最后只说"too many retries"
        with open_lean_instance() as instance:
            described: dict[str, Mapping[str, str | None]] = {}

            def describe(made: Materialization) -> Record:
                if made.run_id not in described:
                    described[made.run_id] = describe_run(instance, made.run_id)
                run = {"run_id": made.run_id, "url": self._url(made.run_id), "worker": made.worker}
                return {**run, **described[made.run_id], "made_at": made.made_at, "scope": made.metadata.get("scope")}

            for row, asset, days in self._written:
                writer = find_writer(instance, asset, days, row["updated_at"])
                row["run"] = describe(writer) if writer else None
            for report, asset, of_import, since in self._taken_in:
                first = [writer for day in of_import if (writer := find_writer(instance, asset, [day], since))]
                report["runs"] = [describe(writer) for writer in {writer.run_id: writer for writer in first}.values()]
            for report, assets, day, limit in self._made:
                runs: dict[str, Record] = {}
                for asset in assets:
                    for made in read_materializations(instance, asset, day, limit=limit):
                        run = runs.setdefault(made.run_id, describe(made) | {"assets": []})
                        run["assets"].append(asset)
                        run["made_at"] = max(run["made_at"], made.made_at)
                newest_first = sorted(runs.values(), key=lambda run: run["made_at"], reverse=True)
                report["runs"] = newest_first[:limit]

    def _url(self, run_id: str | None) -> str | None:
        return f"{self.ui_url.rstrip('/')}/runs/{run_id}" if self.ui_url and run_id else None


def _event_id(data: bytes) -> str | None:
    try:
        return str(json.loads(data)["event_id"])
    except (ValueError, KeyError, TypeError):
        return None
