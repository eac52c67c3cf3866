"""桥的设置：默认值可用，错的值说出变量名与允许的样子。"""

from __future__ import annotations

import pytest

from bridge.settings import LANES, BridgeSettings
from etl_assets.core.errors import SettingsError
from etl_assets.core.settings import read_settings


def test_defaults_serve_every_lane_most_urgent_first() -> None:
    assert BridgeSettings().worker_lanes == LANES == ("interactive", "event", "bulk")


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETL_NATS_URL", "nats://a:1, nats://u:p@b:2")
    monkeypatch.setenv("ETL_WORKER_LANES", "interactive, event")
    settings = read_settings(BridgeSettings)
    assert settings.nats_servers == ["nats://a:1", "nats://u:p@b:2"]
    assert settings.nats_address == "nats://a:1,nats://b:2"
    assert settings.worker_lanes == ("interactive", "event")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ETL_NATS_URL", "http://secret@host", r"ETL_NATS_URL=\*\*\* is not usable: must look like nats://"),
        ("ETL_NATS_URL", "nats://:pw@", "must look like nats://"),
        ("ETL_NATS_URL", "nats://host:99999", "must look like nats://"),
        ("ETL_NATS_URL", "localhost:4222", "must look like nats://"),
        ("ETL_WORKER_LANES", "fast", "ETL_WORKER_LANES='fast' is not usable: .*interactive"),
        ("ETL_WORKER_LANES", " , ", "ETL_WORKER_LANES"),
        ("ETL_UI_HOSTS", "https://dagster.example.com", "ETL_UI_HOSTS=.*must be host names without scheme and port"),
        ("ETL_EVENT_RETRY_SECONDS", "soon", "ETL_EVENT_RETRY_SECONDS='soon' is not usable"),
        ("ETL_TASK_MAX_ATTEMPTS", "0", "ETL_TASK_MAX_ATTEMPTS='0' is not usable"),
    ],
)
def test_wrong_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        read_settings(BridgeSettings)


@pytest.mark.parametrize(
    ("url", "login"),
    [
        ("nats://etl:s3cret@a:4222,nats://etl:s3cret@b:4222", {"user": "etl", "password": "s3cret"}),
        ("nats://etl:s3cret@a:4222,nats://b:4222", {"user": "etl", "password": "s3cret"}),
        ("nats://t0ken@a:4222", {"token": "t0ken"}),
        ("nats://a:4222", {}),
        ("nats://one:x@a:4222,nats://two:y@b:4222", {}),
    ],
)
def test_login_of_the_url_serves_the_nodes_that_a_cluster_names_itself(url: str, login: dict[str, str]) -> None:
    assert BridgeSettings(nats_url=url).nats_login == login
