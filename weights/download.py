"""Fetching a file so that a half, wrong or foreign one never gets its name."""

import contextlib
import errno
import hashlib
import http.client
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from torch.hub import tqdm

from visionattn.errors import amount, one_line
from visionattn.weights.connect import LEAST, connect, header
from visionattn.weights.errors import WeightsError
from visionattn.weights.files import begins_as_weights, refuse_answer
from visionattn.weights.options import settings

__all__ = ["fetch", "sha256_of"]

CHUNK = 1 << 20
LARGEST = 8 * 10**9  # bytes of a file of which nothing is known
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that another attempt may change
LONGEST_WAIT = 60.0


class NotThere(WeightsError):
    """This place does not have the file; another may."""


class Interrupted(Exception):
    """An attempt that ended early; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: object, wait: float | None = None) -> None:
        super().__init__(one_line(reason))
        self.wait = wait


class Wanted(NamedTuple):
    """What is known of a file before it arrives; see ``fetch``."""

    name: str
    sha256: str | None
    size: int | None
    check: Callable[[Path], object] | None
    limit: int


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    urls: str | Sequence[str],
    target: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    check: Callable[[Path], object] | None = None,
    limit: int = LARGEST,
) -> Path:
    """Download a file unless it is there, in full or not at all.

    A partial download is kept beside the target and continued by the next call. Processes that want the same file
    wait for the one that is fetching it.

    Args:
        urls: Places to try in turn, ``https://``, ``http://`` or ``file://``; the next one where a file is missing.
        target: Where the file goes.
        sha256: Its expected hash, or the first digits of it.
        size: Its expected length in bytes.
        check: Looks at what has arrived before it gets its name, and raises ``WeightsError`` if it is of no use.
        limit: Bytes at which a file whose length is not known is given up.

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
                wanted = Wanted(target.name, sha256, size, check, limit)
                _fetch([urls] if isinstance(urls, str) else list(urls), target, wanted)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and repeat the command, which goes on where it stopped" if full else "check the folder"
        raise WeightsError(f"cannot write {target} ({one_line(error)}): {fix}") from error
    return target


def _fetch(urls: list[str], target: Path, wanted: Wanted) -> None:
    absent = []
    for url in urls:
        # Another place may have another file of this name: each has its own partial one.
        part = target.with_name(f".{target.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
        try:
            resumed = _transfer(url, part, wanted)
            try:
                _check(url, part, wanted)
            except WeightsError:
                if not resumed:
                    raise
                _transfer(url, part, wanted)  # what an earlier call had left may have been stale
                _check(url, part, wanted)
        except NotThere as error:
            absent.append(str(error))
            continue
        os.replace(part, target)
        _validator(part).unlink(missing_ok=True)
        return
    raise WeightsError("; ".join(absent))


def _check(url: str, part: Path, wanted: Wanted) -> None:
    """Remove and refuse a complete download that is not the expected file."""
    sha256, size = wanted.sha256, wanted.size
    try:
        refuse_answer(part, url)
        if size is not None and part.stat().st_size != size:
            raise WeightsError(f"{url} has {part.stat().st_size} bytes instead of {size}: it is not the published file")
        if sha256 is not None and not (digest := sha256_of(part)).startswith(sha256.lower()):
            raise WeightsError(f"{url} has SHA-256 {digest} instead of {sha256}: it is not the published file")
        own = url.startswith("file:") and not begins_as_weights(part)  # the user's folder, with a form of its own
        if wanted.check is not None and not own:
            try:
                wanted.check(part)
            except WeightsError as error:
                raise WeightsError(
                    f"{url} gives no weights: {str(error).replace(str(part), 'what it sends')}"
                ) from error
    except WeightsError:
        _discard(part)
        raise


def _transfer(url: str, part: Path, wanted: Wanted) -> bool:
    """Bring ``url`` into ``part``, attempt after attempt; True if the start of it was there before."""
    if part.exists() and wanted.sha256 is None and not _validator(part).exists():
        _discard(part)  # nothing would tell whether the rest belongs to the same file
    resumed, failures = part.exists(), 0
    with contextlib.ExitStack() as stack:
        bar = None

        def progress(done: int, total: int | None) -> None:
            nonlocal bar
            if bar is None:
                off = None if settings.progress else True  # None: on terminals only
                bar = stack.enter_context(tqdm(total=total, desc=wanted.name, unit="B", unit_scale=True, disable=off))
            bar.update(done - bar.n)

        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _attempt(url, part, wanted, progress)
                return resumed
            except (Interrupted, OSError, http.client.HTTPException) as error:
                if wanted.sha256 is None and not _validator(part).exists():
                    _discard(part)  # the next answer may be of another file
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                    raise
                gained = part.exists() and part.stat().st_size >= before + LEAST
                failures = 1 if gained else failures + 1
                if failures > settings.retries:
                    raise WeightsError(
                        f"{url} cannot be downloaded: {one_line(error)}, after {failures} attempts; repeat the command "
                        "to go on where it stopped"
                    ) from error
                wait = settings.backoff * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(LONGEST_WAIT, max(wait, getattr(error, "wait", None) or 0.0)))


def _attempt(url: str, part: Path, wanted: Wanted, progress: Callable[[int, int | None], None]) -> None:
    """One connection: append to ``part`` what it lacks."""
    start = part.stat().st_size if part.exists() else 0
    with _open(url, start, part) as response:
        headers, status = response.headers, getattr(response, "status", None) or 200
        if (encoding := header(url, headers, "Content-Encoding") or "identity").lower() != "identity":
            raise WeightsError(f"{url} is sent as {encoding[:40]}, which was not asked for: refused")
        length = _length(url, header(url, headers, "Content-Length"))
        version = header(url, headers, "ETag") or header(url, headers, "Last-Modified")
        version = version if version and version.isascii() and version.isprintable() else None
        total = None
        if status == 206:
            total = _resumed_total(url, header(url, headers, "Content-Range"), start, length, version, part, wanted)
        else:  # the server sends the whole file, perhaps because it has changed
            start, total = 0, length
        if wanted.size is not None and total is not None and total != wanted.size:
            _discard(part)
            raise WeightsError(f"{url} has {total} bytes instead of {wanted.size}: it is not the published file")
        most = wanted.limit if wanted.size is None else wanted.size
        if total is not None and total > most:
            _discard(part)
            raise WeightsError(f"{url} claims {amount(total)}, more than {amount(most)}: these are not the weights")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise OSError(errno.ENOSPC, f"needs {amount(total - start)}, {part.parent} has {amount(free)} free")
        if version:
            _validator(part).write_text(version, encoding="ascii")
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
                response.moved = done - start
                progress(done, total)
                if done > (most if total is None else total):
                    break
        if done > (most if total is None else total):
            _discard(part)
            raise WeightsError(f"{url} does not end after {amount(done)}: these are not the weights")
        if total is not None and done != total:
            raise Interrupted(f"the connection ended after {done} of {total} bytes")


def _length(url: str, text: str | None) -> int | None:
    """The length that a header claims."""
    if text is not None and not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise WeightsError(f"{url} answers with a length of {text[:40]!r}: try another place, or a mirror")
    return None if text is None else int(text)


def _resumed_total(
    url: str, text: str | None, start: int, length: int | None, version: str | None, part: Path, wanted: Wanted
) -> int:
    """The length of the whole file, if an answer is the rest of the very file that ``part`` is the start of."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", (text or "").strip())
    first, last, total = (int(group) if group != "*" else None for group in match.groups()) if match else (None,) * 3
    fits = match is not None and first == start > 0 and (length is None or length == last - first + 1)
    if not fits or (total is not None and total != last + 1):
        _discard(part)
        raise Interrupted(f"the server continues with {(text or 'what it does not say')[:60]!r} instead of {start}")
    kept = _validator(part).read_text(encoding="ascii") if _validator(part).exists() else None
    if wanted.sha256 is None and (version is None or version != kept):
        _discard(part)
        raise Interrupted("the file has changed meanwhile")
    return last + 1


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
        if _validator(part).exists() and not (validator := _validator(part).read_text(encoding="ascii")).startswith(
            "W/"
        ):
            headers["If-Range"] = validator
    try:
        return connect(url, headers)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing is left to send, or the file has changed: start again
            _discard(part)
            raise Interrupted("the server refused to continue") from error
        if error.code in PASSING:
            wait = error.headers.get("Retry-After", "")
            wait = float(wait) if re.fullmatch(r"[0-9]{1,6}", wait) else None
            raise Interrupted(f"the server answers {error.code} {error.reason}", wait) from error
        raise NotThere(f"{url} answers {error.code} {one_line(error.reason)[:80]}") from error
    except ValueError as error:  # an address that is none, of the user or in a redirect
        raise WeightsError(f"{url} leads nowhere: {one_line(error)[:200]}") from error


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _validator(part: Path) -> Path:
    """Holds what identifies the version of the file that ``part`` is the start of."""
    return part.with_suffix(".version")
