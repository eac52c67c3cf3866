"""README、docs/ 与各指南里的每个代码块：命令在一个真的栈上执行，印出的与文档写的相同；别的按语言解析。

一页一个新的工作文件夹、一个 shell、空的表；一页里的命令接着做。写出来而不执行的，都在下面的表里，各有理由：
两张表里没有、又不认得的块，测试不过。
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa
import yaml

from bridge.imports.rules.profile import parse_profile
from bridge.stack.addresses import read_addresses
from etl_assets.core.database_sync import build_engine
from etl_assets.core.etl_tables import leases, ledger
from etl_assets.core.settings import EtlSettings
from tests.acceptance.documents import ROOT, Block, Command, missing_lines, pages, read_blocks
from tests.acceptance.installation import Installation
from tests.acceptance.shell import Shell

CHINESE = ".zh-CN"
NOT_RUN = {
    r"user:password@": "the reader's own servers",
    r"etl up": "the stack of these tests is `etl up`; its line is read by tests/acceptance/test_newcomer.py",
    r"python3 run\.py up": "the same",
    r"python3 run\.py demo": "tests/acceptance/test_newcomer.py runs it and compares",
    r"(python3 run\.py|pdm run) (check|docs|test|bench|screenshots)|pdm install": "for minutes, or on the checkout itself",
    r"--asset products": "tests/acceptance/test_newcomer.py adds that asset",
    r"etl listen|etl worker|dagster-webserver|dagster-daemon|dagster dev": "never ends by itself; the stack runs each",
    r"ETL_ALERT_URLS=|etl alerts test|dingtalk-1|feishu-2": "sends to strangers: tests/integration/test_alerts.py",
    r"shadow|ETL_ROLLOUT": "beside an old system's tables: tests/integration/test_compare.py, engine/test_rollout.py",
    r"pip install|uvx? ": "installs: tests/integration/test_wheel.py",
    r"ETL_METRICS_PORT|curl http://127\.0\.0\.1:9464": "a setting of the stack: tests/integration/test_metrics.py",
    r"OTEL_EXPORTER": "a setting of the stack: tests/integration/test_tracing.py",
    r"docker|podman|kubectl|systemctl|cd deploy/|\.env": "an engine or a cluster: tests/integration/test_deployment.py",
    r"useradd|/etc/": "a host of the reader's: tests/integration/test_least_privilege.py, test_deployment.py",
    r"psql": "the reader's own server: tests/integration/test_least_privilege.py",
    r'grep -h \'"import_id": "3fd6…': "an import of somebody's: tests/acceptance/test_logs.py follows one",
}
"""命令里有这个 → 为什么不执行。"""
PROGRAMS = {"etl", "cat", "cp", "echo", "zcat"}
"""执行的命令只用这些程序：文档里写着 useradd、rm 的，不会在跑测试的机器上做出来。"""
PICTURES = {
    "a file ── etl import": "what flows where",
    "definitions.py  ": "the folders: tests/unit/test_folders.py",
    "Starting PostgreSQL": "what the demo prints: tests/acceptance/test_newcomer.py compares",
    "read as text, Shift_JIS": "one line that `etl import` says of such a file: tests/unit/test_import_shapes.py",
    "postgresql://etl@db.example.com": "addresses of the reader's servers: tests/integration/test_postgres_credentials.py",
    "CREATE ROLE etl_worker": "SQL for the reader's own server: tests/integration/test_least_privilege.py",
    "dagster.example.com {": "a proxy's configuration, Caddy's",
    "server {": "the same, nginx's",
    "load_from:": "a workspace.yaml whose language is not said",
}
"""不是命令、又没有语言的块：它的开头 → 那是什么。"""
HEADER = "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at"
ORDER = "旗舰店,李四,大货订单,paid,100.50,2,2026-01-06 09:00"


class Scene(NamedTuple):
    """一条命令之前要有什么（shell），它的 `…` 是什么。"""

    before: str = ""
    elided: str = ""


def write(file: str, *lines: str) -> str:
    return "\n".join([f"cat > {file} <<'END'", *lines, "END"])


TWELVE = write(
    "bad.csv",
    HEADER.replace("amount", "paid"),
    "B-1,旗舰店,张三,大货订单,paid,10,1,2026-03-02 10:15",
    "B-2,旗舰店,张三,大货订单,paid,twelve,1,2026-03-02 10:15",
    "B-3,旗舰店,张三,大货订单,paid,thirteen,1,2026-03-02 10:15",
)
REVENUE = write(
    "umsatz.csv",
    HEADER.replace("amount", "Betrag"),
    "U-1,旗舰店,张三,大货订单,paid,85.500,1,2026-03-02 10:15",
)
OWN_COLUMNS = write(
    "export.csv",
    "No,Who,Paid,shop,order_type,order_status,quantity,ordered_at",
    "E-1,张三,10.50,旗舰店,大货订单,paid,1,2026-03-02 10:15",
)
AGAIN = f"""
(echo {HEADER}; for n in $(seq 120); do echo "N-$n,旗舰店,张三,大货订单,paid,1,1,2026-03-05 10:00"; done) > orders.csv
(echo {HEADER}; for n in $(seq 3); do echo "N-$n,旗舰店,张三,大货订单,paid,2,1,2026-03-05 10:00"; done) > newer.csv
etl import orders.csv --create-shops
etl wait --import-id $(etl import newer.csv)
cp orders.csv "orders (1).csv"
"""
HISTORY = "\n".join(
    [
        write("first.csv", HEADER, f"A-1001,{ORDER}", f"A-1002,{ORDER.replace('100.50', '99.00')}"),
        write("moved.csv", HEADER, f"A-1002,{ORDER}"),
        write("nameless.csv", HEADER, f"A-1002,{ORDER.replace('李四', '')}"),
        write("mistake.csv", HEADER, f"A-1002,{ORDER.replace('100.50', '1.00')}"),
        "for file in first moved nameless mistake; do id=$(etl import $file.csv --create-shops); done",
        "etl wait --import-id $id",
        "etl withdraw --yes $id",
    ]
)
DOUYIN = (
    "--profile none --shop 抖音店 --map order_id=主订单编号 --map customer_name=收件人 --map amount=订单应付金额"
    " --map quantity=商品数量 --map ordered_at=订单提交时间 --map order_status=订单状态"
)
SCENES = {
    "etl import ExportOrderList2607.csv --create-shops": Scene('cp "$EXPORTS/taobao.csv" ExportOrderList2607.csv'),
    "etl import orders_export.csv --shop patches.example": Scene(
        'cp "$EXPORTS/shopify_orders_export.csv" orders_export.csv'
    ),
    "etl import items.csv …": Scene('cp "$EXPORTS/douyin.csv" items.csv', DOUYIN),
    "etl import items.csv … --lines-are-items": Scene(elided=DOUYIN),
    "etl import bad.csv …": Scene(TWELVE, "--map amount=paid"),
    "etl import bad.csv … --skip-bad-rows": Scene(elided="--map amount=paid"),
    "etl import umsatz.csv …": Scene(REVENUE, "--map amount=Betrag"),
    "etl import umsatz.csv … --decimal-comma --timezone Europe/Berlin": Scene(elided="--map amount=Betrag"),
    'etl import "orders (1).csv"': Scene(AGAIN),
    "etl import export.csv --map order_id=No --map customer_name=Who --map amount=Paid …": Scene(OWN_COLUMNS),
    'etl import export.xlsx --shop "Lumen 礼品店"': Scene('cp "$EXPORTS/xiaohongshu.xlsx" export.xlsx'),
    "etl import export.csv --create-shops": Scene('cp "$EXPORTS/mac_cr.csv" export.csv'),
    "etl import january.csv february.xlsx exports/": Scene(
        'cp "$EXPORTS/taobao.csv" january.csv; cp "$EXPORTS/far_right.xlsx" february.xlsx;'
        ' mkdir exports; cp "$EXPORTS/html.xls" "$EXPORTS/orders.zip" exports'
    ),
    "zcat export.csv.gz | etl import - --name export.csv": Scene(
        'gzip -c "$EXPORTS/trailing_left_out.csv" > export.csv.gz'
    ),
    "etl why order A-1002": Scene(HISTORY),
}
"""命令要的文件与往事；tests/exports 是 $EXPORTS。"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """状态文件夹就在读者的家里，文档写的路径才对。"""
    home = tmp_path_factory.mktemp("documents") / "home"
    installation = Installation(home / ".local" / "state" / "dayline", ROOT)
    with installation.up(workers=2):
        yield installation.environment | {"HOME": str(home), "EXPORTS": str(ROOT / "tests" / "exports")}


@pytest.fixture
def shell(environment: dict[str, str], tmp_path: Path) -> Iterator[Shell]:
    addresses = read_addresses(Path(environment["ETL_STATE_DIR"]))
    assert addresses is not None
    forget_everything(addresses.database_url)
    with Shell(tmp_path / "work", environment) as shell:
        yield shell


def forget_everything(database_url: str) -> None:
    """前一页导入的都不算：等它做完，再清空记着数据的表。"""
    engine = build_engine(EtlSettings(database_url=database_url))
    busy = sa.select(sa.exists().where(ledger.c.requested > ledger.c.materialized) | sa.exists().select_from(leases))
    tables = (
        "raw_orders, import_tasks, shop_configs, order_type_mappings, orders, customers, business_leads, etl.ledger,"
        " etl.import_events, etl.import_requests, etl.imported_files, etl.order_index, etl.stale_customers,"
        " etl.rejected_rows, etl.day_accounts, etl.counted_imports, etl.troubles"
    )
    deadline = time.monotonic() + 60
    while True:
        with engine.begin() as connection:
            if not connection.scalar(busy):
                connection.exec_driver_sql(f"TRUNCATE {tables} CASCADE")
                break
        assert time.monotonic() < deadline, "what the page before asked for is not done"
        time.sleep(0.1)
    engine.dispose()


def why_not_run(command: Command) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if re.search(part, command.text)), None)


def programs(command: str) -> set[str]:
    """命令里的各个程序；给文件的内容（heredoc）、注释与赋值不算。"""
    text = re.sub(r"<<'(\w+)'.*?\n\1(?=\n|$)", "", command, flags=re.DOTALL)
    parts = re.split(r"\|\||&&|[|;\n]|\$\(", re.sub(r"(?<!\S)#.*", "", text))
    words = [[word for word in part.split() if not re.match(r"\w+=", word)] for part in parts]
    return {found[0] for found in words if found}


def commands_to_run(page: Path) -> list[tuple[Block, Command]]:
    blocks = [block for block in read_blocks(page) if block.kind in ("console", "sh")]
    return [(block, command) for block in blocks for command in block.commands if not why_not_run(command)]


RUN = {page: found for page in pages() if CHINESE not in page.name and (found := commands_to_run(page))}


@pytest.mark.timeout(900)  # 一页几十条命令，机器忙的时候
@pytest.mark.parametrize("page", RUN, ids=str)
def test_commands_print_what_the_page_shows(shell: Shell, page: Path) -> None:
    wrong = [said for block, command in RUN[page] for said in run(shell, block, command)]
    assert not wrong, "\n".join(wrong)


def run(shell: Shell, block: Block, command: Command) -> Iterator[str]:
    """执行一条命令；不对的各是一段话。"""
    scene = SCENES.get(str(command), Scene())
    if others := programs(command.text) - PROGRAMS:
        yield f"{block.place}: {others} is not run here: say in NOT_RUN why, or that it is harmless in PROGRAMS"
        return
    if "…" in command.text and not (scene.before or scene.elided):
        yield f"{block.place}: what is … in `{command}`? Say it in SCENES, or in NOT_RUN why it is not run"
        return
    if scene.before:
        prepared = shell.run(f"(set -e\n{scene.before}\n)")
        assert prepared.exit_code == 0, prepared.text
    printed = shell.run(command.text.replace("…", scene.elided))
    if (printed.exit_code == 0) == command.is_refused:
        yield f"{block.place}: `{command}` ended with {printed.exit_code}:\n{printed.text}"
    elif missing := missing_lines(command.shown, printed.text):
        yield f"{block.place}: `{command}` does not print\n  {missing[0]}\nbut\n{printed.text}"


@pytest.mark.parametrize("page", pages(), ids=str)
def test_every_other_block_is_read_by_its_language(page: Path) -> None:
    readers = {"python": read_python, "toml": read_toml, "yaml": yaml.safe_load, "json": json.loads}
    for block in read_blocks(page):
        if block.kind in readers:
            readers[block.kind](block.text)
        elif block.kind not in ("console", "sh"):
            assert is_known(block), f"{block.place} is neither run nor read, and no table says why"


def is_known(block: Block) -> bool:
    """中文页的图里的话也是中文。"""
    return block.text.startswith(tuple(PICTURES)) or (CHINESE in block.place and not block.text.isascii())


def read_python(text: str) -> None:
    """整段编译；导入的都要有。products 还没有放进来，tests/acceptance/test_newcomer.py 会。"""
    tree = compile(text.replace("…", "..."), "document", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(tree, ast.Module)
    compile(tree, "document", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    tree.body = [node for node in imports if "etl_assets.products" not in ast.unparse(node)]
    exec(compile(tree, "document", "exec"), {})  # noqa: S102  # 只有我们自己文档里的导入


def read_toml(text: str) -> None:
    if tomllib.loads(text).keys() & {"file", "group", "orders"}:
        parse_profile(text, Path("document.toml"))


CHINESE_PAGES = [page for page in pages() if CHINESE in page.name]
OWN_WORDS = {"order_id=单号": "order_id=No", "customer_name=客户": "customer_name=Who", "amount=实收": "amount=Paid"}


@pytest.mark.parametrize("page", CHINESE_PAGES, ids=str)
def test_both_languages_have_the_same_blocks(page: Path) -> None:
    english = page.with_name(page.name.replace(CHINESE, ""))
    assert compared(english) == compared(page)


def compared(page: Path) -> list[str]:
    """除了图：图里的话也译。"""
    texts = [block.without_comments for block in read_blocks(page) if block.kind]
    for chinese, words in OWN_WORDS.items():
        texts = [text.replace(chinese, words) for text in texts]
    return texts


def test_scripts_of_the_documents_are_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pdm"]["scripts"]
    named = re.findall(r"pdm run ([\w-]+)", "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages()))
    assert named
    assert set(named) - scripts.keys() <= {"etl", "pytest"}


def test_the_test_of_five_lines_is_one(postgres_url: str, tmp_path: Path) -> None:
    guide = (ROOT / "etl_assets" / "README.md").read_text(encoding="utf-8")
    section = guide[guide.index("## 五行测一个资产") :]
    plugins, test = (
        re.search(r"`(pytest_plugins = .*?)`", section),
        re.search(r"```python\n(.*?)```", section, re.DOTALL),
    )
    assert plugins is not None
    assert test is not None
    (tmp_path / "conftest.py").write_text(plugins[1], encoding="utf-8")
    (tmp_path / "test_refunds.py").write_text(test[1], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "ETL_TEST_DATABASE_URL": postgres_url, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
