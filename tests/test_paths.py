"""Every path of the repository that a tracked file names exists, and every module that a text names."""

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"(?<![\w./-])(?:backbones|configs|docs|kernels|tests|visionattn|weights)/[\w./*<>{}-]*\w")
# Words that the reader fills in, and what a format string fills in.
PLACEHOLDER = re.compile(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])|<\w+>|{[^}]*}?")
# What looks like a path here and is none.
ELSEWHERE = {
    "weights/model.pth": "a file in a URL that a test makes up",
}


def tracked() -> list[str]:
    """The files that a commit of this moment would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in listing if (ROOT / name).is_file())


FILES = tracked()
TEXTS = (".md", ".py", ".toml", ".yaml", "Makefile")
READ = [
    name for name in FILES if name.endswith(TEXTS) and name != "tests/test_paths.py"
]  # which names two that are not


def exists(path: str) -> bool:
    """Whether a file or folder is called so; a placeholder stands for any name, and one file with one is enough."""
    pattern = PLACEHOLDER.sub("*", path)
    return (ROOT / path).exists() or any(fnmatch.fnmatch(name, pattern) for name in FILES)


@pytest.mark.parametrize("name", READ)
def test_paths_exist(name):
    named = set(NAMED.findall((ROOT / name).read_text(encoding="utf-8"))) - ELSEWHERE.keys()
    missing = sorted(path for path in named if not exists(path))
    assert not missing, f"{name} names {', '.join(missing)}, which the repository does not have"


@pytest.mark.parametrize("name", [name for name in READ if not name.endswith(".py")])
def test_modules_exist(name):
    """Class paths in configurations and texts; those in the code fail where it runs."""
    for dotted in re.findall(r"\bvisionattn(?:\.\w+)+", (ROOT / name).read_text(encoding="utf-8")):
        parts = dotted.split(".")[1:]
        if any(PLACEHOLDER.fullmatch(part) for part in parts):
            continue
        files = [(n, ROOT.joinpath(folder, *parts[:n])) for n in range(len(parts) + 1) for folder in ("visionattn", "")]
        files = [(n, f) for n, path in files for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
        depth, file = max(files)
        inside = parts[depth : depth + 1]
        assert not inside or re.search(rf"\b{inside[0]}\b", file.read_text(encoding="utf-8")), dotted


def test_a_path_that_is_gone_is_found():
    assert exists("configs/dense/FAMILY.yaml") and exists("configs/classify/*_in1k.yaml") and exists("visionattn/train")
    assert not exists("configs/classify/digits_demo.yaml") and not exists("kernels/FAMILY.yaml")
