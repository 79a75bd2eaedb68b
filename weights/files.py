"""What a file is by its first and last bytes, before any reader is let near it."""

import re
import struct
import zipfile
from pathlib import Path

from visionattn.errors import amount, one_line
from visionattn.weights.errors import WeightsError
from visionattn.weights.legacy import is_tar

__all__ = ["begins_as_weights", "kind_of", "refuse_answer"]

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote before 1.6 begins with
LARGEST_HEADER = 16_000_000  # of a safetensors file; 100,000 tensors need as much
LARGEST_LISTING = 16_000_000  # of an archive
LARGEST_PICKLE = 8_000_000  # which names the tensors and holds settings
OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to: run git lfs pull"),
    (b"%PDF", "a PDF document"),
    (b"{", "JSON text, which is how servers report errors"),
)


def page(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a web page."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script", b"<!--"))


def refuse_answer(path: Path, origin: str) -> None:
    """Raise if ``path``, fetched from ``origin``, is what servers say instead of sending a file."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if begins_as_safetensors(head, path.stat().st_size):  # whose first bytes, a number, may be any letters
        return
    if not head:
        raise WeightsError(f"{origin} gives an empty file: try again later, or another place")
    if page(head):
        raise WeightsError(f"{origin} gives a web page, not a file: open it in a browser and save the file there")
    if head.lstrip()[:1] in (b"{", b"["):
        raise WeightsError(f"{origin} gives JSON text, which is how servers report errors: {one_line(head[:80])}")


def begins_as_weights(path: Path) -> bool:
    """Whether a file begins as those do that hold weights, however it goes on."""
    with open(path, "rb") as file:
        head = file.read(16)
    return head.startswith((b"PK", LEGACY[:2])) or head[8:9] == b"{"


def begins_as_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes begins with the header of safetensors, and has room for all of that."""
    claims = size >= 10 and len(head) >= 10 and re.match(rb'\{\s*("|\})', head[8:]) is not None
    return claims and struct.unpack("<Q", head[:8])[0] <= min(size - 8, LARGEST_HEADER)


def kind_of(path: str | Path) -> str:
    """``"safetensors"``, ``"zip"`` (torch.save) or ``"legacy"`` (torch.save before 1.6).

    Args:
        path: A file with weights.

    Raises:
        WeightsError: If it is none of these, truncated, or claims more than it can hold.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)

    def refused(reason: str) -> WeightsError:
        return WeightsError(f"{path} is not a checkpoint that can be read: it is {reason}")

    if size == 0:
        raise refused("empty")
    if begins_as_safetensors(head, size):
        return "safetensors"
    if page(head):
        raise refused("a web page saved under this name: open the link in a browser and save the file itself")
    for magic, name in OTHERS:
        if head.startswith(magic):
            raise refused(name)
    if head.startswith(b"PK"):
        _check_zip(path, size, refused)
        return "zip"
    if is_tar(head):
        raise refused("a tar archive: unpack it first")
    if head.startswith(LEGACY):
        return "legacy"
    if size >= 10 and head[8:9] == b"{" and re.match(rb'\{\s*("|\})', head[8:]):
        (length,) = struct.unpack("<Q", head[:8])
        if length > LARGEST_HEADER:
            raise refused(f"a safetensors file whose header claims {amount(length)}")
        raise refused(f"a truncated safetensors file: {amount(size)} do not even hold its header")
    if head[:1] == b"\x80":
        raise refused("a bare pickle, not what torch.save writes")
    raise refused(f"neither safetensors nor written by torch.save (it begins with {head[:8]!r})")


def _check_zip(path: Path, size: int, refused) -> None:
    """Refuse an archive that is cut off, damaged, compressed, or larger inside than outside, and one of too many parts.

    torch.save writes none of them. PyTorch does not look at the checksums, so flipped bits would become weights.
    """
    if (listing := _listing(path, size)) > LARGEST_LISTING:
        raise refused(f"an archive whose list of contents alone claims {amount(listing)}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # what a damaged list raises depends on its bytes
        raise refused(f"a truncated or damaged archive of {amount(size)}: fetch it again") from error
    names = [entry.filename for entry in entries]
    if any(name.endswith(".npy") for name in names):
        raise refused("a NumPy archive (.npz)")
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise refused(
            f"an archive, not what torch.save writes (it holds {', '.join(names[:3]) or 'nothing'}): unpack it"
        )
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise refused("a TorchScript program, which is code: save its state_dict()")
    inside = sum(entry.file_size for entry in entries)
    if inside > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise refused(f"an archive of {amount(size)} that claims {amount(inside)} inside")
    if len(pickles) > 1 or len(set(names)) < len(names):
        raise refused("an archive that holds files of the same name")
    if pickles[0].file_size > LARGEST_PICKLE:
        raise refused(f"an archive whose index of tensors claims {amount(pickles[0].file_size)}")
    if any(entry.CRC for entry in entries if not entry.filename.endswith(".pkl")):  # torch may be told to write none
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except Exception as error:
            raise refused("a damaged archive: fetch it again, or take an earlier checkpoint") from error
        if bad is not None:
            raise refused(
                f"damaged, {bad} has not the checksum that it was written with: fetch it again, or take an "
                "earlier checkpoint"
            )


def _listing(path: Path, size: int) -> int:
    """Bytes that the archive's own list of contents claims, before anything reads that."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 65_600))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        return 0
    (listing,) = struct.unpack("<L", tail[end + 12 : end + 16])
    wide = tail.rfind(b"PK\x06\x06", 0, end)  # as torch.save writes it, of the 64-bit form
    if wide >= 0 and len(tail) >= wide + 56:
        listing = max(listing if listing != 0xFFFFFFFF else 0, struct.unpack("<Q", tail[wide + 40 : wide + 48])[0])
    return listing
