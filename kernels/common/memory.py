"""What the C library does with memory that a CPU's tensors leave behind.

The next tensors need it at once, but glibc hands freed blocks and the free end of its heap back to the system, which
gives them out again page by page, zeroed: with maps of some MB that takes 5 to 10 % of a network's time, and nearly
half of some layers'. Above the two thresholds that are set here it still does so.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

ENVIRONMENT_VARIABLE = "VISIONATTN_MALLOC"
SETTINGS = ("keep", "default")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
HEAP = 512 * 2**20  # bytes at the end of the heap
BLOCK = 32 * 2**20  # bytes of one block; glibc allows no more

_kept: bool | None = None


def keep_freed_memory() -> bool:
    """Let this process reuse up to 512 MB of freed memory instead of returning it to the system.

    Every backbone asks for it when it is built; who calls operators alone may do so. ``VISIONATTN_MALLOC=default``
    leaves the C library as it is, and so do settings of its own (``MALLOC_..._``, ``GLIBC_TUNABLES``). Other C
    libraries than glibc are left alone, too.

    Returns:
        Whether the process does.

    Raises:
        ValueError: If the environment variable has another value.
    """
    global _kept
    if _kept is None:
        _kept = _asked() and _set()
    return _kept


def _asked() -> bool:
    setting = os.environ.get(ENVIRONMENT_VARIABLE) or "keep"
    if setting not in SETTINGS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(SETTINGS)}, got {setting!r}")
    own = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return setting == "keep" and not own and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "")


def _set() -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, HEAP))
