"""状态文件夹：别人能事先放东西、能换掉的，一概不用，并说出是哪一个、怎么办。"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.stack.addresses import read_addresses
from etl_assets.core.errors import SettingsError
from etl_assets.embedded.child_log import open_log
from etl_assets.embedded.private_folder import (
    create_private_folder,
    lock_folder,
    read_or_create_secret,
    read_private_file,
)

STRANGER = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files that belong to another account")


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o7777)


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def test_folder_and_missing_parents_are_created_for_oneself_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        create_private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(previous)
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == ["0o700", "0o700"]


def test_folder_that_others_can_read_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    (folder / "kept").touch()
    create_private_folder(folder)
    assert mode(folder) == "0o700"


def test_empty_folder_that_others_can_write_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    create_private_folder(folder)
    assert mode(folder) == "0o700"


def test_folder_into_which_others_may_have_put_something_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "sitecustomize.py").touch()
    folder.chmod(0o777)
    with pytest.raises(SettingsError, match=f"others may have put files into {folder}.*chmod 700"):
        create_private_folder(folder)


@only_root
def test_group_counts_as_others_when_somebody_else_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "kept").touch()
    os.chown(folder, -1, 0)
    folder.chmod(0o770)
    create_private_folder(folder)
    assert mode(folder) == "0o700"
    os.chown(folder, -1, STRANGER)
    folder.chmod(0o770)
    with pytest.raises(SettingsError, match="others may have put files"):
        create_private_folder(folder)


@only_root
def test_folder_of_another_account_is_refused_as_root_too(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    give_away(folder)
    with pytest.raises(SettingsError, match=f"the folder {folder} belongs to .*--state-dir"):
        create_private_folder(folder)


@only_root
def test_folder_below_one_of_another_account_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    give_away(home)
    with pytest.raises(SettingsError, match=f"{home} belongs to .*who could replace"):
        create_private_folder(home / "state")


def test_folder_below_one_that_others_can_write_is_refused_unless_sticky(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(
        SettingsError, match=re.escape(f"others can write to {shared} and replace what is in it: `chmod go-w {shared}`")
    ):
        create_private_folder(shared / "state")
    shared.chmod(0o1777)
    create_private_folder(shared / "state")


@only_root
def test_link_of_another_account_on_the_way_is_refused_and_ones_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    create_private_folder(link / "state")
    give_away(link)
    with pytest.raises(SettingsError, match=f"{link} belongs to"):
        create_private_folder(link / "state")


@pytest.mark.parametrize("name", ["lock", "password", "data", "stack.json"])
def test_link_inside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=f"{folder / name} is a symbolic link"):
        create_private_folder(folder)
    assert not (tmp_path / "elsewhere").exists()


@only_root
@pytest.mark.parametrize("name", ["password", "lock", "sitecustomize.py", "data"])
def test_what_belongs_to_another_account_inside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / name).touch()
    give_away(folder / name)
    with pytest.raises(SettingsError, match=f"{folder / name} belongs to"):
        create_private_folder(folder)


@only_root
def test_guest_may_own_what_is_meant_for_it_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / "data").mkdir()
    give_away(folder / "data")
    create_private_folder(folder, guests={"data": STRANGER})
    with pytest.raises(SettingsError, match="belongs to"):
        create_private_folder(folder, guests={"data": 1})


def take_lock(path: Path) -> None:
    with lock_folder(path.parent):
        pass


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("lock", take_lock),
        ("password", read_or_create_secret),
        ("child.log", open_log),
        ("stack.json", read_private_file),
    ],
)
def test_files_are_used_only_when_nobody_else_can_have_written_them(
    tmp_path: Path, name: str, use: Callable[[Path], object]
) -> None:
    file, target = tmp_path / name, tmp_path / "target"
    target.write_text("untouched")
    file.symlink_to(target)
    with pytest.raises(SettingsError, match=f"cannot use {file}"):
        use(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SettingsError, match=str(file)):
        use(file)
    file.unlink()
    file.write_text("forged")
    file.chmod(0o666)
    with pytest.raises(SettingsError, match=f"{file} is not a file that only you can write"):
        use(file)
    assert target.read_text() == "untouched"


def test_secret_that_others_could_read_is_closed(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("abc")
    password.chmod(0o644)
    assert read_or_create_secret(password) == "abc"
    assert mode(password) == "0o600"


@only_root
def test_secret_that_is_empty_is_refused(tmp_path: Path) -> None:
    """nats-server 让空的口令进来。"""
    (tmp_path / "password").touch(mode=0o600)
    with pytest.raises(SettingsError, match="password is empty: put the password back"):
        read_or_create_secret(tmp_path / "password")


def test_addresses_in_a_folder_of_another_account_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "stack.json").write_text("{}")
    give_away(folder)
    with pytest.raises(SettingsError, match=f"the folder {folder} belongs to"):
        read_addresses(folder)


@only_root
def test_no_stack_in_a_folder_of_another_account_is_no_error(tmp_path: Path) -> None:
    give_away(tmp_path)
    assert read_addresses(tmp_path / "state") is None
