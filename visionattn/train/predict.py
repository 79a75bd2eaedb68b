"""Predict on image files with a checkpoint of a run of any task, or classify with published weights."""

import concurrent.futures
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.cli import LightningArgumentParser
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import visionattn
from visionattn.errors import UserError, one_line, some
from visionattn.train.data import finder
from visionattn.train.data.pictures import UnreadableImage, formats, open_image
from visionattn.weights.card import build, check_model_name, complete, read_card
from visionattn.weights.errors import WeightsError
from visionattn.weights.load import load_weights


def add_arguments(parser: LightningArgumentParser) -> list[str]:
    """Add the arguments of :func:`predict` and return their names."""
    parser.add_argument("images", nargs="+", type=str, help="Image files, or folders of them.")
    parser.add_argument("--overwrite", action="store_true", help="Write --output even if it is there.")
    return ["images", "overwrite", *parser.add_function_arguments(predict, skip={"images", "overwrite"})]


def predict(
    images: list[str],
    ckpt: str | None = None,
    model: str | None = None,
    topk: int = 5,
    output: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    threshold: float = 0.5,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Print the most likely classes of each image and write them to a file; draw what a segmenter or detector finds.

    Args:
        images: Image files, or folders of them.
        ckpt: A checkpoint or ``model.safetensors`` that ``train.py`` wrote.
        model: Instead: a timm model, with its published weights.
        topk: Classes to name for each image.
        output: File to write, ``.json`` or ``.csv``; predictions.json if not given, or predictions-1.json and so on if
            that is there. Segmentation and detection write pictures and a JSON file into a folder instead, predictions
            if not given. What is there is not overwritten.
        batch_size: Images at a time, in classification.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes a GPU if there is one.
        threshold: Least score of the objects that detection draws and writes.
        overwrite: Let ``output`` take the place of what is there.

    Returns:
        One entry per readable image: its ``file`` and ``classes``, a list of ``label`` and ``probability``; for the
        other tasks see :mod:`visionattn.train.dense.predict`.

    Raises:
        UserError: For anything the user can fix.
    """
    if bool(ckpt) == bool(model):
        raise UserError("say what to predict with: --ckpt FILE, or --model NAME for published weights")
    card = read_card(ckpt) if ckpt else {}
    device = chosen_device(device)
    if card.get("task"):
        from visionattn.train.dense.predict import predict_dense

        output = output or free_output("predictions")
        return predict_dense(find_images(images), images, ckpt, card, output, device, threshold, overwrite)
    output = output or free_output("predictions.json")
    if Path(output).suffix not in (".json", ".csv"):
        raise UserError(f"cannot write {output}: choose a name that ends in .json or .csv")
    if not overwrite:
        require_free(output, [Path(output)])
    if topk < 1 or batch_size < 1:
        raise UserError("--topk and --batch_size must be at least 1")
    files = find_images(images)
    net, transform, labels = load(ckpt, model)
    net.eval().to(device)

    results, bad = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        for start in progress(range(0, len(files), batch_size)):
            names = files[start : start + batch_size]
            tensors = list(pool.map(lambda file: read(file, transform), names))
            bad += [tensor for tensor in tensors if isinstance(tensor, UnreadableImage)]
            readable = [part for part in zip(names, tensors, strict=True) if isinstance(part[1], Tensor)]
            if readable:
                batch = torch.stack([tensor for _, tensor in readable]).to(device)
                for (file, _), scores in zip(readable, net(batch).softmax(-1).cpu(), strict=True):
                    best = scores.topk(min(topk, len(scores)))
                    classes = [
                        {"label": labels[i] if i < len(labels) else str(i), "probability": round(p, 6)}
                        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                    ]
                    results.append({"file": file, "classes": classes})
    if not results:
        raise UserError(f"none of the {len(files)} images can be read: {some(bad)}. {readable_formats()}")
    print_table(results)
    if right := accuracy(results, labels):
        print(right)
    write(results, output)
    if bad:
        print(f"warning: skipped {len(bad)} unreadable images: {some(bad, 10)}", file=sys.stderr)
    print(f"wrote {output}")
    return results


def chosen_device(name: str) -> str:
    """The device to compute on; ``auto`` is a GPU if there is one.

    Raises:
        UserError: If there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"there is no device {name} here ({one_line(error)[:100]}): use --device cpu, or auto"
        ) from error
    return name


def free_output(name: str) -> str:
    """The first of predictions.json, predictions-1.json, ... that would overwrite nothing."""
    path = Path(name)
    tries = (path.with_stem(f"{path.stem}-{n}") if n else path for n in itertools.count())
    return str(next(path for path in tries if not path.exists()))


def require_free(output: str, files: Iterable[Path]) -> None:
    """Refuse to write over any of ``files``, which are what ``output`` stands for.

    Raises:
        UserError: With those that are there.
    """
    if there := [file for file in files if os.path.lexists(file)]:
        raise UserError(f"--output {output}: {some(there)} would be lost. Choose another name, or add --overwrite")


def progress(steps: Sequence[Any]) -> Iterable[Any]:
    """``steps`` with a bar on a screen that can show one, if there is more than one."""
    return tqdm(steps, leave=False, disable=len(steps) < 2 or not sys.stderr.isatty(), dynamic_ncols=True)


def accuracy(results: list[dict[str, Any]], labels: list[str]) -> str:
    """How many predictions are right if the images lie in folders named after the classes; empty if they do not.

    Args:
        results: Entries with ``file`` and ``classes``, the likeliest first.
        labels: The names of the classes.
    """
    folders = [Path(result["file"]).absolute().parent.name for result in results]
    if not set(folders) <= set(labels):
        return ""
    guesses = [[c["label"] for c in result["classes"]] for result in results]
    pairs = list(zip(folders, guesses, strict=True))
    right, total = sum(folder == guess[0] for folder, guess in pairs), len(pairs)
    among = sum(folder in guess for folder, guess in pairs)
    more = (
        f", {100 * among / total:.2f} % among the first {len(guesses[0])}" if 1 < len(guesses[0]) < len(labels) else ""
    )
    return f"{right} of {total} are in the folder of their class: {100 * right / total:.2f} %{more}"


def readable_formats() -> str:
    """What counts as an image here, in a sentence."""
    return f"Give files of a format that Pillow reads: {', '.join(sorted(formats()))}"


def find_images(paths: list[str]) -> list[str]:
    """The image files among ``paths`` and below the folders among them."""
    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found = finder.find_images(path)
            found.warn(path, file=sys.stderr)
            if not found.images:
                raise UserError(f"no images in folder {path}: expected files such as IMAGE.jpg or IMAGE.png")
            files += sorted(found.images)
        elif os.path.lexists(path):
            files.append(path)
        else:
            raise UserError(f"no such image or folder: {path}")
    return files


def load(ckpt: str | None, model: str | None) -> tuple[nn.Module, Any, list[str]]:
    """A network with its weights, the transform that its images need, and the names of its classes."""
    if ckpt:
        card = read_card(ckpt)
        complete(card, "class_names", "preprocess")
        net = build(card)
        load_weights(net, ckpt)
        return net, create_transform(**card["preprocess"]), card["class_names"]
    check_model_name(model)
    ours = model.partition(".")[0] in visionattn.list_models()  # whose weights may have been added by hand
    if not ours and not timm.models.is_model_pretrained(model):
        raise UserError(f"{model} has no published weights: give a checkpoint with --ckpt")
    try:
        net = timm.create_model(model, pretrained=True)
    except WeightsError as error:
        raise UserError(f"{error}; or give a checkpoint with --ckpt") from error
    names = ImageNetInfo()
    labels = [names.index_to_description(i) for i in range(1000)] if net.num_classes == 1000 else []
    return net, create_transform(**resolve_model_data_config(net)), labels


def read(file: str, transform: Any) -> Tensor | UnreadableImage:
    """The image as the network takes it, or why it cannot be read."""
    try:
        return transform(open_image(file))
    except UnreadableImage as error:
        return error


def print_table(results: list[dict[str, Any]], most: int = 20) -> None:
    """Show each image with its classes and probabilities, the likeliest first."""
    width = min(50, max(len(Path(result["file"]).name) for result in results[:most]))
    for result in results[:most]:
        classes = "   ".join(f"{100 * c['probability']:5.1f} % {c['label']}" for c in result["classes"])
        print(f"{Path(result['file']).name:<{width}}  {classes}")
    if len(results) > most:
        print(f"... and {len(results) - most} more images in the file")


def write(results: list[dict[str, Any]], output: str) -> None:
    """Write the results as JSON, or as CSV with one row per image."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    if output.endswith(".json"):
        Path(output).write_text(json.dumps(results, indent=1), encoding="utf-8")
        return
    with open(output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        count = len(results[0]["classes"])
        writer.writerow(["file", *(f"{kind}{n + 1}" for n in range(count) for kind in ("label", "probability"))])
        for result in results:
            writer.writerow([result["file"], *(v for c in result["classes"] for v in (c["label"], c["probability"]))])
