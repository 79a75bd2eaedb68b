"""Fetching a file so that a half, wrong or foreign one never gets its name."""

import contextlib
import errno
import hashlib
import http.client
import os
import random
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock
from torch.hub import tqdm

from visionattn.errors import amount, one_line
from visionattn.weights.errors import WeightsError
from visionattn.weights.files import refuse_page
from visionattn.weights.options import settings

__all__ = ["fetch", "sha256_of"]

CHUNK = 1 << 20
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that another attempt may change
LONGEST_WAIT = 60.0


class NotThere(WeightsError):
    """This place does not have the file; another may."""


class Interrupted(Exception):
    """An attempt that ended early; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: object, wait: float | None = None) -> None:
        super().__init__(one_line(reason))
        self.wait = wait


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, except away from an encrypted connection."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise WeightsError(f"{req.full_url} redirects to {newurl}, which is not encrypted: refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(urls: str | Sequence[str], target: str | Path, sha256: str | None = None, size: int | None = None) -> Path:
    """Download a file unless it is there, in full or not at all.

    A partial download is kept beside the target and continued by the next call. Processes that want the same file
    wait for the one that is fetching it.

    Args:
        urls: Places to try in turn, ``https://``, ``http://`` or ``file://``; the next one where a file is missing.
        target: Where the file goes.
        sha256: Its expected hash, or the first digits of it.
        size: Its expected length in bytes.

    Returns:
        ``target``.

    Raises:
        WeightsError: Saying why the file cannot be had.
    """
    target = Path(target)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists():  # another process may have brought it meanwhile
                _fetch([urls] if isinstance(urls, str) else list(urls), target, sha256, size)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and repeat the command, which goes on where it stopped" if full else "check the folder"
        raise WeightsError(f"cannot write {target} ({one_line(error)}): {fix}") from error
    return target


def _fetch(urls: list[str], target: Path, sha256: str | None, size: int | None) -> None:
    absent = []
    for url in urls:
        # Another place may have another file of this name: each has its own partial one.
        part = target.with_name(f".{target.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
        try:
            resumed = _transfer(url, part, sha256, size, target.name)
            try:
                _check(url, part, sha256, size)
            except WeightsError:
                if not resumed:
                    raise
                _transfer(url, part, sha256, size, target.name)  # what an earlier call had left may have been stale
                _check(url, part, sha256, size)
        except NotThere as error:
            absent.append(str(error))
            continue
        os.replace(part, target)
        _validator(part).unlink(missing_ok=True)
        return
    raise WeightsError("; ".join(absent))


def _check(url: str, part: Path, sha256: str | None, size: int | None) -> None:
    """Remove and refuse a complete download that is not the expected file."""
    try:
        refuse_page(part, url)
        if size is not None and part.stat().st_size != size:
            raise WeightsError(f"{url} has {part.stat().st_size} bytes instead of {size}: it is not the published file")
        if sha256 is not None and not (digest := sha256_of(part)).startswith(sha256.lower()):
            raise WeightsError(f"{url} has SHA-256 {digest} instead of {sha256}: it is not the published file")
    except WeightsError:
        _discard(part)
        raise


def _transfer(url: str, part: Path, sha256: str | None, size: int | None, name: str) -> bool:
    """Bring ``url`` into ``part``, attempt after attempt; True if the start of it was there before."""
    if part.exists() and sha256 is None and not _validator(part).exists():
        _discard(part)  # nothing would tell whether the rest belongs to the same file
    resumed, failures = part.exists(), 0
    with contextlib.ExitStack() as stack:
        bar = None

        def progress(done: int, total: int | None) -> None:
            nonlocal bar
            if bar is None:
                off = None if settings.progress else True  # None: on terminals only
                bar = stack.enter_context(tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=off))
            bar.update(done - bar.n)

        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _attempt(url, part, size, progress)
                return resumed
            except (Interrupted, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                    raise
                gained = part.exists() and part.stat().st_size > before
                failures = 1 if gained else failures + 1
                if failures > settings.retries:
                    raise WeightsError(
                        f"{url} cannot be downloaded: {one_line(error)}, after {failures} attempts; repeat the command "
                        "to go on where it stopped"
                    ) from error
                wait = settings.backoff * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(LONGEST_WAIT, max(wait, getattr(error, "wait", None) or 0.0)))


def _attempt(url: str, part: Path, size: int | None, progress: Callable[[int, int | None], None]) -> None:
    """One connection: append to ``part`` what it lacks."""
    start = part.stat().st_size if part.exists() else 0
    with _open(url, start, part) as response:
        length = response.headers.get("Content-Length")
        if start and getattr(response, "status", 206) != 206:
            start = 0  # the server sends the whole file, perhaps because it has changed
        total = start + int(length) if length is not None else None
        if size is not None and total is not None and total != size:
            _discard(part)
            raise WeightsError(f"{url} has {total} bytes instead of {size}: it is not the published file")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise OSError(errno.ENOSPC, f"needs {amount(total - start)}, {part.parent} has {amount(free)} free")
        if response.headers.get("ETag") or response.headers.get("Last-Modified"):
            _validator(part).write_text(response.headers.get("ETag") or response.headers["Last-Modified"])
        else:
            _validator(part).unlink(missing_ok=True)
        done = start
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            progress(done, total)
            while chunk := response.read1(CHUNK):  # read() would lose what came before a timeout
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
        if total is not None and done != total:
            raise Interrupted(f"the connection ended after {done} of {total} bytes")


def _open(url: str, start: int, part: Path):
    """The answer to a request for ``url`` from byte ``start`` on."""
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme == "file":
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        if not path.is_file():
            raise NotThere(f"there is no file {path}")
        _discard(part)
        return urllib.request.urlopen(path.as_uri())
    if scheme not in ("http", "https"):
        raise WeightsError(f"{url} is not a URL of http, https or file")
    if settings.is_offline():
        raise NotThere(f"{url} is not in the cache, and offline mode forbids to download it")
    headers = {"User-Agent": "visionattn", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if _validator(part).exists() and not (validator := _validator(part).read_text()).startswith("W/"):
            headers["If-Range"] = validator
    try:
        opener = urllib.request.build_opener(Redirects)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=settings.timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the file has changed: start again
            _discard(part)
            raise Interrupted("the server refused to continue") from error
        if error.code in PASSING:
            wait = error.headers.get("Retry-After", "")
            wait = float(wait) if wait.isdigit() else None
            raise Interrupted(f"the server answers {error.code} {error.reason}", wait) from error
        raise NotThere(f"{url} answers {error.code} {error.reason}") from error


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _validator(part: Path) -> Path:
    """Holds what identifies the version of the file that ``part`` is the start of."""
    return part.with_suffix(".version")
