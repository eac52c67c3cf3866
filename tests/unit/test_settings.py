"""设置：缺省值、逗号分隔的状态、错的值一句话说清而不泄露机密。"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pydantic
import pytest
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import redact
from etl_assets.core.settings import EtlSettings, read_settings
from etl_assets.core.text import WHITE_SPACE

SECRET = "h0nse-Secret"


@pytest.fixture(autouse=True)
def no_outer_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """别让测试者自己的 ETL_* 与 .env 掺进来。"""
    monkeypatch.chdir(tmp_path)
    for name in EtlSettings.model_fields:
        monkeypatch.delenv(f"ETL_{name.upper()}", raising=False)


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> SettingsError:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings(EtlSettings)
    return caught.value


def test_defaults_are_those_of_the_contract() -> None:
    settings = read_settings(EtlSettings)
    assert (settings.timezone, settings.partitions_start) == ("Asia/Shanghai", date(2000, 1, 1))
    assert settings.cancelled_statuses == (
        *("cancelled", "canceled", "closed", "refunded", "已取消", "已关闭", "已退款"),
        *("交易关闭", "交易取消", "退款成功", "voided", "wc-cancelled", "wc-refunded"),
    )
    assert settings.completed_statuses == ("completed", "delivered", "交易成功", "已完成")
    assert (settings.cold_after_days, settings.max_delete_share, settings.target_schema) == (90, 0.2, "public")


def test_values_come_from_the_environment_before_the_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ETL_COLD_AFTER_DAYS=30\nETL_TIMEZONE=UTC\n")
    monkeypatch.setenv("ETL_COLD_AFTER_DAYS", "45")
    settings = read_settings(EtlSettings)
    assert (settings.cold_after_days, settings.timezone) == (45, "UTC")


def test_statuses_are_split_at_commas_trimmed_and_case_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETL_CANCELLED_STATUSES", f" Void ,{WHITE_SPACE}GROẞ{WHITE_SPACE},,已取消, \x1cx")
    assert read_settings(EtlSettings).cancelled_statuses == ("void", "gross", "已取消", "\x1cx")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ETL_TIMEZONE", "Mars/Olympus", "IANA time zone name such as Asia/Shanghai"),
        ("ETL_PARTITIONS_START", "first of May", "valid date"),
        ("ETL_PARTITIONS_START", "1899-12-31", "greater than or equal to 1900-01-01"),
        ("ETL_COLD_AFTER_DAYS", "0", "greater than or equal to 1"),
        ("ETL_COLD_AFTER_DAYS", "ninety", "valid integer"),
        ("ETL_MAX_DELETE_SHARE", "1.01", "less than or equal to 1"),
        ("ETL_MAX_DELETE_SHARE", "nan", "less than or equal to 1"),
        ("ETL_TARGET_SCHEMA", "", "at least 1 character"),
        ("ETL_POOL_SIZE", "0", "greater than or equal to 1"),
        ("ETL_LOCK_TIMEOUT_SECONDS", "-1", "greater than or equal to 1"),
    ],
)
def test_wrong_value_is_refused_with_its_name_its_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    message = str(refusal(monkeypatch, name, value))
    assert message.startswith(f"{name}={value!r} is not usable: ")
    assert allowed in message
    assert "\n" not in message


def test_secret_is_not_shown_when_another_value_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETL_DATABASE_URL", f"postgresql://etl:{SECRET}@localhost/etl")
    error = refusal(monkeypatch, "ETL_POOL_SIZE", "many")
    assert "ETL_POOL_SIZE='many'" in str(error)
    assert not mentions_secret(error)


def test_secret_is_not_part_of_the_printed_settings() -> None:
    settings = EtlSettings(database_url=f"postgresql://etl:{SECRET}@localhost/etl")
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


@pytest.mark.parametrize(
    "url",
    [
        f"etl:{SECRET}@localhost",
        f"mysql://etl:{SECRET}@localhost/etl",
        f"postgresql://etl:{SECRET}@localhost:port/etl",
        f"postgresql://etl:a@b:{SECRET}@localhost/etl",
    ],
)
def test_unusable_database_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(SettingsError, match="ETL_DATABASE_URL") as caught:
        build_engine(EtlSettings(database_url=url))
    assert not mentions_secret(caught.value)


def test_missing_database_url_says_how_to_get_one() -> None:
    with pytest.raises(
        SettingsError, match="ETL_DATABASE_URL is not set: start the stack with `etl up` and wait until it says ready"
    ):
        build_engine(EtlSettings())


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_postgresql_scheme_means_the_one_driver(scheme: str) -> None:
    expected = sa.URL.create(
        "postgresql+psycopg", username="etl", password=SECRET, host="localhost", port=5433, database="shop"
    )
    assert normalize_url(f"{scheme}://etl:{SECRET}@localhost:5433/shop") == expected


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        EtlSettings().cold_after_days = 1


def mentions_secret(error: BaseException | None) -> bool:
    """错误链上的每一层都不能带口令：日志会把整条链打出来。"""
    return error is not None and (SECRET in str(error) or SECRET in repr(error) or mentions_secret(error.__cause__))


@pytest.mark.parametrize("name", ["localtime", "Factory", "Mars/Olympus"])
def test_a_time_zone_that_not_everything_knows_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert "must be an IANA time zone name" in str(refusal(monkeypatch, "ETL_TIMEZONE", name))


def test_secret_comes_from_the_file_that_its_variable_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.touch(0o600)
    path.write_text(f"postgresql://etl:{SECRET}@h/d\r\n")
    monkeypatch.setenv("ETL_DATABASE_URL_FILE", str(path))
    assert read_settings(EtlSettings).database_url == f"postgresql://etl:{SECRET}@h/d"
    monkeypatch.setenv("ETL_DATABASE_URL", "postgresql://other")
    assert read_settings(EtlSettings).database_url == "postgresql://other"
    monkeypatch.setenv("ETL_TIMEZONE_FILE", str(path))  # 不是机密：没有这回事
    assert read_settings(EtlSettings).timezone == "Asia/Shanghai"


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"x", 0o644, r"others can read .* \(mode 0644\): `chmod 0600 "),
        (b"x", 0o640, r"others can read .* \(mode 0640\): `chmod 0600 "),
        (b"\n", 0o600, "is empty: write the secret into it"),
        (b"\xff", 0o600, r"cannot read .* \(it is not text in UTF-8\)"),
        (None, 0o600, r"cannot read .* \(No such file or directory\)"),
    ],
)
def test_file_of_a_secret_that_is_not_usable_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, mode: int, problem: str
) -> None:
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    monkeypatch.setenv("ETL_DATABASE_URL_FILE", str(path))
    with pytest.raises(SettingsError, match=f"^ETL_DATABASE_URL_FILE: .*{problem}"):
        read_settings(EtlSettings)


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("postgresql://u:p%40%2Fx@h1:1,h2:2/d", {"host": "h1,h2", "port": "1,2", "password": "p@/x"}),
        ("postgresql+psycopg2://u:p@h1,h2/d?target_session_attrs=read-write", {"host": "h1,h2", "password": "p"}),
        ("postgresql://u:p@%2Fvar%2Frun:5433/d", {"host": "/var/run", "port": "5433"}),
        ("host=h1,h2 port=5433 dbname=d user=u password='p @:/'", {"host": "h1,h2", "port": "5433,5433"}),
        ("postgresql://u@[::1]:1,[::2]:2/d", {"host": "::1,::2", "port": "1,2"}),
        ("postgresql:///?service=shop", {"service": "shop"}),
        ("service=shop", {"service": "shop"}),
        ("postgresql://", {}),
    ],
)
def test_url_means_what_it_means_to_libpq(url: str, arguments: dict[str, str]) -> None:
    for again in (normalize_url(url), normalize_url(normalize_url(url).render_as_string(hide_password=False))):
        _, found = again.get_dialect()().create_connect_args(again)
        assert arguments.items() <= found.items()


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://etl:{SECRET}@host/d",
        f"nats://{SECRET}@host:4222",
        f"host=h password={SECRET} dbname=d",
        f"postgresql://h/d?user=u&password={SECRET}&sslpassword={SECRET}",
        f"password='{SECRET} \\' {SECRET}'",
    ],
)
def test_secret_in_a_text_is_not_shown(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


def test_seed_of_an_nkey_is_not_shown() -> None:
    assert redact(f"seed SU{'A' * 56}.") == "seed ***."
