"""网站有哪些页、怎样排：每一页在 docs/ 里有中英两份；几份给工程师的文件在别处，有的只有一种语言。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from handbook.repository import ROOT, Language, written_in


@dataclass(frozen=True)
class Chapter:
    """一页。

    :param name: 在网站里的路径，没有后缀。
    :param origin: 在仓库里的路径，没有后缀；缺省在 docs/ 里同名。
    :param only: 只用这一种语言写的，两种语言的网站都放它。
    """

    name: str
    english: str
    chinese: str
    origin: str = ""
    only: Language | None = None

    def title(self, language: Language) -> str:
        return self.english if language == "en" else self.chinese

    def source(self, language: Language) -> Path:
        origin = self.origin or f"docs/{self.name}"
        # 只有一种语言的文件，名字后面都没有语言
        return ROOT / (f"{origin}.md" if self.only else written_in(language, origin))


@dataclass(frozen=True)
class Part:
    english: str
    chinese: str
    chapters: tuple[Chapter, ...]

    def title(self, language: Language) -> str:
        return self.english if language == "en" else self.chinese


PARTS = (
    Part("Start", "开始", (
        Chapter("index", "What it is", "这是什么"),
        Chapter("first-hour", "First hour", "第一个小时"),
    )),
    Part("Use", "使用", (
        Chapter("files", "Your own files", "自己的文件"),
        Chapter("profiles", "Profiles", "配置"),
        Chapter("announce", "Announce imports", "宣布导入"),
        Chapter("tables", "The application's tables", "应用的表"),
        Chapter("ui", "In the Dagster UI", "在 Dagster 网页里"),
        Chapter("why", "Why this row", "这一行为什么"),
        Chapter("compare", "Compare two results", "比较两份结果"),
        Chapter("shell", "In a shell", "在 shell 里"),
    )),
    Part("Operate", "运维", (
        Chapter("operate", "Operate", "运维"),
        Chapter("status", "What is wrong", "什么不对"),
        Chapter("alerts", "Alerts", "告警"),
        Chapter("faults", "Faults and run book", "故障与应对"),
        Chapter("metrics", "Metrics and traces", "指标与追踪"),
        Chapter("logs", "Logs", "日志"),
        Chapter("servers", "Your own servers", "自己的服务器"),
        Chapter("access", "Who gets in", "谁进得来"),
        Chapter("deployment", "Deployment", "部署"),
        Chapter("rollout", "From an old system", "从旧系统过来"),
    )),
    Part("Extend", "扩展", (
        Chapter("extend", "Add an asset, an event", "加一个资产、一个事件"),
        Chapter("guides/etl_assets", "Guide to etl_assets (Chinese)", "etl_assets 指南", "etl_assets/README", "zh-CN"),
        Chapter("guides/bridge", "Guide to bridge", "bridge 指南", "bridge/README"),
        Chapter("development", "Development", "开发"),
        Chapter("project/contributing", "Contributing", "参与", "CONTRIBUTING"),
    )),
    Part("Reference", "参考", (
        Chapter("reference/commands", "Commands", "命令"),
        Chapter("reference/settings", "Settings", "设置"),
        Chapter("reference/subjects", "Subjects and events", "主题与事件"),
        Chapter("reference/tables", "Tables", "表"),
    )),
    Part("How it works", "怎样工作", (
        Chapter("how-it-works", "How it works", "怎样工作"),
        Chapter("trace", "Three traces", "三条踪迹"),
        Chapter("glossary", "Words", "词汇"),
        Chapter("performance", "How fast", "有多快"),
        Chapter("scaling", "How far it scales", "能长到多大"),
        Chapter("requirements", "Requirements", "需求"),
        Chapter("project/security", "Security", "安全", "SECURITY"),
        Chapter("threats", "Threat model", "威胁模型"),
        Chapter("project/changelog", "Changelog (English)", "更新记录（英文）", "CHANGELOG", "en"),
    )),
)  # fmt: skip
CHAPTERS = tuple(chapter for part in PARTS for chapter in part.chapters)
DECISIONS = ROOT / "docs" / "decisions"
"""决定只有英文，不在目录里一条条列，由 decisions/index 列出。"""
