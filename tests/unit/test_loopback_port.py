"""本机端口：占住的，同时起的另一个栈得不到。"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from etl_assets.embedded.loopback_port import accepts_connections, find_free_port, is_free, listen_on, reserve_port


def port_of(held: socket.socket) -> int:
    return int(held.getsockname()[1])


def test_many_who_want_one_port_at_once_get_one_each() -> None:
    wanted = find_free_port()
    with ThreadPoolExecutor(16) as pool:
        listeners = list(pool.map(lambda _: listen_on(None, preferred=wanted), range(64)))
    ports = [port_of(listener) for listener in listeners]
    for listener in listeners:
        listener.close()
    assert len(set(ports)) == 64
    assert wanted in ports


def test_port_that_was_asked_for_is_taken_or_refused() -> None:
    with listen_on(None, preferred=find_free_port()) as occupant, pytest.raises(OSError, match="in use"):
        listen_on(port_of(occupant), preferred=0)


def test_reserved_port_is_free_for_nobody_but_the_server_it_is_for() -> None:
    with reserve_port() as holder:
        port = port_of(holder)
        assert not is_free(port)
        assert find_free_port(port) != port
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        assert not accepts_connections(port)
        server = grpc.server(ThreadPoolExecutor(1))
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()
        assert all(accepts_connections(port) for _ in range(20))
        server.stop(None).wait()
    assert is_free(port)
