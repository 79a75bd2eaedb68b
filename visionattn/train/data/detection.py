"""Images with boxes, and masks where there are any: COCO's and VOC's files, and generated scenes."""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from visionattn.errors import UserError, some
from visionattn.train.data.base import require_distinct
from visionattn.train.data.dense import DenseBatch, DenseData, collate
from visionattn.train.data.layouts import bright_palette
from visionattn.train.data.objects import VOC_CLASSES, Annotated, Annotations, read_coco, read_voc, voc_listing
from visionattn.train.data.pictures import open_image, turned
from visionattn.train.data.sampling import spread, unreadable
from visionattn.train.data.scenes import DIGITS, Scenes


class DetectionData(DenseData):
    """Base of the detection data modules; targets are ``boxes``, ``labels`` from 0, ``iscrowd`` and maybe ``masks``.

    Attributes:
        category_ids: Number of each class in the annotations, for what is written.
        palette: A colour per class, for pictures.
        has_masks: Whether targets have ``masks``.
    """

    category_ids: list[int]
    has_masks: bool

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """A colour per class."""
        return bright_palette(self.num_classes)

    def card(self) -> dict[str, Any]:
        palette = [list(color) for color in self.palette]
        return super().card() | dict(palette=palette, category_ids=list(self.category_ids))

    def empty(self, image: Tensor) -> dict[str, Tensor]:
        labels = torch.zeros(0, dtype=torch.int64)
        target = {"boxes": torch.zeros(0, 4), "labels": labels, "iscrowd": labels}
        return target | ({"masks": torch.zeros(0, *image.shape[-2:], dtype=torch.uint8)} if self.has_masks else {})

    def collate(self, training: bool):
        return _listed


def _listed(entries: list[tuple]) -> DenseBatch:
    return collate(entries, stack=False)


class AnnotatedImages:
    """Images and objects from files; in training without what is ignored."""

    def __init__(self, images: list[Annotated], training: bool, masks: bool, transform: v2.Transform | None) -> None:
        self.images, self.training, self.masks, self.transform = images, training, masks, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.images[index]
        image = F.pil_to_tensor(open_image(entry.file))
        if tuple(image.shape[-2:]) != entry.size:
            found, said = (f"{width} x {height}" for height, width in (image.shape[-2:], entry.size))
            raise UserError(
                f"{entry.file} is {found} pixels, its annotations say {said}: they must be the same{turned(entry.file)}"
            )
        target = entry.target(self.training, self.masks)
        return (image, target) if self.transform is None else transformed(self.transform, image, target)


def transformed(transform: v2.Transform, image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply a joint transform, and drop the objects of which less than a pixel is left."""
    wrapped = dict(target, boxes=tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:]))
    if "masks" in target:
        wrapped["masks"] = tv_tensors.Mask(target["masks"])
    image, wrapped = v2.SanitizeBoundingBoxes(labels_getter=_per_object)(*transform(tv_tensors.Image(image), wrapped))
    return image.as_subclass(Tensor), {key: value.as_subclass(Tensor) for key, value in wrapped.items()}


def _per_object(inputs: tuple) -> tuple[Tensor, ...]:
    return tuple(inputs[1][key] for key in ("labels", "iscrowd"))


class Objects(DetectionData):
    """Images and objects in files of COCO's or VOC's layout.

    Args:
        root: Folder of the data set.
        layout: "coco": the annotation files and image folders below; "voc": a VOC2007 or VOC2012 folder.
        train_annotations: COCO file of the training split, below ``root``.
        val_annotations: COCO file of the validation split.
        train_images: Folder of the training images.
        val_images: Folder of the validation images.
        test_annotations: COCO file of the test split; if not given the validation's with "test" for "val" in its name,
            or the validation's itself where there is no such file.
        test_images: Folder of the test images; from the validation's name in the same way.
        train_split: VOC's training list.
        val_split: VOC's validation list.
        test_split: VOC's test list; if not given "test" where there is one, or the validation list.
        classes: Class names of "voc", if not its 20.
        masks: Whether to read masks too, for Mask R-CNN; COCO only.
        empty_images: Whether images without objects are trained on; they always count in evaluation.
        hflip: Probability of a mirror image.
        crop: Take random crops in training, as SSD does.
        photometric: Change brightness, contrast, saturation and hue.
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test.
        num_workers: Processes that load images, for each training process; up to 8 of the cores if not given.
        check_images: Images, spread over each split, that are read before the run starts; 0 for none, -1 for all.
    """

    def __init__(
        self,
        root: str = "",
        layout: Literal["coco", "voc"] = "coco",
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        train_images: str = "train2017",
        val_images: str = "val2017",
        test_annotations: str | None = None,
        test_images: str | None = None,
        train_split: str = "trainval",
        val_split: str = "test",
        test_split: str | None = None,
        classes: list[str] | None = None,
        masks: bool = False,
        empty_images: Literal["skip", "train"] = "skip",
        hflip: float = 0.5,
        crop: bool = False,
        photometric: bool = False,
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        check_images: int = 100,
    ) -> None:
        workers = min(8, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
        super().__init__(batch_size, eval_batch_size, workers)
        if not root:
            raise UserError("no data: give the folder with --data.root")
        if not Path(root).is_dir():
            raise UserError(f"no such data folder: {root}. Give an existing one with --data.root")
        if masks and layout == "voc":
            raise UserError(
                "VOC's objects have no masks here: leave --data.masks out, or convert them to COCO's layout"
            )
        self.root, self.layout, self.has_masks = Path(root), layout, masks
        if layout == "voc" and not test_split:
            test_split = "test" if voc_listing(self.root, "test").is_file() else val_split
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.files = {"train": (train_annotations, train_images), "val": (val_annotations, val_images)}
        self.files["test"] = self._test_files(test_annotations, test_images)
        self.voc_classes = classes or VOC_CLASSES
        require_distinct(self.voc_classes, "data.classes")
        self.keep_empty, self.check_images = empty_images == "train", check_images
        steps: list[v2.Transform] = [v2.RandomPhotometricDistort()] if photometric else []
        steps += [v2.RandomIoUCrop()] if crop else []
        steps += [v2.RandomHorizontalFlip(hflip)] if hflip else []
        self.transform = v2.Compose(steps) if steps else None
        # The classes are those of the training split, unless there is only one to validate on.
        source = "train" if layout == "voc" or (self.root / train_annotations).is_file() else "val"
        self.known: dict[int, str] | None = None
        first = self.annotations(source)
        self.class_names, self.category_ids = first.names, first.ids
        self.num_classes, self.known = len(first.names), dict(zip(first.ids, first.names, strict=True))
        self.preprocess = dict(input_size=[3, 800, 800])

    def _test_files(self, annotations: str | None, images: str | None) -> tuple[str, str]:
        """COCO file and folder of the test split: what is given, what is named as validation's is, or validation's."""
        validation = self.files["val"]
        if not annotations and not images:
            named = tuple(re.sub("valid(ation)?|val", "test", name) for name in validation)
            return named if all((self.root / name).exists() for name in named) else validation
        if not annotations:
            raise UserError("data.test_images is given: give their file too, with --data.test_annotations")
        return annotations, images or validation[1]

    def origin(self, split: str) -> str:
        if self.layout == "voc":
            return str(voc_listing(self.root, self.splits[split]))
        file, folder = self.files[split]
        return f"{self.root / folder}, annotated in {self.root / file}"

    @lru_cache(3)  # noqa: B019  (one module lives as long as its run)
    def annotations(self, split: str) -> Annotations:
        """What is annotated in a split."""
        if self.layout == "voc":
            return read_voc(self.root, self.splits[split], self.voc_classes)
        file, folder = self.files[split]
        return read_coco(self.root / file, self.root / folder, self.has_masks, self.known)

    def dataset(self, split: str):
        training, images = split == "train", self.annotations(split).images
        if training and not self.keep_empty:
            images = [image for image in images if not all(image.ignored)]
            if not images:
                raise UserError(f"no image of the training split in {self.root} has an object to learn")
        data = AnnotatedImages(images, training, self.has_masks, self.transform if training else None)
        return data, lambda index: str(images[index].file)

    def check(self, splits: list[str]) -> None:
        for split in splits:
            annotations = self.annotations(split)
            if dropped := annotations.dropped:
                print(
                    f"warning: {len(dropped)} objects have no box inside their image and are left out: {some(dropped)}"
                )
            data, name = self.dataset(split)
            if missing := [image.file for image in data.images if not os.path.lexists(image.file)]:
                raise UserError(f"{len(missing)} annotated images are not there: {some(missing)}")
            if bad := unreadable(data.__getitem__, spread(len(data), self.check_images)):
                print(
                    f"warning: {len(bad)} unreadable images are skipped: {some(map(name, bad))} "
                    f"(the first: {next(iter(bad.values()))})"
                )


class SceneObjects(DetectionData):
    """Generated scenes of digits on photographs, with boxes and masks.

    Args:
        img_size: Side of the images.
        train_scenes: Training scenes in an epoch.
        val_scenes: Validation scenes, always the same ones.
        fresh: Make other training scenes in every epoch.
        objects: Smallest and largest number of digits in a scene.
        sides: Smallest and largest side of a digit, as a share of the image.
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
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.class_names, self.num_classes, self.category_ids = list(DIGITS), len(DIGITS), list(range(len(DIGITS)))
        self.preprocess, self.has_masks = dict(input_size=[3, img_size, img_size]), True
        self.counts, self.fresh = {"train": train_scenes, "val": val_scenes, "test": val_scenes}, fresh
        self.settings = dict(size=img_size, objects=objects, sides=sides)

    def dataset(self, split: str):
        training = split == "train"
        scenes = Scenes("train" if training else "val", self.counts[split], self.fresh and training, **self.settings)
        return SceneTargets(scenes), "scene {}".format


class SceneTargets:
    """Scenes as images [3, H, W] and targets."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scenes[index]
        labels = torch.from_numpy(scene.labels)
        return torch.from_numpy(scene.image).permute(2, 0, 1), {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": labels,
            "iscrowd": torch.zeros_like(labels),
            "masks": torch.from_numpy(scene.masks).to(torch.uint8),
        }
