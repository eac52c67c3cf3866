"""一个工人进程里常驻的东西：载入一次的代码位置、Dagster 实例、引擎；领取到期的日子并执行成一个 Dagster 运行。"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from uuid import uuid4

import sqlalchemy as sa
from dagster import DagsterInstance

from bridge.code_location import CODE_MODULE, JOB_NAME, LOCATION_NAME
from bridge.dagster_adapter import CodeLocation, RunResult, fail_abandoned_run, open_instance
from bridge.settings import BridgeSettings
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import EtlError, PermanentError
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.services import leases, ledger
from etl_assets.services.leases import Claim, claim_due_days, current_lease
from etl_assets.services.outbox import Completion, add_completion

logger = get_logger(__name__)


@dataclass(frozen=True)
class RunWorker:
    """阻塞的部分；任务用 asyncio.to_thread 调它们。"""

    instance: DagsterInstance
    location: CodeLocation
    engine: sa.Engine
    settings: EtlSettings
    lease_seconds: float
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")

    @classmethod
    def load(cls, bridge_settings: BridgeSettings) -> RunWorker:
        """载入代码位置，连上 Dagster 的存储，把作业先算一遍：第一个事件就走热的路。"""
        location = CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)
        worker = cls(
            instance=open_instance(),
            location=location,
            engine=get_engine(),
            settings=get_settings(),
            lease_seconds=bridge_settings.lease_seconds,
        )
        location.warm_up(worker.instance, JOB_NAME, ledger.ASSETS)
        return worker

    def claim(self) -> Claim | None:
        """领一段到期的日子；顺便给已死的执行者收尾。"""
        run_id = str(uuid4())
        with translated_errors(), self.engine.begin() as connection:
            abandoned = leases.take_expired_leases(connection, self.settings.target_schema)
            claim = claim_due_days(
                connection, self.settings.target_schema, run_id=run_id, owner=self.owner, lease_seconds=self.lease_seconds
            )
        for abandoned_id in abandoned:
            logger.warning("worker died in mid-run, its days are due again", run_id=abandoned_id)
            fail_abandoned_run(self.instance, abandoned_id, "The worker of this run died or was cut off; another run takes over its days.")
        return claim

    def execute(self, claim: Claim) -> RunResult:
        """建运行、在本线程里执行、释放租约；失败记进台账，由台账决定何时再试。"""
        token = current_lease.set(claim.lease)
        try:
            run = self.location.create_run(
                self.instance,
                job_name=JOB_NAME,
                run_id=claim.lease.run_id,
                assets=claim.assets,
                days=claim.days,
                tags={"etl/trigger": "event"},
            )
            result = self.location.execute_run(self.instance, run)
        finally:
            current_lease.reset(token)
        self._finish(claim, result)
        return result

    def extend_lease(self, claim: Claim) -> bool:
        """心跳；False 表示租约已经不是我们的。"""
        with translated_errors(), self.engine.begin() as connection:
            return leases.extend_lease(connection, claim.lease, lease_seconds=self.lease_seconds)

    def _finish(self, claim: Claim, result: RunResult) -> None:
        with translated_errors(), self.engine.begin() as connection:
            if not result.succeeded:
                self._record_failure(connection, claim, result)
            leases.release_lease(connection, claim.lease)

    def _record_failure(self, connection: sa.Connection, claim: Claim, result: RunResult) -> None:
        """失败的资产也要有完成事件；租约已失的不记，新的持有者会做。"""
        if result.error_class == "LeaseLostError":
            return
        target = self.settings.target_schema
        asset = result.failed_step if result.failed_step in claim.assets else claim.assets[0]
        completion = Completion(
            asset=asset,
            days=claim.days,
            run_id=claim.lease.run_id,
            status="failed",
            downstream="pending",
            import_ids=ledger.waiting_imports(connection, target, asset, claim.days),
            error=result.error,
        )
        permanent = result.error_class in _class_names(PermanentError)
        ledger.record_failure(connection, target, claim.assets, claim.days, reason=result.error, permanent=permanent)
        add_completion(connection, target, completion)


def _class_names(base: type[EtlError]) -> set[str]:
    """Dagster 只留下异常的类名：由类名认出类别。"""
    return {base.__name__}.union(*(_class_names(kind) for kind in base.__subclasses__()))
