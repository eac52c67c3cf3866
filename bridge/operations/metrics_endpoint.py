"""指标的入口：一台机器（一个状态文件夹）一个，不论有几个进程；它的进程死了，另一个接着。"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from bridge.operations.installation_metrics import InstallationMetrics
from bridge.settings import BridgeSettings, get_bridge_settings
from bridge.stack.addresses import read_addresses
from etl_assets.core.errors import EtlError
from etl_assets.core.log import get_logger
from etl_assets.core.metrics import RECORDED, discard_unreadable, drop_gauges_of_the_dead, start_recording
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.embedded.private_folder import create_private_folder

logger = get_logger(__name__)

_AGAIN_SECONDS = 10.0


def start_metrics(state_dir: Path, *, records: bool) -> None:
    """记下本进程的数，轮到它时给出这台机器的；出了什么毛病都只是一句警告。

    :param records: 它自己做事件或任务；只看着别的进程的不记。
    """
    settings = get_bridge_settings()
    folder = state_dir / settings.own_name("metrics")
    try:
        create_private_folder(state_dir)
        create_private_folder(folder)
    except EtlError as error:
        logger.warning("this process records and serves no metrics", error=str(error))
        return
    try:
        discard_unreadable(folder)
        if records:
            start_recording(folder)
    except OSError as error:
        logger.warning("this process records no metrics", error=str(error))
    registry = CollectorRegistry()
    registry.register(ProcessMetrics(folder))
    registry.register(InstallationMetrics(lambda: _settings_of(state_dir)))
    # 守护线程：等着轮到它的，不拦着进程退出
    serve = threading.Thread(target=_serve, args=(folder, settings, registry), name="metrics", daemon=True)
    serve.start()


class ProcessMetrics(MultiProcessCollector):
    """各进程的文件合成的；死了的进程，它的计数还在，它此刻的样子不在了。"""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, path=str(folder))  # type: ignore[no-untyped-call]
        self._folder = folder
        self._names = {metric.name.removesuffix("_total") for metric in RECORDED}

    def collect(self) -> Iterable[Metric]:
        drop_gauges_of_the_dead(self._folder)
        # 旧版本的文件里也许还有已经没有了的
        found = super().collect()  # type: ignore[no-untyped-call]
        return [metric for metric in found if metric.name in self._names]


def _settings_of(state_dir: Path) -> tuple[EtlSettings, BridgeSettings]:
    """没有设的地址取自正在运行的栈。"""
    settings, bridge_settings = get_settings(), get_bridge_settings()
    addresses = read_addresses(state_dir)
    if addresses is not None and not settings.database_url:
        settings = settings.model_copy(update={"database_url": addresses.database_url})
    if addresses is not None and not bridge_settings.nats_url:
        bridge_settings = bridge_settings.model_copy(update={"nats_url": addresses.nats_url})
    return settings, bridge_settings


def _serve(folder: Path, settings: BridgeSettings, registry: CollectorRegistry) -> None:
    """一台机器上只有一个在给出，别的等它：它怎样死的，内核都会放开。端口被别的程序占着，说一声，隔一会儿再试。"""
    is_said = False
    try:
        with (folder / "serving").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            while True:
                try:
                    _, serving = start_http_server(settings.metrics_port, settings.metrics_host, registry)
                except OSError as error:
                    if not is_said:
                        remedy = "set ETL_METRICS_PORT to a free port; meanwhile everything else goes on"
                        where = f"{settings.metrics_host}:{settings.metrics_port}"
                        logger.warning(
                            "cannot serve metrics, trying again", address=where, error=str(error), remedy=remedy
                        )
                    is_said = True
                    time.sleep(_AGAIN_SECONDS)
                else:
                    logger.info(
                        "serving metrics", address=f"http://{settings.metrics_host}:{settings.metrics_port}/metrics"
                    )
                    serving.join()
    except OSError as error:
        logger.warning("this process serves no metrics", error=str(error))
