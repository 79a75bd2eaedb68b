"""Annotated objects of COCO and VOC files: read once, checked whole, given out as tensors per image."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionattn.errors import UserError, one_line, some
from visionattn.train.data.layouts import listed, read_text

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
).split()


@dataclass
class Annotated:
    """One image and its objects.

    Attributes:
        file: The image.
        size: Its height and width.
        boxes: Left, top, right, bottom of each object, inside the image.
        labels: Class of each object.
        ignored: Objects that are neither learned nor counted as missed: crowds (COCO), difficult ones (VOC).
        shapes: Outline of each object, COCO's polygons or run lengths; None where there is none.
    """

    file: Path
    size: tuple[int, int]
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)

    def add(self, box: list[float], label: int, ignored: bool, shape: Any = None) -> bool:
        """Add an object, its box cut at the image's border; False, and nothing, if no box of at least a pixel is left.

        Raises:
            UserError: If the box is no four numbers.
        """
        if len(box) != 4 or not all(isinstance(side, (int, float)) and math.isfinite(side) for side in box):
            raise UserError(f"{self.file}: the box {box} is not four numbers")
        height, width = self.size
        left, right = (min(max(float(x), 0.0), float(width)) for x in box[::2])
        top, bottom = (min(max(float(y), 0.0), float(height)) for y in box[1::2])
        if right - left < 1 or bottom - top < 1:
            return False
        self.boxes.append([left, top, right, bottom])
        self.labels.append(label)
        self.ignored.append(ignored)
        self.shapes.append(shape)
        return True

    def target(self, training: bool, masks: bool) -> dict[str, Tensor]:
        """``boxes`` [N, 4], ``labels`` [N], ``iscrowd`` [N] and, if asked for, ``masks`` [N, H, W]."""
        keep = [i for i, ignored in enumerate(self.ignored) if not (training and ignored)]
        target = {
            "boxes": torch.tensor([self.boxes[i] for i in keep], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self.labels[i] for i in keep], dtype=torch.int64),
            "iscrowd": torch.tensor([self.ignored[i] for i in keep], dtype=torch.int64),
        }
        if masks:
            shapes = [decode(self.shapes[i], self.size, self.file) for i in keep]
            target["masks"] = torch.from_numpy(np.array(shapes, np.uint8).reshape(-1, *self.size))
        return target


@dataclass
class Annotations:
    """What an annotation file, or a folder of them, says.

    Attributes:
        images: In the order of the file.
        names: Of the classes.
        ids: Number of each class in the file; labels count from 0 without gaps.
        dropped: What had no box of at least a pixel inside its image.
    """

    images: list[Annotated]
    names: list[str]
    ids: list[int]
    dropped: list[str]


def mask_tools():
    """The mask functions of faster_coco_eval.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError("detection needs faster-coco-eval: pip install 'visionattn[dense]'") from error
    return mask


def decode(shape: Any, size: tuple[int, int], file: Path) -> np.ndarray:
    """COCO's polygons or run lengths as a mask [H, W]."""
    tools = mask_tools()
    if not shape:
        raise UserError(f"{file} has objects without an outline: train a detector without masks, or annotate them")
    if isinstance(shape, list):
        return tools.decode(tools.merge(tools.frPyObjects(shape, *size)))
    if isinstance(shape["counts"], list):
        shape = tools.frPyObjects(shape, *size)
    return tools.decode(shape)


def read_coco(file: Path, folder: Path, known: list[int] | None = None) -> Annotations:
    """Read a COCO annotation file.

    Args:
        file: JSON with ``images``, ``annotations`` and ``categories``.
        folder: Where the images are.
        known: The category ids that the model learns, if they come from another split.

    Raises:
        UserError: If the file is missing, is not what it should be, or speaks of images or categories that it does
            not have.
    """
    if not file.is_file():
        raise UserError(f"no annotation file {file}: give it with --data.train_annotations or --data.val_annotations")
    try:
        content = json.loads(read_text(file))
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        images = {
            entry["id"]: Annotated(folder / entry["file_name"], (int(entry["height"]), int(entry["width"])))
            for entry in content["images"]
        }
        annotations = content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a COCO annotation file: {type(error).__name__} {one_line(error)}") from error
    if not images or not categories:
        raise UserError(f"{file} has {len(images)} images and {len(categories)} categories: it needs both")
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}: give it with --data.train_images or --data.val_images")
    ids = sorted(categories)
    if known is not None and (extra := [i for i in ids if i not in known]):
        names = some(f"{i} {categories[i]}" for i in extra)
        raise UserError(f"{file} has categories that training does not know: {names}")
    label = {category: index for index, category in enumerate(known or ids)}
    dropped = []
    for entry in annotations:
        number = entry.get("id", "without id")
        if entry.get("image_id") not in images:
            raise UserError(
                f"{file}: annotation {number} is of image {entry.get('image_id')}, which is not in the file"
            )
        if entry.get("category_id") not in label:
            raise UserError(
                f"{file}: annotation {number} is of category {entry.get('category_id')}, which is not in the file"
            )
        image, box = images[entry["image_id"]], entry.get("bbox") or []
        corners = [*box[:2], box[0] + box[2], box[1] + box[3]] if len(box) == 4 else box
        shape = entry.get("segmentation")
        if not image.add(corners, label[entry["category_id"]], bool(entry.get("iscrowd", 0)), shape):
            dropped.append(f"annotation {number} of {image.file.name}")
    return Annotations(list(images.values()), [categories[i] for i in ids], ids, dropped)


def voc_listing(root: Path, split: str) -> Path:
    """The file that says which images belong to a split."""
    return root / "ImageSets" / "Main" / f"{split}.txt"


def read_voc(root: Path, split: str, classes: list[str]) -> Annotations:
    """Read the annotations of a VOC split: ImageSets/Main/SPLIT.txt, Annotations/*.xml, JPEGImages/*.

    Raises:
        UserError: If one of these is missing or broken, or names a class that is not in ``classes``.
    """
    listing = voc_listing(root, split)
    label, images, dropped = {name: index for index, name in enumerate(classes)}, [], []
    for picture in listed(listing, root / "JPEGImages", split):
        stem, file = picture.stem, root / "Annotations" / f"{picture.stem}.xml"
        if not file.is_file():
            raise UserError(f"{listing} names {stem}, but there is no annotation file {file}")
        try:
            tree = ElementTree.parse(file).getroot()
            height, width = (int(tree.find("size").findtext(side)) for side in ("height", "width"))
            image = Annotated(picture, (height, width))
            for thing in tree.iter("object"):
                name = thing.findtext("name")
                if name not in label:
                    raise UserError(f"{file} has an object of class {name!r}, which is not in data.classes")
                sides = [float(thing.find("bndbox").findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
                # Pixels are counted from 1 there, and the last one is inside.
                box = [sides[0] - 1, sides[1] - 1, sides[2], sides[3]]
                if not image.add(box, label[name], thing.findtext("difficult") == "1"):
                    dropped.append(f"a {name} of {file.name}")
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not a VOC annotation file: {one_line(error)}") from error
        images.append(image)
    if not images:
        raise UserError(f"{listing} names no images")
    return Annotations(images, classes, list(range(1, len(classes) + 1)), dropped)
