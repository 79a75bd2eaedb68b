"""Checkpoints of PyTorch before 1.6: how much memory their storages claim, before anything makes room for it."""

import io
import pickle
import tarfile
from typing import Any

from visionattn.errors import amount

__all__ = ["is_tar", "refuse_claims"]

ITEMS = {"ComplexDouble": 16, "Double": 8, "ComplexFloat": 8, "Long": 8, "Float": 4, "Int": 4, "QInt32": 4}
ITEMS |= {"Half": 2, "BFloat16": 2, "Short": 2}
"""Bytes of a number in the storages of this name; in all others 1."""


class Stub:
    """Stands for whatever a pickle names: it takes everything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As of a list."""

    def extend(self, values: Any) -> None:
        """As of a list."""

    add = append


class Sizes(pickle._Unpickler):  # the one of Python itself: that in C makes room for whatever number a memo has
    """Looks through a pickle for the storages that it wants."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Stub,), {"itemsize": ITEMS.get(name.removesuffix("Storage"), 1)})

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) != 6 or saved[0] not in ("storage", b"storage"):
            raise ValueError("it refers to something else than storages")
        _, kind, key, _, count, _ = saved
        if not isinstance(kind, type) or type(count) is not int or count < 0:
            raise ValueError("it describes a storage by something else than its size")
        self.bytes[str(key)] = max(self.bytes.get(str(key), 0), count * getattr(kind, "itemsize", 1))
        return Stub()


def refuse_claims(content: bytes, size: int) -> None:
    """Raise ``ValueError`` if a pickle wants more storage than its file has bytes.

    Args:
        content: The pickle of the tensors.
        size: Bytes of the file.
    """
    sizes = Sizes(content)
    sizes.load()
    if (claimed := sum(sizes.bytes.values())) > size:
        raise ValueError(f"it claims {amount(claimed)} of tensors in {amount(size)}")


def is_tar(head: bytes) -> bool:
    """Whether the first bytes of a file are a header of tar's, which PyTorch looks for whatever else they are."""
    if head[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True
