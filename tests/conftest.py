import gc
import os
import subprocess
from pathlib import Path

import pytest
import torch

# The same forms in every run, in child processes too: what is timed differs from run to run.
os.environ.setdefault("VISIONATTN_TUNE", "off")

ROOT = Path(__file__).resolve().parent.parent

# Small shapes gain nothing from many threads, and workers side by side would fight for the cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // WORKERS))


def pytest_collection_finish():
    # Thousands of tests are millions of objects, through which every full collection would go: seconds each.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what a clone would hold, to build packages in without leaving anything in the tree."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is older than the build asks for")
    target = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/fixtures"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target
