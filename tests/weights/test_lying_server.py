"""Servers that lie: what arrives gets its name only if it is weights, and nothing of a lie stays behind."""

import gzip
import itertools
import os
import struct

import pytest
import timm
import torch
from safetensors.torch import save

from visionattn.weights import WeightsError, checkpoints, download
from visionattn.weights.download import fetch
from visionattn.weights.locate import added_file, locate
from visionattn.weights.options import settings

SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
URL = "/zoo/w.pth"


@pytest.fixture
def place(site, cache, monkeypatch):
    """A row with neither hash nor size, on a server that has its file."""
    monkeypatch.setattr(settings, "retries", 1)
    monkeypatch.setattr(download, "LONGEST_WAIT", 0.01)
    torch.manual_seed(0)
    model = timm.create_model("van_b0", **SMALL)
    site.files[URL] = save({key: value.contiguous() for key, value in model.state_dict().items()})
    return dict(url=site.url + URL)


def open_model(place):
    overlay = dict(url=place["url"], hf_hub_id=None)
    return timm.create_model("van_b0", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)


def left(cache):
    return sorted(f.name for f in cache.glob("**/*") if f.is_file() and not f.name.endswith(".lock"))


def raw(line=b"200 OK", headers=b"", body=b"", length=True):
    headers += b"Content-Length: %d\r\n" % len(body) if length else b""
    return ("raw", line, headers, body)


OK = b"200 OK"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ANSWERS = {
    "nothing": raw(),
    "no content": raw(b"204 No Content"),
    "blanks": raw(body=b"\n\n   \n"),
    "a page": raw(body=b"<!doctype html><html>log in</html>"),
    "a page with a comment": raw(body=b"<!-- hello --><html>"),
    "JSON": raw(body=b'{"error": {"code": "itemNotFound"}}'),
    "a JSON list": raw(body=b'[{"error": 1}]'),
    "JSON with a mark": raw(body=b'  {"error": 1}'),
    "text": raw(body=b"Access denied"),
    "zeros": raw(body=bytes(5000)),
    "an LFS pointer": raw(body=b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "gzip": raw(body=b"\x1f\x8b\x08\x00" + bytes(100)),
    "a pickle": raw(body=b"\x80\x04\x95\x00"),
    "a zip of nothing": raw(body=b"PK\x05\x06" + bytes(18)),
    "another encoding": raw(headers=b"Content-Encoding: gzip\r\n", body=b"\x1f\x8b\x08\x00"),
    "banana": raw(headers=b"Content-Length: banana\r\n", body=b"x", length=False),
    "negative": raw(headers=b"Content-Length: -5\r\n", body=b"x", length=False),
    "fraction": raw(headers=b"Content-Length: 1e9\r\n", body=b"x", length=False),
    "endless digits": raw(headers=b"Content-Length: " + b"9" * 5000 + b"\r\n", body=b"x", length=False),
    "too long a length": raw(headers=b"Content-Length: 99999999999999\r\n", body=b"x", length=False),
    "no such file": raw(b"404 Not Found", body=b"no"),
    "a teapot": raw(b"418 I'm a teapot", body=b"no"),
    "part of what was not asked": raw(b"206 Partial Content", b"Content-Range: bytes 50-99/100\r\n", bytes(50)),
    "part without a range": raw(b"206 Partial Content", body=bytes(50)),
    "to a file": raw(b"302 Found", b"Location: file:///etc/passwd\r\n"),
    "to ftp": raw(b"302 Found", b"Location: ftp://127.0.0.1/w.pth\r\n"),
    "to nowhere": raw(b"302 Found", b"Location: http://[/\r\n"),
    "to a bad port": raw(b"302 Found", b"Location: http://127.0.0.1:99999/w\r\n"),
    "no status": raw(b"banana OK"),
    "endless header": raw(headers=b"X: " + b"x" * 100_000 + b"\r\n"),
    "countless headers": raw(headers=b"X: x\r\n" * 500),
    "wait for years": raw(b"503 Busy", b"Retry-After: \xb2\r\n"),
    # statuses
    "accepted": raw(b"202 Accepted", body=b'{"status": "queued"}'),
    "reset your form": raw(b"205 Reset Content"),
    "several parts": raw(
        b"206 Partial Content",
        b"Content-Type: multipart/byteranges; boundary=b\r\n",
        b"--b\r\nContent-Range: bytes 0-3/8\r\n\r\nabcd\r\n--b--",
    ),
    "a choice": raw(b"300 Multiple Choices", body=b"[]"),
    "not modified": raw(b"304 Not Modified"),
    "use a proxy": raw(b"305 Use Proxy", b"Location: http://127.0.0.1:1/\r\n"),
    "sign in": raw(b"401 Unauthorized", b'WWW-Authenticate: Basic realm="x"\r\n', b"no"),
    "forbidden": raw(b"403 Forbidden", body=b"no"),
    "gone": raw(b"410 Gone"),
    "no such range": raw(b"416 Range Not Satisfiable", b"Content-Range: bytes */0\r\n"),
    "too many": raw(b"429 Too Many Requests", b"Retry-After: 999999\r\n"),
    "too many until a date": raw(b"429 Too Many Requests", b"Retry-After: Wed, 21 Oct 2065 07:28:00 GMT\r\n"),
    "too many for a negative time": raw(b"429 Too Many Requests", b"Retry-After: -1e9\r\n"),
    "for legal reasons": raw(b"451 Unavailable For Legal Reasons", body=b"no"),
    "broken": raw(b"500 Internal Server Error", body=b"Traceback:\n  line"),
    "behind a gateway": raw(b"502 Bad Gateway", body=b"<html>"),
    "a status of no kind": raw(b"999 What"),
    "a status without a number": raw(b"2x0 OK"),
    "another protocol": raw(b"101 Switching Protocols", b"Upgrade: h2c\r\n"),
    "a reason of many lines": raw(b"404 " + b"no " * 5000),
    "a reason with control characters": raw(b"404 \x1b[31mno\x00"),
    "SSH": ("bytes", b"SSH-2.0-OpenSSH_9.6\r\n"),
    "TLS": ("bytes", b"\x15\x03\x01\x00\x02\x02\x46"),
    "HTTP of old": ("bytes", b"the weights"),
    "HTTP/2": ("bytes", b"HTTP/2.0 200 OK\r\n\r\nthe weights"),
    "nothing at all": ("bytes", b""),
    # redirects
    "to nothing": raw(b"302 Found"),
    "to a script": raw(b"302 Found", b"Location: javascript:alert(1)\r\n"),
    "to data": raw(b"302 Found", b"Location: data:,weights\r\n"),
    "to a file in capitals": raw(b"301 Moved", b"Location: FILE:///etc/passwd\r\n"),
    "to a page": raw(b"307 Temporary Redirect", b"Location: /sign-in.html\r\n"),
    "to itself": ("redirect", URL),
    "to an account": raw(b"303 See Other", b"Location: http://user:word@[::1/w\r\n"),
    "to a split header": raw(b"302 Found", b"Location: /a\x0bX: y\r\n"),
    "to bytes": raw(b"302 Found", b"Location: /\xff\xfe\x00\r\n"),
    # encodings
    "bomb": raw(headers=b"Content-Encoding: gzip\r\n", body=gzip.compress(bytes(1 << 22))),
    "deflate": raw(headers=b"Content-Encoding: deflate\r\n", body=b"x\x9c\x03\x00"),
    "br": raw(headers=b"Content-Encoding: br\r\n", body=b"\x8b"),
    "twice": raw(headers=b"Content-Encoding: gzip, gzip\r\n", body=b"\x1f\x8b"),
    "with two tongues": raw(headers=b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\n", body=b"\x1f\x8b"),
    "in transfer": raw(headers=b"Transfer-Encoding: gzip\r\n", body=gzip.compress(bytes(1 << 12))),
    "chunks of no size": raw(headers=CHUNKED, body=b"zz\r\nab\r\n0\r\n\r\n", length=False),
    "chunks of negative size": raw(headers=CHUNKED, body=b"-5\r\nab\r\n0\r\n\r\n", length=False),
    "chunks of huge size": raw(headers=CHUNKED, body=b"f" * 16 + b"\r\nab", length=False),
    "chunks of endless size": raw(headers=CHUNKED, body=b"f" * 70_000 + b"\r\nab", length=False),
    "chunks without end": raw(headers=CHUNKED, body=b"2\r\nab\r\n", length=False),
    "chunks without a beginning": raw(headers=CHUNKED, length=False),
    # lengths
    "two lengths": raw(headers=b"Content-Length: 1\r\nContent-Length: 2\r\n", body=b"ab", length=False),
    "a list of lengths": raw(headers=b"Content-Length: 1, 2\r\n", body=b"ab", length=False),
    "a length of other digits": raw(headers="Content-Length: \u0661\r\n".encode(), body=b"x", length=False),
    "less than the length": raw(headers=b"Content-Length: 100\r\n", body=b"ab", length=False),
    # other files
    "a torrent": raw(body=b"d8:announce20:http://tracker.test/4:infod6:lengthi1eee"),
    "a link": raw(body=b"[InternetShortcut]\r\nURL=http://127.0.0.1/w.pth"),
    "a page after blanks": raw(body=b" \r\n" * 20 + b"<!DOCTYPE html>"),
    "a page in UTF-16": raw(body="\ufeff<html>log in</html>".encode("utf-16-le")),
    "XML": raw(body=b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>"),
    "a picture": raw(body=b"\x89PNG\r\n\x1a\n" + bytes(40)),
    "a tar": raw(body=bytes(257) + b"ustar\x0000" + bytes(400)),
    "NumPy": raw(body=b"\x93NUMPY\x01\x00" + bytes(40)),
    "another model": raw(body=save({"stem.proj.weight": torch.zeros(3, 3, 3, 3)})),
    "no tensors": raw(body=save({})),
    "a header that claims more": raw(body=struct.pack("<Q", 1 << 60) + b'{"a": 1}'),
    # ends
    "reset at once": ("reset", b""),
    "reset in the first line": ("reset", b"HTTP/1.1 2"),
    "reset in the headers": ("reset", b"HTTP/1.1 200 OK\r\nContent-Len"),
    "reset before the body": ("reset", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"),
    "reset in the body": ("reset", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"),
}
SLOW = {  # one byte after another, for years
    "a first line": ("drip", b"HTTP/1.1 2"),
    "a header": ("drip", b"HTTP/1.1 200 OK\r\nX: "),
    "headers": ("drip", b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "answers before the answer": ("drip", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hints before the answer": ("drip", b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
    "a body": ("drip", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nabc"),
    "a body with a version": ("drip", b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 1000000\r\n\r\nabc'),
    "a body without length": ("drip", b"HTTP/1.1 200 OK\r\n\r\nabc"),
    "a chunk's size": ("drip", b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n1;"),
    "what follows the chunks": ("drip", b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n2\r\nab\r\n0\r\n", b"X: y\r\n"),
    "a page that says no": ("drip", b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000000\r\n\r\n"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_lie_ends_in_a_line_and_the_next_call_asks_again(site, cache, place, answer):
    site.tricks[URL] = [ANSWERS[answer]] * 12  # of which a redirect to itself uses some
    with pytest.raises(WeightsError) as caught:
        open_model(place)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert left(cache) == []
    site.tricks[URL] = []
    open_model(place)
    assert left(cache) == [".w.pth.seen", "w.pth"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SLOW)
def test_no_server_is_listened_to_for_years(site, cache, place, kind, monkeypatch):
    monkeypatch.setattr(settings, "timeout", 0.1)
    start, *more = SLOW[kind][1:]
    site.tricks[URL] = [("drip", start, 0.02, *more)] * 2
    with pytest.raises(WeightsError) as caught:
        open_model(place)
    assert "\n" not in str(caught.value) and "w.pth" not in left(cache)
    site.tricks[URL] = []
    open_model(place)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X: y\r\n"])
def test_no_server_talks_without_end_before_or_after_the_body(site, cache, place, part, monkeypatch):
    monkeypatch.setattr(settings, "timeout", 0.2)
    start = b"" if part.startswith(b"HTTP") else b"200 OK\r\n" + CHUNKED + b"\r\n0"
    site.tricks[URL] = [("raw", start or b"100 Continue\r\n", b"", itertools.repeat(part * 100))] * 2
    with pytest.raises(WeightsError):
        open_model(place)
    assert left(cache) == []


def test_a_file_that_comes_slowly_but_comes_is_taken(site, cache, place, monkeypatch):
    monkeypatch.setattr(settings, "timeout", 0.2)
    site.tricks[URL] = [("slow", 0.1)]
    open_model(place)
    assert len(site.requests) == 1


ODD = {
    "a name": b'Content-Disposition: attachment; filename="../../evil.pth"\r\n',
    "a name in capitals": b"CONTENT-DISPOSITION: attachment; filename=W.PTH\r\n",
    "a type": b"Content-Type: text/html\r\n",
    "cookies": b"Set-Cookie: a=b; Domain=evil.test\r\n" * 50,
    "a hash of its own": b"X-Linked-ETag: 0\r\nDigest: sha-256=0\r\n",
    "a folded header": b"X: a\r\n b\r\n",
    "a range": b"Content-Range: bytes 5-9/10\r\n",
    "a long version": b'ETag: "' + b"x" * 60_000 + b'"\r\n',
    "a version of other letters": b'ETag: "\xff\xfe"\r\n',
    "the same length twice": b"Content-Length: %d\r\n",
    "a place": b"Content-Location: file:///etc/passwd\r\nRefresh: 0; url=file:///etc/passwd\r\n",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_a_server_says_beside_the_file_changes_nothing(site, cache, place, kind):
    body = site.files[URL]
    more = ODD[kind] % len(body) if b"%d" in ODD[kind] else ODD[kind]
    site.tricks[URL] = [raw(headers=more, body=body)]
    open_model(place)
    assert left(cache) == [".w.pth.seen", "w.pth"] and (cache / "w.pth").read_bytes() == body
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache"]


@pytest.mark.parametrize("known", [dict(sha256="0" * 64), dict(sha256="0" * 8), dict(size=5), dict(size=10**9)])
@pytest.mark.parametrize("length", [True, False])
def test_what_is_known_of_a_file_has_to_be_true(site, cache, place, known, length):
    site.tricks[URL] = [raw(body=site.files[URL], length=length)]
    with pytest.raises(WeightsError, match="not the published file|does not end after") as caught:
        fetch(place["url"], cache / "w.pth", **known)
    assert "\n" not in str(caught.value) and left(cache) == []
    assert fetch(place["url"], cache / "w.pth").read_bytes() == site.files[URL]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_connection_that_is_reset_goes_on_where_it_stopped(site, cache, place, share):
    body = site.files[URL]
    head = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n' % len(body)
    site.tricks[URL] = [("reset", head + body[: int(share * len(body))])]
    open_model(place)
    assert (cache / "w.pth").read_bytes() == body and len(site.requests) == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_file_that_is_cut_off_without_a_word_does_not_get_its_name(site, cache, place, share, form):
    if form != "safetensors":
        torch.save({"a": torch.zeros(9000)}, cache.parent / "x", _use_new_zipfile_serialization=form == "zip")
        site.files[URL] = (cache.parent / "x").read_bytes()
    site.files[URL] = site.files[URL][: int(share * len(site.files[URL]))]
    with pytest.raises(WeightsError):
        locate("van_b0.mine", place)
    assert left(cache) == []


@pytest.mark.parametrize("length", [True, False])
def test_a_body_without_end_is_given_up(site, cache, length):
    site.tricks["/w.pth"] = [("raw", OK, b"Content-Length: 1000\r\n" if length else b"", itertools.repeat(b"x" * 9999))]
    if length:
        assert fetch(f"{site.url}/w.pth", cache / "w.pth", limit=10**6).stat().st_size == 1000  # http reads no further
        return
    with pytest.raises(WeightsError, match="does not end after"):
        fetch(f"{site.url}/w.pth", cache / "w.pth", limit=10**6)
    assert left(cache) == []


def test_a_known_size_ends_a_body_without_end(site, cache):
    site.tricks["/w.pth"] = [("raw", OK, b"", itertools.repeat(b"x" * 9999))]
    with pytest.raises(WeightsError, match="does not end after"):
        fetch(f"{site.url}/w.pth", cache / "w.pth", size=5000)


# --- continuing -------------------------------------------------------------------------------------------------------


def half(site, etag=b'ETag: "1"\r\n'):
    """The first half, and a connection that ends there."""
    body = site.files[URL]
    return ("raw", OK, etag + b"Content-Length: %d\r\n" % len(body), body[: len(body) // 2])


REST = {
    "from elsewhere": lambda n, h: b"bytes %d-%d/%d" % (h - 8, n - 1, n),
    "from the start": lambda n, h: b"bytes 0-%d/%d" % (n - 1, n),
    "to elsewhere": lambda n, h: b"bytes %d-%d/%d" % (h, n - 9, n),
    "of another length": lambda n, h: b"bytes %d-%d/%d" % (h, n - 1, n + 5),
    "of nonsense": lambda n, h: b"banana",
    "of the end of time": lambda n, h: b"bytes %d-%s/%s" % (h, b"9" * 40, b"9" * 40),
    "of nothing": lambda n, h: b"",
}


@pytest.mark.parametrize("kind", REST)
def test_a_rest_that_is_not_the_rest_is_thrown_away(site, cache, place, kind, monkeypatch):
    monkeypatch.setattr(settings, "retries", 4)
    n, h = len(site.files[URL]), len(site.files[URL]) // 2
    rest = b'ETag: "1"\r\nContent-Range: ' + REST[kind](n, h) + b"\r\n"
    site.tricks[URL] = [half(site), ("raw", b"206 Partial Content", rest, b"x" * (n - h))]
    open_model(place)
    assert site.requests[-1] == (URL, None) and (cache / "w.pth").read_bytes() == site.files[URL]


@pytest.mark.parametrize("first", [b'ETag: "1"\r\n', b'ETag: W/"1"\r\n', b"Last-Modified: Mon\r\n", b""])
@pytest.mark.parametrize("second", [b'ETag: "2"\r\n', b'ETag: W/"2"\r\n', b"Last-Modified: Tue\r\n", b""])
def test_the_rest_of_another_file_is_thrown_away(site, cache, place, first, second):
    n, h = len(site.files[URL]), len(site.files[URL]) // 2
    rest = second + b"Content-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\n" % (h, n - 1, n, n - h)
    site.tricks[URL] = [half(site, first), ("raw", b"206 Partial Content", rest, b"\0" * (n - h))]
    try:
        open_model(place)
    except WeightsError:  # without any version nothing is continued, and a part of what was not asked is refused
        assert left(cache) == []
    else:
        assert (cache / "w.pth").read_bytes() == site.files[URL]


@pytest.mark.parametrize("etag", [b'ETag: "1"\r\n', b'ETag: W/"1"\r\n', b"Last-Modified: Mon\r\n"])
def test_the_rest_of_the_same_file_is_taken(site, cache, place, etag):
    body = site.files[URL]
    n, h = len(body), len(body) // 2
    rest = etag + b"Content-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\n" % (h, n - 1, n, n - h)
    site.tricks[URL] = [half(site, etag), ("raw", b"206 Partial Content", rest, body[h:])]
    open_model(place)
    assert [asked for _, asked in site.requests] == [None, f"bytes={h}-"]


# --- in the cache -----------------------------------------------------------------------------------------------------


def test_what_was_of_use_once_has_to_stay_the_same(cache, place):
    open_model(place)
    content = bytearray((cache / "w.pth").read_bytes())
    content[-2] ^= 1
    (cache / "w.pth").write_bytes(content)
    os.utime(cache / "w.pth", (0, 0))
    with pytest.raises(WeightsError, match=r"w.pth is not the file that it was.*remove .*w.pth"):
        open_model(place)
    (cache / "w.pth").write_bytes(content[:-4])
    with pytest.raises(WeightsError, match=r"instead of the .* it had: remove .*w.pth"):
        open_model(place)
    (cache / "w.pth").unlink()
    (cache / ".w.pth.seen").unlink()
    open_model(place)


@pytest.mark.parametrize("content", [b"", b"{}", b"<html>", b"PK\x03\x04"])
def test_a_bad_file_of_old_is_named_with_what_to_remove(cache, place, content):
    cache.mkdir()
    (cache / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"remove .*/w.pth to download it again"):
        open_model(place)
    assert left(cache) == ["w.pth"]


def test_weights_of_another_model_are_not_kept_as_good(site, cache, place):
    site.files[URL] = save({"stem.proj.weight": torch.zeros(3, 3, 3, 3)})
    with pytest.raises(WeightsError, match=r"does not fit van_b0.*the download was removed"):
        open_model(place)
    assert left(cache) == []


def test_weights_of_the_model_are_kept_whatever_it_was_built_with(site, cache, place):
    site.files[URL] = save({k: v.contiguous() for k, v in timm.create_model("van_b0").state_dict().items()})
    with pytest.raises(WeightsError, match=r"does not fit van_b0.*remove .*w.pth to download it again"):
        timm.create_model(
            "van_b0", True, pretrained_cfg_overlay=dict(url=place["url"], hf_hub_id=None), depths=(9,) * 4
        )
    assert left(cache) == ["w.pth"]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../w.pth", "a/../../w.pth", "/tmp/w.pth", "..", ".w.pth", "a\\..\\w.pth", "\0", "x" * 300]
)
def test_file_names_do_not_leave_the_cache(cache, place, name):
    with pytest.raises(WeightsError, match="is no name of a file in"):
        locate("van_b0.mine", dict(url=(place["url"], name)))
    with pytest.raises(WeightsError, match="is no name of a file in"):
        added_file(f"../{name}")
    assert not cache.exists()


@pytest.mark.parametrize("url", ["/zoo/..%2f..%2fw.pth", "/zoo/%2e%2e%2fw.pth", "/zoo/%00.pth", "/zoo/..%5cw.pth"])
def test_addresses_do_not_leave_the_cache(site, cache, url):
    with pytest.raises(WeightsError, match="is no name of a file in"):
        locate("van_b0.mine", dict(url=site.url + url))
    assert site.requests == []


@pytest.mark.parametrize("tag", ["../../x", "a/b", "\\..\\x"])
def test_tags_do_not_leave_the_cache(tag):
    with pytest.raises((ValueError, RuntimeError)):  # timm's own
        timm.create_model(f"van_b0.{tag}", pretrained=True)
    with pytest.raises(WeightsError, match="is no name of a file"):
        timm.create_model("van_b0", pretrained=True, pretrained_cfg=tag)


def test_every_published_name_stays_in_the_cache(cache):
    assert len({name.casefold() for name in checkpoints()}) == len(checkpoints())
    for name, row in checkpoints().items():
        assert added_file(name).parent == cache / "visionattn"
        if "file" not in row:
            locate(name, row, download=False)
