import hashlib
import shutil
import subprocess
import sys
import urllib.request
from collections import namedtuple
from pathlib import Path

import pytest

from visionattn.weights import WeightsError, connect, download
from visionattn.weights.download import fetch
from visionattn.weights.options import settings

ROOT = Path(__file__).resolve().parents[2]
BODY = bytes(range(256)) * 1000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def place(site, cache):
    site.files["/w.pth"] = BODY
    return f"{site.url}/w.pth", cache / "w.pth"


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_file_is_fetched_once(site, place, cache):
    for _ in range(2):
        assert fetch(*place, sha256=SHA, size=len(BODY)).read_bytes() == BODY
    assert site.requests == [("/w.pth", None)]
    assert leftovers(cache) == ["w.pth"]


def test_a_slow_server_is_waited_for(site, place):
    site.tricks["/w.pth"] = [("slow", 0.05)]
    assert fetch(*place).read_bytes() == BODY


def test_a_dropped_connection_is_resumed_where_it_ended(site, place, cache):
    site.tricks["/w.pth"] = [("drop", 1000), ("drop", 50_000), ("drop", 0)]
    assert fetch(*place).read_bytes() == BODY
    assert [asked for _, asked in site.requests] == [None, "bytes=1000-", "bytes=51000-", "bytes=51000-"]
    assert leftovers(cache) == ["w.pth"]


def test_a_connection_that_falls_silent_is_resumed(site, place, monkeypatch):
    monkeypatch.setattr(settings, "timeout", 0.2)
    site.tricks["/w.pth"] = [("stall", 1000, 0.6)]
    assert fetch(*place).read_bytes() == BODY
    assert site.requests[1] == ("/w.pth", "bytes=1000-")


def test_the_next_call_resumes_what_a_failed_one_left(site, place, monkeypatch):
    monkeypatch.setattr(settings, "retries", 0)
    site.tricks["/w.pth"] = [("drop", 70_000), ("status", 503)]
    for _ in range(2):
        with pytest.raises(WeightsError, match="repeat the command to go on where it stopped"):
            fetch(*place)
        monkeypatch.setattr(settings, "retries", 0)
    assert not place[1].exists()
    assert fetch(*place).read_bytes() == BODY
    assert site.requests[-1] == ("/w.pth", "bytes=70000-")


def test_a_file_that_has_changed_meanwhile_is_fetched_anew(site, place, monkeypatch):
    monkeypatch.setattr(settings, "retries", 0)
    site.tricks["/w.pth"] = [("drop", 70_000)]
    with pytest.raises(WeightsError):
        fetch(*place)
    site.files["/w.pth"], site.etag = BODY[::-1], '"2"'
    assert fetch(*place).read_bytes() == BODY[::-1]


def test_without_a_version_or_a_hash_an_old_part_is_not_trusted(site, place, monkeypatch):
    monkeypatch.setattr(settings, "retries", 0)
    site.etag = None
    site.tricks["/w.pth"] = [("drop", 70_000)]
    with pytest.raises(WeightsError):
        fetch(*place)
    assert fetch(*place).read_bytes() == BODY
    assert site.requests[-1] == ("/w.pth", None)


def test_a_stale_part_that_spoils_the_hash_is_thrown_away(site, place, cache, monkeypatch):
    monkeypatch.setattr(settings, "retries", 0)
    site.tricks["/w.pth"] = [("drop", 1000)]
    with pytest.raises(WeightsError):
        fetch(*place, sha256=SHA)
    (part,) = cache.glob("*.part")
    part.write_bytes(b"x" * 1000)
    assert fetch(*place, sha256=SHA).read_bytes() == BODY


def test_a_server_that_cannot_continue_sends_everything_again(site, place):
    site.ranges = False
    site.tricks["/w.pth"] = [("drop", 1000)]
    assert fetch(*place).read_bytes() == BODY


def test_a_passing_failure_is_tried_again_after_the_time_the_server_asks_for(site, place, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    site.tricks["/w.pth"] = [("status", 429, {"Retry-After": "7"}), ("status", 503), ("status", 500)]
    assert fetch(*place).read_bytes() == BODY
    assert waits[0] == 7.0 and 0.005 <= waits[1] <= waits[2] <= 0.04


def test_a_server_that_never_sends_all_is_given_up(site, place, cache):
    site.tricks["/w.pth"] = [("drop", 0)] * 20
    with pytest.raises(WeightsError, match=r"the connection ended after 0 of 256000 bytes, after 5 attempts"):
        fetch(*place)
    assert len(site.requests) == settings.retries + 1 and not place[1].exists()


def test_another_length_than_published_is_refused(site, place, cache):
    with pytest.raises(WeightsError, match="has 256000 bytes instead of 12"):
        fetch(*place, size=12)
    assert leftovers(cache) == []


def test_another_hash_than_published_is_refused(site, place, cache):
    with pytest.raises(WeightsError, match=f"SHA-256 {SHA} instead of abc: it is not the published file"):
        fetch(*place, sha256="abc")
    assert leftovers(cache) == []


def test_the_first_digits_of_a_hash_are_enough(place):
    assert fetch(*place, sha256=SHA[:8]).exists()


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_missing_file_is_not_asked_for_again(site, place, code):
    site.tricks["/w.pth"] = [("status", code)]
    with pytest.raises(WeightsError, match=f"w.pth answers {code}"):
        fetch(*place)
    assert len(site.requests) == 1


def test_the_next_place_is_asked_for_a_missing_file(site, place):
    url, target = place
    assert fetch([f"{site.url}/elsewhere.pth", url], target).read_bytes() == BODY


def test_redirects_are_followed(site, place, cache):
    site.tricks["/old"] = [("redirect", "/w.pth")]
    assert fetch(f"{site.url}/old", cache / "w.pth").read_bytes() == BODY


def test_a_redirect_away_from_encryption_is_refused():
    request = urllib.request.Request("https://x.org/w.pth")
    with pytest.raises(WeightsError, match="not encrypted"):
        connect.Redirects().redirect_request(request, None, 302, "Found", {}, "http://x.org/w.pth")


def test_a_web_page_does_not_become_a_checkpoint(site, place, cache):
    site.files["/w.pth"] = b"\n<!DOCTYPE html><html><body>Too many users have viewed this file</body></html>"
    with pytest.raises(WeightsError, match="gives a web page, not a file: open it in a browser"):
        fetch(*place)
    assert leftovers(cache) == []


def test_a_server_that_is_not_there_is_an_error_that_names_it(cache):
    with pytest.raises(WeightsError, match="http://127.0.0.1:9/w.pth cannot be downloaded: .*refused"):
        fetch("http://127.0.0.1:9/w.pth", cache / "w.pth")


def test_too_small_a_disk_is_noticed_before_the_download(site, place, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match=r"needs 256.0 kB, .* has 1.0 kB free.*: free some space"):
        fetch(*place)
    assert leftovers(cache) == []


def test_a_disk_that_fills_up_keeps_the_part_for_later(site, place, cache, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, chunk):
            self.file.write(chunk[:5000])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *args: Full(open(*args)), raising=False)
    with pytest.raises(WeightsError, match="No space left on device.*: free some space and repeat the command"):
        fetch(*place)
    monkeypatch.undo()
    assert fetch(*place).read_bytes() == BODY
    assert site.requests[-1] == ("/w.pth", "bytes=5000-")


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write .*/file/w.pth"):
        fetch(place[0], tmp_path / "file" / "w.pth")


def test_offline_nothing_is_asked(site, place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="offline mode forbids"):
        fetch(*place)
    assert site.requests == []


def test_files_of_this_machine_can_be_fetched_offline(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "offline", True)
    (tmp_path / "w ü.pth").write_bytes(BODY)
    assert fetch((tmp_path / "w ü.pth").as_uri(), cache / "w.pth", sha256=SHA).read_bytes() == BODY
    with pytest.raises(WeightsError, match="there is no file /nowhere/w.pth"):
        fetch("file:///nowhere/w.pth", cache / "v.pth")


def test_other_schemes_are_refused(cache):
    with pytest.raises(WeightsError, match="not a URL of http, https or file"):
        fetch("ftp://x.org/w.pth", cache / "w.pth")


def test_processes_that_start_together_download_once(site, place):
    site.tricks["/w.pth"] = [("slow", 0.1)]
    code = (
        "import sys; from visionattn.weights.download import fetch; "
        "print(flush=True); sys.stdin.readline(); fetch(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, place[0], str(place[1])]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for process in processes:
        process.stdout.readline()  # has imported everything
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert place[1].read_bytes() == BODY and len(site.requests) == 1
