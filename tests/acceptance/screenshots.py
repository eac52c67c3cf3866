"""文档里的图，照真的栈画：`pdm run screenshots` 写进 docs/images。

终端的是 SVG（文字清楚，也搜得到），网页的是 PNG。数据是演示的，加上 `etl why` 那个例子的订单。
"""

from __future__ import annotations

import io
import os
import re
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from playwright.sync_api import Page, expect
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from bridge.demo.dataset import write_batches
from bridge.demo.flow import import_and_publish, map_order_types
from bridge.stack.addresses import StackAddresses
from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import get_settings
from tests.acceptance.chromium import open_page
from tests.acceptance.documents import ROOT
from tests.acceptance.installation import Installation
from tests.acceptance.shell import Shell
from tests.acceptance.test_documents import SCENES
from tests.integration.terminal import on_a_terminal

IMAGES = ROOT / "docs" / "images"
COLUMNS = 120
FONTS = '"DejaVu Sans Mono", Menlo, Consolas, "Noto Sans Mono CJK SC", monospace'
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", FONTS
)
"""rich 的样子，但看图的人不去别处取字体。"""
MOST_BYTES = 200_000


def main() -> None:
    with TemporaryDirectory() as folder:
        installation = Installation(Path(folder) / "state", ROOT)
        with installation.up(workers=2) as addresses:
            with Shell(Path(folder) / "work", installation.environment) as shell:
                tell_a_story(addresses, shell, Path(folder))
            for name, command in {"status": ["status"], "why": ["why", "order", "A-1002"]}.items():
                draw_terminal(name, command, installation, addresses)
            with open_page(addresses.ui_url, timezone="Asia/Shanghai") as page:
                draw_ui(page, installation)


def tell_a_story(addresses: StackAddresses, shell: Shell, folder: Path) -> None:
    os.environ.update(addresses.environment())
    engine, settings = get_engine(), get_settings()
    map_order_types(engine)
    for number, batch in enumerate(write_batches(folder)):
        import_and_publish(engine, settings, batch, profile=None, create_shops=number == 0)
    told = shell.run(SCENES["etl why order A-1002"].before)
    assert told.exit_code == 0, told.text


def draw_terminal(name: str, command: list[str], installation: Installation, addresses: StackAddresses) -> None:
    environment = installation.environment | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    received = on_a_terminal(["-m", "bridge.cli.main", *command], environment)
    # 图里的机器叫 host-1，网页在缺省的端口
    received = received.replace("\r\n", "\n")
    shown = received.replace(f"{socket.gethostname()}:", "host-1:").replace(
        f":{urlsplit(addresses.ui_url).port}", ":3000"
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ etl {' '.join(command)}\n{shown}"))
    console.save_svg(str(IMAGES / f"{name}.svg"), title=f"etl {' '.join(command)}", code_format=FORMAT, unique_id=name)


def draw_ui(page: Page, installation: Installation) -> None:
    page.set_viewport_size({"width": 1400, "height": 560})
    page.goto("/locations/etl_assets/asset-groups/etl/lineage")
    expect(page.get_by_text("leads", exact=True).first).to_be_visible()
    draw(page, "lineage")
    told = installation.etl("why", "order", "A-1002")
    page.set_viewport_size({"width": 1500, "height": 950})
    page.goto(re.findall(r"/runs/[0-9a-f-]{36}", told)[0])
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    draw(page, "run")


def draw(page: Page, name: str) -> None:
    expect(page.get_by_text("Loading")).to_have_count(0)
    page.wait_for_timeout(3_000)  # 图的布局与箭头还在动
    file = IMAGES / f"{name}.png"
    page.screenshot(path=file)
    assert file.stat().st_size < MOST_BYTES, f"{file} is too large for a document"


if __name__ == "__main__":
    main()
