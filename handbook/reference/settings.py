"""设置的一页：pydantic 的两个设置对象的每个字段，与不由它们读的几个环境变量。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from handbook.chinese import say
from handbook.markdown import code, page, table
from handbook.repository import Language

_WORDS = {
    "title": {"en": "Settings", "zh-CN": "设置"},
    "intro": {
        "en": "Environment variables, or lines of a file `.env` in the current folder; an unusable value is refused at "
        "start with its name and what is allowed (exit code 2). Set them for `etl up` and every process it starts has "
        "them; on several machines set the same everywhere.",
        "zh-CN": "环境变量，或当前文件夹里 `.env` 的行；不可用的值在启动时就被拒绝，说出名字与允许的值（退出码 2）。"
        "给 `etl up` 设好，它启动的每个进程就都有了；在几台机器上，处处都要一样。",
    },
    "data": {"en": "The data", "zh-CN": "数据"},
    "bridge": {"en": "Events, tasks, UI, alerts, metrics", "zh-CN": "事件、任务、网页、告警、指标"},
    "others": {"en": "Others", "zh-CN": "别的"},
    "setting": {"en": "setting", "zh-CN": "设置"},
    "default": {"en": "default", "zh-CN": "缺省"},
    "allowed": {"en": "allowed", "zh-CN": "允许"},
    "meaning": {"en": "meaning", "zh-CN": "意思"},
}
_OTHERS = (
    (
        "ETL_STATE_DIR",
        "~/.local/state/dayline",
        (
            "state folder of the stack (`$XDG_STATE_HOME/dayline` where that is set); every command's `--state-dir`; "
            "from the environment only"
        ),
    ),
    ("ETL_UI_URL", "", "address of the Dagster UI in what `etl why` prints; without it, that of the stack"),
    ("DAGSTER_HOME", "", "folder with the `dagster.yaml` of workers, webserver and daemon; `etl up` makes its own"),
    ("DAGSTER_POSTGRES_URL", "", "Dagster's database, see [your own servers](../operate.md#use-your-own-servers)"),
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "where traces are sent (needs `dayline[otel]`); see [traces](../metrics.md#traces)",
    ),
    ("NO_COLOR", "", "takes the colour away, see [In a shell](../shell.md)"),
    ("ETL_TEST_DATABASE_URL", "", "for the test fixtures only: a PostgreSQL that may create databases"),
)
"""不是设置对象读的，代码里没有一处列着它们。"""


def settings_page(language: Language) -> str:
    words = {name: both[language] for name, both in _WORDS.items()}
    header = (words["setting"], words["default"], words["allowed"], words["meaning"])
    data = list(_rows(EtlSettings.model_fields, language))
    seen = set(EtlSettings.model_fields)
    bridge = list(_rows({k: v for k, v in BridgeSettings.model_fields.items() if k not in seen}, language))
    others = [(code(name), code(default), "", say(text, language)) for name, default, text in _OTHERS]
    sections = [
        f"## {words[name]}\n\n{table(header, rows)}"
        for name, rows in (("data", data), ("bridge", bridge), ("others", others))
    ]
    return page(words["title"], words["intro"], *sections)


def _rows(fields: dict[str, FieldInfo], language: Language) -> Iterator[tuple[str, str, str, str]]:
    for name, field in fields.items():
        assert field.description, name  # noqa: S101  没有说明的设置不许有
        yield (
            code(f"ETL_{name.upper()}"),
            code(_written(name, field.default)),
            _allowed(field),
            say(field.description, language),
        )


def _written(name: str, value: Any) -> str:
    """在环境变量里怎样写。"""
    if name == "rollout":
        return f"{value}%"
    return "" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _allowed(field: FieldInfo) -> str:
    """几个词里选，或者上下限。"""
    if words := _words_of(field.annotation):
        return ", ".join(map(code, words))
    bounds = {type(each): each for each in field.metadata}
    low, above, high = bounds.get(Ge), bounds.get(Gt), bounds.get(Le)
    parts = [f"≥ {low.ge}" if low else "", f"> {above.gt}" if above else "", f"≤ {high.le}" if high else ""]
    return ", ".join(filter(None, parts))


def _words_of(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(_words_of, get_args(annotation))), ())
