"""登录 NATS 的每种办法，真的服务器、真的证书：对的连得上；错的一句话，退出码 2；连着以后坏了的一直再试。"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nkeys
import pytest

from bridge.errors import NatsRefusedError
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from etl_assets.core.errors import SettingsError
from etl_assets.core.settings import read_settings

from .certificates import Authority, Certificate
from .conftest import PASSWORD, NatsServer

ODD_PASSWORD = "a:b@c/d e%f#g?h\N{SNOWMAN}"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], NatsServer]]:
    """一台照这个配置起来的服务器。"""
    servers: list[NatsServer] = []

    def start(config: dict[str, Any]) -> NatsServer:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(NatsServer(folder, config=config))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger")


def with_tls(certificate: Certificate, *, clients: Authority | None = None, first: bool = False) -> dict[str, Any]:
    tls: dict[str, Any] = {"cert_file": str(certificate.cert), "key_file": str(certificate.key), "timeout": 10}
    if clients:
        tls |= {"ca_file": str(clients.ca), "verify": True}
    return {"tls": tls | ({"handshake_first": True} if first else {}), "authorization": user()}


def user(password: str = PASSWORD) -> dict[str, Any]:
    return {"users": [{"user": "etl", "password": password}]}


def address(server: NatsServer, *, login: str = "etl:s3cret@", scheme: str = "nats", host: str = "127.0.0.1") -> str:
    return f"{scheme}://{login}{host}:{server.port}"


async def connect(settings: BridgeSettings) -> None:
    """连得上，问得到 JetStream。"""
    async with JetStreamConnection(settings, name="test"):
        pass


async def assert_refused(settings: BridgeSettings, sentence: str) -> None:
    with pytest.raises((NatsRefusedError, SettingsError), match=sentence) as caught:
        await connect(settings)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


class User:
    """一个 nkey：种子在 0600 的文件里。"""

    def __init__(self, path: Path) -> None:
        self.seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
        self.public = new_key(self.seed)
        self.path = path
        write_private(path, self.seed.decode() + "\n")


def new_key(seed: bytes) -> str:
    return bytes(nkeys.from_seed(seed).public_key).decode()


def write_private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


class Operator:
    """去中心的 JWT：一个运营者签一个账户，账户签用户；凭据文件就是 `nsc generate creds` 写的样子。"""

    def __init__(self) -> None:
        self._operator = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_OPERATOR)
        self._account = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_ACCOUNT)

    def config(self) -> dict[str, Any]:
        limits = {"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1, "payload": -1}
        store = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        account = {"limits": limits | store, "type": "account", "version": 2}
        public = new_key(self._account)
        system = new_key(nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_ACCOUNT))
        content = {"limits": limits, "type": "account", "version": 2}
        return {
            "system_account": system,
            "operator": self._sign(
                self._operator, "dayline", new_key(self._operator), {"type": "operator", "version": 2}
            ),
            "resolver": "MEMORY",
            "resolver_preload": {
                public: self._sign(self._operator, "DAYLINE", public, account),
                system: self._sign(self._operator, "SYS", system, content),
            },
        }

    def write_creds(self, path: Path, *, lives_seconds: float = 3600) -> Path:
        seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
        content = {"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2}
        jwt = self._sign(self._account, "worker", new_key(seed), content, exp=int(time.time() + lives_seconds))
        return write_private(
            path,
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n",
        )

    def _sign(self, seed: bytes, name: str, subject: str, content: dict[str, Any], **claims: Any) -> str:
        claims |= {"iat": int(time.time()), "iss": new_key(seed), "name": name, "sub": subject, "nats": content}
        claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
        parts = [encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
        signature = nkeys.from_seed(seed).sign(".".join(parts).encode())
        return ".".join([*parts, encode(signature)])


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# ---- 口令、令牌、nkey、凭据、context -------------------------------------------------------


async def test_password_of_any_character_is_percent_encoded_in_the_url(serve: Callable[..., NatsServer]) -> None:
    server = serve({"authorization": user(ODD_PASSWORD)})
    quoted = "a%3Ab%40c%2Fd%20e%25f%23g%3Fh%E2%98%83"
    await connect(BridgeSettings(nats_url=address(server, login=f"etl:{quoted}@")))


async def test_password_and_token_come_from_files(
    serve: Callable[..., NatsServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """口令里的任何字符，文件里照写；地址里可以有用户。"""
    server = serve({"authorization": user(ODD_PASSWORD)})
    monkeypatch.setenv("ETL_NATS_PASSWORD_FILE", str(write_private(tmp_path / "password", f"{ODD_PASSWORD}\n")))
    for login, name in (("", "etl"), ("etl@", "")):
        monkeypatch.setenv("ETL_NATS_URL", address(server, login=login))
        monkeypatch.setenv("ETL_NATS_USER", name)
        await connect(read_settings(BridgeSettings))
    monkeypatch.delenv("ETL_NATS_PASSWORD_FILE")
    with_token = serve({"authorization": {"token": ODD_PASSWORD}})
    monkeypatch.setenv("ETL_NATS_TOKEN_FILE", str(write_private(tmp_path / "token", ODD_PASSWORD)))
    monkeypatch.setenv("ETL_NATS_URL", address(with_token, login=""))
    await connect(read_settings(BridgeSettings))


async def test_nkey_and_credentials_file_log_in(serve: Callable[..., NatsServer], tmp_path: Path) -> None:
    key = User(tmp_path / "worker.nk")
    server = serve({"authorization": {"users": [{"nkey": key.public}]}})
    await connect(BridgeSettings(nats_url=address(server, login=""), nats_nkey=key.path))
    operator = Operator()
    by_jwt = serve(operator.config())
    creds = operator.write_creds(tmp_path / "worker.creds")
    await connect(BridgeSettings(nats_url=address(by_jwt, login=""), nats_creds=creds))


async def test_context_of_the_command_line_is_used_by_name(
    serve: Callable[..., NatsServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = User(tmp_path / "worker.nk")
    server = serve({"authorization": {"users": [{"nkey": key.public}]}})
    contexts = tmp_path / "nats" / "context"
    contexts.mkdir(parents=True)
    (contexts / "shop.json").write_text(
        json.dumps({"description": "x", "url": address(server, login=""), "nkey": str(key.path), "user": ""})
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("ETL_NATS_CONTEXT", "shop")
    settings = read_settings(BridgeSettings)
    await connect(settings)
    for name in ("elsewhere", "../context/shop"):
        monkeypatch.setenv("ETL_NATS_CONTEXT", name)
        with pytest.raises(SettingsError, match=r"has no context of that name, it has shop; see `nats context ls`"):
            read_settings(BridgeSettings)
    (contexts / "far.json").write_text(json.dumps({"url": "nats://a:1", "jetstream_domain": "hub"}))
    monkeypatch.setenv("ETL_NATS_CONTEXT", "far")
    with pytest.raises(SettingsError, match="it sets jetstream_domain, which we do not follow"):
        read_settings(BridgeSettings)
    (contexts / "open.json").write_text(json.dumps({"url": "nats://a:1", "user": "etl", "password": "s3cret"}))
    (contexts / "open.json").chmod(0o644)
    monkeypatch.setenv("ETL_NATS_CONTEXT", "open")
    with pytest.raises(SettingsError, match=r"others can read .*open.json \(mode 0644\)"):
        read_settings(BridgeSettings)


async def test_wrong_login_is_one_sentence_that_names_the_setting(
    serve: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = serve({"authorization": user()})
    url, key = address(server, login=""), User(tmp_path / "stranger.nk")
    creds = Operator().write_creds(tmp_path / "stranger.creds")
    expired = Operator()
    by_jwt = serve(expired.config())
    late = expired.write_creds(tmp_path / "late.creds", lives_seconds=-60)
    for settings, sentence in (
        (
            BridgeSettings(nats_url=address(server, login="etl:x@")),
            "refuses the user or password: correct ETL_NATS_URL",
        ),
        (
            BridgeSettings(nats_url=url, nats_user="etl", nats_password="x"),
            "correct ETL_NATS_USER and ETL_NATS_PASSWORD",
        ),
        (BridgeSettings(nats_url=url, nats_token="x"), "refuses the token: correct ETL_NATS_TOKEN"),
        (BridgeSettings(nats_url=url, nats_nkey=key.path), "refuses the nkey: correct ETL_NATS_NKEY"),
        (BridgeSettings(nats_url=url, nats_creds=creds), "refuses the credentials: correct ETL_NATS_CREDS"),
        (
            BridgeSettings(nats_url=address(by_jwt, login=""), nats_creds=late),
            r"refuses the credentials( \(expired\))?: correct ETL_NATS_CREDS",
        ),
        (BridgeSettings(nats_url=url, nats_nkey=key.path, nats_token="x"), "each say how to log in to NATS: keep one"),
        (BridgeSettings(nats_url="nats://a:s3cret@h:1,nats://b:x@h:2"), "names more than one user"),
    ):
        await assert_refused(settings, sentence)


@pytest.mark.parametrize("setting", ["nats_creds", "nats_nkey"])
async def test_file_of_a_login_that_others_can_read_or_that_holds_none_is_refused(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "login"
    settings = BridgeSettings(nats_url="nats://127.0.0.1:1", **{setting: path})
    name = f"ETL_{setting.upper()}"
    await assert_refused(settings, rf"{name}: cannot read .* \(No such file or directory\)")
    write_private(path, "hello")
    await assert_refused(settings, f"{name}: .* holds no")
    path.chmod(0o644)
    await assert_refused(settings, rf"{name}: others can read .* \(mode 0644\): `chmod 0600")


# ---- TLS ------------------------------------------------------------------------------------


async def test_tls_and_mutual_tls_with_the_right_certificates(
    serve: Callable[..., NatsServer], authority: Authority
) -> None:
    server, own = authority.issue("server", "127.0.0.1"), authority.issue("client")
    tls = serve(with_tls(server))
    await connect(BridgeSettings(nats_url=address(tls), nats_ca=authority.ca))
    mutual = serve(with_tls(server, clients=authority))
    files = {"nats_ca": authority.ca, "nats_cert": own.cert, "nats_key": own.key}
    await connect(BridgeSettings(nats_url=address(mutual, scheme="tls"), **files))
    first = serve(with_tls(server, clients=authority, first=True))
    await connect(BridgeSettings(nats_url=address(first), nats_tls_first=True, **files))


async def test_certificates_that_do_not_hold_are_refused(
    serve: Callable[..., NatsServer], authority: Authority, stranger: Authority
) -> None:
    right, theirs = authority.issue("server", "127.0.0.1"), stranger.issue("client")
    server = serve(with_tls(right))
    plain = serve({"authorization": user()})
    mutual = serve(with_tls(right, clients=authority))
    late = authority.issue("late", expired=True)

    def using(at: NatsServer, **settings: Any) -> BridgeSettings:
        return BridgeSettings(nats_url=address(at), **{"nats_ca": authority.ca, **settings})

    for settings, sentence in (
        (
            using(server, nats_ca=stranger.ca),
            r"has a certificate that is refused \(.*certificate.*\): correct ETL_NATS_CA",
        ),
        (using(server, nats_ca=None), r"has a certificate that is refused"),
        (BridgeSettings(nats_url=address(server, host="localhost"), nats_ca=authority.ca), "Hostname mismatch"),
        (using(serve(with_tls(authority.issue("expired", expired=True)))), "certificate has expired"),
        (using(plain), "offers no TLS and nothing was sent"),
        (BridgeSettings(nats_url=address(plain, scheme="tls")), "offers no TLS and nothing was sent"),
        (using(plain, nats_tls_first=True), "does not begin with TLS: correct ETL_NATS_TLS_FIRST"),
        (using(mutual), "refuses our client certificate .*: correct ETL_NATS_CERT and ETL_NATS_KEY"),
        (using(mutual, nats_cert=theirs.cert, nats_key=theirs.key), "refuses our client certificate"),
        (using(mutual, nats_cert=late.cert, nats_key=late.key), "refuses our client certificate"),
        (using(mutual, nats_cert=right.cert, nats_key=theirs.key), "cannot use .*: correct them"),
        (using(mutual, nats_key=right.key), "ETL_NATS_KEY is set and ETL_NATS_CERT is not"),
        (using(server, nats_ca=right.key), r"ETL_NATS_CA: cannot use .* \(no certificate.*\): correct it"),
    ):
        await assert_refused(settings, sentence)


async def test_certificate_that_expires_while_connected_is_waited_for(
    serve: Callable[..., NatsServer], authority: Authority
) -> None:
    """服务器重启时带着过期的证书：一直再试；换上新的，不必动我们。"""
    server = serve(with_tls(authority.issue("server")))
    async with JetStreamConnection(
        BridgeSettings(nats_url=address(server), nats_ca=authority.ca), name="test"
    ) as connection:
        authority.issue("server", expired=True)
        server.stop()
        server.start()
        while "expired" not in str(connection.client.last_error):
            await asyncio.sleep(0.05)
        authority.issue("server")
        server.stop()
        server.start()
        await wait_until_connected(connection)
        assert (await connection.ask("INFO"))["type"].endswith("account_info_response")


async def test_own_certificate_and_credentials_are_read_again_at_each_connection(
    serve: Callable[..., NatsServer], authority: Authority
) -> None:
    own = authority.issue("client")
    mutual = serve(with_tls(authority.issue("server"), clients=authority))
    settings = BridgeSettings(nats_url=address(mutual), nats_ca=authority.ca, nats_cert=own.cert, nats_key=own.key)
    async with JetStreamConnection(settings, name="test") as connection:
        authority.issue("client", expired=True)
        await connection.client.force_reconnect()
        while not (error := str(connection.client.last_error)) or (
            "server closed" not in error and "alert" not in error
        ):
            await asyncio.sleep(0.05)
        authority.issue("client")
        await wait_until_connected(connection)


async def test_credentials_that_expire_while_connected_are_waited_for(
    serve: Callable[..., NatsServer], tmp_path: Path
) -> None:
    operator = Operator()
    server = serve(operator.config())
    path = operator.write_creds(tmp_path / "worker.creds", lives_seconds=3)
    settings = BridgeSettings(nats_url=address(server, login=""), nats_creds=path)
    async with JetStreamConnection(settings, name="test") as connection:
        while connection.client.is_connected:
            await asyncio.sleep(0.05)
        path.write_text("half written")
        await asyncio.sleep(2)
        assert not connection.client.is_closed
        operator.write_creds(path)
        await wait_until_connected(connection)
        await connection.ask("INFO")


async def wait_until_connected(connection: JetStreamConnection) -> None:
    async with asyncio.timeout(60):
        while not connection.client.is_connected:
            await asyncio.sleep(0.05)


# ---- 命令 -----------------------------------------------------------------------------------


def test_commands_say_it_in_one_sentence_and_end_with_2(nats_server: NatsServer, tmp_path: Path) -> None:
    creds = write_private(tmp_path / "worker.creds", "x")
    creds.chmod(0o644)
    for environment, sentence in (
        ({"ETL_NATS_URL": nats_server.url.replace("s3cret", "wrong-one")}, "refuses the user or password"),
        ({"ETL_NATS_URL": f"nats://127.0.0.1:{nats_server.port}", "ETL_NATS_CREDS": str(creds)}, "mode 0644"),
        ({"ETL_NATS_CONTEXT": "nowhere"}, "ETL_NATS_CONTEXT='nowhere' is not usable"),
        ({"ETL_NATS_URL_FILE": str(tmp_path / "none")}, "ETL_NATS_URL_FILE: cannot read"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "bridge.cli.main", "dlq", "list"],
            env={
                **os.environ,
                "ETL_STATE_DIR": str(tmp_path / "state"),
                "XDG_CONFIG_HOME": str(tmp_path),
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert sentence in result.stderr
        assert "wrong-one" not in result.stderr
