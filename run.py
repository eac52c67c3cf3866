#!/usr/bin/env python3
"""引导：只要有 Python 就能用。找一个够新的 Python，造好 .bootstrap（PDM 与 uv）和 .venv，再把命令交给 PDM。

只用标准库，语法照顾 Python 3.8：太旧的 Python 得到的是一句话，不是语法错误。
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BOOTSTRAP = ROOT / ".bootstrap"
VENV = ROOT / ".venv"
MINORS = range(11, 15)  # Python 3.11 … 3.14，与 pyproject.toml 的 requires-python 相同
TOOLS = ["pdm[locked]>=2.29,<3", "uv"]  # 不带 [locked] 的 PDM 眼下装出来不能用
SCRIPTS = (
    "bench",
    "check",
    "demo",
    "docs",
    "screenshots",
    "test",
    "test-chaos",
    "test-deep",
    "test-new-assets",
    "up",
)


def find_python() -> str:
    """够新的、能造虚拟环境的 Python；PATH 上的名字可能是跑不起来的垫片，所以每个都真的试一次。"""
    wanted = [(3, minor) for minor in MINORS]
    probe = f"import sys; print(sys.version_info[:2] in {wanted}); import venv, ensurepip"
    incomplete = ""
    for python in [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in reversed(MINORS)))]:
        found = subprocess.run(
            [python, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
        if found.stdout.startswith("True") and found.returncode == 0:
            return python
        if found.stdout.startswith("True"):
            incomplete = python
    if incomplete:
        sys.exit(f"{incomplete} cannot make virtual environments: run `apt install python3-venv`, then try again")
    sys.exit(f"Python 3.{MINORS[0]} to 3.{MINORS[-1]} is needed and none is on PATH: install one, then try again")


def run(*command: object) -> None:
    # PIP_USER 与虚拟环境不能并用
    if (
        subprocess.run([str(word) for word in command], env={**os.environ, "PIP_USER": "0"}, check=False).returncode
        != 0
    ):
        sys.exit("the set-up failed for the reason above: check the network and its proxy, then try again")


def prepare() -> None:
    """造好两个环境；.bootstrap 里最后才写的标记表示它是完整的。"""
    marker = BOOTSTRAP / "tools.txt"
    if not (BOOTSTRAP / "bin" / "python").exists() or not marker.exists() or marker.read_text() != "\n".join(TOOLS):
        sys.stderr.write(f"preparing {BOOTSTRAP}\n")
        run(find_python(), "-m", "venv", "--clear", BOOTSTRAP)
        run(BOOTSTRAP / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS)
        marker.write_text("\n".join(TOOLS))
    if not (VENV / "bin" / "python").exists():
        run(BOOTSTRAP / "bin" / "python", "-m", "uv", "venv", "--quiet", "--clear", "--python", find_python(), VENV)


def sync(pdm: list[str], lock: str, *options: str, use_uv: bool = True) -> None:
    """装好锁住的依赖；锁文件没变就不再来，离线也能用。"""
    marker = VENV / f"{lock}.synced"
    locked = hashlib.sha256((ROOT / lock).read_bytes()).hexdigest()
    if marker.exists() and marker.read_text() == locked:
        return
    sys.stderr.write(f"installing the packages of {lock}\n")
    # uv 快几倍，并在安装时编译字节码：不然栈的每个进程第一次启动都要各编译一遍
    os.environ.update(PDM_USE_UV=str(int(use_uv)), UV_COMPILE_BYTECODE="1", UV_SYSTEM_CERTS="1")
    run(*pdm, "sync", "--quiet", "--project", ROOT, "--lockfile", ROOT / lock, *options)
    marker.write_text(locked)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit("usage: python3 run.py demo | test | up | docs | bench NAME | any command of `etl`")
    prepare()
    # 不理会已激活的别的虚拟环境
    os.environ.update(PDM_CHECK_UPDATE="0", PDM_PYTHON=str(VENV / "bin" / "python"), PDM_IGNORE_ACTIVE_VENV="1")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME"):
        os.environ.pop(name, None)
    pdm = [str(BOOTSTRAP / "bin" / "python"), "-m", "pdm"]
    sync(pdm, "pdm.lock")
    if arguments[0] == "bench":
        sync(pdm, "pdm.bench.lock", "--group", "bench", use_uv=False)  # 经 uv 装不了：它嫌 dlt 把 orjson 写了三遍
    if arguments[0] not in SCRIPTS:
        arguments = ["etl", *arguments]
    # 换成 PDM 自己，不做它的父进程：终端、信号与退出码都直接是它的
    os.execv(pdm[0], [*pdm, "run", "--project", str(ROOT), *arguments])  # noqa: S606 不经过 shell 正是所要的


if __name__ == "__main__":
    main(sys.argv[1:])
