"""产品要的每个包：锁文件里有散列，许可允许这样使用。"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PERMISSIVE = ("Apache", "MIT", "BSD", "PSF", "Python Software Foundation", "ISC", "MPL", "Mozilla")
LESSER = {"psycopg", "psycopg-binary", "psycopg2-binary"}
"""LGPL：作为库来用，不改它。"""
SILENT = {"polars-hash", "taskiq-dependencies"}
"""元数据里没有写；它们的仓库写着 MIT。"""


@pytest.mark.parametrize("lock", sorted(path.name for path in ROOT.glob("pdm*.lock")))
def test_every_file_is_locked_by_its_hash(lock: str) -> None:
    packages = tomllib.loads((ROOT / lock).read_text())["package"]
    files = {package["name"]: package.get("files", []) for package in packages if "extras" not in package}
    assert files
    unlocked = {
        name for name, found in files.items() if not found or not all(re.match("sha256:", f["hash"]) for f in found)
    }
    assert not unlocked


def needed(name: str, extras: frozenset[str] = frozenset()) -> Iterator[importlib.metadata.Distribution]:
    """它与它要的一切，各一次；别的平台才要的没有装。"""
    seen: set[tuple[str, str]] = set()
    queue = [(name, extra) for extra in ("", *extras)]
    while queue:
        key = queue.pop()
        if key in seen:
            continue
        seen.add(key)
        try:
            found = importlib.metadata.distribution(key[0])
        except importlib.metadata.PackageNotFoundError:
            continue
        yield found
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": key[1]}):
                queue += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]


def license_of(distribution: importlib.metadata.Distribution) -> str:
    """许可证表达式；旧的包写在分类里，或者一行字里。"""
    metadata = distribution.metadata
    classifiers = [text.split("::")[-1].strip() for text in metadata.get_all("Classifier", []) if "License ::" in text]
    free_text = (metadata.get("License") or "").split("\n")[0]
    expression = metadata.get("License-Expression", "")
    return expression or ", ".join(classifiers) or free_text


def test_licences_allow_this_use() -> None:
    licences = {canonicalize_name(found.metadata["Name"]): license_of(found) for found in needed("dayline")}
    assert len(licences) > 50
    others = {name: text for name, text in licences.items() if not any(word in text for word in PERMISSIVE)}
    assert set(others) == SILENT | (LESSER & licences.keys())
    assert not {name: text for name, text in licences.items() if re.search(r"\b(A?GPL|SSPL|BUSL)\b", text)}
