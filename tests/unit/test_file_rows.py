"""存下的行是文件的第几行：只记不接着的地方。"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pytest

from bridge.imports.file_rows import FileRows
from bridge.imports.rules.profile import ROW_NUMBER
from etl_assets.reports.why.orders import MOST_PLACES


@pytest.mark.parametrize(
    ("blocks", "places", "rows"),
    [
        pytest.param([[2, 3], [4, 5]], [1], [2], id="one after the other"),
        pytest.param([[2, 4, 5], [9]], [1, 2, 4], [2, 4, 9], id="left out, merged, over several lines"),
        pytest.param([[1, 2]], [1], [1], id="without a header"),
        pytest.param([[2], range(4, MOST_PLACES + 4), [9]], [], [], id="too many to be counted"),
        pytest.param([[5], [7], [8]], [1, 2], [5, 7], id="between blocks"),
    ],
)
def test_rows_are_kept_where_they_do_not_follow(
    blocks: list[Sequence[int]], places: list[int], rows: list[int]
) -> None:
    found = FileRows()
    for block in blocks:
        found.add(pl.DataFrame({ROW_NUMBER: block}))
    assert (found.first_places, found.first_rows) == (places, rows)
