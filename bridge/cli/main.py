"""`etl` 的入口：先听着停止的信号，再导入别的。导入要一两秒，那时按的 Ctrl-C 也是一句话。"""

from __future__ import annotations

import sys
import time

from bridge.cli import abort

_AGAIN_SECONDS = 0.1
_FIRST_WORDS = {"import": "aborted, nothing was imported"}
"""命令自己的模块还没导入时就说得出的。"""


def main() -> None:
    abort.listen()
    abort.say_on_abort(_FIRST_WORDS.get(next(iter(sys.argv[1:]), ""), "aborted"))
    try:
        from bridge.cli.commands import run_command

        _cancel_statements_on_abort()
        run_command()
    except BaseException:
        if abort.is_stopping():
            abort.wait_for_the_end()
        raise


def _cancel_statements_on_abort() -> None:
    """断了线的服务器不知道没有人等了，语句照做下去；要明说。"""
    from etl_assets.core.interruption import Interruption, current_interruption

    interruption = Interruption()
    current_interruption.set(interruption)

    def cancel() -> None:
        interruption.request()
        time.sleep(_AGAIN_SECONDS)  # 两条语句之间没有东西可取消，而下一条已经过了看请求的地方
        interruption.request()

    abort.on_abort(cancel)


if __name__ == "__main__":
    main()
