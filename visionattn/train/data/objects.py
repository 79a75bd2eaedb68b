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

from visionattn.errors import UserError, one_line
from visionattn.train.data.layouts import listed, read_text
from visionattn.train.data.outlines import outline_fault

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
        places: Where each object is written, for messages.
    """

    file: Path
    size: tuple[int, int]
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    places: list[tuple[Path, Any]] = field(default_factory=list)

    def add(self, box: list[float], label: int, ignored: bool, shape: Any, place: tuple[Path, Any]) -> bool:
        """Add an object, its box cut at the image's border, and return True; False if no pixel of it is left."""
        height, width = self.size
        left, right = (min(max(float(x), 0.0), float(width)) for x in box[::2])
        top, bottom = (min(max(float(y), 0.0), float(height)) for y in box[1::2])
        if right - left < 1 or bottom - top < 1:
            return False
        self.boxes.append([left, top, right, bottom])
        self.labels.append(label)
        self.ignored.append(ignored)
        self.shapes.append(shape)
        self.places.append(place)
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
            shapes = [decode(self.shapes[i], self.size, *self.places[i]) for i in keep]
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


def decode(shape: Any, size: tuple[int, int], file: Path, number: Any) -> np.ndarray:
    """COCO's polygons or run lengths as a mask [H, W]; ``file`` and ``number`` say which annotation it is.

    Raises:
        UserError: If the run lengths are not those of an image of this size.
    """
    tools = mask_tools()
    if isinstance(shape, list):
        return tools.decode(tools.merge(tools.frPyObjects(shape, *size)))
    try:
        return tools.decode(tools.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file}: annotation {number}: its run lengths are damaged: {one_line(error)}") from error


def read_coco(file: Path, folder: Path, masks: bool, known: dict[int, str] | None = None) -> Annotations:
    """Read a COCO annotation file.

    Args:
        file: JSON with ``images``, ``annotations`` and ``categories``.
        folder: Where the images are.
        masks: Whether the outlines of the objects are needed.
        known: Ids and names of the categories that the model learns, if they come from another split.

    Raises:
        UserError: If the file is missing, is not what it should be, speaks of images or categories that it does not
            have or has twice, or has a box or an outline that is none.
    """
    if not file.is_file():
        raise UserError(f"no annotation file {file}: give it with --data.train_annotations or --data.val_annotations")
    try:
        content = json.loads(read_text(file))
        categories = _by_id(file, content["categories"], "category", "name")
        files = _by_id(file, content["images"], "image", "file_name")
        sizes = {entry["id"]: (int(entry["height"]), int(entry["width"])) for entry in content["images"]}
        annotations = list(content["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a COCO annotation file: {type(error).__name__} {one_line(error)}") from error
    if not files or not categories:
        raise UserError(f"{file} has {len(files)} images and {len(categories)} categories: it needs both")
    if not folder.is_dir():
        raise UserError(f"no image folder {folder}: give it with --data.train_images or --data.val_images")
    if odd := [i for i in categories if type(i) is not int]:
        raise UserError(f"{file}: category {odd[0]!r} has an id that is a {type(odd[0]).__name__}: expected an integer")
    for i, name in categories.items():
        if known is not None and known.get(i) != name:
            learned = f"{known[i]!r} in training" if i in known else "not known in training"
            raise UserError(
                f"{file} has categories that training does not know: {i} is {name!r} here and {learned}. Give both "
                "files the same categories"
            )
    ids = sorted(categories)
    images = {i: Annotated(folder / name, sizes[i]) for i, name in files.items()}
    label = {category: index for index, category in enumerate(known or ids)}
    dropped = []
    for position, entry in enumerate(annotations):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: annotation at place {position} is a {type(entry).__name__}: expected an object")
        number = entry.get("id", f"at place {position}, without id,")
        image = _refer(file, number, entry, "image", images)
        index = _refer(file, number, entry, "category", label)
        place, box = f"{file}: annotation {number} of {image.file.name}", entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"{place}: the box {box} is not four numbers: expected left, top, width and height")
        corners, shape = [*box[:2], box[0] + box[2], box[1] + box[3]], entry.get("segmentation") if masks else None
        if not image.add(corners, index, bool(entry.get("iscrowd", 0)), shape, (file, number)):
            dropped.append(f"annotation {number} of {image.file.name}")
        elif masks and (fault := outline_fault(shape, image.size)):
            raise UserError(f"{place}: {fault}")
    return Annotations(list(images.values()), [categories[i] for i in ids], ids, dropped)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _by_id(file: Path, entries: list[dict], kind: str, key: str) -> dict[Any, str]:
    """The texts under ``key`` by id, each id and each text once."""
    texts: dict[Any, str] = {}
    first: dict[str, Any] = {}
    for entry in entries:
        number, text = entry["id"], entry[key]
        if not isinstance(text, str):
            raise UserError(f"{file}: {kind} {number!r} has the {key} {text!r}: expected a text")
        if number in texts:
            raise UserError(f"{file}: {kind} {number!r} is there twice: give each {kind} an id of its own")
        if text in first:
            raise UserError(
                f"{file}: {kind} {first[text]!r} and {kind} {number!r} have the same {key}, {text!r}: make them "
                "one, or rename one"
            )
        texts[number], first[text] = text, number
    return texts


def _refer(file: Path, number: Any, entry: dict, kind: str, known: dict[Any, Any]) -> Any:
    """What an annotation means by its ``image_id`` or ``category_id``."""
    wanted = entry.get(f"{kind}_id")
    if not isinstance(wanted, (list, dict)) and wanted in known:
        return known[wanted]
    if alike := [i for i in known if str(i) == str(wanted)]:
        said, meant = (f"{value!r}, a {type(value).__name__}" for value in (wanted, alike[0]))
        raise UserError(f"{file}: annotation {number} has the {kind}_id {said}, but the {kind} has the id {meant}")
    raise UserError(f"{file}: annotation {number} is of {kind} {wanted!r}, which is not in the file")


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
                if not all(map(_is_number, box)):
                    raise UserError(f"{file}: the box {sides} of a {name} is not four numbers")
                if not image.add(box, label[name], thing.findtext("difficult") == "1", None, (file, name)):
                    dropped.append(f"a {name} of {file.name}")
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not a VOC annotation file: {one_line(error)}") from error
        images.append(image)
    if not images:
        raise UserError(f"{listing} names no images")
    return Annotations(images, classes, list(range(1, len(classes) + 1)), dropped)
