"""主题的一页：收什么、发什么事件，每个字段；流。"""

from __future__ import annotations

from typing import Any

from nats.js.api import RetentionPolicy, StreamConfig

from bridge.events.asset_events import asset_events
from bridge.events.envelope import ENVELOPE_FIELDS, DataImportCompleted, EtlCompleted
from bridge.events.streams import DEAD_LETTERS, events_stream
from bridge.events.subjects import DATA_IMPORT_COMPLETED, EVERY_ETL_COMPLETED
from bridge.queue.streams import task_streams
from bridge.settings import BridgeSettings
from etl_assets.core.asset_events import Event
from handbook.markdown import code, page, table
from handbook.repository import Language
from handbook.written import is_written, written

_MIB = 1 << 20
_DAY = 86_400

_WORDS = {
    "title": {"en": "Subjects and events", "zh-CN": "主题与事件"},
    "intro": {
        "en": "Events are JSON on JetStream subjects of the stream `EVENTS`. Further fields are allowed and kept. How to "
        "publish them: [Announce imports](../announce.md).",
        "zh-CN": "事件是 JSON，在流 `EVENTS` 的 JetStream 主题上。多出来的字段可以有，原样保留。怎样发布："
        "[宣布导入](../announce.zh-CN.md)。",
    },
    "envelope": {"en": "Every event", "zh-CN": "每个事件"},
    "field": {"en": "field", "zh-CN": "字段"},
    "type": {"en": "type", "zh-CN": "类型"},
    "default": {"en": "default", "zh-CN": "缺省"},
    "meaning": {"en": "meaning", "zh-CN": "意思"},
    "required": {"en": "required", "zh-CN": "必须有"},
    "streams": {"en": "Streams", "zh-CN": "流"},
    "stream": {"en": "stream", "zh-CN": "流"},
    "subjects": {"en": "subjects", "zh-CN": "主题"},
    "bytes": {"en": "at most", "zh-CN": "至多"},
    "age": {"en": "kept", "zh-CN": "保留"},
    "days": {"en": "days", "zh-CN": "天"},
    "until_done": {"en": "until it is done", "zh-CN": "到做完为止"},
    "ours": {
        "en": "As we create them; a stream `EVENTS` that exists is used as it is.",
        "zh-CN": "我们建的是这样；已有的流 `EVENTS` 原样使用。",
    },
}


def subjects_page(language: Language) -> str:
    words = {name: both[language] for name, both in _WORDS.items()}
    events: dict[str, type[Event]] = {
        DATA_IMPORT_COMPLETED: DataImportCompleted,
        **{subject: each.event_type for subject, each in asset_events().items()},
        EVERY_ETL_COMPLETED.replace("*", "<asset>"): EtlCompleted,
    }
    sections = [_section(subject, event, language, words) for subject, event in events.items()]
    settings = BridgeSettings.model_construct()
    streams = [events_stream(settings), DEAD_LETTERS, *task_streams(settings)]
    rows = [_stream_row(each, language, words) for each in streams]
    header = [words[name] for name in ("stream", "subjects", "bytes", "age", "meaning")]
    envelope = table(_header(words), [_field_row(Event, name, language, words) for name in ENVELOPE_FIELDS])
    return page(
        words["title"],
        words["intro"],
        f"## {words['envelope']}\n\n{envelope}",
        *sections,
        f"## {words['streams']}\n\n{words['ours']}\n\n{table(header, rows)}",
    )


def _header(words: dict[str, str]) -> list[str]:
    return [words[name] for name in ("field", "type", "default", "meaning")]


def _section(subject: str, event: type[Event], language: Language, words: dict[str, str]) -> str:
    own = [name for name in event.model_fields if name == "status" or name not in ENVELOPE_FIELDS]
    known = is_written("subjects", subject)
    rows = [_field_row(event, name, language, words, known=known) for name in own]
    about = written("subjects", subject, language) if known else ""
    return "\n\n".join(filter(None, [f"## `{subject}`", about, table(_header(words), rows)]))


def _field_row(
    event: type[Event], name: str, language: Language, words: dict[str, str], *, known: bool = True
) -> tuple[str, str, str, str]:
    schema = event.model_json_schema()["properties"][name]
    field = event.model_fields[name]
    default = words["required"] if field.is_required() else code(_plain(field.default))
    about = written("fields", f"{event.__name__}.{name}", language) if known else ""
    return code(name), _type(schema), default, about


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else ""


def _type(schema: dict[str, Any]) -> str:
    """JSON Schema 的类型，写成一个词。"""
    if "anyOf" in schema:
        return " / ".join(_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return " / ".join(map(code, schema["enum"]))
    if schema.get("type") == "array":
        return f"[{_type(schema['items'])}]"
    return str(schema.get("format") or schema.get("type") or "any")


def _stream_row(stream: StreamConfig, language: Language, words: dict[str, str]) -> tuple[str, str, str, str, str]:
    size = f"{stream.max_bytes // _MIB:,} MiB" if stream.max_bytes and stream.max_bytes > 0 else ""
    is_queue = stream.retention == RetentionPolicy.WORK_QUEUE
    age = f"{stream.max_age / _DAY:g} {words['days']}" if stream.max_age else words["until_done"] if is_queue else ""
    subjects = ", ".join(map(code, stream.subjects or []))
    return code(str(stream.name)), subjects, size, age, written("streams", str(stream.name), language)
