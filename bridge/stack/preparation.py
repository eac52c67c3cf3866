"""栈的数据库备好，才起别的：我们的 schema、结果表、Dagster 的表。

在自己的进程里，做完就走：Alembic、Polars 与它们带来的，不必一直留在监督者里；它一早就起来，装载它们与建库同时做。
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

from etl_assets.core import errors
from etl_assets.core.errors import DatabaseRefusedError, EtlError, PermanentError
from etl_assets.core.log import configure_logging, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_process import with_launcher

logger = get_logger(__name__)


@dataclass(frozen=True)
class Order:
    """要备好的：settings 说的数据库与结果表，Dagster 的表在 dagster_schema 里；service_url 里的角色能登录（空的没有）。"""

    settings: EtlSettings
    dagster_schema: str
    environment: Mapping[str, str]
    log_path: Path
    service_url: str

    def to_json(self) -> bytes:
        return json.dumps(
            {**vars(self), "settings": self.settings.model_dump(mode="json"), "log_path": str(self.log_path)}
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Order:
        given = json.loads(text)
        return cls(**{**given, "settings": EtlSettings(**given["settings"]), "log_path": Path(given["log_path"])})


class Preparation:
    """做这件事的进程，等着吩咐。"""

    def __init__(self) -> None:
        command = with_launcher([sys.executable, "-P", "-m", __name__], death_signal=SIGKILL)
        # 自成会话：终端里的 Ctrl-C 由监督者听，由它停下
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def run(self, order: Order) -> None:
        """:raises EtlError: 它的错误，原样的一句话。"""
        answer, _ = self._process.communicate(order.to_json())
        if not answer:
            raise PermanentError(f"preparing the database ended with exit code {self._process.returncode}")
        raise_error(answer)

    def stop(self) -> None:
        """不等它做完。"""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    from bridge.roles.database import give_rights
    from bridge.stack.dagster_home import create_dagster_storage
    from etl_assets.core.database_sync import build_engine, normalize_url, transact
    from etl_assets.migrations.upgrade import upgrade_database
    from etl_assets.reports.readiness import assert_rights_of_service, assert_writable
    from etl_assets.services.target_schema import prepare_target

    configure_logging("stack")
    given = sys.stdin.buffer.read()
    if not given:  # 用不着它了
        return
    order = Order.from_json(given)
    engine = build_engine(order.settings)
    error: EtlError | None = None
    try:
        transact(engine, assert_writable)  # 备机：一句话，不等迁移去撞
        upgrade_database(engine)
        prepare_target(engine, order.settings)
        create_dagster_storage(
            engine, schema=order.dagster_schema, environment=order.environment, log_path=order.log_path
        )
        if order.service_url:
            login, target = normalize_url(order.service_url), order.settings.target_schema
            give_rights(engine, login, target=target, dagster_schema=order.dagster_schema)
            try:
                transact(engine, assert_rights_of_service, target)
            except DatabaseRefusedError as missing:  # 栈照样起来：不起来，谁也连不上去补
                logger.warning(str(missing))
    except EtlError as raised:
        error = raised
    finally:
        engine.dispose()
    sys.stdout.buffer.write(error_to_json(error))


def error_to_json(error: EtlError | None) -> bytes:
    """那一句话，与最近的一个只要一句话就造得出的类：带着别的东西的错误过不了进程。"""
    if error is None:
        return b"null"
    plain = (each for each in type(error).__mro__ if vars(errors).get(each.__name__) is each and _says_only(each))
    return json.dumps([next(plain).__name__, str(error)]).encode()


def raise_error(answer: bytes) -> None:
    """:raises EtlError: `error_to_json` 写的那一个。"""
    if (found := json.loads(answer)) is not None:
        name, says = found
        raise getattr(errors, name)(says)


def _says_only(kind: type) -> bool:
    return "__init__" not in vars(kind)


if __name__ == "__main__":
    main()
