"""Pictures of a run: its curves, its confusion matrix, and validation images with what the model says."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, so that it works without a screen

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

BLUE, ORANGE, RED, GREY = "#2f6db3", "#e07b27", "#c0392b", "#5f6670"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.edgecolor": GREY,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def draw_curves(metrics: Path, path: Path, title: str) -> None:
    """Loss and accuracy over the epochs.

    Args:
        metrics: The CSV logger's file.
        path: Picture to write.
        title: What was trained.
    """
    with open(metrics, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name) and row.get("epoch")]
        return [epoch for epoch, _ in points], [value for _, value in points]

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        for name, label, color in (("train/loss_epoch", "training", BLUE), ("val/loss", "validation", ORANGE)):
            left.plot(*series(name), "o-", color=color, label=label, markersize=3)
        left.set(title="Loss", xlabel="epoch", ylim=(0, None))
        left.legend(frameon=False)
        epochs, accuracy = series("val/acc1")
        right.plot(epochs, accuracy, "o-", color=ORANGE, markersize=3)
        right.set(title="Validation accuracy", xlabel="epoch", ylabel="top-1, %")
        if accuracy:
            best = int(np.argmax(accuracy))
            right.set_ylim(max(0, min(accuracy) - 2), 101)
            right.plot(epochs[best], accuracy[best], "o", color=RED, markersize=6)
            right.annotate(
                f"best {accuracy[best]:.2f} %\nepoch {epochs[best]}",
                (epochs[best], accuracy[best]),
                xytext=(8, -34),
                textcoords="offset points",
                color=RED,
            )
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path)
        plt.close(figure)


def draw_confusion(targets: np.ndarray, predicted: np.ndarray, names: list[str], path: Path) -> None:
    """How often each class is taken for each other one; mistakes are framed."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (targets, predicted), 1)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    right, total = int(np.trace(counts)), int(counts.sum())
    title = f"{right} of {total} right ({100 * right / total:.2f} %)"
    with plt.rc_context({**STYLE, "axes.grid": False}):
        side = 2 + 0.42 * len(names)
        figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="predicted", ylabel="true class", title=title)
        for i, j in zip(*np.nonzero(counts), strict=True):
            axis.text(j, i, counts[i, j], ha="center", va="center", color="white" if share[i, j] > 0.5 else GREY)
            if i != j:
                axis.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=1.5))
        figure.savefig(path)
        plt.close(figure)


def draw_predictions(
    images: list[Image.Image], targets: np.ndarray, scores: np.ndarray, names: list[str], path: Path
) -> None:
    """A grid of validation images: first the wrong ones, then the least certain, then a sample of the rest.

    Args:
        images: All validation images.
        targets: Their classes. [N]
        scores: Probabilities. [N, classes]
        names: One per class.
        path: Picture to write.
    """
    predicted, certainty = scores.argmax(1), scores.max(1)
    order = np.lexsort((certainty, predicted == targets))
    columns, hard = 8, min(16, len(order))
    rest = order[hard:]
    chosen = [*order[:hard], *rest[np.linspace(0, len(rest) - 1, min(24, len(rest))).astype(int)]]
    rows = -(-len(chosen) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, 1.65 * rows), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, index in zip(axes.flat, chosen, strict=False):
            good = predicted[index] == targets[index]
            text = f"{names[predicted[index]]}  {100 * certainty[index]:.0f} %"
            text += "" if good else f"\n(is {names[targets[index]]})"
            axis.imshow(images[index], cmap="gray")
            axis.set_title(
                text, fontsize=9, loc="center", color=GREY if good else RED, weight="normal" if good else "bold"
            )
        wrong = int((predicted != targets).sum())
        first = f"the {wrong} wrong ones (red), then" if wrong else "all are right;"
        title = f"{len(chosen)} of {len(targets)} validation images: {first} from the least certain to the most"
        figure.suptitle(title, x=0.02, ha="left", weight="bold")
        figure.tight_layout(rect=(0, 0, 1, 0.99))
        figure.savefig(path)
        plt.close(figure)
