"""监督者：真的子进程，真的信号；停下或被杀以后不留下任何进程。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bridge.stack.leftovers import record_children
from bridge.stack.readiness import logged_ready
from bridge.stack.supervisor import Service, Supervisor
from etl_assets.core.errors import SettingsError
from etl_assets.embedded.child_log import ROTATE_BYTES, ChildStartError
from etl_assets.embedded.child_process import ProcessIdentity, identify, launch

READY = "import json, sys; print(json.dumps({'message': 'ready'}), file=sys.stderr, flush=True);"
SLEEP = "import time; time.sleep(600)"
# 写下自己收到停止信号的时刻
NOTE_STOP = """
import pathlib, signal, sys, time
def stop(*_):
    with open(sys.argv[1], "a") as file:
        file.write(sys.argv[2] + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
"""
# 留下一个同会话的孙进程，它不会随父进程死
SPAWN = (
    "import pathlib, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
)
SUPERVISE_AND_HOLD = """
import os, sys, time
from functools import partial
from pathlib import Path
from bridge.stack.readiness import logged_ready
from bridge.stack.supervisor import Service, Supervisor
from etl_assets.embedded.child_process import launch
from etl_assets.core.log import configure_logging
configure_logging("stack")
state_dir, code = Path(sys.argv[1]), sys.argv[2]
supervisor = Supervisor(state_dir)
supervisor.start()
environment = {**os.environ, "ETL_STATE_DIR": str(state_dir)}
supervisor.supervise([Service("child", partial(launch, [sys.executable, "-c", code], env=environment), logged_ready)])
supervisor.wait_until_ready(timeout_seconds=30)
print("ready", flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float = 10) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def python(*arguments: str) -> partial[subprocess.Popen[bytes]]:
    return partial(launch, [sys.executable, "-c", *arguments], env=dict(os.environ))


def service(
    name: str, code: str = READY + SLEEP, *arguments: str, after: tuple[str, ...] = (), stop_timeout_seconds: float = 10
) -> Service:
    return Service(name, python(code, *arguments), logged_ready, after=after, stop_timeout_seconds=stop_timeout_seconds)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "state")
    supervisor.start()
    yield supervisor
    supervisor.stop()


@pytest.fixture
def pids(tmp_path: Path) -> Callable[[], list[int]]:
    """记在 pids.json 里的各子进程，按启动的先后。"""
    path = tmp_path / "state" / "pids.json"
    return lambda: [child["pid"] for child in json.loads(path.read_text())["children"]] if path.exists() else []


def alive(pid: int) -> bool:
    return identify(pid) is not None


def test_starts_in_the_order_of_dependencies_and_stops_in_reverse(tmp_path: Path, supervisor: Supervisor) -> None:
    order = tmp_path / "stopped"
    code = NOTE_STOP + READY + SLEEP
    supervisor.supervise(
        [
            service("webserver", code, str(order), "webserver", after=("code",)),
            service("code", code, str(order), "code", after=("postgres",)),
            service("postgres", code, str(order), "postgres"),
        ]
    )
    with capture_logs() as logs:
        supervisor.wait_until_ready(timeout_seconds=20)
    supervisor.stop()

    assert [entry["name"] for entry in logs if entry["event"] == "child ready"] == ["postgres", "code", "webserver"]
    assert order.read_text().split() == ["webserver", "code", "postgres"]


def test_what_dies_is_started_again(supervisor: Supervisor, pids: Callable[[], list[int]]) -> None:
    supervisor.supervise([service("first"), service("second")])
    supervisor.wait_until_ready(timeout_seconds=20)
    first, second = pids()

    os.kill(first, signal.SIGKILL)

    wait_until(lambda: len(pids()) == 2 and first not in pids())
    supervisor.wait_until_ready(timeout_seconds=20)
    assert second in pids()
    assert all(map(alive, pids()))


@pytest.mark.parametrize(("code", "level"), [(0, "info"), (1, "warning")])
def test_a_child_that_stops_itself_in_order_is_no_warning(
    tmp_path: Path, supervisor: Supervisor, pids: Callable[[], list[int]], code: int, level: str
) -> None:
    ends = "\nimport os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\nsys.exit(int(sys.argv[2]))"
    flag = tmp_path / "stop"
    supervisor.supervise([service("code-server", READY + ends, str(flag), str(code))])
    supervisor.wait_until_ready(timeout_seconds=20)
    first = pids()
    with capture_logs() as logs:
        flag.touch()
        wait_until(lambda: pids() != first)
        flag.unlink()
    stopped = [entry for entry in logs if entry["event"] == "child stopped, starting it again"]
    assert [(entry["name"], entry["log_level"]) for entry in stopped[:1]] == [("code-server", level)]


def test_child_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.supervise(
        [service("worker-1", "print('first', flush=True); raise SystemExit('error: no such table: ledger')")]
    )

    with pytest.raises(ChildStartError, match="worker-1 does not start: no such table: ledger; see ") as caught:
        supervisor.wait_until_ready(timeout_seconds=20)

    assert caught.value.log == tmp_path / "state" / "logs" / "worker-1.log"
    assert "first" in caught.value.log.read_text()


def test_child_that_never_gets_ready_is_reported(supervisor: Supervisor) -> None:
    supervisor.supervise([service("worker-1", SLEEP)])

    with pytest.raises(ChildStartError, match="worker-1 does not start: not ready after 1 s"):
        supervisor.wait_until_ready(timeout_seconds=1)


def test_program_that_does_not_exist_is_reported(supervisor: Supervisor) -> None:
    supervisor.supervise([Service("worker-1", partial(launch, ["/nowhere/python"], env={}), logged_ready)])

    with pytest.raises(ChildStartError, match="No such file or directory"):
        supervisor.wait_until_ready(timeout_seconds=20)


def test_crash_loop_is_said_in_one_line(supervisor: Supervisor) -> None:
    with capture_logs() as logs:
        supervisor.supervise(
            [service("worker-1", READY + "import time; time.sleep(0.1); raise SystemExit('disk full')")]
        )
        wait_until(lambda: any(entry["event"] == "child stops again and again" for entry in logs))

    line = next(entry for entry in logs if entry["event"] == "child stops again and again")
    assert (line["name"], line["exit_code"], line["last_line"], line["log_level"]) == (
        "worker-1",
        1,
        "disk full",
        "error",
    )
    assert line["log"].endswith("/logs/worker-1.log")


def test_what_was_up_once_is_not_waited_for_long(
    tmp_path: Path, supervisor: Supervisor, pids: Callable[[], list[int]]
) -> None:
    broken = tmp_path / "broken"
    supervisor.supervise(
        [service("worker-1", f"import pathlib; pathlib.Path({str(broken)!r}).exists() and 1 / 0;" + READY + SLEEP)]
    )
    supervisor.wait_until_ready(timeout_seconds=20)
    broken.touch()
    with capture_logs() as logs:
        os.kill(pids()[0], signal.SIGKILL)
        wait_until(lambda: len([entry for entry in logs if "restart_in_seconds" in entry]) >= 6, timeout_seconds=60)
    assert max(entry["restart_in_seconds"] for entry in logs if "restart_in_seconds" in entry) == 3


def test_sick_child_is_started_again(tmp_path: Path, supervisor: Supervisor, pids: Callable[[], list[int]]) -> None:
    sick = tmp_path / "sick"
    supervisor.supervise(
        [replace(service("nats"), is_sick=sick.exists, after_exit=lambda: sick.unlink(missing_ok=True))]
    )
    supervisor.wait_until_ready(timeout_seconds=20)
    first = pids()
    sick.touch()
    wait_until(lambda: pids() not in ([], first), timeout_seconds=30)
    assert not alive(first[0])


def test_child_that_is_sick_for_a_moment_is_left_alone(supervisor: Supervisor, pids: Callable[[], list[int]]) -> None:
    answers = [True, True, False, True, True, False]
    supervisor.supervise([replace(service("nats"), is_sick=lambda: bool(answers) and answers.pop(0))])
    supervisor.wait_until_ready(timeout_seconds=20)
    first = pids()
    wait_until(lambda: not answers, timeout_seconds=30)
    assert pids() == first
    assert alive(first[0])


def test_failing_readiness_check_does_not_end_the_supervision(
    supervisor: Supervisor, pids: Callable[[], list[int]]
) -> None:
    def check(_attempt: object) -> bool:
        raise ValueError("unexpected answer")

    supervisor.supervise([Service("odd", python(SLEEP), check), service("other")])

    with pytest.raises(ChildStartError, match="odd does not start: ValueError: unexpected answer"):
        supervisor.wait_until_ready(timeout_seconds=20)
    assert all(map(alive, pids()))


def test_child_that_ignores_the_stop_signal_is_killed_at_the_deadline(
    supervisor: Supervisor, pids: Callable[[], list[int]]
) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY + SLEEP
    supervisor.supervise([replace(service("stubborn", stubborn), stop_timeout_seconds=0.3)])
    supervisor.wait_until_ready(timeout_seconds=20)
    (pid,) = pids()

    started = time.monotonic()
    supervisor.stop()

    assert 0.3 <= time.monotonic() - started < 5
    assert not alive(pid)


def test_killing_is_said_once_though_dying_takes_a_while(supervisor: Supervisor) -> None:
    large = "held = b'x' * 500_000_000;"  # 内核要些时候才放得完
    stubborn = large + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY + SLEEP
    supervisor.supervise([replace(service("stubborn", stubborn), stop_timeout_seconds=0.1)])
    supervisor.wait_until_ready(timeout_seconds=20)
    with capture_logs() as logs:
        supervisor.stop()
    assert [log["event"] for log in logs].count("child does not stop, killing it") == 1


def test_all_are_killed_at_once_when_asked(supervisor: Supervisor, pids: Callable[[], list[int]]) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY + SLEEP
    supervisor.supervise([service("stubborn", stubborn), replace(service("other"), after=("stubborn",))])
    supervisor.wait_until_ready(timeout_seconds=20)
    running = pids()
    started = time.monotonic()
    supervisor.stop(at_once=True)
    assert time.monotonic() - started < 5
    assert not any(map(alive, running))


def test_children_of_children_are_stopped_too(tmp_path: Path, supervisor: Supervisor) -> None:
    noted = tmp_path / "grandchild"
    supervisor.supervise(
        [service("parent", SPAWN + "pathlib.Path(sys.argv[1]).write_text(str(child.pid));" + READY + SLEEP, str(noted))]
    )
    supervisor.wait_until_ready(timeout_seconds=20)
    grandchild = int(noted.read_text())
    assert alive(grandchild)

    supervisor.stop()

    wait_until(lambda: not alive(grandchild))


def test_second_supervisor_of_a_folder_is_refused_and_disturbs_nothing(
    tmp_path: Path, supervisor: Supervisor, pids: Callable[[], list[int]]
) -> None:
    supervisor.supervise([service("child")])
    supervisor.wait_until_ready(timeout_seconds=20)
    second = Supervisor(tmp_path / "state")

    with pytest.raises(SettingsError, match="another process is using the state folder"):
        second.start()
    second.stop()

    assert len(pids()) == 1
    assert all(map(alive, pids()))


def test_folder_is_free_again_after_a_stop(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.stop()

    second = Supervisor(tmp_path / "state")
    second.start()
    second.stop()


def test_large_log_is_rotated_at_start(tmp_path: Path, supervisor: Supervisor) -> None:
    log = tmp_path / "state" / "logs" / "child.log"
    log.write_bytes(b"x" * (11 * 1024 * 1024))

    supervisor.supervise([service("child")])
    supervisor.wait_until_ready(timeout_seconds=20)

    assert log.stat().st_size < 1000
    assert log.with_name("child.log.1").stat().st_size == ROTATE_BYTES


def test_log_of_a_running_child_is_rotated_and_its_last_words_stay_right(
    tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etl_assets.embedded.child_log.ROTATE_BYTES", 100_000)
    log, go_on = tmp_path / "state" / "logs" / "talker.log", tmp_path / "go_on"
    talk = "[print('x' * 99) for _ in range(5000)]; sys.stdout.flush();"
    end = f"\nwhile not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.02)\nprint('after', flush=True); raise SystemExit('no more room')"
    supervisor.supervise([service("talker", "import pathlib, time;" + READY + talk + end)])
    supervisor.wait_until_ready(timeout_seconds=20)

    wait_until(lambda: log.with_name("talker.log.1").exists() and log.stat().st_size == 0)
    with capture_logs() as logs:
        go_on.touch()
        wait_until(lambda: any(entry.get("last_line") == "no more room" for entry in logs))

    assert log.with_name("talker.log.1").stat().st_size <= 100_000
    assert log.read_bytes().startswith(b"after\nno more room\n")


# ---- 监督者自己被 kill -9 ------------------------------------------------------------


def hold_and_kill_supervisor(state_dir: Path, code: str) -> list[int]:
    """另一个进程里的监督者，就绪以后被 kill -9；返回它的子进程。"""
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISE_AND_HOLD, str(state_dir), code], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            return [child["pid"] for child in json.loads((state_dir / "pids.json").read_text())["children"]]
        finally:
            holder.kill()


def test_children_die_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    (child,) = hold_and_kill_supervisor(tmp_path / "state", READY + SLEEP)

    wait_until(lambda: not alive(child))


def test_next_start_kills_what_a_killed_supervisor_left(tmp_path: Path) -> None:
    noted = tmp_path / "grandchild"
    note = f"pathlib.Path({str(noted)!r}).write_text(str(child.pid));"
    hold_and_kill_supervisor(tmp_path / "state", SPAWN + note + READY + SLEEP)
    grandchild = int(noted.read_text())
    assert alive(grandchild)

    supervisor = Supervisor(tmp_path / "state")
    supervisor.start()
    supervisor.stop()

    assert not alive(grandchild)


@pytest.mark.parametrize("recorded", ["other start time", "other boot"])
def test_next_start_spares_a_process_that_only_has_the_same_pid(tmp_path: Path, recorded: str) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    environment = {**os.environ, "ETL_STATE_DIR": str(state_dir)}  # 用户自己的 shell 里也可能有
    with subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True, env=environment) as bystander:
        identity = identify(bystander.pid)
        assert identity is not None
        off_by = 1 if recorded == "other start time" else 0
        record_children(state_dir, [ProcessIdentity(identity.pid, identity.started_ticks - off_by)])
        if recorded == "other boot":
            path = state_dir / "pids.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "another"}))

        supervisor = Supervisor(state_dir)
        supervisor.start()
        supervisor.stop()

        assert bystander.poll() is None
        bystander.kill()
