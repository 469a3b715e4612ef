"""Servers for the tests of URLs: S3 and web servers of this machine, and a proxy that makes them fail."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shard_tools.core.locks import lock
from shard_tools.remote.cache import Cache, RemoteFile
from shard_tools.remote.filesystem import Remote
from tests.support.waiting import wait_for


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Faults:
    """What a proxy does to requests: by chance, alike in every run.

    Attributes:
        failed: share that is answered by 503 or a reset connection; cut: share of long bodies that end in the middle.
        latency: seconds before each answer.
        whole: how often each path was sent to its last byte; counted are GET only.
    """

    failed: float = 0.0
    cut: float = 0.0
    latency: float = 0.0
    draws: random.Random = field(default_factory=lambda: random.Random(5))
    requests: int = 0
    broken: int = 0
    whole: Counter = field(default_factory=Counter)


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while self.pass_on():
                pass

    def pass_on(self) -> bool:
        """One request and its answer, over a connection of their own to the real server."""
        faults, server = self.server.faults, self.server
        head, body = _read_head(self.request)
        request, path = head.split(b" ", 2)[0], head.split(b" ", 2)[1].decode().partition("?")[0]
        length = int(_header(head, b"content-length") or 0)
        time.sleep(faults.latency)
        with server.lock:
            faults.requests += 1
            lot, cut = faults.draws.random(), faults.draws.random()
        if b"100-continue" in head.lower():
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)expect: *100-continue\r\n", b"", head)
        while len(body) < length:
            body += self.request.recv(65536)
        if lot < faults.failed:
            with server.lock:
                faults.broken += 1
            if lot < faults.failed / 2:
                self.request.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        with socket.create_connection(server.target) as upstream:
            upstream.sendall(head + body)
            answer, start = _read_head(upstream)
            size = int(_header(answer, b"content-length") or 0)
            cutting = cut < faults.cut and size > 20_000 and request == b"GET"
            allowed = size // 2 if cutting else size
            whole = request == b"GET" and answer.split(b" ", 2)[1] in (b"200", b"206")
            if part := re.fullmatch(rb"bytes \d+-(\d+)/(\d+)", _header(answer, b"content-range") or b""):
                whole = whole and int(part[1]) + 1 == int(part[2])
            data, done = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answer) + start[:allowed], min(len(start), allowed)
            while request != b"HEAD" and done < allowed:
                self.request.sendall(data)
                data = upstream.recv(min(65536, allowed - done))
                if not data:
                    return False
                done += len(data)
            with server.lock:  # before the last bytes, after which the client goes on
                faults.broken += cutting
                faults.whole[path] += whole and not cutting
            self.request.sendall(data)
        return not cutting


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            raise EOFError
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _header(head: bytes, name: bytes) -> bytes | None:
    found = re.search(rb"(?i)\r\n" + name + rb": *([^\r]*)", head)
    return found[1] if found else None


@contextlib.contextmanager
def proxy(target: str, faults: Faults) -> Iterator[str]:
    """A proxy before a server (``http://host:port``); its own URL."""
    host, port = target.removeprefix("http://").split(":")
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.target, server.faults, server.lock = (host, int(port)), faults, threading.Lock()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextlib.contextmanager
def nginx(root: Path, work: Path) -> Iterator[str]:
    """nginx that serves a folder; its URL. Skips where it is not installed."""
    if not (binary := shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/bin")):
        pytest.skip("nginx is not installed")
    port = free_port()
    work.mkdir(parents=True, exist_ok=True)
    paths = "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in
                    ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (work / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {work}/pid; error_log {work}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n")
    process = subprocess.Popen([binary, "-p", str(work), "-e", str(work / "error.log"), "-c", str(work / "nginx.conf")])
    try:
        _await_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """A real S3 server over HTTP (moto), with a bucket ``covers``; its URL. Skips where it is not installed."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x",
                     aws_secret_access_key="y").create_bucket(Bucket="covers")
        yield url
    finally:
        server.stop()


def fetch_all(folder: str, url: str, stored: list[RemoteFile]) -> None:
    """Has every file in a cache."""
    cache = Cache(folder)
    for one in stored:
        cache.open(Remote(url), one).close()


KEYS = {"AWS_ACCESS_KEY_ID": "known", "AWS_SECRET_ACCESS_KEY": "hidden-words", "AWS_DEFAULT_REGION": "us-east-1"}


def upload(url: str, folder: Path, prefix: str) -> None:
    """Every file of a folder into the bucket."""
    import boto3
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x",
                          aws_secret_access_key="y")
    for path in folder.iterdir():
        if path.is_file():
            client.upload_file(str(path), "covers", f"{prefix}/{path.name}")


def _await_port(port: int, process: subprocess.Popen) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10):
            return True
        return False
    wait_for(answers, "the server's first answer", by=[process])


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The sizes of a folder in bytes, many times a second, with what is set aside in it."""
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            with lock(folder / ".lock"):  # or what goes and what comes for it would both be counted
                total = 0
                for path in folder.rglob("*"):
                    with contextlib.suppress(FileNotFoundError):
                        total += path.stat().st_size if path.is_file() else 0
            sizes.append(total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()
