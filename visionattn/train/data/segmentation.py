"""Images with a class per pixel: the data set layouts that papers use, folders of your own, and generated scenes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from visionattn.errors import UserError, some
from visionattn.train.data.base import require_distinct
from visionattn.train.data.dense import DenseBatch, DenseData, collate
from visionattn.train.data.finder import Found
from visionattn.train.data.joint import IGNORE, eval_image, train_segmentation
from visionattn.train.data.layouts import INVALID, LAYOUTS, find_pairs, lookup, read_text, voc_palette
from visionattn.train.data.pictures import open_classes, open_image, turned
from visionattn.train.data.sampling import UNREADABLE, spread, unreadable
from visionattn.train.data.scenes import DIGITS, Scenes


class Pairs:
    """Images and class maps from files.

    Args:
        pairs: Files of each image and its class map.
        table: From the values in the files to classes.
        transform: Applied to both, in training.
        sides: Short and long side at which images are evaluated; class maps keep their size.
    """

    def __init__(
        self, pairs: list[tuple[Path, Path]], table: np.ndarray, transform: Any, sides: tuple[int, int]
    ) -> None:
        self.pairs, self.table, self.transform, self.sides = pairs, table, transform, sides

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, classes = self.read(index)
        if self.transform is None:
            return eval_image(image, *self.sides), classes
        image, classes = self.transform(tv_tensors.Image(image), tv_tensors.Mask(classes))
        return image.as_subclass(Tensor), classes.as_subclass(Tensor)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] and class map [H, W], both uint8."""
        file, mask_file = self.pairs[index]
        image, classes = F.pil_to_tensor(open_image(file)), self.classes(index)
        if classes.shape != image.shape[-2:]:
            sizes = [" x ".join(map(str, reversed(shape))) for shape in (image.shape[-2:], classes.shape)]
            differ = f"{file} is {sizes[0]}, its class map {mask_file} {sizes[1]} pixels"
            raise UserError(f"{differ}: they must be the same{turned(file)}")
        return image, classes

    def classes(self, index: int) -> Tensor:
        """Class map [H, W], uint8."""
        file = self.pairs[index][1]
        values = open_classes(file)
        classes = self.table[values]
        if (invalid := classes == INVALID).any():
            found = np.unique(values[invalid])
            known = np.flatnonzero(self.table != INVALID)
            raise UserError(
                f"{file} has values that are no class: {some(found)}. The classes are {ranges(known)}; "
                "give all classes, or name further values to ignore with --data.ignored"
            )
        return torch.from_numpy(classes)


def ranges(values: np.ndarray) -> str:
    """Numbers in short, such as "0-20, 255"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def one_class(data: Pairs, first: Sequence[int], names: list[str]) -> str:
    """What is wrong if there are not two classes in all the class maps that can be read, and what may help.

    Args:
        data: Where they are.
        first: Which of them to look at first: the rest is only read if these have one class.
        names: Of the classes.
    """
    seen: set[int] = set()
    for index in dict.fromkeys([*first, *range(len(data))]):
        try:
            seen.update(np.flatnonzero(np.bincount(data.classes(index).flatten(), minlength=256)).tolist())
        except UNREADABLE:
            continue
        if len(seen - {IGNORE}) > 1:
            return ""
    if not seen:
        return ""
    only = f"only the class {names[min(seen)]!r}" if seen - {IGNORE} else "no class"
    if IGNORE not in seen:
        return f"the class maps have {only}: there is nothing to tell apart. Give maps that show the other classes"
    ignored = ranges(np.flatnonzero(data.table == IGNORE))
    return (
        f"the class maps have {only} and what is ignored (the values {ignored}). If such a value is a class, say which "
        "value each class has: --data.values [0,255], say"
    )


class SegmentationData(DenseData):
    """Base of the segmentation data modules.

    Attributes:
        palette: A colour per class, for pictures.

    Args:
        img_size: Side of the training crop.
        short_side: Short side of the images, at scale 1 in training; ``img_size`` if not given.
        long_side: Largest long side in evaluation.
        scale: Smallest and largest factor of ``short_side`` in training.
        max_class_share: A training crop in which one class covers more than this is drawn again; 1 for any crop.
        hflip: Probability of a mirror image.
        photometric: Change brightness, contrast, saturation and hue.
    """

    palette: list[tuple[int, int, int]]

    def __init__(
        self,
        img_size: int,
        short_side: int | None,
        long_side: int,
        scale: tuple[float, float],
        max_class_share: float,
        hflip: float,
        photometric: bool,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        short_side = short_side or img_size
        for name, value in (("img_size", img_size), ("short_side", short_side), ("long_side", long_side)):
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"data.scale is {list(scale)}: the smallest and the largest factor, greater than 0")
        self.sides = (short_side, long_side)
        self.augment = train_segmentation(img_size, short_side, tuple(scale), max_class_share, hflip, photometric)
        self.preprocess = dict(input_size=[3, img_size, img_size], short_side=short_side, long_side=long_side)

    def card(self) -> dict[str, Any]:
        return super().card() | dict(palette=[list(color) for color in self.palette])

    def empty(self, image: Tensor) -> Tensor:
        return torch.full(image.shape[-2:], IGNORE, dtype=torch.uint8)

    def collate(self, training: bool):
        return _stacked if training else _listed


def _stacked(entries: list[tuple]) -> DenseBatch:
    return collate(entries, stack=True)


def _listed(entries: list[tuple]) -> DenseBatch:
    return collate(entries, stack=False)


class Masks(SegmentationData):
    """Images and class maps in files.

    Args:
        root: Folder of the data set.
        layout: "folders": images/SPLIT/NAME.jpg and masks/SPLIT/NAME.png, classes counted from 0; or the layout of
            "ade20k", "cityscapes" or "voc" as they are distributed.
        classes: Names of the classes of "folders"; its file classes.txt, one per line, if not given.
        values: Value in the class maps of each class, such as [0, 255]; the layout's own if not given.
        ignored: Values in the class maps that neither train nor count, unless they are a class's.
        train_split: Name of the training split, if not the layout's own.
        val_split: Name of the validation split, if not the layout's own.
        test_split: Name of the test split; if not given "test" of "folders", or the validation split where there is
            none and in the other layouts, whose test images have no public class maps.
        img_size: Side of the training crop.
        short_side: Short side of the images, at scale 1 in training; ``img_size`` if not given.
        long_side: Largest long side in evaluation.
        scale: Smallest and largest factor of ``short_side`` in training.
        max_class_share: A training crop in which one class covers more than this is drawn again; 1 for any crop.
        hflip: Probability of a mirror image.
        photometric: Change brightness, contrast, saturation and hue.
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test.
        num_workers: Processes that load images, for each training process; up to 8 of the cores if not given.
        check_images: Pairs, spread over each split, that are read before the run starts; 0 for none, -1 for all.
    """

    def __init__(
        self,
        root: str = "",
        layout: Literal["folders", "ade20k", "cityscapes", "voc"] = "folders",
        classes: list[str] | None = None,
        values: list[int] | None = None,
        ignored: list[int] = [255],  # noqa: B006  (never changed; the parser wants a list)
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        img_size: int = 512,
        short_side: int | None = None,
        long_side: int = 2048,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        batch_size: int = 4,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        check_images: int = 100,
    ) -> None:
        workers = min(8, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
        augment = (short_side, long_side, scale, max_class_share, hflip, photometric)
        super().__init__(img_size, *augment, batch_size, eval_batch_size, workers)
        if not root:
            raise UserError("no data: give the folder with --data.root")
        if not Path(root).is_dir():
            raise UserError(f"no such data folder: {root}. Give an existing one with --data.root")
        self.root, self.layout, self.check_images = Path(root), LAYOUTS[layout], check_images
        self.found: dict[str, Found] = {}
        own = {k: v for k, v in (("train", train_split), ("val", val_split), ("test", test_split)) if v}
        self.splits = self.layout.splits | own
        if not test_split and not ("test" in self.splits and self._images("test").is_dir()):
            self.splits["test"] = self.splits["val"]
        self.class_names = classes or self._classes()
        if classes or not self.layout.classes:  # a layout's own are not the user's to mend
            require_distinct(self.class_names, "data.classes" if classes else self.root / "classes.txt")
        self.num_classes = len(self.class_names)
        if not 2 <= self.num_classes < INVALID:
            raise UserError(f"data.classes has {self.num_classes} classes: 2 to {INVALID - 1} are possible")
        values = values or self.layout.values or list(range(self.num_classes))
        if len(values) != self.num_classes:
            raise UserError(
                f"data.classes has {self.num_classes} names, but values are given for {len(values)} classes"
            )
        if len(set(values)) < len(values) or not all(0 <= value <= 255 for value in (*values, *ignored)):
            raise UserError(f"data.values is {values}, data.ignored {ignored}: from 0 to 255, no two classes the same")
        ignored = {0, *ignored} if self.layout.values and 0 not in values else ignored
        self.table = lookup(values, ignored, self.layout.others)
        self.palette = self.layout.palette or voc_palette(self.num_classes)

    def origin(self, split: str) -> str:
        listing = self.layout.listing
        return str(self.root / listing.format(split=self.splits[split]) if listing else self._images(split))

    def dataset(self, split: str):
        pairs, self.found[split] = find_pairs(self.root, self._layout(split), split)
        transform = self.augment if split == "train" else None
        return Pairs(pairs, self.table, transform, self.sides), lambda index: str(pairs[index][0])

    def check(self, splits: list[str]) -> None:
        for split in splits:
            data, name = self.dataset(split)
            self.found[split].warn(self.root)
            checked = spread(len(data), self.check_images)
            if bad := unreadable(data.read, checked):
                print(
                    f"warning: {len(bad)} unreadable images or class maps are skipped: {some(map(name, bad))} "
                    f"(the first: {next(iter(bad.values()))})"
                )
            if checked and (fault := one_class(data, checked, self.class_names)):
                if split == "train":
                    raise UserError(f"{self.origin(split)}: {fault}")
                print(f"warning: {self.origin(split)}: {fault}")

    def _images(self, split: str) -> Path:
        return self.root / self.layout.images.format(split=self.splits[split])

    def _layout(self, split: str):
        from dataclasses import replace

        return replace(self.layout, splits=self.splits)

    def _classes(self) -> list[str]:
        ade20k = self.root / "objectInfo150.txt"
        if self.layout is LAYOUTS["ade20k"] and ade20k.is_file():
            rows = read_text(ade20k).splitlines()[1:]
            return [row.split("\t")[-1].split(",")[0].strip() for row in rows]
        if self.layout.classes:
            return list(self.layout.classes)
        file = self.root / "classes.txt"
        if not file.is_file():
            raise UserError(f"the classes have no names: give --data.classes, or a file {file} with one per line")
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]


class SceneMasks(SegmentationData):
    """Generated scenes of digits on photographs with the class of every pixel: the photograph, or one of ten digits.

    Args:
        img_size: Side of the images.
        train_scenes: Training scenes in an epoch.
        val_scenes: Validation scenes, always the same ones.
        fresh: Make other training scenes in every epoch.
        objects: Smallest and largest number of digits in a scene.
        sides: Smallest and largest side of a digit, as a share of the image.
        photometric: Change brightness, contrast, saturation and hue in training.
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test.
        num_workers: Processes that make scenes, for each training process.
    """

    def __init__(
        self,
        img_size: int = 128,
        train_scenes: int = 1000,
        val_scenes: int = 100,
        fresh: bool = True,
        objects: tuple[int, int] = (1, 4),
        sides: tuple[float, float] = (0.2, 0.5),
        photometric: bool = False,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            img_size,
            img_size,
            4 * img_size,
            (1.0, 1.0),
            1.0,
            0.0,
            photometric,
            batch_size,
            eval_batch_size,
            num_workers,
        )
        self.class_names = ["photograph", *DIGITS]
        self.num_classes, self.palette = len(self.class_names), voc_palette(len(self.class_names))
        self.counts, self.fresh, self.photometric = {"train": train_scenes}, fresh, photometric
        self.counts |= {"val": val_scenes, "test": val_scenes}
        self.settings = dict(size=img_size, objects=objects, sides=sides)

    def dataset(self, split: str):
        training = split == "train"
        scenes = Scenes("train" if training else "val", self.counts[split], self.fresh and training, **self.settings)
        return SceneMaps(scenes, self.augment if training and self.photometric else None), "scene {}".format


class SceneMaps:
    """Scenes as images [3, H, W] and class maps [H, W]."""

    def __init__(self, scenes: Scenes, transform: Any) -> None:
        self.scenes, self.transform = scenes, transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scenes[index]
        image, classes = torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.classes)
        if self.transform is not None:
            image, classes = self.transform(tv_tensors.Image(image), tv_tensors.Mask(classes))
        return image.as_subclass(Tensor), classes.as_subclass(Tensor)
