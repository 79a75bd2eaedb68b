"""What computes here: the processor, the instructions that PyTorch and oneDNN use of it, and their versions."""

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["capability", "cpu_name", "machine"]


@cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def capability() -> str:
    """The widest instructions that PyTorch's own code and oneDNN both use, such as ``AVX2`` or ``AVX512``.

    The environment variables ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` narrow what each of them uses.
    """
    pytorch = torch.backends.cpu.get_cpu_capability()
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if pytorch.startswith("AVX512") and onednn.startswith(("SSE", "AVX")) and not onednn.startswith("AVX512"):
        return "AVX2"
    return pytorch


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def machine() -> dict[str, str]:
    """All that decides which of several equal forms is the fastest, but for the number of threads."""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() or "all",
        "torch": torch.__version__,
        "visionattn": _version("visionattn"),
    }
