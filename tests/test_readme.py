"""Every command of the README and every snippet of it and of docs/ runs, on data small enough for a test."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
# What a test adds to a command so that it needs no network and little time.
SMALLER = {
    "python train.py fit": "--model.pretrained false --out runs/van_b0-1 --data.batch_size 2 --data.num_workers 0 "
    "--data.img_size 64 --trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1",
    "python train.py predict": "",
    "python -m visionattn weights": "",
    "python -m visionattn.benchmark": "--batch 1 --img-size 64 --repeats 3 --seconds 1 --mode infer "
    "--candidates plain,ours",
}


PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}  # fmt: skip
SNIPPETS = {f"{page}-{i}": code for page, text in PAGES.items()
            for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))}  # fmt: skip


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name):
    subprocess.run([sys.executable, "-c", SNIPPETS[name]], cwd=ROOT, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / target).is_file(), target


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pip_install(checkout, tmp_path):
    assert "pip install ." in COMMANDS
    # fmt: off
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                    "--target", tmp_path / "site", "."], cwd=checkout, check=True)
    # fmt: on
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    code = "import visionattn; assert 'site' in visionattn.__file__; print(visionattn.list_models())"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_command_lines_run_in_the_order_given(tmp_path):
    pytest.importorskip("lightning")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "FOLDER" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    os.symlink(ROOT / "configs", tmp_path / "configs")
    os.symlink(ROOT / "train.py", tmp_path / "train.py")
    os.symlink(tmp_path / "FOLDER" / "val" / "cat", tmp_path / "IMAGE_OR_FOLDER")
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    commands = [c for c in COMMANDS if not c.startswith(("make ", "pip install "))]
    for command in commands:
        extra = next((extra for start, extra in SMALLER.items() if command.startswith(start)), None)
        assert extra is not None, f"the README has a command that no test runs: {command}"
        words = shlex.split(f"{command} {extra}")
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "predictions.json").is_file()
