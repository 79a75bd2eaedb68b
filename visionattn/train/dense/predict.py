"""Segment or detect in image files with a checkpoint of a run: pictures to look at, and files to work with."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from visionattn.errors import UserError, some
from visionattn.train.data.joint import eval_image
from visionattn.train.data.objects import mask_tools
from visionattn.train.data.pictures import UnreadableImage, open_image
from visionattn.train.dense.detector import Detector
from visionattn.train.dense.segment import inference
from visionattn.train.dense.segmenter import Segmenter
from visionattn.train.overlays import overlay_classes, overlay_objects, to_pil
from visionattn.train.predict import readable_formats, require_free
from visionattn.weights.load import load_weights

NETS = {"segment": Segmenter, "detect": Detector}


def predict_dense(
    files: list[str],
    given: list[str],
    ckpt: str,
    card: dict[str, Any],
    output: str,
    device: str,
    threshold: float,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write ``NAME_overlay.png`` for each image, and what the task found.

    Segmentation adds ``NAME_classes.png``, an indexed PNG whose values are the classes; ``predictions.json`` has the
    share of each class. Detection writes ``predictions.json`` as a COCO annotation file whose annotations have scores.

    Args:
        files: Images.
        given: What the user gave, files or folders; results keep the folders below.
        ckpt: A checkpoint or ``model.safetensors`` that ``train.py`` wrote.
        card: Its description.
        output: Folder to write.
        device: Where to compute.
        threshold: Least score of an object.
        overwrite: Write over files that are there.

    Returns:
        One entry per readable image: its ``file``, its ``overlay`` and, of a segmenter, ``classes`` (their shares) or,
        of a detector, ``objects`` (``label``, ``score``, ``box``).

    Raises:
        UserError: For anything the user can fix.
    """
    folder = Path(output)
    if folder.suffix or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output {output}: segmentation and detection write several files, so give a folder")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}: it must be between 0 and 1")
    places = free_places(files, given)
    if not overwrite:
        require_free(output, written(folder, places, card["task"]))
    net = NETS[card["task"]].from_card(card)
    load_weights(net, ckpt)
    net.eval().to(device)
    results, bad, found = [], [], []
    with torch.inference_mode():
        bar = tqdm(files, leave=False, disable=len(files) < 2 or not sys.stderr.isatty(), dynamic_ncols=True)
        for file, place in zip(bar, places, strict=True):
            try:
                image = F.pil_to_tensor(open_image(file))
            except UnreadableImage as error:
                bad.append(error)
                continue
            stem = folder / place
            stem.parent.mkdir(parents=True, exist_ok=True)
            if card["task"] == "segment":
                picture, result = _segment(net, card, image, device, Path(f"{stem}_classes.png"))
            else:
                picture, result, objects = _detect(net, card, image, device, threshold)
                found.append((file, image.shape[-2:], objects))
            overlay = f"{stem}_overlay.png"
            to_pil(picture).save(overlay)
            results.append({"file": file, "overlay": overlay, **result})
    if not results:
        raise UserError(f"none of the {len(files)} images can be read: {some(bad)}. {readable_formats()}")
    content = results if card["task"] == "segment" else coco(found, card)
    (folder / "predictions.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for result in results[:20]:
        print(f"{Path(result['file']).name}  {describe(result)}")
    if bad:
        print(f"warning: skipped {len(bad)} unreadable images: {some(bad, 10)}", file=sys.stderr)
    print(f"wrote {len(results)} overlays and predictions.json to {folder}")
    return results


def free_places(files: list[str], given: list[str]) -> list[str]:
    """Where the results of each file go, without ending: its name, below a given folder its path, never one twice."""
    roots = [Path(path) for path in given if os.path.isdir(path)]
    taken: set[str] = set()
    places = []
    for file in map(Path, files):
        root = next((root for root in roots if file.is_relative_to(root)), file.parent)
        stem = str(file.relative_to(root).with_suffix(""))
        place = next(name for n in range(len(files) + 1) if (name := f"{stem}_{n}" if n else stem) not in taken)
        taken.add(place)
        places.append(place)
    return places


def written(folder: Path, places: list[str], task: str) -> Iterator[Path]:
    """All files that a call writes into ``folder``."""
    yield folder / "predictions.json"
    for place in places:
        yield folder / f"{place}_overlay.png"
        if task == "segment":
            yield folder / f"{place}_classes.png"


def describe(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "classes" in result:
        shares = sorted(result["classes"].items(), key=lambda item: -item[1])[:5]
        return "   ".join(f"{100 * share:5.1f} % {name}" for name, share in shares)
    objects = result["objects"][:8]
    return ", ".join(f"{o['label']} ({100 * o['score']:.0f} %)" for o in objects) or "nothing found"


def _segment(
    net: nn.Module, card: dict[str, Any], image: Tensor, device: str, path: Path
) -> tuple[Tensor, dict[str, Any]]:
    sides = card["preprocess"]["short_side"], card["preprocess"]["long_side"]
    scaled = eval_image(image, *sides)[None].to(device).float() / 255
    classes = inference(net, card)(scaled, image.shape[-2:])[0].argmax(0).to(torch.uint8).cpu()
    indexed = Image.fromarray(classes.numpy()).convert("P")
    indexed.putpalette(np.array(card["palette"], np.uint8).tobytes())
    indexed.save(path)
    counts = torch.bincount(classes.flatten(), minlength=card["num_classes"]) / classes.numel()
    shares = {n: round(s, 4) for n, s in zip(card["class_names"], counts.tolist(), strict=True) if s > 0}
    return overlay_classes(image, classes, card["palette"]), {"map": str(path), "classes": shares}


def _detect(
    net: nn.Module, card: dict[str, Any], image: Tensor, device: str, threshold: float
) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    (objects,) = net([image.to(device).float() / 255])
    keep = objects["scores"] >= threshold
    objects = {key: value[keep].cpu() for key, value in objects.items()}
    boxes, labels, scores = objects["boxes"], objects["labels"], objects["scores"]
    names = card["class_names"]
    picture = overlay_objects(image, boxes, labels, names, card["palette"], scores, objects.get("masks"))
    parts = zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
    described = [
        {"label": names[label], "score": round(score, 4), "box": [round(side, 2) for side in box]}
        for label, score, box in parts
    ]
    return picture, {"objects": described}, objects


def coco(found: list[tuple[str, tuple[int, int], dict[str, Tensor]]], card: dict[str, Any]) -> dict[str, Any]:
    """Objects as a COCO annotation file; the category ids are those of the training annotations."""
    images, annotations = [], []
    for number, (file, (height, width), objects) in enumerate(found, 1):
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for i, (left, top, right, bottom) in enumerate(objects["boxes"].tolist()):
            entry = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": card["category_ids"][int(objects["labels"][i])],
                "bbox": [round(side, 2) for side in (left, top, right - left, bottom - top)],
                "area": round((right - left) * (bottom - top), 2),
                "iscrowd": 0,
                "score": round(float(objects["scores"][i]), 5),
            }
            if "masks" in objects:
                mask = objects["masks"][i]
                run_lengths = mask_tools().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                entry["segmentation"] = {**run_lengths, "counts": run_lengths["counts"].decode()}
                entry["area"] = int(mask.sum())
            annotations.append(entry)
    ids, names = card["category_ids"], card["class_names"]
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}
