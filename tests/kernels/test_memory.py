"""Freed memory is kept for the next tensors, unless somebody has said otherwise."""

import platform
import subprocess
import sys

import pytest

from visionattn.kernels import keep_freed_memory
from visionattn.kernels.common import memory

# Page faults of ten maps that are made and freed one after the other, after the first ones.
COUNT = """
import resource, torch
from visionattn.kernels import keep_freed_memory
print(keep_freed_memory(), end=" ")
def maps():
    a = [torch.ones(6 * 2**20 // 4) for _ in range(3)]
maps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    maps()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def faults(**environment):
    """Whether memory was kept, and the page faults after that."""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment}
    ran = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    kept, number = ran.stdout.split()
    return kept == "True", int(number)


@glibc
def test_freed_memory_is_used_again():
    kept, number = faults()
    assert kept and number < 5000
    kept, number = faults(VISIONATTN_MALLOC="default")
    assert not kept and number > 15_000


@glibc
@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "2"), ("MALLOC_TRIM_THRESHOLD_", "65536")])
def test_settings_of_the_c_library_s_own_stay(name, value):
    kept, _ = faults(**{name: value})
    assert kept == (not name.endswith("_"))


def test_other_settings_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "_kept", None)
    monkeypatch.setenv("VISIONATTN_MALLOC", "all")
    with pytest.raises(ValueError, match="VISIONATTN_MALLOC must be one of keep, default, got 'all'"):
        keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_kept", None)
    monkeypatch.delenv("VISIONATTN_MALLOC", raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
