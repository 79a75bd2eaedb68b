"""Which files of a folder are images: one list of endings, one walk, and an account of what is left out."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from visionattn.errors import UserError, some
from visionattn.train.data.pictures import formats

# What operating systems put beside the files; names that begin with a dot are hidden too.
_LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir"}


@dataclass
class Found:
    """What lies in a folder.

    Attributes:
        images: Paths of the images, by name in each folder.
        others: Paths of what is not used, by what it is.
    """

    images: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, entry: os.DirEntry, kinds: frozenset[str]) -> None:
        """Take in a file."""
        if is_image(entry.path, kinds):
            self.images.append(entry.path)
        elif not is_hidden(entry.name):
            self.others["without the ending of an image"].append(entry.path)
        elif _ending(entry.name) in kinds:
            self.hide(entry)

    def hide(self, entry: os.DirEntry) -> None:
        """Take in something hidden."""
        self.others["hidden"].append(entry.path)

    def warn(self, folder: str | Path, **where: object) -> None:
        """Print how many files are not used and which, if there are any.

        Args:
            folder: What their names are relative to.
            **where: Arguments of ``print``.
        """
        kinds = (
            f"{len(files)} {kind} ({some(os.path.relpath(file, folder) for file in files)})"
            for kind, files in self.others.items()
            if files
        )
        if text := ", ".join(kinds):
            print(f"warning: left out in {folder}: {text}", **where)


def endings() -> frozenset[str]:
    """How the names of images end, in small letters: all that Pillow reads here, its plugins included."""
    known = {*formats(), "MPO"}  # the latter is opened as JPEG
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant to be seen."""
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS


def is_image(path: str, kinds: frozenset[str]) -> bool:
    """Whether a name is that of an image, of an ending among ``kinds``, that is not hidden."""
    name = os.path.basename(path)
    return _ending(name) in kinds and not is_hidden(name)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def entries(folder: str | Path) -> list[os.DirEntry]:
    """What lies directly in a folder, by name.

    Raises:
        UserError: If it cannot be listed.
    """
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}. Make it readable, or remove it") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one.

    Raises:
        UserError: If no one can tell, as of a link that leads to itself.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"cannot follow {entry.path}: {error.strerror}. Mend or remove it") from error


def find_images(folder: str | Path, kinds: Iterable[str] | None = None) -> Found:
    """The images in a folder and in those below it; links are followed, hidden folders are not entered.

    Args:
        folder: Where to look.
        kinds: Endings of the names that count, if not :func:`endings`.

    Raises:
        UserError: If a folder cannot be listed, or a link leads back to a folder around it.
    """
    found = Found()
    _walk(str(Path(folder)), frozenset(kinds or endings()), found, ())
    return found


def _walk(folder: str, kinds: frozenset[str], found: Found, around: tuple[str, ...]) -> None:
    around = (*around, os.path.realpath(folder))
    for entry in entries(folder):
        if not is_folder(entry):
            found.add(entry, kinds)
        elif is_hidden(entry.name):
            found.hide(entry)
        elif entry.is_symlink() and (target := os.path.realpath(entry.path)) in around:
            raise UserError(f"{entry.path} is a link back to {target}, a folder around it: remove the link")
        else:
            _walk(entry.path, kinds, found, around)


class ByStem:
    """Finds images directly in a folder by their names without ending, for lists that name none.

    Args:
        folder: Where they are.
        usual: The ending that is taken if there are several.
    """

    def __init__(self, folder: Path, usual: str) -> None:
        self.folder, self.usual = folder, usual
        self.others: dict[str, Path] | None = None

    def __call__(self, stem: str) -> Path:
        """The image called ``stem``; a path where nothing is if there is none."""
        path = self.folder / f"{stem}{self.usual}"
        if os.path.lexists(path) or not self.folder.is_dir():
            return path
        if self.others is None:
            kinds = endings()
            files = [Path(entry.path) for entry in entries(self.folder) if is_image(entry.path, kinds)]
            self.others = {file.stem: file for file in files}
        return self.others.get(stem, path)
