"""加一个资产就是加一个文件夹：在一份代码里加上 products 与 daily_report，别的文件一个也不改，然后到处都认得它们。

两个文件夹是测试的数据（new_assets），也是 etl_assets/README.md 里的例子。在那份代码里跑的测试是 new_assets/in_the_copy.py；
整个栈的见 tests/acceptance/test_new_asset_folders.py；`pdm run test-new-assets` 在那份代码里跑全部的测试。
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .new_assets.copying import NEW_ASSETS, ROOT, copy_with_new_assets

MOST_LINES = 60
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_new_assets(tmp_path_factory.mktemp("copy") / "code")


def run_in(copy: Path, postgres_url: str, *arguments: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_", "PYTEST_"))
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env={**environment, "PYTHONPATH": str(copy), "ETL_TEST_DATABASE_URL": postgres_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("asset", ["products", "daily_report"])
def test_a_folder_has_few_lines(asset: str) -> None:
    assert 0 < sum(map(lines_of, (NEW_ASSETS / asset).glob("*.py"))) < MOST_LINES


def lines_of(file: Path) -> int:
    """空行与导入不算。"""
    return sum(bool(line.strip()) for line in without_imports(file))


def without_imports(file: Path) -> list[str]:
    source = file.read_text(encoding="utf-8")
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = {number for node in statements for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [line for number, line in enumerate(source.splitlines(), 1) if number not in imports]


def test_everything_knows_the_new_assets(copy: Path, postgres_url: str) -> None:
    run_in(copy, postgres_url, *PYTEST, "tests/integration/new_assets/in_the_copy.py")


def test_import_contracts_need_no_line_for_them(copy: Path, postgres_url: str) -> None:
    run_in(
        copy,
        postgres_url,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    )
    run_in(copy, postgres_url, *PYTEST, "tests/unit/test_folders.py")


@pytest.mark.parametrize("page", ["etl_assets/README.md", "docs/extend.md", "docs/extend.zh-CN.md"])
@pytest.mark.parametrize("module", ["asset", "etl", "description", "checks"])
def test_readme_shows_the_folder_as_it_is(module: str, page: str) -> None:
    """连同导入：照抄就能用，见 tests/acceptance/test_newcomer.py。"""
    source = (NEW_ASSETS / "products" / f"{module}.py").read_text(encoding="utf-8")
    assert f"```python\n{source}```" in (ROOT / page).read_text(encoding="utf-8")


def test_readmes_show_the_event_as_it_is_and_how_long() -> None:
    handler = ROOT / "etl_assets" / "leads" / "events.py"
    source, lines = handler.read_text(encoding="utf-8"), lines_of(handler)
    readme = (ROOT / "etl_assets" / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## 怎样加一个事件") : readme.index("## 五行测一个资产")]
    shown = re.findall(r"```python\n(.*?)\n```", section, re.DOTALL)
    assert "\n\n".join(shown).split() == source.partition("\n\n")[2].split()  # 除了文档串是整个文件
    assert f"全部 {lines} 行" in section
    assert f"全部 {lines} 行" in (ROOT / "bridge" / "README.zh-CN.md").read_text(encoding="utf-8")
    assert f"{lines} lines in all" in (ROOT / "bridge" / "README.md").read_text(encoding="utf-8")
