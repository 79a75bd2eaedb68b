"""The command line itself: configurations, help, and errors that fit one line."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from visionattn.train.cli import main, python, run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path
    for path in Path(str(importlib.resources.files("visionattn.configs"))).rglob("*.yaml")
    if path.parent.name not in ("data", "dense")
)


def last_line(capsys, *arguments):
    """What the user sees last, after a command that must fail."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert exit.value.code not in (0, None)
    text = (shown.out + shown.err + (exit.value.code if isinstance(exit.value.code, str) else "")).strip()
    assert "Traceback" not in text and "usage" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_prints_and_is_short(config, capsys):
    assert len(config.read_text().splitlines()) <= 40
    data = [] if "data" in yaml.safe_load(config.read_text()) else ["--data=Digits"]
    with pytest.raises(SystemExit) as exit:
        run(["fit", "-c", str(config), *data, "--print_config"])
    assert not exit.value.code
    task = {"segment": "Segmentation", "detect": "Detection"}.get(config.parent.name, "Classification")
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith(task)


@pytest.mark.parametrize("name", ["van_b0", "van_b2"])
@pytest.mark.parametrize("config", ["van_in1k", "finetune"])
def test_image_recipes_run_a_step(config, name, folder, tmp_path):
    path = ROOT / "configs" / "classify" / f"{config}.yaml"
    if config == "finetune" and name == "van_b2":
        pytest.skip("one model is enough")
    flags = ["--data.img_size=32", "--data.batch_size=2", "--data.num_workers=0", "--model.pretrained=false"]
    cli = run(
        ["fit", "-c", str(path), f"--data.root={folder}", f"--model.name={name}", *flags, "--trainer.fast_dev_run=true"]
    )
    assert cli.trainer.global_step == 1 and cli.model.net.num_classes == 3


RECIPES = ["pvt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cswin", "nalaformer", "pola", "transnext"))]


@pytest.mark.parametrize("config", RECIPES)
def test_recipes_run_a_step_with_their_own_models(config, folder):
    path = ROOT / "configs" / "classify" / f"{config}_in1k.yaml"
    flags = ["--data.img_size=64", "--data.batch_size=2", "--data.num_workers=0", "--trainer.fast_dev_run=true"]
    cli = run(["fit", "-c", str(path), f"--data.root={folder}", *flags])
    assert cli.trainer.global_step == 1 and cli.model.net.num_classes == 3
    assert cli.model.hparams["name"].startswith(config)


def test_data_files_are_layered_under_flags(folder):
    data = ROOT / "configs" / "data" / "images.yaml"
    flags = [f"--data.root={folder}", "--data.img_size=32", "--data.batch_size=4", "--data.num_workers=0"]
    cli = run(["fit", f"--data={data}", *flags, "--model.name=test_resnet", "--trainer.fast_dev_run=true"])
    assert (cli.datamodule.batch_size, cli.datamodule.augment["re_prob"]) == (4, 0.25)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("fit --data Digits --model.name van_bo", "unknown model 'van_bo': did you mean van_b"),
        ("fit --data Digits", "no model: give a timm model with --model.name"),
        ("fit --model.name van_b0", "required: --data"),
        ("fit --data Digit --model.name van_b0", "data: there is no class Digit"),
        ("fit --data Images --model.name van_b0", "no data: give the image folder with --data.root"),
        ("fit --data Images --data.root nowhere --model.name van_b0", "no such data folder: nowhere"),
        ("fit --data Digits --data.batch_size 0 --model.name van_b0", "data.batch_size is 0: it must be at least 1"),
        ("fit --data Digits --data.batch_size x --model.name van_b0", "data.batch_size: Expected a <class 'int'>"),
        ("fit --data Digits --data.num_workers -1 --model.name van_b0", "data.num_workers is -1"),
        ("fit --data Digits --data.batchsize 8 --model.name van_b0", "Option 'batchsize' is not accepted"),
        ("fit --data Digits --model.name van_b0 --model.lr 0", "model.lr is 0"),
        ("fit --data Digits --model.name van_b0 --model.decay step", "model.decay is 'step'"),
        ("fit --data Digits --model.name van_b0 --model.optimizer adamm", "unknown optimizer 'adamm'"),
        ("fit --data Digits --model.name van_b0 --model.model_args.deep 3", "van_b0 does not take model.model_args"),
        ("fit --data Digits --model.name van_b0 --model.weights no.ckpt", "no such checkpoint: no.ckpt"),
        ("fit --data Digits --model.name van_b0 --ckpt_path no.ckpt", "no such checkpoint: no.ckpt"),
        (
            "fit --data Digits --model.name van_b0 --model.mixup 1 --data.batch_size 9",
            "data.batch_size is 9: make it even",
        ),
        ("fit --data Digits --model.name van_b0 --trainer.max_epoch 3", "trainer.max_epoch"),
        ("fit --data Digits --model.name van_b0 --trainer.accelerator warp", "accelerator"),
        ("fit -c nowhere.yaml", "File does not exist"),
        ("train", "train"),
        ("predict", "required: IMAGE_OR_FOLDER"),
        ("predict nowhere.png --model resnet18", "no such image or folder: nowhere.png"),
        ("predict x.png --ckpt nowhere.ckpt", "no such checkpoint: nowhere.ckpt"),
        ("predict train.py", "say what to predict with: --ckpt FILE, or --model NAME"),
        ("predict train.py --ckpt train.py", "is not a checkpoint"),
        ("predict train.py --model van_bo", "unknown model 'van_bo'"),
        ("predict train.py --model resnet18 --output x.txt", "cannot write x.txt: choose a name that ends in"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = last_line(capsys, *arguments.split())
    assert line.startswith("error: ") and message in line


def test_bugs_still_show_a_traceback(monkeypatch):
    monkeypatch.setattr("visionattn.train.cli.check_disk", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--data=Digits", "--model.name=test_resnet", "--trainer.fast_dev_run=true"])


def test_a_mistake_in_a_real_process_is_the_last_line_and_an_error_status():
    command = [sys.executable, "train.py", "fit", "--data=Digits", "--model.name=van_bo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("error: unknown model")


def test_help_lists_the_four_subcommands(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("fit", "validate", "test", "predict"))


def test_next_commands_name_the_interpreter_that_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert python() == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert python() == "python"


def test_threads_do_not_spin_unless_asked_to(monkeypatch):
    """OpenMP reads its policy when PyTorch is imported, so the script has to set it before."""
    code = "import os, runpy, sys; sys.modules['torch'] = None\n"
    code += "try: runpy.run_path('train.py')\nexcept ImportError: pass\n"
    command = [sys.executable, "-c", f"{code}print(os.environ['OMP_WAIT_POLICY'])"]
    for given, used in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == [used]
