"""A real HTTP server on loopback whose answers follow a script, for the tests of fetching."""

import base64
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class File:
    """An object and how it is served; the faults come `times` times, then all is well."""

    data: bytes
    times: int = 10**9
    status: int = 200  # 403, 404, 429, 500, 503: no object, but this
    ranges: bool = True  # else every answer is the whole object, with status 200
    lengths: bool = True  # else answers have no Content-Length and end with the connection
    cut: int | None = None  # bytes after which the connection ends
    hang: int | None = None  # bytes after which nothing comes any more
    drip: float = 0  # seconds between two of 8 parts
    page: bytes = b""  # an HTML page in its place, with status 200
    claim: int = 0  # bytes by which the Content-Length is too large
    tag: str = ""
    shift: int = 0  # bytes by which answered ranges are others than those asked for
    whole: bool = False  # every range is answered with bytes 0-END, and status 206
    login: str = ""  # USER:PASSWORD without which it is not given
    patience: str = ""  # the header Retry-After that goes with a faulty status
    dated: str = ""  # the header Last-Modified of faulty answers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((path, dict(self.headers)))
        file = self.server.files.get(path, File(b"", status=404))
        self.server.counts[path] += 1
        faulty = self.server.counts[path] <= file.times
        self.server.times.append(time.monotonic())
        if (
            file.login
            and self.headers.get("Authorization") != f"Basic {base64.b64encode(file.login.encode()).decode()}"
        ):
            return self.answer(b"who?", 401)
        if faulty and file.status != 200:
            return self.answer(b"sorry", file.status, file=File(b"sorry", patience=file.patience))
        if faulty and file.page:
            return self.answer(file.page, kind="text/html", lengths=file.lengths)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", file.tag) == file.tag
        if not asked or not unchanged or (faulty and not file.ranges):
            return self.answer(file.data, file=file, faulty=faulty)
        start, end = int(asked[1]), int(asked[2] or len(file.data) - 1) + 1
        if start >= len(file.data):
            return self.answer(b"", 416)
        if file.whole:
            return self.answer(file.data, 206, file=file, faulty=faulty)
        start += file.shift if faulty else 0
        return self.answer(file.data[start:end], 206, start=start, file=file, faulty=faulty)

    def answer(
        self,
        data: bytes,
        status: int = 200,
        kind: str = "application/octet-stream",
        start: int = 0,
        lengths: bool = True,
        file: File | None = None,
        faulty: bool = False,
    ) -> None:
        file = file or File(data, lengths=lengths)
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        if file.tag:
            self.send_header("ETag", file.tag)
        if file.patience:
            self.send_header("Retry-After", file.patience)
        if file.dated:
            self.send_header("Last-Modified", file.dated if faulty else "now")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{len(file.data)}")
        if file.lengths:
            self.send_header("Content-Length", str(len(data) + (file.claim if faulty else 0)))
        self.end_headers()
        if not faulty:
            self.wfile.write(data)
            return
        whole = min(len(data) if part is None else part for part in (file.cut, file.hang))
        step = -(-whole // 8) if file.drip else whole
        for place in range(0, whole, max(1, step)):
            self.wfile.write(data[place : min(place + step, whole)])
            self.wfile.flush()
            time.sleep(file.drip)
        if file.hang is not None:
            self.server.ended.wait(30)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.counts: Counter[str] = Counter()  # requests by path
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []  # when, of each request
        self.ended = threading.Event()

    def put(self, name: str, file: File) -> str:
        """Serves it from now on, with its faults counted anew; returns its URL."""
        self.files["/" + name], self.counts["/" + name] = file, 0
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that hung up


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
