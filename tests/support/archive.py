"""A server such as the Cover Art Archive's: pictures and faults in; what was asked for, and when, out."""

from __future__ import annotations

import email.utils
import http.server
import threading
import time
from collections import Counter


class Archive:
    """A server such as the archive's: ``/release/<id>/front`` leads to ``/download/<id>``, which has the picture.

    ``faults``: for a release what goes wrong, once each in this order, before it is had; ``missing``: 404.
    """

    def __init__(self, port: int = 0):
        self.pictures: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[float, str]] = []
        self.agents: set[str] = set()
        self.dead = False
        archive = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                archive.answer(self)

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server.server_address)

    def close(self) -> None:
        self.dead = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if self.dead:  # a connection that was opened before
            request.close_connection = True
            return
        self.asked.append((time.monotonic(), request.path))
        self.agents.add(request.headers["User-Agent"])
        kind, mbid = request.path.split("/")[1:3]
        if mbid not in self.pictures:
            self.send(request, 404, b"<html>no such release</html>")
            return
        if kind == "release":
            self.send(request, 307, b"see there", Location=f"/download/{mbid}")
            return
        fault = self.faults.get(mbid) and self.faults[mbid].pop(0)
        data = self.pictures[mbid]
        if not fault:
            self.send(request, 200, data, **{"Content-Type": "image/jpeg"})
        elif fault == "cut":  # fewer bytes than were announced
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:len(data) // 2])
            request.close_connection = True
        elif fault == "torn":  # a picture that is not whole, though the answer is
            self.send(request, 200, data[:len(data) // 2], **{"Content-Type": "image/jpeg"})
        elif fault == "drop":
            request.close_connection = True
            request.connection.close()
        elif fault == "page":
            self.send(request, 200, b"<html>the item is being moved</html>", **{"Content-Type": "text/html"})
        else:  # such as "503 2" or "429 date 2"
            status, *date, seconds = fault.split()
            until = email.utils.formatdate(time.time() + float(seconds) + 0.5, usegmt=True) if date else seconds
            self.send(request, int(status), b"slowly, please", **{"Retry-After": until})

    def send(self, request: http.server.BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def counts(self, kind: str) -> Counter[str]:
        return Counter(path.split("/")[2] for _, path in self.asked if path.startswith(f"/{kind}/"))
