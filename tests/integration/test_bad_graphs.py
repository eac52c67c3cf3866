"""代码里的图不成立：载入时一句话，工人说的、网页上看到的是同一句；图没有写下，别的工人照旧。"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from dagster import DagsterInstance

from bridge.runs import worker as worker_module
from etl_assets.core.errors import EtlError

SOURCE = """
from dagster import DailyPartitionsDefinition, Definitions, asset
from etl_assets.orchestration.graph import graph_of

DAILY = DailyPartitionsDefinition("2026-01-01")

def made(name, *upstreams, partitions=DAILY):
    @asset(name=name, deps=list(upstreams), partitions_def=partitions)
    def nothing(): ...
    return nothing

defs = Definitions(assets=[{assets}])
graph_of(defs.assets)
"""


@pytest.mark.parametrize(
    ("assets", "says"),
    [
        ("made('a', 'b'), made('b', 'a')", "the assets depend on each other in a cycle: "),
        ("made('a'), made('a')", "two assets are named a: rename one of them"),
        ("made('a', 'b')", "asset a depends on b, which does not exist: correct its deps"),
        ("made('a', partitions=None)", "asset a has no daily partitions: "),
    ],
    ids=["a cycle", "two of one name", "an unknown upstream", "no partitions"],
)
def test_graph_that_does_not_hold_is_one_sentence_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: str, says: str, request: pytest.FixtureRequest
) -> None:
    name = f"bad_graph_{request.node.callspec.id.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(assets=assets))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # 排在最前的，Dagster 载入时拿掉
    monkeypatch.setattr(worker_module, "CODE_MODULE", name)
    with DagsterInstance.ephemeral() as instance, pytest.raises(EtlError, match=says) as caught:
        worker_module._load_code(instance)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(says)
