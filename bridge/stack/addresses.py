"""正在运行的栈的地址：`stack.json` 由 `etl up` 写，由别的命令读。"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from etl_assets.core.errors import SettingsError
from etl_assets.embedded.child_process import ProcessIdentity
from etl_assets.embedded.private_folder import check_private_folder, read_private_file, write_private_file

_FILE_NAME = "stack.json"


@dataclass(frozen=True)
class StackAddresses:
    """一个栈的各个地址；前五项正是要给别的进程的环境变量。`pid` 与 `started_ticks` 是监督者的。"""

    database_url: str
    nats_url: str
    dagster_home: str
    dagster_postgres_url: str
    ui_url: str
    pid: int
    started_ticks: int

    def environment(self) -> dict[str, str]:
        return {
            "ETL_DATABASE_URL": self.database_url,
            "ETL_NATS_URL": self.nats_url,
            "DAGSTER_HOME": self.dagster_home,
            "DAGSTER_POSTGRES_URL": self.dagster_postgres_url,
            "ETL_UI_URL": self.ui_url,
        }


def default_state_dir() -> Path:
    """ETL_STATE_DIR，否则 XDG 的状态文件夹。"""
    if chosen := os.environ.get("ETL_STATE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dayline"


def write_addresses(state_dir: Path, addresses: StackAddresses) -> None:
    write_private_file(state_dir / _FILE_NAME, json.dumps(asdict(addresses), indent=2))


def remove_addresses(state_dir: Path) -> None:
    (state_dir / _FILE_NAME).unlink(missing_ok=True)


def read_addresses(state_dir: Path) -> StackAddresses | None:
    """没有活着的栈则为 None：文件可能是被 kill -9 的监督者留下的。

    :raises SettingsError: 这个栈属于别的用户，或者别的用户能动它；这不能是一个文件夹。
    """
    path = state_dir / _FILE_NAME
    try:
        path.lstat()
        check_private_folder(state_dir)
        addresses = StackAddresses(**json.loads(read_private_file(path)))
    except (FileNotFoundError, ValueError):
        return None
    except PermissionError as error:
        raise SettingsError(
            f"the stack in {state_dir} belongs to another user: use a state folder of your own (--state-dir)"
        ) from error
    except OSError as error:
        raise SettingsError(
            f"{state_dir} cannot be a state folder ({error.strerror}): choose another one (--state-dir, ETL_STATE_DIR)"
        ) from error
    # 进程号会轮到别的进程：启动的时刻也要对得上
    return addresses if ProcessIdentity(addresses.pid, addresses.started_ticks).is_alive() else None
