"""The command before PyTorch: help at once, and what has to be set before PyTorch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionattn_train
from visionattn.train.cli import main

ROOT = Path(__file__).resolve().parents[2]


def python(code, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).stdout.split("\n")


def test_help_loads_no_more_than_it_needs():
    code = "import sys, visionattn_train as v\ntry: v.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    *shown, modules, _ = python(code)
    assert all(any(line.startswith(f"  {name} ") for line in shown) for name in ("fit", "validate", "test", "predict"))
    assert not {"torch", "visionattn", "lightning", "numpy", "yaml"} & set(modules.split())


def test_the_trainer_loads_only_what_it_trains_with():
    code = "import sys, visionattn.train.cli; print(*sys.modules)"
    modules = set(python(code)[0].split())
    assert "lightning" in modules
    heavy = {
        "sklearn",
        "pandas",
        "visionattn.train.figures",
        "visionattn.train.demo",
        "tensorboard",
        "faster_coco_eval",
    }
    assert not heavy & modules


@pytest.mark.parametrize("before, then", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_are_told_to_wait_before_torch_is_there(before, then):
    code = (
        "import os, sys, types, visionattn_train as v\n"
        "assert 'torch' not in sys.modules\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY')); raise SystemExit\n"
        "sys.meta_path.insert(0, Finder())\n"
        "v.main(['fit'])"
    )
    assert python(code, **before) == [then, ""]


def test_a_command_without_arguments_shows_what_there_is(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        visionattn_train.main([])
    assert end.value.code == 2 and "{fit,validate,test,predict}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_installed_command_is_the_one_of_the_checkout():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"]["visionattn-train"] == "visionattn_train:main"
    assert "from visionattn_train import main" in (ROOT / "train.py").read_text("utf-8")
