"""What timm's readers of folders and tars take for images and classes: all that Pillow reads, and nothing hidden."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from timm.data.readers import get_img_extensions, set_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from visionattn.errors import UserError, some
from visionattn.train.data.finder import Found, endings, entries, is_folder, is_hidden, is_image


class ClassFolders(Reader):
    """The images of an image folder and their classes, in timm's order. Gives paths, so that nothing is opened early.

    Args:
        folder: Holds one folder per class.
        known: The classes that the model learns, if they come from another split.
        kinds: Endings of the names that count, if not all that are images'.

    Attributes:
        class_to_idx: The target of each class.
        samples: Path and target of each image.
        found: An account of what is left out.

    Raises:
        UserError: If there is no class, one is empty, has folders inside or is not known.
    """

    def __init__(self, folder: Path, known: dict[str, int] | None = None, kinds: list[str] | None = None) -> None:
        super().__init__()
        self.found, counted, classes = Found(), frozenset(kinds or endings()), []
        for entry in entries(folder):
            if not is_folder(entry):
                self.found.others["outside of the class folders"] += [] if is_hidden(entry.name) else [entry.path]
            elif is_hidden(entry.name):
                self.found.hide(entry)
            else:
                classes.append(entry)
        classes.sort(key=lambda entry: natural_key(entry.name))
        if not classes:
            raise UserError(
                f"no class folders in {folder}: expected {folder / 'CLASS' / 'IMAGE.jpg'}; --data.train_split, "
                "--data.val_split and --data.test_split name other folders"
            )
        names = [entry.name for entry in classes]
        files = {entry.name: self._images(entry.path, counted) for entry in classes}
        if empty := [entry.path for entry in classes if not files[entry.name]]:
            raise UserError(f"no images in class folder {some(empty)}: fill or remove it")
        if known is not None and (extra := [name for name in names if name not in known]):
            raise UserError(f"{folder} has classes that training does not know: {some(extra)}. Remove or rename them")
        self.class_to_idx = known or {name: index for index, name in enumerate(names)}
        samples = [(file, self.class_to_idx[name]) for name in names for file in files[name]]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def _images(self, folder: str, kinds: frozenset[str]) -> list[str]:
        part = Found(others=self.found.others)
        for entry in entries(folder):
            if not is_folder(entry):
                part.add(entry, kinds)
            elif is_hidden(entry.name):
                part.hide(entry)
            else:
                raise UserError(f"class folder {folder} has folders inside: images must lie directly in it")
        return part.images

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.samples[index][0]
        return os.path.basename(file) if basename else file


@contextmanager
def all_images_in_tars() -> Iterator[None]:
    """Lets timm's reader of tars find what is not PNG or JPEG too."""
    before = get_img_extensions()
    set_img_extensions(endings())
    try:
        yield
    finally:
        set_img_extensions(before)


def drop_hidden(reader: ReaderImageInTar) -> None:
    """Take hidden files, and classes that are hidden folders, out of a tar."""
    kept = [not _any_hidden(os.path.normpath(sample[0].path)) for sample in reader.samples]
    used, targets = np.unique(reader.targets[kept], return_inverse=True)
    names = [reader.class_idx_to_name[index] for index in used.tolist()]
    reader.samples, reader.targets = reader.samples[kept], targets
    reader.class_name_to_idx = {name: index for index, name in enumerate(names)}


def is_image_below(path: str, root: str, kinds: frozenset[str]) -> bool:
    """Whether ``path`` is an image with an ending among ``kinds``, and nothing from ``root`` to it is hidden."""
    return is_image(path, kinds) and not _any_hidden(os.path.relpath(path, root))


def _any_hidden(path: str) -> bool:
    return any(map(is_hidden, path.split(os.sep)))
