"""`nats` 命令行的一个 context：地址与凭据，存在它自己的文件夹里；ETL_NATS_CONTEXT 点名用哪一个。"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from etl_assets.core.errors import SettingsError
from etl_assets.core.secret_files import assert_private

_SETTING = "ETL_NATS_CONTEXT"
_TEXTS = ("url", "user", "password", "token", "inbox_prefix")
_PATHS = ("creds", "nkey", "ca", "cert", "key")
_UNKNOWN = ("nsc", "jetstream_domain", "jetstream_api_prefix", "user_jwt", "user_seed", "socks_proxy")
"""照着连会连到别处去，或者连不上的：宁可不用它。"""


class NatsContextSource(PydanticBaseSettingsSource):
    """设置里没有写明的，取自 ETL_NATS_CONTEXT 的 context。"""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError(f"{field_name} ({field}) is read together with the others")

    def __call__(self) -> dict[str, Any]:
        name = self.current_state.get("nats_context") or ""
        found = read_nats_context(name) if name else {}
        return {setting: value for setting, value in found.items() if setting not in self.current_state}


def read_nats_context(name: str) -> dict[str, Any]:
    """:raises SettingsError: 没有它，读不懂它，或者它要的我们做不到。"""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats" / "context"
    path = folder / f"{name}.json"
    try:
        if path.parent != folder:
            raise FileNotFoundError
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(found.stem for found in folder.glob("*.json"))) or "none"
        raise _refusal(name, f"{folder} has no context of that name, it has {there}; see `nats context ls`") from error
    except (OSError, ValueError) as error:
        raise _refusal(name, f"{path} cannot be read as JSON; correct it with `nats context edit`") from error
    if not isinstance(content, dict):
        raise _refusal(name, f"{path} is no JSON object; correct it with `nats context edit`")
    if unknown := [key for key in _UNKNOWN if content.get(key)]:
        raise _refusal(name, f"it sets {', '.join(unknown)}, which we do not follow; name a context without")
    if content.get("password") or content.get("token"):
        assert_private(path, setting=_SETTING)
    found: dict[str, Any] = {f"nats_{key}": content[key] for key in _TEXTS if content.get(key)}
    found |= {f"nats_{key}": os.path.expanduser(content[key]) for key in _PATHS if content.get(key)}  # noqa: PTH111
    return found | ({"nats_tls_first": True} if content.get("tls_first") else {})


def _refusal(name: str, problem: str) -> SettingsError:
    return SettingsError(f"{_SETTING}={name!r} is not usable: {problem}")
