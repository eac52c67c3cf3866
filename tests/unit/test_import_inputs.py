"""人给的参数是哪些文件。"""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridge.imports.inputs import STDIN, find_tables, gather_inputs
from bridge.imports.rules.errors import ImportFileError


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_a_folder_gives_its_tables_by_name_and_says_what_else_is_there(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "exports",
        *("orders 10.csv", "orders 2.XLSX", "a.zip", "b.csv.gz"),
        *("~$orders 2.XLSX", ".hidden.csv", "a.csv.rejected.csv", "a.csv.rejected-2.csv", "manual.pdf"),
    )
    fill(folder / "2025.csv", "c.csv")
    tables, others = find_tables(folder)
    assert [path.name for path in tables] == ["a.zip", "b.csv.gz", "orders 2.XLSX", "orders 10.csv"]
    assert others == [
        "2025.csv (a folder)",
        ".hidden.csv (hidden)",
        "a.csv.rejected-2.csv (bad rows of an import)",
        "a.csv.rejected.csv (bad rows of an import)",
        "manual.pdf (not named like a table)",
        "~$orders 2.XLSX (lock file of an office program)",
    ]


@pytest.mark.parametrize(
    ("names", "there"), [((), "folder; "), (("a.pdf",), r"folder: a\.pdf \(not named like a table\); ")]
)
def test_a_folder_without_tables_is_refused(tmp_path: Path, names: tuple[str, ...], there: str) -> None:
    with pytest.raises(
        ImportFileError, match=rf"exports: there is no table in the {there}nothing was imported: name the files"
    ):
        find_tables(fill(tmp_path / "exports", *names))


def test_arguments_keep_their_order_and_one_file_is_single(tmp_path: Path) -> None:
    folder = fill(tmp_path / "exports", "b.csv", "a.csv")
    named = fill(tmp_path / "other", "z.dat") / "z.dat"
    with gather_inputs([named, folder, tmp_path / "absent.csv"]) as inputs:
        assert [(item.path, item.is_named) for item in inputs.files] == [
            (named, True),
            (folder / "a.csv", False),
            (folder / "b.csv", False),
            (tmp_path / "absent.csv", True),
        ]
        assert not inputs.is_single
    for paths, is_single in (([named], True), ([folder], False)):
        with gather_inputs(paths) as inputs:
            assert inputs.is_single is is_single


@pytest.mark.parametrize(("given", "name"), [(None, "stdin"), ("三月.csv", "三月.csv")])
def test_stdin_is_kept_as_a_file_until_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, name: str
) -> None:
    content = os.urandom(3 << 20)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    monkeypatch.chdir(tmp_path)
    with gather_inputs([STDIN], stdin_name=given) as inputs:
        (item,) = inputs.files
        assert (item.path.name, item.path.read_bytes(), item.size, inputs.is_single) == (name, content, 3 << 20, True)
        assert item.rejected_folder == tmp_path
    assert not item.path.parent.parent.exists()
    assert list(tmp_path.iterdir()) == []


def test_stdin_can_be_read_once() -> None:
    with pytest.raises(ImportFileError, match="standard input is named twice"), gather_inputs([STDIN, STDIN]):
        pass


def test_what_can_be_read_only_once_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "63"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"a,b\n",))
    writer.start()
    with gather_inputs([path]) as inputs:
        assert (inputs.files[0].path.name, inputs.files[0].path.read_bytes()) == ("63", b"a,b\n")
    writer.join()


def test_a_path_that_cannot_be_looked_at_is_one_sentence() -> None:
    with (
        pytest.raises(ImportFileError, match=r"the file cannot be read \(File name too long\)"),
        gather_inputs([Path("x" * 300)]),
    ):
        pass


def test_stdin_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"x")))
    with (
        pytest.raises(
            ImportFileError,
            match=r"it cannot be kept in .* \(File name too long\); nothing was imported: make room there",
        ),
        gather_inputs([STDIN], stdin_name="x" * 300),
    ):
        pass


def test_a_pipe_in_a_folder_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "gone.csv").symlink_to("nowhere.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    tables, others = find_tables(tmp_path)
    assert ([table.name for table in tables], others) == (["a.csv", "gone.csv"], ["pipe.csv (not a file)"])
