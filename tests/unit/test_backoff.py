"""隔多久再试：每次加倍，到最长为止；数据库里取的是同样的数。"""

from __future__ import annotations

import pytest

from etl_assets.core.backoff import Backoff, failures_in_a_row


def test_delay_grows_from_first_to_longest_and_stays_there() -> None:
    backoff = Backoff(first_seconds=5, longest_seconds=60)
    assert [backoff.seconds(failures) for failures in (1, 2, 3, 4, 5, 6, 10_000)] == [5, 10, 20, 40, 60, 60, 60]


@pytest.mark.parametrize(
    ("backoff", "steps"),
    [
        (Backoff(1, 30, factor=5), [1, 5, 25, 30]),
        (Backoff(0, 0), [0]),
        (Backoff(90, 60), [60]),  # 设置里的最长比首次还短
    ],
)
def test_steps_end_with_the_longest(backoff: Backoff, steps: list[float]) -> None:
    assert backoff.steps == steps


def test_spread_delays_differ_and_stay_within_their_bounds() -> None:
    delays = [Backoff(10, 60, spread=0.2).seconds(2) for _ in range(200)]
    assert 16 <= min(delays) < 18 < 22 < max(delays) <= 24


def test_failure_after_a_long_life_is_the_first_one_again() -> None:
    assert failures_in_a_row(3, lived_seconds=59) == 4
    assert failures_in_a_row(3, lived_seconds=61) == 1
