"""基准的结果：中位数与范围、达标与否、机器与版本；印成表，写成 JSON。"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("dagster", "dlt", "nats-py", "polars", "psycopg", "sqlalchemy", "taskiq")


@dataclass(frozen=True)
class Bar:
    """一项要求：value 与 limit 比，`at` 说是不超过还是不少于。"""

    name: str
    value: float
    unit: str
    limit: float
    at: Literal["most", "least"]

    @property
    def ok(self) -> bool:
        return self.value <= self.limit if self.at == "most" else self.value >= self.limit


@dataclass(frozen=True)
class Spread:
    """同一个数量了几次。"""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=statistics.median(values), min=min(values), max=max(values), runs=len(values))


def print_bars(bars: Sequence[Bar]) -> None:
    table = Table("required", "measured", "limit", "")
    for bar in bars:
        limit = f"at {bar.at} {bar.limit:g} {bar.unit}"
        table.add_row(
            bar.name, f"{bar.value:.2f} {bar.unit}", limit, "ok" if bar.ok else f"missed by {_missed_by(bar)}"
        )
    Console().print(table)


def write_results(name: str, bars: Sequence[Bar], figures: Mapping[str, Any]) -> Path:
    """写 benchmarks/results/NAME.json。"""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "system": platform.system(),
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version(), **_versions(), **figures.get("versions", {})},
        "commit": _commit(),
        "bars": [{**asdict(bar), "ok": bar.ok} for bar in bars],
        **{key: value for key, value in figures.items() if key != "versions"},
    }
    path.write_text(json.dumps(document, indent=2, default=asdict, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _missed_by(bar: Bar) -> str:
    missed = abs(bar.value - bar.limit)
    return f"{missed / bar.limit:.0%}" if bar.limit else f"{missed:g}"


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
