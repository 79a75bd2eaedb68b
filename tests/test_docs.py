"""Every command and snippet of the README and of docs/ runs, on data small enough for a test; those of the running text
are parsed."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
SNIPPETS = {
    f"{page}-{i}": code
    for page, text in PAGES.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
}


def commands(text: str) -> list[str]:
    """The lines of a page's bash blocks, without comments, lines that end with a backslash joined to the next."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line for line in (line.split("#")[0].strip() for line in blocks.splitlines()) if line]


def mentioned(text: str) -> list[str]:
    """The commands that stand between backticks in a page's running text; three dots are the benchmark's."""
    spans = [
        " ".join(span.split())
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    found = [span for span in spans if re.match(r"(python|pytest|pip|make|visionattn|\.\.\.) ", span)]
    return [re.sub(r"^\.\.\.", "python -m visionattn.benchmark", span) for span in found]


COMMANDS = {page: commands(text) for page, text in PAGES.items()}
MENTIONED = sorted({command for text in PAGES.values() for command in mentioned(text)})

# What a test adds to a command so that it needs no network and little time.
SMALL_NET = "--model.model_args '{embed_dims: [8, 16, 16, 24], depths: [1, 1, 1, 1], mlp_ratios: [2, 2, 2, 2]}'"
ONE_STEP = (
    "--model.pretrained false --data.batch_size 2 --data.num_workers 0 --trainer.limit_train_batches 1 "
    "--trainer.limit_val_batches 1"
)
ONE_ROUND = "--repeats 1 --seconds 1 --mode infer"
SMALLER = {
    "python train.py fit -c configs/classify/": f"{ONE_STEP} --data.img_size 64 --trainer.max_epochs 1",
    "python train.py fit -c configs/segment/": f"{ONE_STEP} {SMALL_NET} --data.img_size 64 --trainer.max_steps 1 "
    "--trainer.val_check_interval 1 --model.head_args '{width: 16}'",
    "python train.py fit -c configs/detect/": f"{ONE_STEP} {SMALL_NET} --model.min_size [64] --model.max_size 96 "
    "--model.fpn_channels 16 --trainer.max_epochs 1",
    "python train.py validate -c configs/classify/": "--data.num_workers 0",
    "python train.py test -c configs/classify/": "--data.num_workers 0",
    "python train.py predict": "",
    "python -m visionattn weights": "",
    "python -m visionattn.benchmark models": f"{ONE_ROUND} --batch 1 --img-size 64 --candidates plain,ours",
    "python -m visionattn.benchmark layers": f"{ONE_ROUND} --sizes 4x4x192,8x8x192",
}
# What a page's commands leave behind.
RESULTS = {
    "README.md": "predictions.json",
    "docs/dense.md": "results/0_classes.png",
    "docs/linear-attention.md": "docs/images/mixers.png",
}
# What stands for a word that the reader fills in.
EXAMPLES = {"OP": "lka", "FAMILY": "van", "NAME": "van_b0", "NAME.TAG": "van_b0.in1k"}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name):
    subprocess.run([sys.executable, "-c", SNIPPETS[name]], cwd=ROOT, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / target).is_file(), target


def test_pip_install(checkout, tmp_path):
    assert "pip install ." in COMMANDS["README.md"]
    # fmt: off
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                    "--target", tmp_path / "site", "."], cwd=checkout, check=True)
    # fmt: on
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    code = "import visionattn; assert 'site' in visionattn.__file__; print(visionattn.list_models())"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def execute(words: list[str], monkeypatch) -> None:
    """What ``python WORDS`` does, here instead of in a process that imports everything anew."""
    module, words = (words[1], words[2:]) if words[0] == "-m" else (None, words)
    monkeypatch.setattr(sys, "argv", [module, *words] if module else words)
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a reader: the checkout's files, and data and images under the names that pages use."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            images = tmp_path / "FOLDER" / split / label
            images.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{i}.jpg")
    for name in ("configs", "train.py", "visionattn_train.py"):
        os.symlink(ROOT / name, tmp_path / name)
    os.symlink(tmp_path / "FOLDER" / "val" / "cat", tmp_path / "IMAGE_OR_FOLDER")
    for name in ("images", "benchmarks"):
        (tmp_path / "docs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)  # the benchmark's --threads


@pytest.mark.parametrize("page", [page for page in PAGES if COMMANDS[page]])
def test_commands_run_in_the_order_given(page, folder, monkeypatch):
    pytest.importorskip("lightning")
    if page == "docs/dense.md":
        pytest.importorskip("segmentation_models_pytorch")
        from tests.train.dense_data import coco, folders

        folders(folder / "FOLDER")
        coco(folder / "FOLDER")
    for command in COMMANDS[page]:
        if command.startswith(("make ", "pip install ")):
            parse(command)
            continue
        extra = next((extra for start, extra in SMALLER.items() if command.startswith(start)), None)
        assert extra is not None, f"{page} has a command that no test runs: {command}"
        print(command)  # pytest shows it with a failure
        execute(shlex.split(f"{command} {extra}")[1:], monkeypatch)
    assert page not in RESULTS or (folder / RESULTS[page]).is_file()


def parse(command: str) -> None:
    """Ask the program itself, or what it reads, whether it knows everything that the command says."""
    program, *words = [EXAMPLES.get(word, word) for word in shlex.split(command)]
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (None, words)
    if program == "make":
        done = subprocess.run([program, *words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert words[0] == "install" and words[1].removeprefix(".").strip("[]") in {"", *extras}
    elif program == "pytest" or module == "pytest":
        # Collecting would take longer than all other commands together.
        assert all((ROOT / word.split("::")[0]).exists() for word in rest if "/" in word)
    elif program == "visionattn" or module == "visionattn":
        pytest.importorskip("jsonargparse")
        from visionattn.weights.commands.cli import make_parser

        make_parser().parse_args(rest)
    elif module == "visionattn.benchmark" and rest:
        from visionattn.benchmark import cli

        arguments = cli._build_parser().parse_args(rest)
        assert arguments.command == "gpu" or cli._plan(arguments).cases
    elif words[0] == "-c":
        exec(words[1], {})
    else:
        assert module and importlib.util.find_spec(module), f"a command that no test knows: {command}"


@pytest.mark.parametrize("command", MENTIONED)
def test_commands_of_the_running_text_are_understood(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(ROOT)
    parse(command)
