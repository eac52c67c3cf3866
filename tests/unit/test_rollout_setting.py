"""ETL_ROLLOUT：百分比或店名；别的写法在启动时就拒绝，说出名字、值与允许的。"""

from __future__ import annotations

from pathlib import Path

import pytest

from etl_assets.core.errors import SettingsError
from etl_assets.core.settings import EtlSettings, read_settings


@pytest.fixture(autouse=True)
def no_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ETL_ROLLOUT", raising=False)


def test_all_customers_are_the_default() -> None:
    assert read_settings(EtlSettings).rollout == 100


@pytest.mark.parametrize(
    ("value", "rollout"),
    [
        ("1%", 1),
        ("10%", 10),
        (" 100 %\u3000", 100),
        ("云上旗舰店", ("云上旗舰店",)),
        (" 云上旗舰店 ,二店,二店", ("云上旗舰店", "二店")),
        ("1688", ("1688",)),
    ],
)
def test_percent_or_shops(monkeypatch: pytest.MonkeyPatch, value: str, rollout: int | tuple[str, ...]) -> None:
    monkeypatch.setenv("ETL_ROLLOUT", value)
    assert read_settings(EtlSettings).rollout == rollout


@pytest.mark.parametrize(
    "value",
    ["", " ", "0%", "00%", "101%", "1000%", "-5%", "12.5%", "10", "0.1", "+7", "%", "10%,二店", "二店,", ",二店"],
)
def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ETL_ROLLOUT", value)
    with pytest.raises(SettingsError) as caught:
        read_settings(EtlSettings)
    assert str(caught.value) == (
        f"ETL_ROLLOUT={value!r} is not usable: must be a whole percentage from 1% to 100%, or names of shops separated by commas; "
        "correct it in the environment or in .env"
    )
