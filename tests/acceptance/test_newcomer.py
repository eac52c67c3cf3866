"""第一次来的人只照着文档走：演示、自己的文件、改映射、在网页上重做一天、加一个资产、在 `etl status` 里看见它。

每条命令都在某一页文档里；新资产的文件逐字取自 etl_assets/README.md。代码是一份拷贝，虚拟环境用现有的：
`run.py` 怎样造它们见 tests/unit/test_bootstrap.py。
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.acceptance.chromium import needs_chromium, open_page
from tests.acceptance.documents import ROOT, Block, missing_lines, pages, read_blocks
from tests.acceptance.installation import Installation
from tests.acceptance.shell import Shell
from tests.integration.new_assets.copying import copy_without_new_assets

pytestmark = needs_chromium
GUIDE = ROOT / "etl_assets" / "README.md"


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    home = tmp_path / "home"
    return Installation(home / ".local" / "state" / "dayline", copy_without_new_assets(tmp_path / "dayline"))


@pytest.fixture
def newcomer(installation: Installation, tmp_path: Path) -> Iterator[Newcomer]:
    home = tmp_path / "home"
    with Shell(home / "work", installation.environment | {"HOME": str(home)}) as shell:
        yield Newcomer(shell)


class Newcomer:
    """只打文档里有的命令。"""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._read = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages())

    def types(self, command: str) -> str:
        assert command in self._read, f"no document says `{command}`"
        return self.tries(command)

    def tries(self, command: str) -> str:
        """文档里的命令，换了参数。"""
        printed = self._shell.run(command)
        assert printed.exit_code == 0, printed.text
        return printed.text


def block(start: str) -> Block:
    """英文的某一页里这样开头的那一块。"""
    found = [each for page in pages() if ".zh-CN" not in page.name for each in read_blocks(page)]
    return next(each for each in found if each.text.startswith(start))


@pytest.mark.timeout(900)
def test_newcomer_gets_from_the_demo_to_an_asset_of_his_own(newcomer: Newcomer, installation: Installation) -> None:
    printed = newcomer.types("python3 run.py demo")
    assert missing_lines(block("Starting PostgreSQL").text.splitlines(), printed, numbers_vary=True) == []

    with installation.up() as addresses:
        (own_file,) = block("cat > orders.csv").commands
        newcomer.types(own_file.text)
        newcomer.types("id=$(etl import orders.csv --create-shops)")
        newcomer.types("etl wait --import-id $id")
        assert sample_counts(newcomer) == [0]
        newcomer.types("etl types set 打样订单=SAMPLE 大货订单=BULK")
        run_again_in_the_ui(addresses.ui_url, newcomer)
        assert sample_counts(newcomer) == [1]
        add_products(installation.code)
        newcomer.types("etl init-db")

    with installation.up():
        newcomer.tries("etl backfill --asset products --from 2026-03-01 --to 2026-03-31")
        rows = json.loads(newcomer.tries("etl show products --format json"))
        assert {(row["day"], row["system_order_type"], row["order_count"]) for row in rows} == {
            ("2026-03-02", "SAMPLE", 1),
            ("2026-03-20", "BULK", 1),
            ("2026-03-21", "BULK", 2),
        }
        (products,) = [line for line in newcomer.types("etl status").splitlines() if line.startswith("│ products")]
        assert "2026-03-31" in products


def sample_counts(newcomer: Newcomer) -> list[int]:
    rows = json.loads(newcomer.tries("etl show customers --customer 张三 --format json"))
    return [row["sample_count"] for row in rows]


def run_again_in_the_ui(ui_url: str, newcomer: Newcomer) -> None:
    """`etl why` 说出做这一天的运行；它的页面上有 Re-execute。"""
    (address,) = set(re.findall(rf"{ui_url}/runs/[0-9a-f-]+", newcomer.tries("etl why order A-1001")))
    with open_page(ui_url, timezone="Asia/Shanghai") as page:
        page.goto(address)
        page.get_by_role("button", name=re.compile("Re-execute")).first.click()
        page.wait_for_url(re.compile(f"/runs/(?!{address.rpartition('/')[2]})"))
        expect(page.get_by_text("Success", exact=True).first).to_be_visible()


def add_products(code: Path) -> None:
    """照指南：四个文件，与一个空的 `__init__.py`。"""
    files = re.findall(r"`(products/\w+\.py)`.*?```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in files] == [f"products/{name}.py" for name in ("asset", "etl", "description", "checks")]
    (code / "etl_assets" / "products").mkdir()
    for name, text in [*files, ("products/__init__.py", "")]:
        (code / "etl_assets" / name).write_text(text, encoding="utf-8")
