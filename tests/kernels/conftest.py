"""Fixtures of the kernel tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionattn.kernels import set_backend
from visionattn.kernels.common.backend import ENVIRONMENT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch):
    """Every test starts from the automatic choice."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    set_backend(None)
    torch.manual_seed(0)
    yield
    set_backend(None)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill new memory with NaN, so that a kernel that leaves part of its output unwritten is seen."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def run_python():
    """Run a Python program in a fresh process from the repository root; return its output, fail with it if it fails."""

    def run(*arguments: str, **environment: str | None) -> str:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        settings = {name: value for name, value in settings.items() if value is not None}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=settings, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"exit {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}", pytrace=False)
        return done.stdout

    return run
