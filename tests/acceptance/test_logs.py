"""从一次导入到它的运行，日志里同一件事的键到处一样。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conftest import Etl

CSV = (
    "order_id,shop,customer_name,order_status,amount,quantity,ordered_at\n"
    "L-1,日志店,日志客户,已付款,12.50,1,2026-04-02 09:00:00\n"
)
PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("logs.md", "logs.zh-CN.md")]


def test_an_import_is_followed_from_its_event_to_its_run(etl: Etl, state_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "logs.csv"
    path.write_text(CSV, encoding="utf-8")
    import_id = json.loads(etl("import", str(path), "--create-shops", "--json").stdout)["import_id"]
    etl("wait", "--import-id", import_id, "--timeout", "90")
    (handled,) = [line for line in lines_of(state_dir, "event handled") if line.get("import_id") == import_id]
    assert handled["component"] == "listener"
    assert {"subject", "stream_sequence", "event_id"} <= handled.keys()
    runs = json.loads(etl("why", "import", import_id, "--json").stdout)["runs"]
    finished = {line["run_id"]: line for line in lines_of(state_dir, "run finished")}
    for run in runs:
        line = finished[run["run_id"]]
        assert (line["partition"], line["succeeded"], line["worker"]) == ("2026-04-02", True, run["worker"])
        assert line["duration_ms"] > 0
        assert line["task_id"]
    assert runs
    keys = {key for line in [handled, *finished.values()] for key in line} - {"logger", "assets", "succeeded", "error"}
    for page in PAGES:
        named = page.read_text(encoding="utf-8")
        assert [key for key in keys if f"`{key}`" not in named] == []


def lines_of(state_dir: Path, message: str) -> Iterator[dict[str, Any]]:
    for log in (state_dir / "logs").glob("*.log"):
        for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if f'"{message}"' in text and text.startswith("{"):
                yield json.loads(text)
