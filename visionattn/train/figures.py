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


def draw_curves(
    metrics: Path, path: Path, title: str, metric: str = "val/acc1", label: str = "top-1 accuracy, %"
) -> None:
    """Loss and the metric of the validation over the epochs.

    Args:
        metrics: The CSV logger's file; those of the same run before it was resumed, ``metrics.1.csv`` and so on, count.
        path: Picture to write.
        title: What was trained.
        metric: Column of the metric.
        label: Its name and unit.
    """
    rows = [row for file in log_files(metrics) for row in csv.DictReader(file.read_text("utf-8").splitlines())]

    def series(name: str) -> tuple[list[int], list[float]]:
        # A later log has the last word about an epoch.
        points = {int(row["epoch"]) + 1: float(row[name]) for row in rows if row.get(name) and row.get("epoch")}
        return sorted(points), [points[epoch] for epoch in sorted(points)]

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        for name, which, color in (("train/loss_epoch", "training", BLUE), ("val/loss", "validation", ORANGE)):
            left.plot(*series(name), "o-", color=color, label=which, markersize=3)
        left.set(title="Loss", xlabel="epoch", ylim=(0, None))
        left.legend(frameon=False)
        epochs, accuracy = series(metric)
        right.plot(epochs, accuracy, "o-", color=ORANGE, markersize=3)
        right.set(title="Validation", xlabel="epoch", ylabel=label)
        if accuracy:
            best = int(np.argmax(accuracy))
            right.set_ylim(max(0, min(accuracy) - 2), min(101, max(accuracy) + 5))
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


def log_files(metrics: Path) -> list[Path]:
    """The log of a run and before it, the oldest first, those that were set aside when the run was resumed."""
    old = sorted(metrics.parent.glob("metrics.*.csv"), key=lambda path: path.stat().st_mtime)
    return [path for path in (*old, metrics) if path.exists()]


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
    images: list[Image.Image],
    targets: np.ndarray,
    scores: np.ndarray,
    names: list[str],
    path: Path,
    counts: tuple[int, int] | None = None,
) -> None:
    """A grid of validation images: first the wrong ones, then the least certain, then a sample of the rest.

    Args:
        images: Validation images, all of them or the worst.
        targets: Their classes. [N]
        scores: Probabilities. [N, classes]
        names: One per class.
        path: Picture to write.
        counts: How many images there are in all and how many of them are wrong, if not all are given.
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
            text = f"{short(names[predicted[index]])}  {100 * certainty[index]:.0f} %"
            text += "" if good else f"\n(is {short(names[targets[index]])})"
            axis.imshow(images[index], cmap="gray")
            axis.set_title(
                text, fontsize=9, loc="center", color=GREY if good else RED, weight="normal" if good else "bold"
            )
        wrong = predicted != targets
        total, all_wrong = counts or (len(targets), int(wrong.sum()))
        shown = int(wrong[chosen].sum())
        figure.suptitle(heading(len(chosen), total, shown, all_wrong), x=0.02, ha="left", weight="bold")
        figure.tight_layout(rect=(0, 0, 1, 0.99))
        figure.savefig(path)
        plt.close(figure)


def heading(chosen: int, total: int, shown: int, wrong: int) -> str:
    """What a grid of ``chosen`` of ``total`` images shows, ``shown`` of whose ``wrong`` ones are in it."""
    if not wrong:
        first = "all are right;"
    elif shown == wrong:
        first = f"the {wrong} wrong ones (red), then"
    else:
        first = f"{shown} of the {wrong} wrong ones (red), then"
    return f"{chosen} of {total} validation images: {first} from the least certain to the most"


def short(name: str, most: int = 14) -> str:
    """A class name that fits above its picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
