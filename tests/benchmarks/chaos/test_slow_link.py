"""The link: what goes over it is unchanged, slow or not, and an absent server is a refused connection."""

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from benchmarks.chaos.slow_link import SlowLink
from tests.support.ports import free_port

LONG = bytes(range(256)) * 1000


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while chunk := self.request.recv(4096):
            self.request.sendall(chunk)


@pytest.fixture
def link() -> Iterator[SlowLink]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with SlowLink(server.server_address[1]) as opened:
            yield opened
        server.shutdown()


def echoed(link: SlowLink, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", link.port), timeout=30) as connection:
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        got = b""
        while len(got) < len(sent):
            chunk = connection.recv(4096)
            assert chunk, "the link closed early"
            got += chunk
    return got


def test_bytes_come_through_unchanged(link: SlowLink) -> None:
    assert echoed(link, LONG) == LONG


def test_a_slow_link_only_delays(link: SlowLink) -> None:
    link.delay_s = 30.0
    with socket.create_connection(("127.0.0.1", link.port)) as connection:
        connection.sendall(b"x")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    link.delay_s = 0.05
    assert echoed(link, b"abc") == b"abc"


def test_a_server_that_is_gone_ends_the_connection() -> None:
    with SlowLink(free_port()) as link, socket.create_connection(("127.0.0.1", link.port)) as connection:
        connection.settimeout(30)
        with pytest.raises(ConnectionResetError):
            if connection.recv(1) == b"":
                raise ConnectionResetError
