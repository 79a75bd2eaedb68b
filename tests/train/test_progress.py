"""What a run says and draws: lines of epochs, the bar of the run, pictures at its end."""

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.train import progress
from visionattn.train.cli import run
from visionattn.train.figures import heading
from visionattn.train.summary import Validation


def test_an_epoch_without_validation_shows_no_metric_of_an_earlier_one(fit, tmp_path, capsys):
    fit(tmp_path, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2", ema=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val" in line for line in lines] == [False, True, False]
    assert lines[2].startswith("epoch 3/3, loss ")


def test_a_resumed_epoch_is_not_timed_from_the_start_of_the_machine(run_dir, fit, tmp_path, capsys):
    fit(tmp_path, "--trainer.max_epochs=4", f"--ckpt_path={run_dir / 'every' / '2.ckpt'}")
    seconds = float(capsys.readouterr().out.split("epoch 4/4")[1].splitlines()[0].split(", ")[-1].removesuffix(" s"))
    assert seconds < 60


def test_the_bar_is_of_the_whole_run_and_leaves_a_line_per_epoch(fit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bars = []
    make = progress.RunBar.init_train_tqdm
    monkeypatch.setattr(progress.RunBar, "init_train_tqdm", lambda self: bars.append(make(self)) or bars[-1])
    fit(tmp_path, "--trainer.max_epochs=3", ema=False)
    assert bars[0].total == 18 == bars[0].n
    shown = capsys.readouterr().out
    assert [shown.count(f"epoch {n}/3, loss") for n in (1, 2, 3)] == [1, 1, 1]
    assert " left" in shown and "epoch 0" not in shown.lower()


def test_a_run_draws_its_curves_and_its_mistakes(run_dir):
    for name in ("curves.png", "confusion.png", "predictions.png"):
        assert min(Image.open(run_dir / name).size) > 200


def test_a_run_keeps_all_in_its_folder_whatever_names_its_folder(tmp_path, tiny, monkeypatch):
    """Lightning's own argument, of a folder that is not there yet."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data=Digits", *tiny, "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    run(["fit", *flags, "--trainer.default_root_dir=new/run"])
    found = {path.name for path in (tmp_path / "new" / "run").iterdir()}
    assert {"checkpoints", "confusion.png", "predictions.png"} <= found
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_worst_images_are_kept_whatever_the_batches(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, scores = torch.rand(50, 3, 4, 4, generator=generator), torch.rand(50, 5, generator=generator).softmax(-1)
    targets = torch.randint(-1, 5, (50,), generator=generator)
    kept = []
    for size in (50, 7):
        seen = Validation(10)
        for parts in zip(images.split(size), targets.split(size), scores.split(size), strict=True):
            seen.add(*parts)
        kept.append(seen)
    (a, b), preprocess = kept, {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert len(a.targets) == int((targets >= 0).sum())
    for one, other in zip(a.worst(preprocess)[1:], b.worst(preprocess)[1:], strict=True):
        assert np.array_equal(one, other)
    wrong = a.worst(preprocess)[2].argmax(1) != a.worst(preprocess)[1]
    assert wrong.all()  # more than 10 of 50 are


@pytest.mark.parametrize(
    "shown, wrong, text", [(0, 0, "all are right"), (9, 9, "the 9 wrong"), (17, 20, "17 of the 20 wrong")]
)
def test_the_heading_counts_what_is_shown(shown, wrong, text):
    assert text in heading(40, 360, shown, wrong)


def test_validation_alone_draws_nothing(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["validate", "--data=Digits", f"--ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}"])
    assert not list(tmp_path.iterdir())
