"""怎样登录 NATS：设置里的用户与口令、令牌、凭据文件、nkey、证书，变成客户端要的样子。文件每次连接都重新读，换了新的不必重启。"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nats.errors
import nkeys

from bridge.settings import BridgeSettings
from etl_assets.core.errors import SettingsError
from etl_assets.core.secret_files import assert_private, read_secret

_PART = r"-----BEGIN {name}-----\s+(\S+)\s+-+END"
_JWT = re.compile(_PART.format(name="NATS USER JWT"))
_SEED = re.compile(_PART.format(name="USER NKEY SEED"))
_USER = nkeys.PREFIX_BYTE_USER


@dataclass(frozen=True)
class NatsLogin:
    """登录的一种办法。setting 是该去改的设置，what 是它给出的东西，都给错误的那一句。"""

    setting: str = "ETL_NATS_URL"
    what: str = "the user or password"
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """给 `Client.connect` 的。"""
    public_key: str | None = None
    """nkey 的那一半，服务器的配置里写着它。"""


def login_of(settings: BridgeSettings) -> NatsLogin:
    """:raises SettingsError: 几种办法都给了，或者文件用不了。"""
    found = (_of_url(settings), _of_user(settings), _of_token(settings), _of_creds(settings), _of_nkey(settings))
    ways = [way for way in found if way]
    if len(ways) > 1:
        raise SettingsError(f"{' and '.join(way.setting for way in ways)} each say how to log in to NATS: keep one")
    return ways[0] if ways else NatsLogin()


def servers_without_login(settings: BridgeSettings) -> list[str]:
    """登录另外给：集群告诉客户端的别的节点，地址里没有它，重连过去就会被拒。"""
    parts = [urlsplit(server) for server in settings.nats_servers]
    return [part._replace(netloc=part.netloc.rpartition("@")[2]).geturl() for part in parts]


def wants_tls(settings: BridgeSettings) -> bool:
    """说了要 TLS：服务器不肯就不连，口令不能明着发。"""
    schemes = {urlsplit(server).scheme for server in settings.nats_servers}
    return bool(schemes & {"tls", "wss"} or settings.nats_ca or settings.nats_cert or settings.nats_tls_first)


def tls_context(settings: BridgeSettings) -> ssl.SSLContext:
    """:raises SettingsError: 证书或私钥用不了。"""
    try:
        context = ssl.create_default_context(cafile=settings.nats_ca)
    except OSError as error:
        raise SettingsError(f"ETL_NATS_CA: cannot use {settings.nats_ca} ({_reason(error)}): correct it") from error
    if settings.nats_key and not settings.nats_cert:
        raise SettingsError("ETL_NATS_KEY is set and ETL_NATS_CERT is not: set both, or neither")
    if settings.nats_cert:
        key = settings.nats_key or settings.nats_cert
        assert_private(key, setting="ETL_NATS_KEY" if settings.nats_key else "ETL_NATS_CERT")
        try:
            # 有口令的私钥会到终端上来问；没有人在那里
            context.load_cert_chain(settings.nats_cert, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"ETL_NATS_CERT and ETL_NATS_KEY: cannot use {settings.nats_cert} with {key} ({_reason(error)}): correct them"
            ) from error
    return context


def _of_url(settings: BridgeSettings) -> NatsLogin | None:
    user, password = _login_in_url(settings)
    if user is None:
        return None
    if password is not None:
        return NatsLogin(options={"user": user, "password": password})
    if _is_user_of_url(settings):
        return NatsLogin("ETL_NATS_PASSWORD", options={"user": user, "password": settings.nats_password})
    return NatsLogin(what="the token", options={"token": user})


def _of_user(settings: BridgeSettings) -> NatsLogin | None:
    if settings.nats_user:
        options = {"user": settings.nats_user, "password": settings.nats_password}
        return NatsLogin("ETL_NATS_USER and ETL_NATS_PASSWORD", options=options)
    if settings.nats_password and not _is_user_of_url(settings):
        raise SettingsError("ETL_NATS_PASSWORD has no user: set ETL_NATS_USER, or the name alone in ETL_NATS_URL")
    return None


def _is_user_of_url(settings: BridgeSettings) -> bool:
    """地址里只有一个名字：口令另给时它是用户，不然是令牌。"""
    user, password = _login_in_url(settings)
    return bool(user and password is None and settings.nats_password and not settings.nats_user)


def _login_in_url(settings: BridgeSettings) -> tuple[str | None, str | None]:
    given = {(part.username, part.password) for part in map(urlsplit, settings.nats_servers) if part.username}
    if len(given) > 1:
        raise SettingsError("ETL_NATS_URL names more than one user: give each server the same")
    for user, password in given:
        return unquote(str(user)), None if password is None else unquote(password)
    return None, None


def _of_token(settings: BridgeSettings) -> NatsLogin | None:
    if not settings.nats_token:
        return None
    return NatsLogin("ETL_NATS_TOKEN", "the token", {"token": settings.nats_token})


def _of_creds(settings: BridgeSettings) -> NatsLogin | None:
    path = settings.nats_creds
    if path is None:
        return None
    text = read_secret(path, setting="ETL_NATS_CREDS")
    if not _JWT.search(text) or not _SEED.search(text):
        raise SettingsError(f"ETL_NATS_CREDS: {path} holds no user JWT and seed: take it from `nsc generate creds`")
    _public_key(_found(_SEED, text), setting="ETL_NATS_CREDS", path=path)
    options = {
        "user_jwt_cb": lambda: bytearray(_found(_JWT, path.read_text()), "ascii"),
        "signature_cb": _signing(lambda: _found(_SEED, path.read_text())),
    }
    return NatsLogin("ETL_NATS_CREDS", "the credentials", options)


def _of_nkey(settings: BridgeSettings) -> NatsLogin | None:
    path = settings.nats_nkey
    if path is None:
        return None
    seed = read_secret(path, setting="ETL_NATS_NKEY").strip()
    return NatsLogin(
        "ETL_NATS_NKEY",
        "the nkey",
        {"signature_cb": _signing(lambda: path.read_text().strip())},
        _public_key(seed, setting="ETL_NATS_NKEY", path=path),
    )


def _signing(read_seed: Callable[[], str]) -> Callable[[str], bytes]:
    def sign(nonce: str) -> bytes:
        try:
            return base64.b64encode(nkeys.from_seed(read_seed().encode()).sign(nonce.encode()))
        except (nkeys.NkeysError, OSError, ValueError) as error:
            # 换了一半的文件：客户端只对自己的错误再试
            raise nats.errors.Error(f"nats: cannot sign with the seed ({type(error).__name__})") from None

    return sign


def _found(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    if found is None:
        raise nats.errors.Error("nats: the credentials file is incomplete")
    return found[1]


def _public_key(seed: str, *, setting: str, path: Path) -> str:
    try:
        prefix, _ = nkeys.decode_seed(seed.encode())
        public = bytes(nkeys.from_seed(seed.encode()).public_key).decode()
    except (nkeys.NkeysError, ValueError):
        prefix, public = None, ""
    if prefix != _USER:
        raise SettingsError(f"{setting}: {path} holds no seed of a user (SU…): correct it")
    return public


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no certificate in it").lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
