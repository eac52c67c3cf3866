"""docs/metrics.md、面板与规则：说的正是代码里有的指标；每条规则指着一段真有的说明。"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.operations.installation_metrics import INSTALLATION
from etl_assets.core.metrics import RECORDED, Metric

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dayline.json"
PAGES = ("docs/metrics.md", "docs/metrics.zh-CN.md")
DECLARED = {metric.name: metric for metric in (*RECORDED, *INSTALLATION)}
_NAME = re.compile(r"\betl_[a-z_]+")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def metrics_named_in(query: str) -> set[str]:
    return set(_NAME.findall(query))


def series_of(metric: Metric) -> Iterator[str]:
    if metric.kind == "histogram":
        yield from (f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
    else:
        yield metric.name


@pytest.mark.parametrize("metric", DECLARED.values(), ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert metric.help.endswith((".", "server."))


@pytest.mark.parametrize("page", PAGES)
def test_page_has_every_metric_as_the_code_declares_it(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(etl_[a-z_]+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE)
    assert {name: (kind, labels) for name, kind, labels in rows} == {
        metric.name: (metric.kind, ", ".join(f"`{label}`" for label in metric.labels)) for metric in DECLARED.values()
    }
    assert [name for name, _, _ in rows] == list(DECLARED)


def test_english_page_says_what_the_endpoint_says() -> None:
    text = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    assert [metric.name for metric in DECLARED.values() if f"| {metric.help} |" not in text] == []


def test_dashboard_and_rules_name_only_metrics_that_exist() -> None:
    known = {series for metric in DECLARED.values() for series in series_of(metric)}
    queries = [*dashboard_queries(), *(rule["expr"] for rule in rules())]
    assert {name for query in queries for name in metrics_named_in(query)} - known == set()


def test_dashboard_shows_every_metric() -> None:
    shown = {name for query in dashboard_queries() for name in metrics_named_in(query)}
    assert [metric.name for metric in DECLARED.values() if shown.isdisjoint(series_of(metric))] == []


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_rule_says_what_it_is_and_where_its_run_book_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    annotations = rule["annotations"]
    assert annotations["summary"]
    assert annotations["description"]
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    for text in ((ROOT / page), (ROOT / page).with_suffix(".zh-CN.md")):
        assert re.search(rf"^### {rule['alert']}$", text.read_text(encoding="utf-8"), re.MULTILINE)


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt-get install prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    result = subprocess.run([str(PROMTOOL), *arguments], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_is_loaded_where_metrics_are_off() -> None:
    """缺省是关着的：监听器与工人的模块都载入了，也没有 prometheus_client 与 opentelemetry。"""
    code = (
        "import sys; from bridge.cli.options import start_metrics_if_wanted; import bridge.runs.tasks, bridge.events.listener;"
        "from etl_assets.core.tracing import span, start_tracing; start_metrics_if_wanted(records=True); start_tracing('test')\n"
        "with span('nothing'): print('prometheus_client' in sys.modules, 'opentelemetry' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
