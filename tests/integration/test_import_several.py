"""好几个文件、一个文件夹、标准输入：各是一次导入，一个坏了不牵连别的；试运行先给人看。"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from etl_assets.core.errors import DatabaseUnavailableError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs

from .etl_import import Import

HEADER = "order_id,shop,customer_name,order_status,amount,quantity,ordered_at\n"


def write(folder: Path, name: str, *order_ids: str, amount: str = "12.50") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        HEADER + "".join(f"{each},旗舰店,张三,已付款,{amount},1,2026-01-05 09:00:00\n" for each in order_ids),
        encoding="utf-8",
    )
    return path


def imported(engine: sa.Engine) -> list[tuple[str, int]]:
    tasks = import_tasks.c
    with engine.connect() as connection:
        found = connection.execute(sa.select(tasks.source_name, tasks.row_count).order_by(tasks.completed_at))
        return [(row[0], row[1]) for row in found]


def test_one_bad_file_of_a_folder_does_not_undo_the_others(
    engine: sa.Engine, etl_import: Import, tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    write(folder, "orders 10.csv", "C1")
    write(folder, "orders 2.csv", "A1", "A2")
    write(folder, "orders 9.csv", "B1", amount="12.5O")
    write(folder, "orders 1.csv.rejected.csv", "X1")
    (folder / "manual.pdf").write_bytes(b"%PDF")
    said = etl_import(folder)
    assert said.exit_code == 2
    assert imported(engine) == [("orders 2.csv", 2), ("orders 10.csv", 1)]
    assert len(said.out.split()) == 2
    assert (
        said.err.splitlines()[0]
        == "left out: manual.pdf (not named like a table), orders 1.csv.rejected.csv (bad rows of an import)"
    )
    assert "error: orders 9.csv, row 2, column 'amount': '12.5O' is not a number; nothing was imported" in said.err
    assert said.err.endswith("2 of 3 files imported, 3 orders\nnot imported: orders 9.csv\n")


def test_a_folder_is_imported_again_for_what_is_new_in_it(
    engine: sa.Engine, etl_import: Import, tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    write(folder, "1.csv", "A1")
    assert etl_import(folder).exit_code == 0
    write(folder, "2.csv", "A2")
    said = etl_import(folder)
    assert (said.exit_code, imported(engine)) == (0, [("1.csv", 1), ("2.csv", 1)])
    assert said.err.endswith("1 of 2 files imported, 1 orders\nimported before, left out: 1.csv\n")
    assert "error" not in said.err
    named = etl_import(folder / "1.csv", folder / "2.csv")
    assert (named.exit_code, named.out) == (2, "")
    assert named.err.endswith("0 of 2 files imported, 0 orders\nnot imported: 1.csv, 2.csv\n")


def test_the_same_file_twice_in_one_command_is_imported_once(
    engine: sa.Engine, etl_import: Import, tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    write(folder, "orders (1).csv", "A1")
    write(folder, "orders.csv", "A1")
    assert etl_import(folder).exit_code == 0
    assert imported(engine) == [("orders (1).csv", 1)]


def test_several_files_are_one_json_object_a_line(etl_import: Import, tmp_path: Path) -> None:
    files = [write(tmp_path, "1.csv", "A1"), write(tmp_path, "2.csv", "A2", amount="x"), write(tmp_path, "3.csv", "A3")]
    said = etl_import(*files, "--json")
    assert said.exit_code == 2
    first, second, third = map(json.loads, said.out.splitlines())
    assert [(report["file"], report["rows"]) for report in (first, third)] == [("1.csv", 1), ("3.csv", 1)]
    assert second["file"] == "2.csv"
    assert second["error"].startswith("2.csv, row 2, column 'amount': 'x' is not a number")
    again = etl_import(files[0].parent, "--json").out.splitlines()
    assert json.loads(again[0])["imported_before"]["import_id"] == first["import_id"]


def test_one_file_of_a_folder_is_a_line_too(etl_import: Import, tmp_path: Path) -> None:
    write(tmp_path / "exports", "1.csv", "A1")
    assert [json.loads(line)["rows"] for line in etl_import(tmp_path / "exports", "--json").out.splitlines()] == [1]


def test_what_is_not_the_file_s_fault_ends_it_and_the_rest_is_named(
    engine: sa.Engine, etl_import: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path, f"{n}.csv", f"A{n}") for n in range(4)]
    announced: list[object] = []

    def announce(import_id: object) -> None:
        announced.append(import_id)
        if len(announced) == 2:
            raise DatabaseUnavailableError("gone")

    monkeypatch.setattr("bridge.cli.importing.files.announce", announce)
    said = etl_import(*files)
    assert said.exit_code == 2
    assert [name for name, _ in imported(engine)] == ["0.csv", "1.csv"]
    assert said.err.endswith(
        "2 of 4 files imported, 2 orders\nnot imported, this ended before: 2.csv, 3.csv\nerror: gone\n"
    )


def test_an_option_that_fits_no_file_is_said_once(etl_import: Import, tmp_path: Path) -> None:
    files = [write(tmp_path, f"{n}.csv", f"A{n}") for n in range(2)]
    said = etl_import(*files, "--map", "colour=x")
    assert said.exit_code == 2
    assert said.err.count("raw_orders has no column 'colour'") == 1


@pytest.mark.parametrize(("options", "name"), [([], "stdin"), (["--name", "三月.csv"], "三月.csv")])
def test_stdin_is_a_file_of_its_name(
    engine: sa.Engine,
    etl_import: Import,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write(tmp_path, "1.csv", "A1").read_bytes() + "A2,旗舰店,张三,已付款,x,1,2026-01-05 09:00:00\n".encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False))
    refused = etl_import("-", *options)
    assert refused.exit_code == 2
    assert refused.err.startswith(f"error: {name}, row 3, column 'amount': 'x' is not a number")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False))
    assert etl_import("-", *options, "--skip-bad-rows").exit_code == 0
    assert imported(engine) == [(name, 1)]
    assert (tmp_path / f"{name}.rejected.csv").exists()


@pytest.mark.parametrize("arguments", ["x.csv --name a", "- - --name a", "- --name a/b", "- --name=", ""])
def test_names_that_name_nothing_are_refused(etl_import: Import, arguments: str) -> None:
    assert etl_import(*arguments.split()).exit_code == 2


def test_a_pipe_is_read_by_the_real_command(etl_settings: EtlSettings, tmp_path: Path) -> None:
    content = write(tmp_path, "1.csv", *(f"A{n}" for n in range(5_000))).read_bytes()
    environment = {**os.environ, "ETL_DATABASE_URL": etl_settings.database_url, "ETL_STATE_DIR": str(tmp_path / "none")}
    command = [sys.executable, "-m", "bridge.cli.main", "import", "-", "--dry-run", "--json"]
    done = subprocess.run(command, check=False, input=content, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 5_000


def test_an_abort_leaves_nothing_of_a_pipe_behind(etl_settings: EtlSettings, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    settings = {
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_STATE_DIR": str(tmp_path / "none"),
        "TMPDIR": str(spool),
    }
    command = [sys.executable, "-m", "bridge.cli.main", "import", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **settings}
    ) as process:
        deadline = time.monotonic() + 60
        while not list(spool.glob("*/*/stdin")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.stderr is not None
        assert process.stderr.read() == b"aborted, nothing was imported\n"
    assert process.returncode == 143
    assert list(spool.iterdir()) == []


PREVIEW = """\
订单编号,店铺名称,买家会员名,订单状态,实付金额,下单时间,备注
X1,旗舰店,\x1b[31m张三,已付款,12.5,2026-01-05 23:30:00,
X2,新店,李四,,3,2026-01-06 00:30:00,
X3,旗舰店,,已完成,4,2026-01-06 00:30:00,
X4,旗舰店,王五,已完成,5,1999-12-31 23:00:00,
X5,旗舰店,王五,已完成,5,2026-01-07 23:00:00,
X6,旗舰店,王五,已完成,5,2126-01-07 23:00:00,
"""


@pytest.fixture
def strange_file(engine: sa.Engine, tmp_path: Path) -> Path:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(shop_configs).values(shop_id=sa.func.gen_random_uuid(), shop_name="旗舰店", platform="x")
        )
    path = tmp_path / "orders.csv"
    path.write_text(PREVIEW, encoding="utf-8")
    return path


def test_a_dry_run_shows_what_would_be_stored_and_why(
    engine: sa.Engine, etl_import: Import, strange_file: Path
) -> None:
    said = etl_import(strange_file, "--dry-run", "--map", "quantity=")
    assert said.exit_code == 0
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.out.splitlines() if line.startswith("│")]
    assert table[0] == ["X1", "旗舰店", "\\x1b[31m张三", "已付款", "12.50", "2026-01-05 23:30:00"]
    assert [row[0] for row in table[:5]] == ["X1", "X2", "X3", "X4", "X5"]
    assert table[5:] == [
        ["order_id", "订单编号", "known header"],
        ["shop", "店铺名称", "known header"],
        ["customer_name", "买家会员名", "known header"],
        ["order_type", "", "no column for it"],
        ["order_status", "订单状态", "known header"],
        ["amount", "实付金额", "known header"],
        ["quantity", "", "--map"],
        ["ordered_at", "下单时间", "known header"],
    ]
    assert "\x1b" not in said.out
    assert "the first 5 rows as they will be stored, times in Asia/Shanghai" in said.out
    assert "columns of the file that are not used: 备注\n" in said.out
    assert said.out.endswith("dry run: nothing was written\n")
    warnings = [line.partition(";")[0] for line in said.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: shop '新店' is not in shop_configs, its 1 rows will be rejected (--create-shops adds it)",
        "warning: orders before 2000-01-01 are outside the partitions and will be rejected",
        "warning: orders after today are outside the partitions and will be rejected",
        "warning: 2 rows will be rejected: outside_partitions",
        "warning: 1 rows will be rejected: missing_customer_name",
    ]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(raw_orders)) == 0


def test_the_preview_is_in_the_json(etl_import: Import, strange_file: Path) -> None:
    report = json.loads(etl_import(strange_file, "--dry-run", "--json", "--map", "quantity=").out)
    preview = report["preview"]
    assert report["unknown_shops"] == {"新店": 1}
    assert report["rejected"] == {"outside_partitions": 2, "missing_customer_name": 1}
    assert preview["unused_columns"] == ["备注"]
    assert preview["columns"][5] == {"name": "amount", "source": "实付金额", "because": "known header"}
    assert [row["order_id"] for row in preview["rows"]] == ["X1", "X2", "X3", "X4", "X5"]
    assert (preview["rows"][0]["amount"], preview["rows"][0]["ordered_at"]) == ("12.50", "2026-01-05T23:30:00+08:00")


def test_an_import_has_no_preview(etl_import: Import, strange_file: Path) -> None:
    report = json.loads(etl_import(strange_file, "--json", "--map", "quantity=").out)
    assert (report["preview"], report["file"], report["imported_before"], report["turned_back"]) == (
        None,
        "orders.csv",
        None,
        None,
    )


def test_an_empty_name_is_not_the_current_folder(
    etl_import: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orders.csv").write_text("order_id\n1\n", encoding="utf-8")
    said = etl_import("")
    assert said.exit_code == 2
    assert "an empty name is no file" in said.err
