"""Segmentation and detection to watch: two small networks find digits on photographs, and draw what they find.

``python -m visionattn.train.demo_dense`` is ``python train.py fit -c configs/segment/van_scenes.yaml``, the same for
``configs/detect/van_scenes.yaml``, and predictions on a few scenes that neither has seen.
"""

import argparse
import importlib.resources
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.errors import UserError
from visionattn.train.callbacks import best_checkpoint
from visionattn.train.cli import python, run
from visionattn.train.data.scenes import make_scene

CONFIGS = importlib.resources.files("visionattn.configs")
TASKS = {
    "segment": ("a class for every pixel", "val/mIoU", "mean intersection over union"),
    "detect": ("a box around every digit", "val/AP50", "average precision at half overlap"),
}


def demo(out: str = "runs/demo-dense", max_epochs: int | None = None) -> dict[str, float]:
    """Train both, draw, and print where everything is.

    Args:
        out: Folder of the runs.
        max_epochs: Epochs, if not those of the configurations.

    Returns:
        The validation scores of the best checkpoints in percent: ``mIoU`` and ``AP50``.
    """
    scenes = Path(out, "scenes")
    scenes.mkdir(parents=True, exist_ok=True)
    for n in range(6):  # three times as large as those of the training; they are scaled to that size and back
        scene = make_scene(np.random.default_rng([7, n]), "val", 288, (2, 3), (0.35, 0.55))
        Image.fromarray(scene.image).save(scenes / f"{n}.png")
    scores, following = {}, []
    for task, (text, metric, explained) in TASKS.items():
        start, folder = time.perf_counter(), Path(out, task)
        print(f"\nTraining a small VAN to give {text} of generated scenes. Everything goes to {folder}.", flush=True)
        epochs = [] if max_epochs is None else ["--trainer.max_epochs", str(max_epochs)]
        cli = run(["fit", "-c", str(CONFIGS / task / "van_scenes.yaml"), "--out", str(folder), *epochs])
        checkpoint = best_checkpoint(cli.trainer)
        best = run(["validate", "-c", str(CONFIGS / task / "van_scenes.yaml"), "--ckpt_path", checkpoint])
        scores[metric.removeprefix("val/")] = value = float(best.trainer.callback_metrics[metric])
        print(f"{explained}: {value:.1f} %, after {time.perf_counter() - start:.0f} s")
        results = str(folder / "predictions")
        run(["predict", "--ckpt", checkpoint, str(scenes), "--output", results, "--overwrite"])
        following.append(f"{python()} train.py predict --ckpt {checkpoint} IMAGE_OR_FOLDER --output results")
        pictures = sorted((folder / "pictures").glob("*.png"))
        print(f"  validation scenes, true and predicted  {pictures[-1]}\n  unseen scenes  {results}/*_overlay.png")
    print("\nNext, on your own images:", *following, sep="\n  ")
    print("and docs/dense.md says how to train on your own data.")
    return scores


def main() -> None:
    """Run the demo from the command line."""
    summary = demo.__doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m visionattn.train.demo_dense", description=summary)
    parser.add_argument("--out", default="runs/demo-dense", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--max_epochs", type=int, help="epochs, if not those of the configurations")
    try:
        demo(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
