"""Reading checkpoints of strangers: tensors come out, nothing in the file runs.

safetensors hold no code. Everything else goes through PyTorch's ``weights_only`` reader. Where authors left settings
in their checkpoints (argparse namespaces, yacs nodes, numpy scalars), it is told beforehand to make empty dictionaries
of every class that it does not know, so that no class or function named in a file is ever looked up.
"""

import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # pickles of protocol 2 have the names of Python 2
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from visionattn.errors import one_line, some
from visionattn.weights.errors import WeightsError
from visionattn.weights.files import kind_of
from visionattn.weights.legacy import refuse_claims
from visionattn.weights.numbers import numpy_globals
from visionattn.weights.rename import unwrap

__all__ = ["PREFIX", "bare", "fitting_weights", "local_file", "read_bare_weights", "read_checkpoint", "read_weights"]

PREFIX = "net."
"""What ``train.py`` puts before the names of the bare model's weights in the checkpoints of a run."""
# What other trainings leave around the weights of a model; a reading has to fit the model to be taken.
INNER = (
    "state_dict",
    "model",
    "ema_model",
    "model_ema",
    "params_ema",
    "params",
    "student",
    "teacher",
    "network",
    "net",
)
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "timm_model.", "backbone.", "encoder.", "network.", "net."),
    *("student.", "teacher.", "ema_model.", "model_ema."),
)
DEEPEST = 3  # nests and prefixes in one another
# A file that names these was made to do harm; it is not worth reading even with its teeth out.
HARMFUL_MODULES = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "ctypes", "runpy", "importlib", "pickle"),
    *("webbrowser", "code", "pip", "urllib", "requests"),
}
PLAIN = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter", "parameter_with_state")}
"""What rebuilds tensors of bytes that are in the file; sparse, nested and other ones can claim what is not there."""
NUMBERS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}
SMALL = 1 << 24  # bytes up to which a tensor may repeat what is in the file
MOST_OPERATIONS = 4_000_000  # of a pickle
HARMFUL_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "input", "breakpoint", "exit", "quit"}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, without running code that it may hold.

    Args:
        path: A safetensors file, or one that ``torch.save`` wrote.

    Returns:
        Whatever dictionary was saved. Objects of unknown classes are replaced by empty or ordinary dictionaries.

    Raises:
        WeightsError: Saying why the file is not read.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "safetensors":
        try:
            content = load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a safetensors file, or a truncated one: {one_line(error)}") from error
        _check_tensors(path, content)
        return content
    named = _named_or_refused(path, kind)
    try:
        content = _load(path, kind, [])
    except Exception as first:  # what a file that is no checkpoint raises depends on its bytes
        content = _load_with_strangers(path, kind, named, first)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint: save its state_dict()")
    _check_tensors(path, content)
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of the nests and prefixes that training leaves around them.

    Raises:
        WeightsError: If the file is not read, or holds no tensors.
    """
    return weights_in(read_checkpoint(path), path)


def weights_in(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors of what ``read_checkpoint`` gave for ``path``; see ``read_weights``."""
    state = {name: value for name, value in unwrap(content).items() if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no weights: it must be a state_dict(), or hold one")
    return state


def read_bare_weights(path: str) -> dict[str, Tensor]:
    """The bare model's weights, from any file that holds them; the averaged ones where there are some.

    Raises:
        WeightsError: If there is no such file, it is not read, or holds no tensors.
    """
    return bare(read_weights(local_file(path)))


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the bare model's names, without the rest of a run if it is of one."""
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return {key.removeprefix("_orig_mod."): value for key, value in state.items()}


def fitting_weights(path: str | Path, fits: Callable[[dict[str, Tensor]], bool]) -> tuple[dict[str, Tensor], str]:
    """The weights of ``path`` as a model takes them, out of nests and prefixes that only some trainings leave.

    Args:
        path: A file on this machine.
        fits: Whether a model is complete with some tensors.

    Returns:
        The usual reading if it fits or no other does, else the only one that fits; and what was stripped for it.

    Raises:
        WeightsError: If the file is not read, holds no tensors, or several of its readings fit.
    """
    content, refusal, usual = read_checkpoint(path), None, {}
    try:
        usual = bare(weights_in(content, path))
    except WeightsError as error:
        refusal = error
    if usual and fits(usual):
        return usual, ""
    found = {stripped: state for stripped, state in _readings(content) if fits(state)}
    held = {stripped: {id(value) for value in state.values()} for stripped, state in found.items()}
    for stripped in list(found):  # of the same weights the reading that strips most, with fewest names beside them
        if any(held[stripped] >= held[other] for other in found if other != stripped):
            del found[stripped]
    if len(found) > 1:
        raise WeightsError(f"{path} holds several weights that fit ({', '.join(found)}): save the ones you mean alone")
    if found:
        return next((state, stripped) for stripped, state in found.items())
    if refusal is not None:
        raise refusal
    return usual, ""


def _readings(content: dict) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Tensors within nests and behind prefixes, with what was stripped to come there; each set of tensors once."""
    seen, waiting = set(), [("", content, 0)]
    while waiting:
        stripped, state, depth = waiting.pop(0)
        tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
        mark = frozenset((key, id(value)) for key, value in tensors.items())
        if tensors and mark not in seen and stripped:
            seen.add(mark)
            yield stripped, tensors
        if depth == DEEPEST:
            continue
        for nest in INNER:
            if isinstance(state.get(nest), dict):
                waiting.append((f"{stripped}{nest} > ", state[nest], depth + 1))
        for prefix in PREFIXES:
            inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if inside:
                waiting.append((f"{stripped}{prefix}", inside, depth + 1))


def local_file(path: str) -> str:
    """``path``, if it is a file on this machine.

    Raises:
        WeightsError: If it is a URL, or there is no such file.
    """
    if "://" in path:
        raise WeightsError(f"{path} is a URL: download it first and give the file")
    if not Path(path).is_file():
        raise WeightsError(f"no such checkpoint: {path}")
    return path


def _load(path: Path, kind: str, allowed: list) -> Any:
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")


def _named_or_refused(path: Path, kind: str) -> set[str]:
    """What the pickles of ``path`` name; raises for a file that cannot be looked through or was made to do harm."""
    refusal = f"{path} is not a checkpoint that loads safely"
    try:
        named = _named(path, kind)
    except Exception as error:
        raise WeightsError(f"{refusal} ({_reason(error)}): it is damaged, or save plain tensors") from error
    if harmful := [name for name in sorted(named) if _is_harmful(name)]:
        raise WeightsError(f"{refusal} (it would call {some(harmful)}): do not use it")
    if special := [name for name in sorted(named) if name.startswith("torch._utils._rebuild_") and name not in PLAIN]:
        raise WeightsError(f"{refusal} (it holds tensors of a special kind, {some(special)}): save plain tensors")
    return named


def _load_with_strangers(path: Path, kind: str, named: set[str], first: Exception) -> Any:
    """Read ``path`` with a substitute for every class that the strict reader does not know."""
    numbers = numpy_globals()
    strangers = named - {name for _, name in numbers}  # those that the strict reader knows stay what they are
    for substitute in (Settings, Opaque):
        try:
            return _load(path, kind, numbers + [(substitute, name) for name in strangers])
        except Exception as error:
            reason = _reason(error)
    raise WeightsError(f"{path} is not a checkpoint that loads safely ({reason}): save plain tensors") from first


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that claim more than their file holds, which would take memory as soon as they are copied."""
    seen, waiting = set(), [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # however often a list repeats another, it is looked at once
            continue
        if isinstance(value, Tensor):
            dense = type(value) in (Tensor, Parameter) and value.layout is torch.strided and value.device.type == "cpu"
            if not dense or value.is_quantized or value.dim() > 16:
                raise WeightsError(f"{path} holds a tensor of a special kind ({value.layout}): save plain tensors")
            if value.dtype not in NUMBERS:
                raise WeightsError(
                    f"{path} has numbers of type {value.dtype}, with which nothing computes: convert them"
                )
            room = max(value.untyped_storage().nbytes(), SMALL)
            if value.numel() * value.element_size() > room:
                shape = list(value.shape)
                raise WeightsError(f"{path} has a tensor {shape} without the bytes for it: save it contiguous")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        else:
            continue
        seen.add(id(value))


class Settings:
    """Becomes a dictionary, which takes items and attributes as configuration nodes do."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


class Opaque:
    """Takes whatever state it is given and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Opaque":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _named(path: Path, kind: str) -> set[str]:
    """The classes and functions that a checkpoint names, found without unpickling it."""
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl")
            del entry.CRC  # kind_of has looked at the checksums, where there are any
            pickles = [archive.read(entry)]
    else:
        pickles = []
        with open(path, "rb") as file:
            for _ in range(4):  # magic number, protocol, system, content
                start = file.tell()
                for number, _operation in enumerate(pickletools.genops(file)):
                    if number > MOST_OPERATIONS:
                        raise ValueError("a pickle without end")
                end = file.tell()
                file.seek(start)
                pickles.append(file.read(end - start))
        refuse_claims(pickles[-1], path.stat().st_size)
    named = set()
    for content in pickles:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "GLOBAL":
                module, name = argument.split(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                named.add(f"{module}.{name}")
            elif operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"{operation.name} is not read")
    return named


def _is_harmful(name: str) -> bool:
    module, _, function = name.rpartition(".")
    builtin = module in ("builtins", "io", "_io") and function in HARMFUL_BUILTINS
    return builtin or module.split(".")[0] in HARMFUL_MODULES


def _reason(error: Exception) -> str:
    """The part of PyTorch's message that says what is wrong with the file."""
    text = one_line(error)
    if "WeightsUnpickler error:" in text:
        text = text.partition("WeightsUnpickler error:")[2].strip()
    return text.split(". ")[0].split(" Please ")[0] or type(error).__name__
