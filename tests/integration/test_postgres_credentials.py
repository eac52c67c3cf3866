"""连 PostgreSQL 的每种办法，libpq 自己的：TLS、双向 TLS、几个主机、服务文件、口令文件；错的一句话。

内嵌的 PostgreSQL 没有 TLS：用系统里的那一台，没有就跳过。
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.stack.dagster_home import build_dagster_postgres_url, check_dagster_database
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, SettingsError
from etl_assets.core.settings import EtlSettings, read_settings
from etl_assets.embedded.postgres_binaries import unprivileged_account
from tests.integration.host import eventually

from .certificates import Authority, Certificate
from .test_nats_credentials import ODD_PASSWORD, write_private

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
QUOTED = "a%3Ab%40c%2Fd%20e%25f%23g%3Fh%E2%98%83"


class Server:
    """一台有 TLS 的 PostgreSQL；证书与谁连得上可以换。"""

    def __init__(self, folder: Path) -> None:
        """:param folder: 换了账户的服务器也走得进的。"""
        self._bin = PROGRAMS[-1].parent
        self._data = folder / "data"
        account = unprivileged_account()
        self._account = {"user": account.pw_uid, "group": account.pw_gid} if account else {}
        self._owner = account
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._own(folder)
        password = write_private(folder / "password", ODD_PASSWORD)
        self._own(password)
        options = [
            "-U",
            "etl",
            "--pwfile",
            str(password),
            "--auth=scram-sha-256",
            "--locale=C",
            "--encoding=UTF8",
            "-N",
        ]
        self._run("initdb", "-D", str(self._data), *options)
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{folder}'\nfsync = off\n"
                "ssl = on\nssl_cert_file = 'own.pem'\nssl_key_file = 'own.key'\nssl_ca_file = 'ca.pem'\n"
            )
        self._process: subprocess.Popen[bytes] | None = None

    def present(self, certificate: Certificate, clients: Authority, *, mutual: bool = False) -> None:
        """用这张证书；mutual 就要客户端也有一张。运行着的重新读。"""
        for source, name in ((certificate.cert, "own.pem"), (certificate.key, "own.key"), (clients.ca, "ca.pem")):
            shutil.copy(source, self._data / name)
            self._own(self._data / name)
        option = "clientcert=verify-ca" if mutual else ""
        (self._data / "pg_hba.conf").write_text(
            f"hostssl all all 127.0.0.1/32 scram-sha-256 {option}\nlocal all all scram-sha-256\n"
        )
        if self._process:
            before = self._serial()
            self._process.send_signal(signal.SIGHUP)
            eventually(lambda: self._serial() != before, "the server shows its old certificate")

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", str(self._data)], **self._account, cwd="/", stderr=subprocess.DEVNULL
        )
        eventually(lambda: "ready" in self._pid_file().split(), "the server is not ready")

    def stop(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    def become_standby(self) -> None:
        """重启以后只读：等着主库的日志，而主库不在。"""
        self.stop()
        marker = self._data / "standby.signal"
        marker.touch()
        self._own(marker)
        self.start()

    def url(self, *options: str, password: str = QUOTED, host: str = "127.0.0.1") -> str:
        return f"postgresql://etl:{password}@{host}:{self.port}/postgres?" + "&".join(options)

    def _pid_file(self) -> str:
        path = self._data / "postmaster.pid"
        return path.read_text() if path.exists() else ""

    def _serial(self) -> bytes:
        """此刻给客户端看的证书。"""
        with socket.create_connection(("127.0.0.1", self.port)) as raw:
            return peer_certificate(raw)

    def _own(self, path: Path) -> None:
        if self._owner:
            os.chown(path, self._owner.pw_uid, self._owner.pw_gid)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([self._bin / program, *arguments], **self._account, cwd="/", check=True, capture_output=True)


def peer_certificate(raw: socket.socket) -> bytes:
    raw.sendall((8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
    assert raw.recv(1) == b"S"
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(raw) as wrapped:
        return wrapped.getpeercert(binary_form=True) or b""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "stranger")


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    if not PROGRAMS:
        pytest.skip("no PostgreSQL of the system, and the embedded one has no TLS")
    with tempfile.TemporaryDirectory(prefix="dayline-tls-") as folder:
        made = Server(Path(folder))
        made.present(authority.issue("server", "127.0.0.1"), authority)
        made.start()
        yield made
        made.stop()


def is_encrypted(settings: EtlSettings) -> bool:
    with own_engine(settings) as engine, translated_errors(), engine.connect() as connection:
        statement = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        return bool(connection.exec_driver_sql(statement).scalar_one())


@contextmanager
def own_engine(settings: EtlSettings) -> Iterator[sa.Engine]:
    engine = build_engine(settings)
    yield engine
    engine.dispose()


def connects(url: str) -> bool:
    """数据的，与 Dagster 的存储的：两个驱动。"""
    check_dagster_database(build_dagster_postgres_url(url))
    return is_encrypted(EtlSettings(database_url=url))


def refusal(url: str) -> str:
    """两个驱动说的；一句话，没有口令。"""
    with pytest.raises(DatabaseRefusedError) as of_data:
        is_encrypted(EtlSettings(database_url=url))
    with pytest.raises(DatabaseRefusedError) as of_dagster:
        check_dagster_database(build_dagster_postgres_url(url))
    for error in (of_data.value, of_dagster.value):
        assert "\n" not in str(error)
        assert ODD_PASSWORD not in str(error)
        assert QUOTED not in str(error)
    sentence = str(of_data.value).partition(":")[0]
    assert sentence == str(of_dagster.value).partition(":")[0].replace("DAGSTER_POSTGRES_URL", "ETL_DATABASE_URL")
    return sentence


def test_server_and_client_certificates_are_verified(server: Server, authority: Authority, stranger: Authority) -> None:
    own, theirs = authority.issue("client"), stranger.issue("client")
    verified = ("sslmode=verify-full", f"sslrootcert={authority.ca}")
    assert connects(server.url(*verified))
    refused = "the certificate of the PostgreSQL of ETL_DATABASE_URL is refused, "
    assert refusal(server.url("sslmode=verify-full", f"sslrootcert={stranger.ca}")).startswith(refused)
    assert refusal(server.url(*verified, host="localhost")).startswith(refused)
    assert refusal(server.url("sslmode=verify-full", "sslrootcert=/nowhere.pem")).startswith(refused)
    server.present(authority.issue("expired", expired=True), authority)
    assert refusal(server.url(*verified)).startswith(refused)

    server.present(authority.issue("server", "127.0.0.1"), authority, mutual=True)
    with_own = (f"sslcert={own.cert}", f"sslkey={own.key}")
    assert connects(server.url(*verified, *with_own))
    refused = "the client certificate or key of ETL_DATABASE_URL cannot be used or is refused, "
    late = authority.issue("late", expired=True)
    for client in (theirs, late):
        assert refusal(server.url(*verified, f"sslcert={client.cert}", f"sslkey={client.key}")).startswith(refused)
    assert refusal(server.url(*verified)).startswith(refused)
    own.key.chmod(0o644)
    assert refusal(server.url(*verified, *with_own)).startswith(refused)


def test_expired_certificate_is_waited_for_by_a_process_that_runs(server: Server, authority: Authority) -> None:
    """引擎还是那一个：服务器有了新的证书就又连得上。"""
    url = server.url("sslmode=verify-full", f"sslrootcert={authority.ca}")
    with own_engine(EtlSettings(database_url=url)) as engine:

        def ask() -> None:
            with translated_errors(), engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")

        ask()
        server.present(authority.issue("late", expired=True), authority)
        engine.dispose()
        for _ in range(2):
            with pytest.raises(DatabaseRefusedError, match="certificate of the PostgreSQL"):
                ask()
        server.present(authority.issue("server", "127.0.0.1"), authority)
        ask()


def test_wrong_password_and_closed_port_are_one_sentence(server: Server) -> None:
    assert refusal(server.url(password="wrong")).startswith("PostgreSQL refuses the user or password")
    closed = server.url().replace(str(server.port), "1")
    with pytest.raises(DatabaseUnavailableError, match="cannot reach the PostgreSQL of ETL_DATABASE_URL"):
        is_encrypted(EtlSettings(database_url=closed))


def test_service_and_password_files_and_several_hosts_are_libpqs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = tmp_path / "pg_service.conf"
    service.write_text(f"[shop]\nhost=127.0.0.1\nport={server.port}\ndbname=postgres\nuser=etl\n")
    escaped = ODD_PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    passwords = write_private(tmp_path / "pgpass", f"127.0.0.1:{server.port}:*:etl:{escaped}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    for url in ("postgresql:///?service=shop", "service=shop"):
        assert connects(url)
    monkeypatch.setenv("PGSERVICE", "shop")
    assert connects("postgresql://")
    monkeypatch.setenv("PGSERVICE", "nowhere")
    assert "the service of ETL_DATABASE_URL is not there" in refusal("postgresql://")
    monkeypatch.delenv("PGSERVICE")
    several = f"127.0.0.1:1,127.0.0.1:{server.port}/postgres?target_session_attrs=read-write"
    assert connects(f"postgresql://etl@{several}")
    assert connects(f"postgresql://etl:{QUOTED}@{several}")
    assert connects(f"host=127.0.0.1,127.0.0.1 port=1,{server.port} dbname=postgres user=etl password='{ODD_PASSWORD}'")


def test_url_comes_from_a_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_private(tmp_path / "url", server.url() + "\n")
    monkeypatch.setenv("ETL_DATABASE_URL_FILE", str(path))
    assert is_encrypted(read_settings(EtlSettings))
    path.chmod(0o640)
    with pytest.raises(SettingsError, match=r"ETL_DATABASE_URL_FILE: others can read .* \(mode 0640\): `chmod 0600"):
        read_settings(EtlSettings)


def test_standby_is_refused_in_one_sentence_and_left_aside_among_several_hosts(server: Server, tmp_path: Path) -> None:
    server.become_standby()
    wanted = server.url("target_session_attrs=read-write")
    assert "no server that ETL_DATABASE_URL names is a primary" in refusal(wanted)
    for url, command, sentence in (
        (server.url(), ["init-db"], "point ETL_DATABASE_URL at the primary"),
        (server.url(), ["up"], "point ETL_DATABASE_URL at the primary"),
        (wanted, ["show", "orders"], "no server that ETL_DATABASE_URL names is a primary"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "bridge.cli.main", *command],
            env={**os.environ, "ETL_DATABASE_URL": url, "ETL_STATE_DIR": str(tmp_path / "state")},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, len(errors)) == (2, 1), result.stderr
        assert sentence in errors[0]
        assert "Traceback" not in result.stderr
