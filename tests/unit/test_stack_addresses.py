"""栈的地址文件：谁能读、什么时候算数。"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.stack.addresses import StackAddresses, default_state_dir, read_addresses, remove_addresses, write_addresses
from etl_assets.core.errors import SettingsError
from etl_assets.embedded.child_process import identify


@pytest.fixture
def addresses() -> StackAddresses:
    own = identify(os.getpid())
    assert own is not None
    return StackAddresses(
        database_url="postgresql://etl:secret@127.0.0.1:1/etl",
        nats_url="nats://etl:secret@127.0.0.1:2",
        dagster_home="/somewhere/dagster",
        dagster_postgres_url="postgresql+psycopg2://etl:secret@127.0.0.1:1/etl",
        ui_url="http://127.0.0.1:3000",
        pid=own.pid,
        started_ticks=own.started_ticks,
    )


def test_addresses_of_a_living_stack_are_read_back(tmp_path: Path, addresses: StackAddresses) -> None:
    write_addresses(tmp_path, addresses)

    assert read_addresses(tmp_path) == addresses


def test_file_with_passwords_is_private(tmp_path: Path, addresses: StackAddresses) -> None:
    previous = os.umask(0)
    try:
        write_addresses(tmp_path, addresses)
    finally:
        os.umask(previous)

    assert [oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == ["0o600"]


def test_no_stack_without_a_file(tmp_path: Path, addresses: StackAddresses) -> None:
    assert read_addresses(tmp_path) is None

    write_addresses(tmp_path, addresses)
    remove_addresses(tmp_path)

    assert read_addresses(tmp_path) is None


@pytest.mark.parametrize("name", ["a" * 300, "a file/state"])
def test_folder_that_cannot_be_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot be a state folder \(.+\): choose another one"):
        read_addresses(tmp_path / name)


def test_no_stack_when_another_process_has_its_pid(tmp_path: Path, addresses: StackAddresses) -> None:
    write_addresses(tmp_path, replace(addresses, started_ticks=addresses.started_ticks - 1))

    assert read_addresses(tmp_path) is None


def test_state_folder_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ETL_STATE_DIR", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_state_dir() == tmp_path / ".local" / "state" / "dayline"

    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert default_state_dir() == Path("/var/state/dayline")

    monkeypatch.setenv("ETL_STATE_DIR", "/srv/etl")
    assert default_state_dir() == Path("/srv/etl")
