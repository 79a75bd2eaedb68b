"""Connections to servers that may be slow, broken or of ill will: what is asked, and for how long one listens."""

import contextlib
import http.client
import socket
import threading
import urllib.request

from visionattn.weights.errors import WeightsError
from visionattn.weights.options import settings

__all__ = ["LEAST", "connect", "header"]

LEAST = 1000
"""Bytes that an answer has to bring within ``settings.timeout``."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, except away from an encrypted connection."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith(("http:", "https:")):
            raise WeightsError(f"{req.full_url} redirects to {newurl}, which is neither http nor https: refused")
        if req.full_url.lower().startswith("https:") and not newurl.lower().startswith("https:"):
            raise WeightsError(f"{req.full_url} redirects to {newurl}, which is not encrypted: refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Answer(http.client.HTTPResponse):
    """An answer that is cut off where it does not get on.

    A socket's own timeout starts anew with every byte: a header, a chunk's end or a body that drips would be listened
    to for years. Whoever reads adds what has come to ``moved``.
    """

    def __init__(self, sock: socket.socket, *args, **kwargs) -> None:
        super().__init__(sock, *args, **kwargs)
        self.moved, self._sock, self._over = 0, sock, threading.Event()

    def begin(self) -> None:  # the answer of a proxy, on the same socket, does not come here
        threading.Thread(target=self._watch, args=(self._sock,), daemon=True).start()
        super().begin()

    def _watch(self, sock: socket.socket) -> None:
        before = 0
        while not self._over.wait(settings.timeout):
            if self.moved - before < LEAST:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                return
            before = self.moved

    def close(self) -> None:
        self._over.set()
        super().close()


class Plain(http.client.HTTPConnection):
    response_class = Answer


class Encrypted(http.client.HTTPSConnection):
    response_class = Answer


class PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(Plain, req)


class EncryptedHandler(urllib.request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(Encrypted, req)


def connect(url: str, headers: dict[str, str]):
    """The answer to a request for ``url``; raises what urllib raises, and ``WeightsError`` for a redirect."""
    opener = urllib.request.build_opener(Redirects, PlainHandler, EncryptedHandler)
    return opener.open(urllib.request.Request(url, headers=headers), timeout=settings.timeout)


def header(url: str, headers: http.client.HTTPMessage, name: str) -> str | None:
    """The value of a header, which may be there several times if it says the same.

    Raises:
        WeightsError: If it says different things.
    """
    values = sorted({value.strip() for value in headers.get_all(name, [])})
    if len(values) > 1:
        raise WeightsError(f"{url} answers with several {name}, {str(values)[:80]}: try another place, or a mirror")
    return values[0] if values else None
