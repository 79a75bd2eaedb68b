"""What the failures of a run mean to the user: a sentence where there is something to do, else nothing."""

import errno
import re
import traceback
from collections.abc import Iterator
from types import FrameType

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from visionattn.errors import UserError, one_line

# Failures of a disk or of a folder, which no change of the program mends.
DISK = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EISDIR EEXIST ENAMETOOLONG EIO ENFILE EMFILE".split()
}
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo", "heartbeat")
GONE = "another process of this run ended, so this one cannot go on"


class LostProcess(UserError):
    """Another process of the run has ended, and this one cannot go on without it.

    Attributes:
        told: Whether another process has said so, or will.
    """

    told = False


def explained(error: Exception) -> UserError | None:
    """``error`` as one that ends with a line; None for a mistake of the program, whose traceback is needed."""
    for inner in chain(error):
        if isinstance(inner, UserError):  # maybe with the parser's own around it, or out of a process that loads data
            text = str(inner)
            return UserError(forwarded(text)) if "Original Traceback" in text else inner
        if isinstance(inner, ProcessRaisedException) and "UserError: " in (text := str(inner)):
            return UserError(forwarded(text))
        if isinstance(inner, ImportError) and (missing := missing_package(inner)):
            return missing
    if isinstance(error, MisconfigurationException | torch.cuda.OutOfMemoryError):
        return UserError(one_line(error))
    if isinstance(error, ProcessExitedException):
        return LostProcess(GONE)
    text = one_line(error)
    if isinstance(error, OSError | EOFError) and is_lost_loader(error):
        return lost_loader("ended")
    if isinstance(error, OSError | MemoryError | RuntimeError | SafetensorError):
        return of_machine(error, text)
    if isinstance(error, AssertionError) and text and raised_in(error, "timm", "torch"):
        # What is asserted about an input or a name; a size is what --data.img_size and the model say.
        advice = ". Change --data.img_size, or the model's by --model.model_args {img_size: ...}"
        return UserError(text.rstrip(".") + (advice if "match model" in text else ""))
    if isinstance(error, ValueError | TypeError) and raised_in(error, "lightning"):
        return UserError(text)
    return None


def forwarded(text: str) -> str:
    """What an error said at the end of the traceback that another process sent."""
    return text.strip().splitlines()[-1].split("UserError: ", 1)[-1]


def of_machine(error: Exception, text: str) -> UserError | None:
    """A failure of a disk, of memory, or of another process."""
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        signal = re.search(r"killed by signal: (\w[\w ]*)", text)
        how = f"was killed ({signal[1].strip()})" if signal else "ended"
        return lost_loader(how)
    if "out of shared memory" in text or "unable to open shared memory object" in text or "/dev/shm" in text:
        return UserError("shared memory (/dev/shm) is full: enlarge it, or load images with --data.num_workers 0")
    if "No usable temporary directory" in text:
        return UserError("no folder for temporary files can be written: free some space, or set TMPDIR to another one")
    if isinstance(error, OSError) and error.errno in DISK:
        where = f" {error.filename}" if error.filename else ""
        return UserError(f"cannot write{where}: {error.strerror}. {advice(error.errno)}")
    full = re.search(r"No space left on device|Disk quota exceeded|File too large|Read-only file system", text)
    if full:
        return UserError(f"cannot write: {full[0]}. {advice(errno.ENOSPC)}")
    if is_lost_process(error, text):
        return LostProcess(GONE)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return UserError(f"memory ran out ({text[:100]}): use smaller batches with --data.batch_size")
    if raised_in(error, "lightning"):
        return UserError(text)
    return None


def lost_loader(how: str) -> UserError:
    """What to do when a process that loads images is gone."""
    return UserError(
        f"a process that loads images {how}, usually because memory ran out: use fewer with --data.num_workers, "
        "or smaller batches"
    )


def is_lost_loader(error: Exception) -> bool:
    """Whether a process that loads images was gone when the batch it had sent word of was fetched from it.

    The loader finds a dead process when it waits for a batch. A tensor's memory is asked for after that, over a
    connection of its own, and fails as a connection does.
    """
    return raised_in(error, "multiprocessing") and any(
        module_of(frame) == "torch.utils.data.dataloader" for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def is_lost_process(error: Exception, text: str) -> bool:
    """Whether the error says that another process of the run is gone."""
    if not torch.distributed.is_available():
        return False
    joined = torch.distributed.is_initialized() and any(word in text for word in LOST)
    return joined or isinstance(error, torch.distributed.DistError)


def advice(number: int) -> str:
    """What to do about a failure of a disk, by its errno."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space, or choose another disk with --out"
    if number == errno.EFBIG:
        return "Raise the limit on the size of files (ulimit -f), or choose another disk with --out"
    if number in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit on open files (ulimit -n)"
    return "Choose another folder"


def missing_package(error: ImportError) -> UserError | None:
    """An import that a choice of the user needs; None if it is of ours or of what we need ourselves."""
    if not raised_in(error, "lightning", "torchmetrics", "torch.utils.tensorboard"):
        return None
    named = re.search(
        r"Requirement '([\w-]+)|pip install ['`\"]?(?:-U )?['\"]?([\w-]+)|No module named '([\w-]+)", str(error)
    )
    package = next(filter(None, named.groups()), None) if named else None
    return UserError(f"pip install {package}: what was asked for needs this package" if package else one_line(error))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those out of which it was raised, the last one first."""
    seen = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def raised_in(error: BaseException, *packages: str) -> bool:
    """Whether the innermost frame of an error's traceback is in one of the packages."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = module_of(frames[-1]) if frames else ""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def module_of(frame: FrameType) -> str:
    """The name of the module whose code a frame runs."""
    return frame.f_globals.get("__name__", "")
