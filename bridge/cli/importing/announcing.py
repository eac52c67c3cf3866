"""宣布一次导入：它已经在库里，发布失败也不白做，说得出怎样补发。"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AbstractContextManager
from uuid import UUID

from bridge.cli.abort import finished_first, say_on_abort
from bridge.cli.output import say
from bridge.errors import StreamFullError
from bridge.events.envelope import DataImportCompleted
from bridge.events.publish import publish_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import get_bridge_settings
from etl_assets.core.settings import get_settings
from etl_assets.core.tracing import start_tracing

_FULL_SECONDS = 1.0


def committing(import_id: UUID) -> AbstractContextManager[None]:
    """提交这次导入的一步：Ctrl-C 落在它前后，说的不一样。"""
    return finished_first(
        meanwhile=f"aborted while import {import_id} was being committed: `etl imports` says whether it is in raw_orders",
        afterwards=_is_not_announced(import_id),
    )


def announce(import_id: UUID) -> None:
    """发布事件；发不出去就说怎样补发，照样抛出。"""
    try:
        _publish(import_id)
    except Exception:
        say(_is_not_announced(import_id), err=True)
        raise
    say_on_abort(f"{_is_in(import_id)} and was announced")


def _is_in(import_id: UUID) -> str:
    return f"import {import_id} is in raw_orders"


def _is_not_announced(import_id: UUID) -> str:
    """没有人宣布的，监听器自己会找到。"""
    seconds = get_settings().unannounced_after_seconds
    by_itself = f"a running listener finds it after about {seconds} s"
    return f"{_is_in(import_id)} but was not announced: {by_itself}; at once: {_publish_command(import_id)}"


def _publish_command(import_id: UUID) -> str:
    return f"etl publish {DATA_IMPORT_COMPLETED} '{json.dumps({'status': 'completed', 'import_id': str(import_id)})}'"


def _publish(import_id: UUID) -> None:
    """流满了就等，并说为什么等。"""
    event, waiting = DataImportCompleted(import_id=import_id), False
    start_tracing("import")
    while True:
        try:
            asyncio.run(publish_event(DATA_IMPORT_COMPLETED, event, settings=get_bridge_settings()))
        except StreamFullError as error:
            if not waiting:
                say(f"{_is_in(import_id)}; waiting to announce it: {error}", err=True)
            waiting = True
            time.sleep(_FULL_SECONDS)
        else:
            return
