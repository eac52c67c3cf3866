"""与逐行参照核对：参照在 tests/reference，与产品不共用代码，所以这里按路径找它。"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import sqlalchemy as sa

from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings

_CHECKOUT = Path(__file__).parents[2]


def has_reference() -> bool:
    """装的是 wheel 就没有：测试不在包里。"""
    return (_CHECKOUT / "tests" / "reference" / "oracle.py").exists()


def find_differences(engine: sa.Engine, settings: EtlSettings) -> list[str]:
    """三张表与拒收记录跟参照的差别，一句一处；没有就是空。

    :raises PermanentError: 不是从检出的代码里运行的，没有参照。
    """
    if not has_reference():
        raise PermanentError("the row-by-row reference lives in the repository's tests: run the demo from a checkout")
    if str(_CHECKOUT) not in sys.path:
        sys.path.append(str(_CHECKOUT))
    oracle = importlib.import_module("tests.reference.oracle")
    reference_settings = oracle.ReferenceSettings.like(settings)
    with engine.connect() as connection:
        actual = oracle.actual(connection, target_schema=settings.target_schema)
        expected = oracle.expected(connection, reference_settings, target_schema=settings.target_schema)
    return list(oracle.differences(expected, actual))
