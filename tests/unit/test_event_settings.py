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


def test_addresses_for_alerts_are_separated_by_blanks_or_commas_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ETL_ALERT_URLS", " feishu://token-1, mailto://u:token-2@host?to=a@x,b@x\njson://host/token-3,")
    settings = read_settings(BridgeSettings)
    assert settings.alert_urls == ("feishu://token-1", "mailto://u:token-2@host?to=a@x,b@x", "json://host/token-3")
    assert "token" not in repr(settings)
    monkeypatch.setenv("ETL_ALERT_LANGUAGE", "de")
    with pytest.raises(SettingsError, match="ETL_ALERT_LANGUAGE='de' is not usable"):
        read_settings(BridgeSettings)
