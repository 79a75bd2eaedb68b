"""Any classification data set that timm reads: image folders and tars, Hugging Face, WebDataset, TFDS, torchvision."""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.transforms import Compose

from visionattn.errors import UserError, one_line, some
from visionattn.train.data.base import Data
from visionattn.train.data.finder import endings
from visionattn.train.data.folders import ClassFolders, all_images_in_tars, drop_hidden, is_image_below
from visionattn.train.data.pictures import UnreadableImage, as_seen, open_image
from visionattn.train.data.sampling import spread, unreadable
from visionattn.train.data.transforms import train_transform
from visionattn.weights.card import check_model_name

FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval"), "test": ("test",)}

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class Images(Data):
    """Images that ``timm.data.create_dataset`` reads; a folder holds ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

    Size, normalisation, interpolation and crop follow the model's published ones unless given.

    Args:
        root: Folder of the data set, also of ``train.tar`` and ``val.tar``, or where a downloaded one is kept.
        dataset: Empty for an image folder, else a timm name: ``hfds/...``, ``wds/...``, ``tfds/...``, ``torch/...``.
        train_split: Name of the training split; folders also answer to "training".
        val_split: Name of the validation split; folders also answer to "validation", "valid" and "eval".
        test_split: Name of the test split; if not given a folder's "test", or the validation split where there is none.
        num_classes: Number of classes, where the data set does not tell.
        dataset_args: Further arguments of ``create_dataset`` (``download``, ``input_key``, ``num_samples``, ...).
        model: Whose preprocessing to follow; taken from ``model.name``.
        img_size: Side of the input.
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test; ``batch_size`` if not given.
        num_workers: Processes that load images, for each training process; up to 8 of the cores if not given.
        mean: Normalisation mean per channel.
        std: Normalisation deviation per channel.
        interpolation: Resampling for validation.
        crop_pct: Share of the resized image that the validation crop keeps.
        train_interpolation: Resampling in training; "random" alternates bilinear and bicubic.
        scale: Smallest and largest share of the image that a training crop covers.
        hflip: Probability of a mirror image.
        color_jitter: Strength of brightness, contrast and saturation changes; unused with an augmentation policy.
        auto_augment: timm's policy, such as "rand-m9-mstd0.5-inc1" or "3a".
        re_prob: Probability of erasing a random rectangle.
        re_mode: What the rectangle is filled with.
        check_images: Images, spread over each split, that are decoded before the run starts; 0 for none, -1 for all.
        bad_images: Whether an unreadable image found by that check stops the run. One that turns up in training is
            always named, replaced by its neighbour and counted in the log.
    """

    def __init__(
        self,
        root: str = "",
        dataset: str = "",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        num_classes: int | None = None,
        dataset_args: dict[str, Any] | None = None,
        model: str | None = None,
        img_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        train_interpolation: str = "random",
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        re_mode: Literal["const", "rand", "pixel"] = "pixel",
        check_images: int = 2000,
        bad_images: Literal["error", "skip"] = "error",
    ) -> None:
        workers = min(8, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
        super().__init__(batch_size, eval_batch_size, workers)
        if img_size is not None and img_size < 1:
            raise UserError(f"data.img_size is {img_size}: it must be at least 1")
        self._require_sense(mean, std, interpolation, crop_pct, train_interpolation, scale)
        self.root, self.source, self.dataset_args = root, dataset, dataset_args or {}
        self.splits = {"train": train_split, "val": val_split, "test": test_split or self._test_split(val_split)}
        self.check_images, self.bad_images = check_images, bad_images
        given = dict(img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)
        config = resolve_data_config(given, pretrained_cfg=_published(model))
        self.preprocess = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
        self.augment = dict(
            interpolation=train_interpolation,
            scale=tuple(scale),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            re_prob=re_prob,
            re_mode=re_mode,
        )
        self.class_to_idx = self._classes()
        if not self.class_to_idx and not num_classes:
            raise UserError(f"{dataset!r} does not tell its classes: give --data.num_classes")
        if num_classes and self.class_to_idx and num_classes != len(self.class_to_idx):
            raise UserError(
                f"data.num_classes is {num_classes}, but {root or dataset} has {len(self.class_to_idx)} classes "
                f"({some(self.class_to_idx)}): drop the flag or fix the data"
            )
        names = sorted(self.class_to_idx, key=self.class_to_idx.get)
        self.class_names = names or [str(index) for index in range(num_classes)]
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise UserError(
                f"{root or dataset} has one class ({some(self.class_names)}): there is nothing to tell apart, and the "
                "loss is 0 from the start. Add a class, such as one of everything else"
            )

    def dataset(self, split: str):
        training = split == "train"
        data = self._from_folder(split) if self._is_folder else self._create(split)
        augment = self.preprocess | self.augment
        data.transform = train_transform(**augment) if training else create_transform(**self.preprocess)
        if self._streams_images and "input_img_mode" not in self.dataset_args:
            data.transform = Compose([from_stream, data.transform])
        if hasattr(data, "reader") and not hasattr(data, "set_epoch"):
            return Decoded(data), lambda index: data.filename(index, absolute=True)
        return data, lambda index: f"{index} of {self.source} {self.splits[split]}"

    def origin(self, split: str) -> str:
        if tar := self._tar(split):
            return str(tar)
        return str(self._folder(split)) if self._is_folder else f"{self.source or self.root}, {self.splits[split]}"

    def check(self, splits: list[str]) -> None:
        if len(splits) > 1 and not self.source and Path(self.root).is_file():
            raise UserError(
                f"{self.root} is one file, so that validation would see the training images: make a tar of each split, "
                "train.tar and val.tar, and give the folder that they are in"
            )
        for split in splits:
            data, name = self.dataset(split)
            if self._is_folder:
                data.dataset.reader.found.warn(self._folder(split))
            if not hasattr(data, "__getitem__"):
                continue
            read = data.read if isinstance(data, Decoded) else data.__getitem__
            threads = (
                1 if Path(self.root).is_file() or self._tar(split) else 16
            )  # which would move one another's place in a tar
            if bad := unreadable(read, spread(len(data), self.check_images), threads):
                found = f"{len(bad)} unreadable images in {self.splits[split]}: {some(name(index) for index in bad)}"
                first = f"(the first: {next(iter(bad.values()))})"
                if self.bad_images == "error":
                    raise UserError(f"{found}. Remove them, or skip them with --data.bad_images skip {first}")
                print(f"warning: {found}; they are skipped {first}")

    @property
    def _is_folder(self) -> bool:
        return not self.source and Path(self.root).is_dir() and not self._tar("train") and not self._tar("val")

    def _tar(self, split: str) -> Path | None:
        """The file of a split in a folder of tars; None if there is none."""
        if self.source:
            return None
        tars = (Path(self.root, f"{name}.tar") for name in self._names(split))
        return next((tar for tar in tars if tar.is_file()), None)

    def _names(self, split: str) -> tuple[str, ...]:
        """What a split may be called in a folder, the name that was asked for first."""
        name = self.splits[split]
        return (name, *next((names for names in FOLDERS.values() if name in names), ()))

    @property
    def _is_torch_folder(self) -> bool:
        """Whether torchvision reads an image folder."""
        return self.source.lower() in ("torch/folder", "torch/image_folder")

    @staticmethod
    def _require_sense(
        mean: list[float] | None,
        std: list[float] | None,
        interpolation: str | None,
        crop_pct: float | None,
        train_interpolation: str,
        scale: tuple[float, float],
    ) -> None:
        """Refuse what timm would take and change in silence, or fail at."""
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != 3 or name == "std" and min(values) <= 0):
                above = ", greater than 0" if name == "std" else ""
                raise UserError(f"data.{name} is {values}: give a number for each of the 3 channels{above}")
        for name, value, more in (
            ("interpolation", interpolation, ()),
            ("train_interpolation", train_interpolation, ("random",)),
        ):
            if value is not None and value not in (known := (*INTERPOLATIONS, *more)):
                raise UserError(f"data.{name} is {value!r}: it must be one of {', '.join(known)}")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise UserError(f"data.crop_pct is {crop_pct}: it must be greater than 0 and at most 1")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"data.scale is {list(scale)}: give two shares, the smaller one first, from above 0 to 1")

    def _test_split(self, val_split: str) -> str:
        """What is tested on if nobody says: the test folder if there is one."""
        if self.source and not self._is_torch_folder:
            return val_split
        there = (path for name in FOLDERS["test"] for path in (Path(self.root, name), Path(self.root, f"{name}.tar")))
        return next((path.stem for path in there if path.exists()), val_split)

    def _folder(self, split: str) -> Path:
        name = self.splits[split]
        for candidate in self._names(split):
            if (folder := Path(self.root, candidate)).is_dir():
                return folder
        raise UserError(
            f"no {name!r} folder in {self.root}: expected {Path(self.root, name, 'CLASS', 'IMAGE.jpg')}, "
            "or name the split with --data.train_split, --data.val_split and --data.test_split"
        )

    def _classes(self) -> dict[str, int]:
        if not self.source:
            if not self.root:
                raise UserError("no data: give the image folder with --data.root")
            if not Path(self.root).exists():
                raise UserError(f"no such data folder: {self.root}. Give an existing one with --data.root")
            if Path(self.root).is_file() and Path(self.root).suffix.lower() != ".tar":
                raise UserError(f"{self.root} is no folder of images and no tar: give one of them with --data.root")
        if self._is_folder:
            has_train = any(Path(self.root, name).is_dir() for name in (self.splits["train"], *FOLDERS["train"]))
            return ClassFolders(self._folder("train" if has_train else "val"), kinds=self._kinds).class_to_idx
        tar = "val" if self._tar("val") and not self._tar("train") else "train"
        return class_index(self._create(tar))

    @property
    def _kinds(self) -> list[str] | None:
        """The endings that count, as timm takes them; all images if not given."""
        return [kind for kind in self.dataset_args.get("input_key", "").split(";") if kind] or None

    def _from_folder(self, split: str) -> ImageDataset:
        """The data set of a folder: timm's, with a reader that knows more kinds of images."""
        if unknown := self.dataset_args.keys() - {"input_key", "input_img_mode"}:
            raise UserError(
                f"data.dataset_args has {some(sorted(unknown))}: an image folder takes input_key and input_img_mode"
            )
        folder = self._folder(split)
        reader = ClassFolders(folder, self.class_to_idx, self._kinds)
        return ImageDataset(str(folder), reader, input_img_mode=self.dataset_args.get("input_img_mode", "RGB"))

    def _create(self, split: str) -> Any:
        """The data set as timm makes it."""
        root = self.root
        if Path(root).is_dir() and (self._tar("train") or self._tar("val")):
            root = self._tar(split)
            if root is None:
                raise UserError(f"no {self.splits[split]}.tar in {self.root}, where the other splits are tars: add it")
        try:
            with all_images_in_tars():
                data = create_dataset(
                    self.source,
                    root=str(root) or None,
                    split=self.splits[split],
                    search_split=True,
                    is_training=split == "train",
                    batch_size=self.batch_size,
                    **self._reading | self.dataset_args,
                )
        except ImportError as error:
            raise UserError(f"{self.source} needs a package that is not installed: {one_line(error)}") from error
        except (AssertionError, RuntimeError, ValueError, OSError) as error:
            raise UserError(f"cannot open data set {self.source or self.root!r}: {one_line(error)}") from error
        if isinstance(reader := getattr(data, "reader", None), ReaderImageInTar):
            drop_hidden(reader)
        if hasattr(data, "loader"):  # torchvision's
            data.loader = open_image
        return data

    @property
    def _reading(self) -> dict[str, Any]:
        """Arguments of ``create_dataset`` that make its readers see the images that ours see."""
        if self._is_torch_folder:
            return dict(is_valid_file=partial(is_image_below, root=self.root, kinds=endings()))
        return dict(input_img_mode="") if self._streams_images else {}

    @property
    def _streams_images(self) -> bool:
        """Whether a reader of timm decodes the images, and leaves their orientation and depth to us."""
        return self.source.partition("/")[0].lower() in ("wds", "hfids")


class Decoded:
    """A timm ``ImageDataset`` that raises for an unreadable image, where timm would take another one unasked."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, target = self.read(index)
        return self.dataset.transform(image), target

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """The image as it is in the file, and its class."""
        source, target, *_ = self.dataset.reader[index]
        return open_image(source, self.dataset.input_img_mode or "RGB"), target


def from_stream(image: Image.Image) -> Image.Image:
    """An image that a stream decoded, upright and in RGB; a stream cannot leave one out, so that stops the run."""
    try:
        return as_seen(image)
    except UnreadableImage as error:
        raise UserError(f"an image in the stream cannot be used: {error.why}") from error


def _published(model: str | None) -> dict[str, Any]:
    if not model:
        return {}
    check_model_name(model)
    config = timm.get_pretrained_cfg(model)
    return config.to_dict() if config else {}


def class_index(dataset: Any) -> dict[str, int]:
    """The class names of a data set and their targets; empty if it does not tell."""
    for owner in (getattr(dataset, "reader", None), dataset):
        for name in ("class_to_idx", "class_name_to_idx"):
            if index := getattr(owner, name, None):
                return dict(index)
    return {}
