"""事件要的运行只做变了的；说不清变了什么、或者别的什么变了，就整天做。两种做法的结果一样。"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import counted_imports, day_accounts, import_requests, ledger, stale_customers
from etl_assets.core.tables import raw_orders, target_tables
from etl_assets.ledger.requests import request_days, request_downstream
from etl_assets.orders import changed
from etl_assets.orders.recount import find_wrong_days
from etl_assets.services import fingerprints
from etl_assets.services.accounting import AccountingError
from etl_assets.services.materialization import AssetReport
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME, RawData
from tests.integration.engine.chain import ASSETS, Chain
from tests.integration.engine.interleaving import interleaved, writes_to

DAY, NEXT = date(2026, 1, 5), date(2026, 1, 6)
AT, ON_NEXT = datetime(2026, 1, 5, 4, tzinfo=UTC), datetime(2026, 1, 6, 4, tzinfo=UTC)
ORDERS, CUSTOMERS = target_tables("public").orders, target_tables("public").customers

_HOURS = count(1)


@pytest.fixture
def done(chain: Chain, raw_data: RawData) -> Chain:
    """两天各有几个订单，都做完了，没有欠着的。"""
    rows = [{"order_id": f"A-{number}", "customer_name": f"客户{number}", "ordered_at": AT} for number in range(5)]
    rows += [
        {"order_id": f"B-{number}", "customer_name": f"客户{number}", "ordered_at": ON_NEXT} for number in range(5)
    ]
    chain.announce(raw_data.add_import(rows))
    chain.run_due()
    return chain


def later(raw_data: RawData, *rows: dict[str, Any]) -> UUID:
    """一次更新的导入。"""
    completed_at = datetime(2026, 6, 2, tzinfo=UTC) + timedelta(hours=next(_HOURS))
    return raw_data.add_import([{"ordered_at": AT, **row} for row in rows], completed_at=completed_at)


def run_event(chain: Chain, day: date = DAY) -> list[AssetReport]:
    return chain.run(day, is_of_event=True)


def scopes(reports: list[AssetReport]) -> list[str]:
    return [report.scope for report in reports]


def assert_right(chain: Chain) -> None:
    chain.run_due()
    chain.assert_converged()
    with chain.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert find_wrong_days(connection, chain.settings) == []


def accounts(chain: Chain) -> dict[date, dict[str, Any]]:
    return dict(chain.rows(sa.select(day_accounts.c.day, day_accounts.c.account)))  # type: ignore[arg-type]  # 两列


def without_runs(of_days: dict[date, dict[str, Any]]) -> dict[date, dict[str, Any]]:
    return {day: {**account, "run_id": None} for day, account in of_days.items()}


def test_event_works_on_what_its_import_names(done: Chain, raw_data: RawData) -> None:
    done.announce(
        later(
            raw_data,
            {"order_id": "A-1", "customer_name": "客户1", "amount": "7.00"},
            {"order_id": "A-9", "customer_name": "新"},
        )
    )
    reports = run_event(done)
    assert scopes(reports) == ["changed"] * 3
    assert [report.written.rows for report in reports] == [2, 2, 3]  # 客户1 有两个商机
    account = reports[0].accounts[0]
    assert (account.raw, account.loaded, account.superseded) == (7, 6, 1)
    assert_right(done)


def test_click_a_backfill_and_an_event_from_elsewhere_are_whole(done: Chain, raw_data: RawData) -> None:
    assert scopes(done.run(DAY)) == ["whole"] * 3
    with done.engine.begin() as connection:
        request_days(connection, "public", [DAY])
    done.announce(later(raw_data, {"order_id": "A-1"}))
    reports = run_event(done)
    assert scopes(reports) == ["whole"] * 3
    assert reports[0].whole_because == "asked for as a whole"
    done.announce(later(raw_data, {"order_id": "A-1"}))
    assert scopes(run_event(done)) == ["changed"] * 3
    assert_right(done)


def test_day_that_was_never_done_is_done_whole_and_then_by_changes(chain: Chain, raw_data: RawData) -> None:
    for expected in ("whole", "changed"):
        chain.announce(later(raw_data, {"order_id": "A-1"}))
        assert scopes(run_event(chain)) == [expected] * 3
    assert_right(chain)


def rename_shop(chain: Chain) -> None:
    chain.execute(
        sa.text("UPDATE order_type_mappings SET system_order_type = 'SAMPLE' WHERE raw_order_type = '大货订单'")
    )


def restore_orders(chain: Chain) -> None:
    """从备份里恢复：表清空了，装回早先的行。"""
    chain.execute(
        sa.text("""
            CREATE TABLE backup AS SELECT * FROM orders WHERE order_id <> 'A-4';
            TRUNCATE orders; INSERT INTO orders SELECT * FROM backup; DROP TABLE backup
        """)
    )


def change_order(chain: Chain) -> None:
    chain.execute(sa.update(ORDERS).where(ORDERS.c.order_id.in_(["A-1", "A-2"])).values(amount=1))


def delete_order(chain: Chain) -> None:
    chain.execute(sa.delete(ORDERS).where(ORDERS.c.order_id.in_(["A-1", "A-2"])))


def forget_fingerprint(chain: Chain) -> None:
    chain.execute(sa.update(ledger).values(fingerprint="of an older version"))


def forget_accounts(chain: Chain) -> None:
    chain.execute(sa.delete(day_accounts))


def forget_requests(chain: Chain) -> None:
    chain.execute(sa.delete(import_requests))


def remake_as_an_older_version(chain: Chain) -> None:
    """旧版本的工人做完一天，不记账。"""
    chain.execute(sa.update(ledger).values(run_id="of an older version"))


def request_as_an_older_version(chain: Chain) -> None:
    """旧版本的进程只会抬 requested。"""
    chain.execute(sa.update(ledger).where(ledger.c.asset == ASSETS[0]).values(requested=ledger.c.requested + 1))


@pytest.mark.parametrize(
    ("happen", "because"),
    [
        (rename_shop, "shops, mappings, settings or tables changed"),
        (restore_orders, "shops, mappings, settings or tables changed"),
        (forget_fingerprint, "shops, mappings, settings or tables changed"),
        (change_order, "rows of orders are not as they were written"),
        (delete_order, "rows of orders are not as they were written"),
        (forget_accounts, "the day has no account of its last run"),
        (remake_as_an_older_version, "the day has no account of its last run"),
        (forget_requests, "the waiting imports do not say what changed"),
        (request_as_an_older_version, "asked for as a whole"),
    ],
)
def test_what_else_changed_while_the_event_waited_makes_the_day_whole(
    done: Chain, raw_data: RawData, happen: Callable[[Chain], None], because: str
) -> None:
    done.announce(later(raw_data, {"order_id": "A-1", "customer_name": "客户1", "amount": "7.00"}))
    happen(done)
    reports = run_event(done)
    assert scopes(reports) == ["whole"] * 3
    assert reports[0].whole_because == because
    if happen in (rename_shop, restore_orders):
        run_event(done, NEXT)
    assert_right(done)


def test_import_withdrawn_between_claim_and_read_makes_the_day_whole(done: Chain, raw_data: RawData) -> None:
    import_id = later(raw_data, {"order_id": "A-1", "customer_name": "别人"}, {"order_id": "A-8"})
    done.announce(import_id)
    raw_data.set_status(import_id, "failed")
    reports = run_event(done)
    assert reports[0].whole_because == "a waiting import was withdrawn"
    assert_right(done)


def test_rows_added_to_an_import_that_was_counted_make_the_day_whole(done: Chain, raw_data: RawData) -> None:
    import_id = later(raw_data, {"order_id": "A-1"})
    done.announce(import_id)
    done.run_due()
    row = {
        "import_id": import_id,
        "order_id": "A-7",
        "shop": SAMPLE_SHOP_NAME,
        "customer_name": "张三",
        "ordered_at": AT,
    }
    done.execute(sa.insert(raw_orders).values(row))
    done.announce(import_id)
    assert run_event(done)[0].whole_because == "an import has other rows than when it was counted"
    assert_right(done)


def test_large_import_over_many_days_is_read_day_by_day(
    done: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changed, "FEW_ROWS", 2)
    done.announce(later(raw_data, *[{"order_id": f"N-{number}"} for number in range(3)]))
    assert run_event(done)[0].whole_because == "the waiting imports name over 2 rows"
    assert_right(done)


def test_newer_rules_make_the_day_whole(done: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "RULES", fingerprints.RULES + 1)
    done.announce(later(raw_data, {"order_id": "A-1"}))
    assert scopes(run_event(done)) == ["whole"] * 3
    assert_right(done)


def test_account_is_carried_over_moves_rejections_and_repetitions(done: Chain, raw_data: RawData) -> None:
    """订单挪到别的日子又挪回来，同一次导入里重复，拒收，类型没有映射：账与整天数出来的一样。"""
    imports = [
        [{"order_id": "A-1", "ordered_at": ON_NEXT}, {"order_id": "A-2", "quantity": -1}],
        [
            {"order_id": "A-1"},
            {"order_id": "A-1", "order_type": "没有映射"},
            {"order_id": "A-3", "order_type": "没有映射"},
        ],
        [{"order_id": "A-3", "customer_name": ""}, {"order_id": None}, {"order_id": "B-1", "ordered_at": AT}],
        [{"order_id": None}, {"order_id": "A-4", "amount": "NaN"}],
        [{"order_id": "A-3"}, {"order_id": "B-1", "ordered_at": ON_NEXT}],
    ]
    for rows in imports:
        done.announce(later(raw_data, *rows))
        done.run_due()
        assert {report.scope for report in done.reports[-3:]} == {"changed"}
        carried = accounts(done)
        with done.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            assert find_wrong_days(connection, done.settings) == []
        for day in (DAY, NEXT):
            done.run(day)
        assert without_runs(accounts(done)) == without_runs(carried)
    assert_right(done)


def test_import_whose_event_has_not_come_is_counted_by_its_own_run(done: Chain, raw_data: RawData) -> None:
    first, second = later(raw_data, {"order_id": "A-1"}), later(raw_data, {"order_id": "A-1"}, {"order_id": "A-2"})
    done.announce(first)
    assert run_event(done)[0].accounts[0].raw == 6
    done.announce(second)
    assert run_event(done)[0].accounts[0].raw == 8
    assert len(done.rows(sa.select(counted_imports).where(counted_imports.c.day == DAY))) == 3
    assert_right(done)


def test_row_that_a_trigger_swallows_stops_a_run_of_what_changed(done: Chain, raw_data: RawData) -> None:
    done.announce(later(raw_data, {"order_id": "A-8", "customer_name": "新"}))
    body = "BEGIN RETURN NULL; END"
    done.execute(sa.text(f"CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS '{body}'"))
    done.execute(sa.text("CREATE TRIGGER swallow BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION swallow()"))
    with pytest.raises(AccountingError, match=r"6 raw rows in scope on 2026-01-05, 5 loaded.*look at raw_id 11"):
        run_event(done)
    done.execute(sa.text("DROP FUNCTION swallow() CASCADE"))
    assert_right(done)


def test_nightly_check_finds_an_account_that_is_not_what_the_tables_say(done: Chain) -> None:
    done.execute(sa.delete(ORDERS).where(ORDERS.c.order_id == "A-1"))
    with done.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert find_wrong_days(connection, done.settings) == [DAY]
        assert find_wrong_days(connection, done.settings, DayRange(NEXT, NEXT)) == []


def test_run_takes_the_marks_of_its_own_days(done: Chain, raw_data: RawData) -> None:
    done.announce(
        later(raw_data, {"order_id": "A-8", "customer_name": "新"}),
        later(raw_data, {"order_id": "B-8", "ordered_at": ON_NEXT}),
    )
    for day in (DAY, NEXT):
        done.run(day, assets=["orders"], is_of_event=True)
    reports = done.run(DAY, assets=["customers", "leads"], is_of_event=True)
    assert [report.written.rows for report in reports] == [1, 1]
    assert {day for (day,) in done.rows(sa.select(stale_customers.c.day))} == {NEXT}
    assert_right(done)


def test_click_that_an_event_overtakes_leaves_the_customers_of_its_whole_day_to_the_run_of_the_event(
    done: Chain, raw_data: RawData
) -> None:
    """整天做的 orders 看见了没有宣布的导入，而它提交之前这一天又到期了：下游由事件的运行去做，也得整天做。"""
    unannounced = later(raw_data, {"order_id": "A-9", "customer_name": "新"})
    announced = later(raw_data, {"order_id": "A-1", "customer_name": "客户1"})
    with interleaved(done.engine, before=writes_to("public.orders")) as both:
        assert both.begin(lambda: done.run(DAY, assets=["orders"]))
        both.meanwhile(lambda: done.announce(announced))
        both.resume()
    reports = run_event(done)
    done.announce(unannounced)
    assert_right(done)
    assert scopes(reports) == ["changed", "whole", "whole"]


def test_customers_that_were_asked_for_while_their_orders_wait_are_whole(done: Chain, raw_data: RawData) -> None:
    done.announce(later(raw_data, {"order_id": "A-1", "customer_name": "客户1"}))
    done.execute(sa.update(CUSTOMERS).where(CUSTOMERS.c.customer_nickname == "客户3").values(order_count=99))
    with done.engine.begin() as connection:
        request_downstream(
            connection, "public", "orders", [DAY]
        )  # etl backfill --asset customers，或者别处的 ORDERS_ETL_COMPLETED
    reports = run_event(done)
    assert_right(done)
    assert scopes(reports) == ["changed", "whole", "whole"]
    done.announce(later(raw_data, {"order_id": "A-1", "customer_name": "客户1"}))
    assert scopes(run_event(done)) == ["changed"] * 3


@pytest.mark.parametrize(
    "row", [{"order_id": "A-9", "customer_name": "新"}, {"order_id": "A-1", "customer_name": "客户1", "amount": "7.00"}]
)
def test_row_that_another_system_wrote_first_makes_the_day_whole(
    done: Chain, raw_data: RawData, row: dict[str, Any]
) -> None:
    """别的系统已经照这次导入写了 orders，一列不差：没有什么要写，客户却还没有算过它，账上也没有。"""
    (sample,) = done.rows(sa.select(ORDERS).where(ORDERS.c.order_id == "A-1"))
    import_id = later(raw_data, row)
    ((raw_id, amount),) = done.rows(
        sa.select(raw_orders.c.raw_id, raw_orders.c.amount).where(raw_orders.c.import_id == import_id)
    )
    done.execute(sa.delete(ORDERS).where(ORDERS.c.order_id == row["order_id"]))
    written = {"order_id": row["order_id"], "customer_nickname": row["customer_name"], "amount": amount}
    values = dict(zip(ORDERS.c.keys(), sample, strict=True)) | written | {"import_id": import_id, "raw_id": raw_id}
    done.execute(sa.insert(ORDERS).values(values))
    done.announce(import_id)
    reports = run_event(done)
    assert_right(done)
    assert reports[0].whole_because == "rows of orders are from an import that is not counted yet"


def test_import_restored_before_the_day_its_order_left_was_done_again(done: Chain, raw_data: RawData) -> None:
    """撤回之后只做了一天，订单从另一天挪了回来；恢复之后做另一天，它的账不再是表里的样子。"""
    import_id = later(raw_data, {"order_id": "A-1", "ordered_at": ON_NEXT})
    done.announce(import_id)
    done.run_due()
    raw_data.set_status(import_id, "failed")
    done.announce(import_id)
    run_event(done, DAY)
    raw_data.set_status(import_id, "completed")
    done.announce(import_id)
    run_event(done, NEXT)
    assert_right(done)


def test_import_that_only_a_click_saw_leaves_the_account_when_it_is_withdrawn(done: Chain, raw_data: RawData) -> None:
    superseded = later(raw_data, {"order_id": "A-1"})
    done.announce(later(raw_data, {"order_id": "A-1"}))
    done.run(DAY)
    raw_data.set_status(superseded, "failed")
    done.announce(superseded)
    done.announce(later(raw_data, {"order_id": "A-2"}))
    assert run_event(done)[0].accounts[0].raw == 7
    assert_right(done)


def test_marks_of_adopted_orders_are_for_any_day(done: Chain) -> None:
    """别的 ETL 把第二天的订单给了另一个客户；有人先点了两天的 leads，它离开的客户仍要由第二天的 customers 去修。"""
    done.execute(sa.update(ORDERS).where(ORDERS.c.order_id == "B-3").values(customer_nickname="客户4"))
    with done.engine.begin() as connection:
        request_downstream(connection, "public", "orders", [NEXT])
    done.run(DAY, NEXT, assets=["leads"])
    done.run_due()
    counts = dict(done.rows(sa.select(CUSTOMERS.c.customer_nickname, CUSTOMERS.c.order_count)))
    assert (counts["客户3"], counts["客户4"]) == (1, 3)


def test_account_of_a_day_that_an_older_version_did_again_is_not_judged(done: Chain) -> None:
    done.execute(sa.delete(ORDERS).where(ORDERS.c.order_id == "A-1"))
    remake_as_an_older_version(done)
    with done.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert find_wrong_days(connection, done.settings) == []


@pytest.mark.parametrize(
    "odd", [{"amount": "NaN"}, {"ordered_at": sa.text("'infinity'")}, {"ordered_at": sa.text("'0044-03-15 BC'")}]
)
def test_order_that_no_frame_can_hold_makes_the_day_whole(done: Chain, raw_data: RawData, odd: dict[str, Any]) -> None:
    """别的系统写进 orders 的怪值：读不进来，也就不是我们写的；整天做会把它改对。"""
    done.announce(later(raw_data, {"order_id": "A-1", "customer_name": "客户1"}))
    done.execute(sa.update(ORDERS).where(ORDERS.c.order_id == "A-1").values(odd))
    assert run_event(done)[0].whole_because == "rows of orders are not as they were written"
    assert_right(done)
