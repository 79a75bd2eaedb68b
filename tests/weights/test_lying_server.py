"""Servers that lie: what arrives gets its name only if it is weights, and nothing of a lie stays behind."""

import itertools
import os

import pytest
import timm
import torch
from safetensors.torch import save

from visionattn.weights import WeightsError, checkpoints
from visionattn.weights.download import fetch
from visionattn.weights.locate import added_file, locate
from visionattn.weights.options import settings

SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
URL = "/zoo/w.pth"


@pytest.fixture
def place(site, cache, monkeypatch):
    """A row with neither hash nor size, on a server that has its file."""
    monkeypatch.setattr(settings, "retries", 1)
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
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_lie_ends_in_a_line_and_the_next_call_asks_again(site, cache, place, answer):
    site.tricks[URL] = [ANSWERS[answer]] * 2
    with pytest.raises(WeightsError) as caught:
        open_model(place)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert left(cache) == []
    site.tricks[URL] = []
    open_model(place)
    assert left(cache) == [".w.pth.seen", "w.pth"]


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
    with pytest.raises(WeightsError, match=r"does not fit van_b0.*remove .*w.pth to download it again"):
        open_model(place)
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
    for name, row in checkpoints().items():
        assert added_file(name).parent == cache / "visionattn"
        if "file" not in row:
            locate(name, row, download=False)
