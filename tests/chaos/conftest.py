"""混沌测试共用的夹具。"""

from __future__ import annotations

import pytest

from tests.integration.conftest import nats_server

__all__ = ["nats_server"]


@pytest.fixture
def is_deep(request: pytest.FixtureRequest) -> bool:
    """`pdm run test-chaos` 跑全长，平日只跑一小段。"""
    return request.config.getoption("--minutes") is not None
