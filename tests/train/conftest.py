import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

if all(importlib.util.find_spec(name) for name in ("lightning", "jsonargparse", "torchmetrics")):
    from visionattn.train.cli import run
else:
    collect_ignore_glob = ["test_*.py", "dense/*"]  # the training extra is not installed

# A real VAN, small enough to train in seconds.
TINY = [
    "--model.name=van_b0",
    "--model.model_args={embed_dims: [8,16,16,24], depths: [1,1,1,1], mlp_ratios: [2,2,2,2]}",
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps of a few pixels are slowest with many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """An image folder of three classes that differ in colour: 8 training and 3 validation images each."""
    return make_folder(tmp_path / "images")


def make_folder(root, classes=("cat", "dog", "owl"), train=8, val=3):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 80, (48, 64, 3), dtype=np.uint8)
                pixels[..., channel % 3] += 150
                Image.fromarray(pixels).save(root / split / name / f"{n}.png")
    return root


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run on digits: four epochs of the tiny VAN, every epoch's checkpoint kept."""
    out = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    digits(out, "--trainer.max_epochs=4", *keep_all(out))
    return out


def keep_all(out):
    """Keep the checkpoint of every epoch, besides the configured ones, as every/EPOCH.ckpt."""
    saver = "--trainer.callbacks"
    return [
        f"{saver}+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"{saver}.dirpath={out / 'every'}",
        f"{saver}.filename={{epoch}}",
        f"{saver}.auto_insert_metric_name=false",
        f"{saver}.save_top_k=-1",
    ]


def digits(out, *arguments, ema=True):
    """Train on digits with shuffling, augmentation, drop path, Mixup and averaged weights; 6 steps an epoch."""
    average = ["--trainer.callbacks+=visionattn.train.callbacks.EMA", "--trainer.callbacks.decay=0.9"] if ema else []
    return run(
        [
            "fit",
            "--data=Digits",
            *TINY,
            "--data.batch_size=32",
            "--trainer.limit_train_batches=6",
            "--model.mixup=0.2",
            "--model.warmup_epochs=1",
            "--model.model_args.drop_path_rate=0.2",
            "--model.lr=0.01",
            *average,
            f"--out={out}",
            *arguments,
        ]
    )


@pytest.fixture(scope="session")
def fit():
    """The function that trains the tiny VAN on digits."""
    return digits


@pytest.fixture(scope="session")
def tiny():
    """The flags of the tiny VAN."""
    return TINY
