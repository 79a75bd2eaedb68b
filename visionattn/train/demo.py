"""A first run to watch: train a small VAN on handwritten digits, draw what it learned, say what to try next.

``python -m visionattn.train.demo`` is ``python train.py fit -c configs/classify/van_digits.yaml`` and the pictures.
"""

import argparse
import importlib.resources
import sys
import time
from pathlib import Path

import numpy as np
import torch

from visionattn.errors import UserError
from visionattn.train.callbacks import best_checkpoint
from visionattn.train.cli import python, run
from visionattn.train.figures import draw_predictions
from visionattn.train.predict import load

CONFIG = importlib.resources.files("visionattn.configs") / "classify" / "van_digits.yaml"


def demo(out: str = "runs/demo", max_epochs: int | None = None) -> float:
    """Train, draw, and print where everything is.

    Args:
        out: Folder of the run.
        max_epochs: Epochs, if not those of the configuration.

    Returns:
        The best validation accuracy in percent.
    """
    start = time.perf_counter()
    # The maps are so small that threads cost more than they save: 6 times as much on two busy cores.
    torch.set_num_threads(1)
    print(f"Training a small VAN on 1,437 handwritten digits, validating on 360. Everything goes to {out}.")
    epochs = [] if max_epochs is None else ["--trainer.max_epochs", str(max_epochs)]
    cli = run(["fit", "-c", str(CONFIG), "--out", out, *epochs])
    checkpoint, folder = best_checkpoint(cli.trainer), Path(out)
    accuracy = float(cli.trainer.checkpoint_callback.best_model_score)

    net, transform, names = load(checkpoint, None)
    digits, _ = cli.datamodule.dataset("val")
    images, targets = digits.images, np.array(digits.targets)
    with torch.inference_mode():
        batch = torch.stack([transform(image) for image in images])
        scores = net.eval()(batch).softmax(-1).numpy()
    draw_predictions(images, targets, scores, names, folder / "predictions.png")
    sample = folder / "digit.png"
    images[0].save(sample)

    print(f"\n{accuracy:.2f} % of the validation digits are right, after {time.perf_counter() - start:.0f} s.")
    for text, path in {
        "best checkpoint": checkpoint,
        "bare weights": Path(checkpoint).with_name("model.safetensors"),
        "log": folder / "metrics.csv",
        "loss and accuracy": folder / "curves.png",
        "confusion matrix": folder / "confusion.png",
        "predictions": folder / "predictions.png",
    }.items():
        print(f"  {text:<18} {path}")
    print("\nNext, classify an image file:")
    print(f"  {python()} train.py predict --ckpt {checkpoint} {sample}")
    print("and train on your own folder, FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg:")
    print(f"  {python()} train.py fit -c configs/classify/finetune.yaml --data.root FOLDER")
    return accuracy


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m visionattn.train.demo", description=demo.__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="folder of the run (default: %(default)s)")
    parser.add_argument("--max_epochs", type=int, help="epochs, if not those of the configuration")
    try:
        demo(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
