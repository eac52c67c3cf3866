"""咨询锁只认号码：两件不相干的事用了同一个号，就会互相等，甚至死锁。"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
USES = re.compile(r"advisory\w*\(\s*(_[A-Z_]+)")


def test_every_advisory_lock_has_a_number_of_its_own() -> None:
    numbers: dict[str, int] = {}
    for package in ("bridge", "etl_assets"):
        for path in (ROOT / package).rglob("*.py"):
            for name in USES.findall(path.read_text(encoding="utf-8")):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                numbers[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    assert len(numbers) > 5
    assert [number for number, times in Counter(numbers.values()).items() if times > 1] == []
