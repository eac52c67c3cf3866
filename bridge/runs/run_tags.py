"""领到的日子建成的运行，标签说是谁要的、是什么；网页的「Launched by」与运行列表照着显示。"""

from __future__ import annotations

from collections.abc import Sequence

from bridge.runs.lanes import LANE_TAG, shown_days
from bridge.warm_dagster.internals import USER_TAG
from etl_assets.core.text import escape_invisible
from etl_assets.core.tracing import trace_id_of
from etl_assets.ledger.claims import NAMED_EVENTS, Claim
from etl_assets.orchestration.run_tags import EVENT, PREFIX, TRIGGER_TAG

LEDGER = "ledger"
"""没有导入等着，上游也没有刚做过：补做、人改了商机、别处的完成事件。"""
_LONGEST_NAME = 40


def tags_of_claim(claim: Claim, traceparents: Sequence[str] = ()) -> dict[str, str]:
    """`user` 在列表的「Launched by」里，又是一个看得见的标签；别的，除了一段日子，列表都收起来。"""
    asked_by, handed_on = claim.asked_by, claim.handed_on
    tags = {
        TRIGGER_TAG: EVENT,
        LANE_TAG: "event",
        USER_TAG: _launched_by(claim),
        f"{PREFIX}import_id": ",".join(event.import_id for event in asked_by),
        f"{PREFIX}event_id": ",".join(event.event_id for event in asked_by),
        f"{PREFIX}stream_sequence": ",".join(str(event.stream_sequence) for event in asked_by if event.stream_sequence),
        f"{PREFIX}after_run": handed_on.run_id if handed_on else "",
        f"{PREFIX}trace_id": trace_id_of(traceparents[0]) if traceparents else "",
        **shown_days(claim.days),
    }
    return {name: value for name, value in tags.items() if value}


def _launched_by(claim: Claim) -> str:
    if claim.handed_on is not None:
        return f"run {claim.handed_on.run_id[:8]}"
    if not claim.asked_by:
        return LEDGER
    newest, *others = claim.asked_by
    name = escape_invisible(newest.source_name or f"import {newest.import_id[:8]}")
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    if not others:
        return name
    return (
        f"{name}, {len(others)} more" if len(claim.asked_by) < NAMED_EVENTS else f"{name}, {len(others)} or more others"
    )
