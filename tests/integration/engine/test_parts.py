"""太大的区间一段一段地做：按原始行数切，超过语句时限的对半再切。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta

import pytest
import sqlalchemy as sa

from etl_assets.core.errors import StatementTimeoutError
from etl_assets.core.etl_tables import outbox
from etl_assets.core.tables import target_tables
from etl_assets.services import parts
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

FIRST = date(2026, 1, 1)
ORDERS = target_tables("public").orders


def bring(chain: Chain, raw_data: RawData, *rows_of_days: int) -> None:
    """从 FIRST 起，每天这么多订单。当地零点的一单也算这一天。"""
    midnight = datetime(2025, 12, 31, 16, tzinfo=UTC)
    chain.announce(
        raw_data.add_import(
            [
                {"order_id": f"{day}-{number}", "ordered_at": midnight + timedelta(days=day, hours=number)}
                for day, rows in enumerate(rows_of_days)
                for number in range(rows)
            ]
        )
    )


def made(chain: Chain) -> list[list[str]]:
    """orders 一段一段做好的日子，来自完成事件。"""
    payloads = chain.rows(sa.select(outbox.c.payload).where(outbox.c.asset == "orders").order_by(outbox.c.outbox_id))
    return [[day[-2:] for day in payload["partitions"]] for (payload,) in payloads]


def test_range_is_cut_by_its_raw_rows(chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch) -> None:
    """两天三行合得下；五行的一天自己就超过了，单独做。"""
    monkeypatch.setattr(parts, "ROWS_PER_PART", 3)
    bring(chain, raw_data, 1, 2, 1, 5, 3, 0, 1)
    (report,) = chain.run(FIRST, FIRST + timedelta(days=6), assets=["orders"])
    assert made(chain) == [["01", "02"], ["03"], ["04"], ["05", "06"], ["07"]]
    assert (report.days.first, report.days.last) == (FIRST, FIRST + timedelta(days=6))
    assert report.written.inserted == 13
    assert [account.loaded for account in report.accounts] == [1, 2, 1, 5, 3, 0, 1]
    assert chain.due_days("orders") == []
    chain.run_due()
    chain.assert_converged()


def test_range_that_fits_is_one_transaction(chain: Chain, raw_data: RawData) -> None:
    bring(chain, raw_data, 1, 2, 1)
    chain.run(FIRST, FIRST + timedelta(days=2), assets=["orders"])
    assert made(chain) == [["01", "02", "03"]]


def test_statement_that_times_out_is_tried_with_half_of_the_days(chain: Chain, raw_data: RawData) -> None:
    bring(chain, raw_data, 1, 2, 2, 1)
    with statements_timing_out(chain):
        (report,) = chain.run(FIRST, FIRST + timedelta(days=3), assets=["orders"])
    assert made(chain) == [["01", "02"], ["03", "04"]]
    assert report.written.inserted == 6
    chain.run_due()
    chain.assert_converged()


def test_day_that_times_out_alone_says_which_setting_to_raise(chain: Chain, raw_data: RawData) -> None:
    """前面的日子做好了，后面的还到期。"""
    bring(chain, raw_data, 1, 5, 1)
    with (
        statements_timing_out(chain),
        pytest.raises(StatementTimeoutError, match=r"2026-01-02 alone .*STATEMENT_TIMEOUT_SECONDS"),
    ):
        chain.run(FIRST, FIRST + timedelta(days=2), assets=["orders"])
    assert made(chain) == [["01"]]
    assert chain.due_days("orders") == [date(2026, 1, 2), date(2026, 1, 3)]
    chain.run_due()
    chain.assert_converged()


_TIME_OUT = sa.text("""
    CREATE FUNCTION etl.time_out() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT count(*) FROM written) > 3 THEN
            RAISE EXCEPTION 'canceling statement due to statement timeout' USING ERRCODE = 'query_canceled';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER time_out AFTER INSERT ON orders REFERENCING NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION etl.time_out()
""")


@contextmanager
def statements_timing_out(chain: Chain) -> Iterator[None]:
    """一条 INSERT 写进 orders 的行多于三行，服务器就像到了时限那样取消它。"""
    chain.execute(_TIME_OUT)
    try:
        yield
    finally:
        chain.execute(sa.text("DROP FUNCTION etl.time_out() CASCADE"))
