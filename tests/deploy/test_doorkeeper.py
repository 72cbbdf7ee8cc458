"""Clients of an endpoint whose proxy dies: they wait for the next one; without the doorkeeper they are
refused."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from deploy.doorkeeper import kept_door
from tests.support.ports import free_port

PROXY = """
import http.server, socket, sys
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
server = Server(("127.0.0.1", int(sys.argv[1])), Answers)
print("up", flush=True)
server.serve_forever()
"""


@contextmanager
def proxy(port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PROXY, str(port)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


def ask(port: int, body: bytes, timeout_s: float = 60.0) -> bytes:
    """On a connection of its own."""
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        return client.post(f"http://127.0.0.1:{port}/echo", content=body).content


def wait_for_door(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("nobody holds the door")


def test_clients_wait_for_the_next_proxy_and_get_their_whole_answers() -> None:
    port, bodies = free_port(), [bytes([65 + number]) * 300_000 for number in range(6)]
    answers: dict[int, bytes] = {}
    with proxy(port) as first, kept_door("127.0.0.1", port):
        assert ask(port, b"before") == b"before"
        first.kill()
        first.wait()
        wait_for_door(port)
        threads = [
            threading.Thread(target=lambda n=number: answers.update({n: ask(port, bodies[n])}))
            for number in range(len(bodies))
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)  # so that some have connected; those that come later find the proxy
        assert not answers
        with proxy(port):
            for thread in threads:
                thread.join()
            assert [answers[number] for number in range(len(bodies))] == bodies
            assert ask(port, b"after") == b"after"


def test_it_stands_in_as_often_as_a_proxy_dies_and_lets_go_of_the_port() -> None:
    port = free_port()
    with proxy(port) as first, kept_door("127.0.0.1", port):
        first.kill()
        first.wait()
        wait_for_door(port)
        with proxy(port) as second:
            for _ in range(20):  # each connection goes to the proxy: the doorkeeper does not listen beside it
                assert ask(port, b"x") == b"x"
            second.kill()
            second.wait()
            wait_for_door(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5.0)


def test_without_it_clients_are_refused() -> None:
    port = free_port()
    with proxy(port) as first:
        first.kill()
        first.wait()
        with pytest.raises(httpx.ConnectError):
            ask(port, b"x")
