"""机密的文件：`ETL_…_FILE` 指的、NATS 的凭据与私钥。谁能读，照 libpq 对私钥的规矩。"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from etl_assets.core.errors import SettingsError


def read_secret(path: Path, *, setting: str) -> str:
    """文件里的机密，去掉末尾的换行。

    :param setting: 哪个设置指着它，出错时要说。
    :raises SettingsError: 读不了、是空的、别人也读得到。
    """
    assert_private(path, setting=setting)
    try:
        text = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}: cannot read {path} ({_reason(error)}): correct it") from error
    if not text:
        raise SettingsError(f"{setting}: {path} is empty: write the secret into it")
    return text


def assert_private(path: Path, *, setting: str) -> None:
    """自己的文件只许自己读；root 的（挂进容器的）还许我们的组读。

    :raises SettingsError: 没有它，或者别人也读得到。
    """
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {path} ({_reason(error)}): correct it") from error
    is_mounted = status.st_uid == 0 != os.geteuid()
    if stat.S_IMODE(status.st_mode) & (0o007 if is_mounted else 0o077):
        allowed = "0640" if is_mounted else "0600"
        raise SettingsError(
            f"{setting}: others can read {path} (mode {stat.S_IMODE(status.st_mode):04o}): `chmod {allowed} {path}`"
        )


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is not text in UTF-8"


class SecretFileSource(PydanticBaseSettingsSource):
    """机密的设置（就是 repr=False 的）没有给出时，取自同名加 `_FILE` 的变量所指的文件。"""

    def __init__(self, kind: type[BaseSettings], environment: EnvSettingsSource, dotenv: EnvSettingsSource) -> None:
        super().__init__(kind)
        self._variables: Mapping[str, str | None] = {**dotenv.env_vars, **environment.env_vars}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{self.config.get('env_prefix', '')}{field_name.upper()}_FILE"
        path = None if field.repr else self._variables.get(variable.lower())
        return (read_secret(Path(path).expanduser(), setting=variable) if path else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        missing = {
            name: field for name, field in self.settings_cls.model_fields.items() if name not in self.current_state
        }
        found = {name: self.get_field_value(field, name)[0] for name, field in missing.items()}
        return {name: value for name, value in found.items() if value is not None}
