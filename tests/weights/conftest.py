import contextlib
import http.server
import itertools
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

import pytest

from visionattn.weights.options import settings


@dataclass
class Site:
    """What a local web server holds, how it behaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    tricks: dict[str, list] = field(default_factory=dict)  # by path; each request uses up the first one
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range
    etag: str | None = '"1"'
    ranges: bool = True


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(headers.pop("length", len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):  # which nobody should believe
        self.server.site.requests.append(("HEAD", None))
        self.answer(404)

    def do_GET(self):
        site, path = self.server.site, self.path
        asked = self.headers.get("Range")
        site.requests.append((path, asked))
        trick, *value = site.tricks[path].pop(0) if site.tricks.get(path) else (None,)
        self.close_connection = True
        if trick == "status":
            return self.answer(value[0], b"no", **(value[1] if len(value) > 1 else {}))
        if trick == "raw":  # a first line, headers and a body (or parts of an endless one) of the test's own
            self.wfile.write(b"HTTP/1.1 " + value[0] + b"\r\n" + value[1] + b"\r\n")
            for part in (value[2],) if isinstance(value[2], bytes) else value[2]:
                try:
                    self.wfile.write(part)
                except OSError:
                    return None
            return None
        if trick == "reset":  # some bytes, and an end that the other side gets as an error
            self.wfile.write(value[0])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return socket.socket(fileno=self.connection.detach()).close()
        if trick == "drip":  # some bytes, and one more after every so many seconds
            self.wfile.write(value[0])
            with contextlib.suppress(OSError):
                for byte in itertools.cycle(value[2] if len(value) > 2 else b"x"):
                    self.wfile.write(bytes([byte]))
                    time.sleep(value[1])
            return None
        if trick == "bytes":
            return self.wfile.write(value[0])
        if trick == "redirect":
            return self.answer(302, Location=value[0])
        if path not in site.files:
            return self.answer(404, b"not found")
        body, code, headers = site.files[path], 200, {}
        if site.etag:
            headers["ETag"] = site.etag
        same = self.headers.get("If-Range") in (None, site.etag)
        if asked and site.ranges and same:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.answer(416)
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, code = body[start:], 206
        if trick == "drop":  # promise everything, send the first bytes
            return self.answer(code, body[: value[0]], length=len(body), **headers)
        if trick == "stall":
            self.answer(code, body[: value[0]], length=len(body), **headers)
            self.wfile.flush()
            return time.sleep(value[1])
        if trick == "slow":
            self.answer(code, b"", length=len(body), **headers)
            for byte in range(0, len(body), 1 + len(body) // 8):
                self.wfile.write(body[byte : byte + 1 + len(body) // 8])
                self.wfile.flush()
                time.sleep(value[0])
            return None
        return self.answer(code, body, **headers)


@pytest.fixture
def site():
    """A web server on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.site = Site(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    yield server.site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, a patient of no one, and an environment that says nothing."""
    for name in ("VISIONATTN_WEIGHTS_MIRROR", "VISIONATTN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings, "backoff", 0.01)
    monkeypatch.setattr(settings, "timeout", 5.0)
    monkeypatch.setattr(settings, "cache_dir", tmp_path / "cache")
    return tmp_path / "cache"
