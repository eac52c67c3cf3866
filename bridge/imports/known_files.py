"""导入过的文件：按内容认，名字与选项都不算数。同样的行再来一次，会把后来的版本盖回去；换一家店再来，钱就算了两遍。"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import sqlalchemy as sa

from bridge.imports.earlier_versions import count_superseded
from bridge.imports.file_rows import FileRows
from bridge.imports.rules.errors import ImportFileError, shorten
from etl_assets.core.etl_tables import imported_files
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.services.raw_rows import IN_SCOPE

logger = get_logger(__name__)

_LOOK_AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class KnownFile:
    """同样的内容上一次导入的样子。

    :param name: 那时的文件名。
    :param superseded: 看过的 looked_at 个订单里，此刻以别的导入的版本为准的；没有看是 None。
    """

    import_id: UUID
    name: str
    completed_at: datetime
    superseded: int | None
    looked_at: int | None

    def describe(self, settings: EtlSettings) -> str:
        when = self.completed_at.astimezone(settings.zone)
        said = f"this content was imported on {when:%Y-%m-%d %H:%M:%S} as {self.import_id} (file {shorten(self.name)})"
        if self.superseded is None:
            return said
        if not self.superseded:
            return f"{said}, and its orders are still the newest versions"
        cases = f"{self.superseded:,} case{'s' if self.superseded > 1 else ''}"
        return f"{said}, its orders are now older versions in {cases} of {self.looked_at:,}, and would be turned back"


class KnownFileError(ImportFileError):
    """这个内容导入过了。"""

    def __init__(self, file: Path, known: KnownFile, settings: EtlSettings) -> None:
        self.known = known
        super().__init__(file, known.describe(settings), advice="--again imports it all the same")


def hash_content(path: Path) -> str:
    """文件字节的 SHA-256：给了压缩包就是压缩包的。"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_known(connection: sa.Connection, settings: EtlSettings, content_hash: str) -> KnownFile | None:
    """撤回了的不算。"""
    statement = (
        sa.select(import_tasks)
        .join(imported_files, imported_files.c.import_id == import_tasks.c.import_id)
        .where(imported_files.c.content_hash == content_hash, IN_SCOPE)
        .order_by(import_tasks.c.completed_at.desc().nulls_last())
        .limit(1)
    )
    found = connection.execute(statement).one_or_none()
    if found is None:
        return None
    superseded, looked_at = count_superseded(connection, settings, found.import_id) or (None, None)
    return KnownFile(found.import_id, found.source_name, found.completed_at, superseded, looked_at)


def claim_content(connection: sa.Connection, content_hash: str) -> None:
    """到事务结束为止，别人不能同时导入同样的内容；有人正在导入，就等他的结果。

    一遍遍地问，不等在锁上：那边要多久就多久，没有哪条语句超时，Ctrl-C 也立刻有用。
    """
    # 锁的编号只有 64 位：碰巧撞上的不过白等一会，拒不拒由整个散列定
    key = int.from_bytes(bytes.fromhex(content_hash)[:8], signed=True)
    is_waiting = False
    while not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(sa.literal(key, sa.BigInteger)))):
        if not is_waiting:
            logger.warning("the same file is being imported by another process, waiting for its end")
            is_waiting = True
        time.sleep(_LOOK_AGAIN_SECONDS)


def remember(
    connection: sa.Connection,
    import_id: UUID,
    content_hash: str,
    rows: FileRows,
    first_ordered_at: datetime | None,
    last_ordered_at: datetime | None,
) -> None:
    """在导入的事务里记下它是什么内容、各行在哪里、它的订单从何时到何时。"""
    values = {
        "content_hash": content_hash,
        "first_ordered_at": first_ordered_at,
        "last_ordered_at": last_ordered_at,
        "first_places": rows.first_places,
        "first_rows": rows.first_rows,
    }
    connection.execute(sa.insert(imported_files).values(import_id=import_id, **values))
