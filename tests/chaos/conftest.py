"""混沌测试共用的夹具。"""

from __future__ import annotations

import pytest

from tests.integration.conftest import nats_server

__all__ = ["nats_server"]

pytest.register_assert_rewrite("tests.chaos.verdict")  # 断言不成立时，说出剩下的是什么

_BESIDE_THE_CHAOS_SECONDS = 840  # 起栈、铺历史、排完、核对，在又忙又慢的机器上


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """混沌的时限跟着它的长短走：平日那一分钟卡住了，不能占住整轮。"""
    seconds = (config.getoption("--minutes") or 1) * 60 + _BESIDE_THE_CHAOS_SECONDS
    for item in items:
        if item.name.startswith("test_nothing_is_lost"):
            item.add_marker(pytest.mark.timeout(seconds))


@pytest.fixture
def is_deep(request: pytest.FixtureRequest) -> bool:
    """`pdm run test-chaos` 跑全长，平日只跑一小段。"""
    return request.config.getoption("--minutes") is not None
