"""Whole runs in one process: what they leave behind, how they continue, what they refuse."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from visionattn.errors import UserError
from visionattn.train.callbacks import EMA
from visionattn.train.cli import run

ROOT = Path(__file__).resolve().parents[2]


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["state_dict"], checkpoint.get("current_model_state", {})


def assert_same_weights(a, b):
    for one, other in zip(weights(a), weights(b), strict=True):
        assert one and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def rows(folder, column):
    with open(folder / "metrics.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_a_run_leaves_checkpoints_weights_logs_and_its_configuration(run_dir):
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"last.ckpt", "model.safetensors"} < names and len(names) == 5  # and the three best
    assert any(path.name.startswith("events.out.tfevents") for path in run_dir.iterdir())
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["init_args"]["name"] == "van_b0"
    assert len(rows(run_dir, "val/acc1")) == 4 and rows(run_dir, "train/device/samples_per_sec")[0] > 0
    assert rows(run_dir, "train/unreadable_images") == [0] * 4


def test_checkpoints_load_without_running_code_and_hold_settings_as_json(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    json.dumps(checkpoint["hyper_parameters"])
    assert not any("_orig_mod" in key for key in checkpoint["state_dict"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_identical(run_dir, fit, tmp_path, workers):
    """Shuffling, augmentation, Mixup, drop path, schedule, optimizer and averaged weights all continue."""
    flags = ["--trainer.max_epochs=4", f"--ckpt_path={run_dir / 'every' / '1.ckpt'}", f"--data.num_workers={workers}"]
    fit(tmp_path, *flags)
    assert_same_weights(run_dir / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "last.ckpt")


def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_identical(run_dir, fit, tmp_path):
    saver = "--trainer.callbacks"
    steps = [f"{saver}+=lightning.pytorch.callbacks.ModelCheckpoint", f"{saver}.dirpath={tmp_path / 'steps'}"]
    steps += [f"{saver}.every_n_train_steps=9", f"{saver}.filename={{step}}", f"{saver}.save_top_k=-1"]
    fit(tmp_path / "first", "--trainer.max_epochs=4", *steps)
    fit(tmp_path / "second", "--trainer.max_epochs=4", f"--ckpt_path={tmp_path / 'steps' / 'step=9.ckpt'}")
    for out in ("first", "second"):
        assert_same_weights(run_dir / "checkpoints" / "last.ckpt", tmp_path / out / "checkpoints" / "last.ckpt")


def test_the_last_checkpoint_is_of_the_last_epoch_even_if_it_is_not_among_the_best(fit, tmp_path, monkeypatch):
    first_only = lambda self, trainer, current=None: trainer.current_epoch == 0  # noqa: E731
    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", first_only)
    fit(tmp_path, "--trainer.max_epochs=3", ema=False)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_second_run_in_the_same_folder_works_and_keeps_the_first_log(fit, tmp_path):
    for _ in range(2):
        fit(tmp_path, "--trainer.max_epochs=1", ema=False)
    assert (tmp_path / "metrics.csv").exists() and (tmp_path / "metrics.1.csv").exists()


def test_settings_that_contradict_the_checkpoint_are_refused(run_dir, fit, tmp_path):
    last = run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"model.weight_decay is 0.7, was 0.05.*--model.weights .*last.ckpt"):
        fit(tmp_path, f"--ckpt_path={last}", "--model.weight_decay=0.7")
    with pytest.raises(UserError, match=r"model.name is 'resnet18', was 'van_b0'"):
        run(["validate", "--data=Digits", f"--ckpt_path={last}", "--model.name=resnet18"])


def test_validation_needs_the_checkpoint_alone(run_dir):
    best = max((run_dir / "checkpoints").glob("epoch*.ckpt"), key=lambda p: float(p.stem.split("acc")[1]))
    cli = run(["validate", "--data=Digits", f"--ckpt_path={best}"])
    assert cli.model.hparams.name == "van_b0"
    assert float(cli.trainer.callback_metrics["val/acc1"]) == pytest.approx(max(rows(run_dir, "val/acc1")), abs=1e-3)


def test_preprocessing_comes_with_the_checkpoint(fit, tmp_path):
    fit(tmp_path, "--trainer.max_epochs=1", "--data.img_size=48", ema=False)
    cli = run(["test", "--data=Digits", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    assert cli.datamodule.img_size == 48


def test_averaged_weights_are_not_dropped_unnoticed_on_resume(run_dir, fit, tmp_path):
    with pytest.raises(UserError, match="holds averaged weights: continue with the EMA callback on"):
        fit(tmp_path, f"--ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}", ema=False)


def test_a_new_run_starts_from_the_weights_of_another(run_dir, fit, tmp_path):
    last = run_dir / "checkpoints" / "last.ckpt"
    cli = fit(tmp_path, f"--model.weights={last}", "--model.lr=1e-9", "--trainer.max_epochs=1", ema=False)
    old = weights(last)[0]
    assert all(
        torch.allclose(v, old[k], atol=1e-6) for k, v in cli.model.state_dict().items() if k.endswith("proj.weight")
    )


def test_another_data_set_than_the_checkpoint_knows_is_refused(run_dir, folder):
    flags = ["--data=Images", f"--data.root={folder}", f"--ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}"]
    with pytest.raises(UserError, match=r"checkpoint knows 10 classes .*the data has 3 \(cat, dog, owl\)"):
        run(["validate", *flags])


def test_compiled_models_write_ordinary_checkpoint_keys(fit, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__))
    fit(tmp_path, "--trainer.max_epochs=1", "--model.compile=true")
    assert compiled == ["VAN"]


@pytest.mark.slow
def test_torch_compile_with_averaged_weights_writes_plain_checkpoint_keys(fit, tmp_path):
    fit(tmp_path, "--trainer.max_epochs=1", "--model.compile=true")
    assert not any("_orig_mod" in key for key in weights(tmp_path / "checkpoints" / "last.ckpt")[0])


def test_bf16_channels_last_accumulation_and_clipping_run(fit, tmp_path):
    flags = "--trainer.precision=bf16-mixed --model.channels_last=true --trainer.accumulate_grad_batches=2"
    cli = fit(tmp_path, *flags.split(), "--trainer.gradient_clip_val=1.0", "--trainer.max_epochs=1")
    assert cli.trainer.global_step == 3


def test_learning_rate_follows_the_global_batch(fit, tmp_path, capsys):
    fit(tmp_path, "--model.lr_batch=64", "--trainer.max_epochs=1", ema=False)
    assert "learning rate 0.01 for a batch of 64 is 0.005 for 32" in capsys.readouterr().out


def test_no_room_for_checkpoints_stops_before_training(fit, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("visionattn.train.callbacks.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        UserError, match=r"not enough disk space: the checkpoints need about .* choose another disk with --out"
    ):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unreadable_images_in_training_are_counted_in_the_log(folder, tiny, tmp_path):
    file = folder / "train" / "owl" / "3.png"
    file.write_bytes(file.read_bytes()[:300])
    flags = [f"--data.root={folder}", "--data.img_size=32", "--data.batch_size=8", "--data.num_workers=0"]
    flags += ["--data.bad_images=skip", "--trainer.max_epochs=2", f"--out={tmp_path / 'run'}"]
    run(["fit", "--data=Images", *tiny, *flags])
    assert rows(tmp_path / "run", "train/unreadable_images") == [1, 1]


def test_averaging_warms_up_to_its_decay():
    ema = EMA(decay=0.9)
    for step, decay in ((0, 0.1), (8, 0.5), (1000, 0.9)):
        ema._latest_update_step = step
        average = [torch.ones(1)]
        ema._average(average, [torch.zeros(1)], None)
        assert average[0].item() == pytest.approx(decay)


def test_validation_uses_the_average_and_the_checkpoint_holds_both(run_dir):
    average, raw = weights(run_dir / "checkpoints" / "last.ckpt")
    assert average.keys() == raw.keys() and any(not torch.equal(average[key], raw[key]) for key in raw)


def test_digits_are_learned(tmp_path, tiny):
    """With half of a minute and 20 thousand parameters; an untrained network scores 10 %."""
    flags = ["--data=Digits", *tiny, "--model.lr=0.01", "--model.warmup_epochs=1", "--trainer.max_epochs=6"]
    cli = run(["fit", *flags, f"--out={tmp_path}"])
    assert cli.trainer.checkpoint_callback.best_model_score > 90


SHARDED = [
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.save_distributed_checkpoint=false",
]
AVERAGED = ["--trainer.callbacks+=visionattn.train.callbacks.EMA", "--trainer.callbacks.decay=0.8"]


def two_processes(tiny, out, *arguments):
    flags = ["--data.batch_size=32", "--data.eval_batch_size=17", "--trainer.max_epochs=1", "--model.warmup_epochs=0"]
    flags += ["--trainer.devices=2", "--trainer.accelerator=cpu", "--model.lr=0.01", f"--out={out}", *arguments]
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--data=Digits", *tiny, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    "strategy",
    [
        ["--trainer.strategy=ddp", *AVERAGED],
        pytest.param(
            [*SHARDED, "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_report_the_accuracy_of_one(strategy, tmp_path, tiny):
    """Each has 180 images in batches of 17: what only fills the last batch up must not count."""
    result = two_processes(tiny, tmp_path, *strategy)
    assert result.returncode == 0, result.stderr
    (reported,) = rows(tmp_path, "val/acc1")
    last = tmp_path / "checkpoints" / "last.ckpt"
    metrics = run(["validate", "--data=Digits", f"--ckpt_path={last}"]).trainer.callback_metrics
    assert float(metrics["val/acc1"]) == pytest.approx(reported, abs=1e-4) and reported > 15
    assert float(metrics["val/loss"]) == pytest.approx(rows(tmp_path, "val/loss")[0], rel=1e-5)


@pytest.mark.slow
def test_processes_that_would_not_share_the_data_are_refused(tmp_path, tiny):
    result = two_processes(tiny, tmp_path, *SHARDED)
    assert result.returncode != 0 and "error: 1 of 2 processes would share the data: add --trainer" in result.stderr
