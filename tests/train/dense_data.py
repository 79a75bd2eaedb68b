"""Small data sets in the layouts of the real ones."""

import json

import numpy as np
from PIL import Image

from visionattn.train.data.layouts import CITYSCAPES
from visionattn.train.data.scenes import make_scene


def scenes(count, size=64, seed=0, split="train"):
    return [make_scene(np.random.default_rng([seed, n]), split, size) for n in range(count)]


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def folders(root, train=4, val=2):
    """images/SPLIT/*.jpg, masks/SPLIT/*.png and classes.txt: the photograph and ten digits."""
    for split, count in (("train", train), ("val", val)):
        for n, scene in enumerate(scenes(count, seed=len(split))):
            save(root / "images" / split / f"{n}.jpg", scene.image)
            save(root / "masks" / split / f"{n}.png", scene.classes)
    (root / "classes.txt").write_text("photograph\n" + "\n".join(map(str, range(10))))
    return root


def ade20k(root, train=4, val=2):
    for split, count in (("training", train), ("validation", val)):
        for n, scene in enumerate(scenes(count)):
            save(root / "images" / split / f"ADE_{n}.jpg", scene.image)
            save(root / "annotations" / split / f"ADE_{n}.png", scene.classes * 13)
    return root


def cityscapes(root, train=4, val=2):
    ids = np.array([1, *list(CITYSCAPES)[:10]], np.uint8)  # 1 is "ego vehicle", which is ignored
    for split, count in (("train", train), ("val", val)):
        for n, scene in enumerate(scenes(count)):
            stem = f"ulm_{n:06d}_000019"
            save(root / "leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png", scene.image)
            save(root / "gtFine" / split / "ulm" / f"{stem}_gtFine_labelIds.png", ids[scene.classes])
    return root


def voc_masks(root, train=4, val=2):
    for split, count in (("train", train), ("val", val)):
        stems = [f"2007_{split}{n}" for n in range(count)]
        for stem, scene in zip(stems, scenes(count), strict=True):
            classes = scene.classes.copy()
            classes[:2] = 255  # the border that counts for nothing
            save(root / "JPEGImages" / f"{stem}.jpg", scene.image)
            save(root / "SegmentationClass" / f"{stem}.png", classes)
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(stems))
    return root


MASKS = {"folders": folders, "ade20k": ade20k, "cityscapes": cityscapes, "voc": voc_masks}

CATEGORY_IDS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 90]
"""With gaps, as COCO's."""


def coco_dict(images, size=64):
    """A COCO annotation file of scenes: polygons, run lengths, and one image without objects."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": f"digit {n}"} for n, i in enumerate(CATEGORY_IDS)]
    for n, scene in enumerate(images, 1):
        content["images"].append({"id": 10 * n, "file_name": f"{n}.jpg", "height": size, "width": size})
        for mask, (left, top, right, bottom), label in zip(
            scene.masks, scene.boxes.tolist(), scene.labels, strict=True
        ):
            runs = np.diff(np.flatnonzero(np.diff(mask.T.flatten(), prepend=0, append=0)), prepend=0).tolist()
            box = [left, top, right - left, bottom - top]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 * n,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": box,
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": [*runs, mask.size - sum(runs)]},
                }
            )
    content["images"].append({"id": 999, "file_name": "empty.jpg", "height": size, "width": size})
    return content


def coco(root, train=4, val=2, size=64):
    for split, count in (("train2017", train), ("val2017", val)):
        images = scenes(count, size)
        for n, scene in enumerate(images, 1):
            save(root / split / f"{n}.jpg", scene.image)
        save(root / split / "empty.jpg", np.zeros((size, size, 3), np.uint8))
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(coco_dict(images, size)))
    return root


def voc_boxes(root, train=4, val=2):
    names = ("cat", "dog", "cow", "car", "bus", "boat", "bird", "sofa", "chair", "person")
    for split, count in (("trainval", train), ("test", val)):
        stems = [f"{split}{n}" for n in range(count)]
        for stem, scene in zip(stems, scenes(count), strict=True):
            save(root / "JPEGImages" / f"{stem}.jpg", scene.image)
            objects = "".join(
                f"<object><name>{names[label]}</name><difficult>{int(n == 1)}</difficult><bndbox>"
                f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
                "</bndbox></object>"
                for n, (label, (left, top, right, bottom)) in enumerate(
                    zip(scene.labels, scene.boxes.astype(int).tolist(), strict=True)
                )
            )
            file = root / "Annotations" / f"{stem}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = "<size><width>64</width><height>64</height></size>"
            file.write_text(f"<annotation>{size}{objects}</annotation>")
        listing = root / "ImageSets" / "Main" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(stems))
    return root
