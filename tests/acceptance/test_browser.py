"""真的浏览器对真的网页：看见血缘图，点一下物化一天，重新执行，回填三十天，取消一个正在跑的。

截图留在 pytest 的临时文件夹，设了 ETL_SCREENSHOTS 就留在那里。用系统里的 Chromium；没有就跳过。
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from playwright.sync_api import Locator, Page, expect

from bridge.stack.addresses import StackAddresses
from etl_assets.core.settings import EtlSettings
from tests.acceptance.chromium import needs_chromium, open_page
from tests.acceptance.conftest import AddOrders, Etl, Query, held_day
from tests.acceptance.dagster_ui import DagsterUi

pytestmark = needs_chromium
Shoot = Callable[[str], None]
MOST_PIXELS = 130
"""这么宽的窗口里一个运行的高度：编号、日子、文件与「View all tags」；一个长标签就是一行，约 28 个像素。"""


@pytest.fixture(scope="module")
def page(stack: StackAddresses, stack_settings: EtlSettings) -> Iterator[Page]:
    with open_page(stack.ui_url, timezone=stack_settings.timezone) as page:
        yield page


@pytest.fixture
def shoot(page: Page, tmp_path: Path) -> Shoot:
    folder = Path(os.environ.get("ETL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return save


@pytest.fixture
def ui(query: Query) -> DagsterUi:
    return DagsterUi(query)


def choose_partitions(page: Page, partitions: str) -> Locator:
    """打开物化对话框，填好分区；还没有点启动。"""
    page.goto("/assets/orders")
    page.get_by_role("button", name=re.compile("Materialize")).first.click()
    dialog = page.get_by_role("dialog")
    field = dialog.get_by_role("textbox").first
    field.fill(partitions)
    field.press("Tab")
    return dialog


def test_lineage_shows_the_sources_and_the_three_tables(page: Page, shoot: Shoot) -> None:
    page.goto("/locations/etl_assets/asset-groups/etl/lineage")
    for asset in ("raw_orders", "shop_configs", "order_type_mappings", "orders", "customers", "leads"):
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()
    shoot("lineage")


def test_a_day_is_materialized_and_run_again_by_clicking(
    page: Page, add_orders: AddOrders, ui: DagsterUi, stack_settings: EtlSettings, shoot: Shoot
) -> None:
    """对话框缺省只列最近 90 天，所以是昨天。"""
    day = stack_settings.today() - timedelta(days=1)
    add_orders(day, "B-1", "B-2")
    choose_partitions(page, day.isoformat()).get_by_role("button", name="Launch 1 run").click()
    link = page.get_by_role("link", name="View", exact=True)
    run_id = str(link.get_attribute("href")).removeprefix("/runs/")
    link.click()
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    assert ui.run(run_id)["status"] == "SUCCESS"
    shoot("run")
    page.get_by_role("button", name=re.compile("Re-execute")).first.click()
    page.wait_for_url(re.compile(f"/runs/(?!{run_id})"))
    run = ui.wait(page.url.rpartition("/")[2].partition("?")[0])
    assert (run["status"], run["parentRunId"]) == ("SUCCESS", run_id)
    page.goto("/assets/orders")
    expect(page.get_by_text("system_order_type").first).to_be_visible()
    shoot("orders")


def test_an_assets_page_says_where_each_column_comes_from(page: Page, shoot: Shoot) -> None:
    """血缘的那条元数据开源的网页不显示。"""
    page.goto("/assets/orders?view=overview")
    expect(page.get_by_text("from raw_orders.customer_name", exact=True)).to_be_visible()
    expect(page.get_by_text("from raw_orders.shop, shop_configs.shop_name, shop_configs.shop_id")).to_be_visible()
    shoot("columns")


def test_the_resource_has_a_name(page: Page, shoot: Shoot) -> None:
    page.goto("/locations/etl_assets/resources/database")
    expect(page.get_by_text("etl_database", exact=True).first).to_be_visible()
    assert page.get_by_text("<lambda>").count() == 0
    shoot("resource")


def test_list_of_runs_says_which_file_and_is_not_full_of_tags(
    page: Page, etl: Etl, tmp_path: Path, shoot: Shoot
) -> None:
    file = tmp_path / "三月.csv"
    orders = [
        f"U-{number},客户{number},1.00,1,2001-03-0{1 + number % 3} 12:00,网页店,已完成,大货订单" for number in range(9)
    ]
    file.write_text(
        "\n".join(["订单编号,买家昵称,订单金额,数量,下单时间,店铺名称,订单状态,订单类型", *orders]), encoding="utf-8"
    )
    import_id = etl("import", str(file), "--create-shops").stdout.split()[-1]
    etl("wait", "--import-id", import_id)
    page.goto("/runs")
    row = page.locator("[class*='rowGrid']").filter(has_text="三月.csv").first
    expect(row.get_by_text("三月.csv", exact=True).first).to_be_visible()
    expect(row.get_by_text("days: 2001-03-01..2001-03-03")).to_be_visible()
    box = row.bounding_box()
    assert box is not None
    assert box["height"] < MOST_PIXELS
    assert row.get_by_text("Manually launched").count() == row.get_by_text(import_id).count() == 0
    shoot("runs")
    row.get_by_text("View all tags").click()
    expect(page.get_by_text(import_id).first).to_be_visible()


def test_a_day_of_a_range_shows_its_own_rows(page: Page, ui: DagsterUi, add_orders: AddOrders, shoot: Shoot) -> None:
    days = [date(1999, 9, day) for day in (11, 12, 13)]
    for number, day in enumerate(days, 1):
        add_orders(day, *[f"R-{day.day}-{order}" for order in range(number * 3)])
    run_id = ui.launch(day=str(days[0]), last_day=str(days[-1]))
    assert ui.wait(run_id)["status"] == "SUCCESS", ui.messages(run_id)
    page.goto(f"/assets/orders?partition={days[1]}&view=partitions")
    rows = page.get_by_role("row").filter(has=page.get_by_text("rows", exact=True))
    expect(rows.get_by_text("6", exact=True)).to_be_visible()
    expect(page.get_by_text("R-12-0", exact=True)).to_be_visible()
    shoot("day of a range")


def test_a_running_run_is_cancelled_by_clicking(
    page: Page, ui: DagsterUi, stack_engine: sa.Engine, shoot: Shoot
) -> None:
    day = date(1999, 9, 2)
    with held_day(stack_engine, day):
        run_id = ui.launch(day=day.isoformat())
        ui.wait(run_id, "STARTED")
        page.goto(f"/runs/{run_id}")
        page.get_by_role("button", name="Terminate").click()
        page.get_by_role("dialog").get_by_role("button", name="Terminate 1 run").click()
        assert ui.wait(run_id)["status"] == "CANCELED"
    expect(page.get_by_text("Canceled", exact=True).first).to_be_visible()
    shoot("cancelled")


def test_text_of_buyers_is_shown_as_text(page: Page, ui: DagsterUi, add_orders: AddOrders, shoot: Shoot) -> None:
    """图片一请求，别人就知道谁在看；链接与 HTML 能骗人去点。"""
    day = date(1999, 9, 5)
    names = (
        "![a](http://127.0.0.1:9/a.png)",
        "[b](http://127.0.0.1:9/b)",
        '<img src="http://127.0.0.1:9/c.png">',
        "`d` **e**",
        r"f\|![g](http://127.0.0.1:9/g.png)",
    )
    for number, name in enumerate(names):
        add_orders(day, f"N-{number}", customer=name)
    run_id = ui.launch(day=day.isoformat())
    assert ui.wait(run_id)["status"] == "SUCCESS"
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"/assets/orders?partition={day}&view=partitions")
    for name in names:
        expect(page.get_by_text(name.replace("|", r"\x7c"), exact=True).first).to_be_visible()
    shoot("names")
    assert page.locator("a[href*='127.0.0.1:9/'], img[src*='127.0.0.1:9/']").count() == 0
    assert [url for url in requested if ":9/" in url] == []


def test_thirty_days_are_backfilled_by_clicking(
    page: Page, query: Query, stack_settings: EtlSettings, shoot: Shoot
) -> None:
    last = stack_settings.today()
    dialog = choose_partitions(page, f"[{last - timedelta(days=29)}...{last}]")
    dialog.get_by_role("button", name="Launch backfill").click()
    expect(dialog).to_be_hidden()
    page.goto("/runs?view=backfills")
    page.locator("a[href^='/runs/b/']").first.click()
    newest = "query { partitionBackfillsOrError(limit: 1) { ... on PartitionBackfills { results { status numPartitions runs { runId } } } } }"
    deadline = time.monotonic() + 120
    while (backfill := query(newest)["partitionBackfillsOrError"]["results"][0])["status"] != "COMPLETED_SUCCESS":
        assert time.monotonic() < deadline, backfill
        time.sleep(0.5)
    assert (backfill["numPartitions"], len(backfill["runs"])) == (30, 1)
    page.reload()
    expect(page.get_by_text("100% completed").first).to_be_visible()
    shoot("backfill")
