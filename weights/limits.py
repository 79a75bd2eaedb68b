"""What a file may say beside its tensors: text, numbers, lists and mappings, few and small enough to act upon."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from visionattn.weights.errors import WeightsError

__all__ = ["check_sizes", "limited"]

DEEPEST = 12  # mappings within mappings
LONGEST = 1 << 20  # characters of all text together
LARGEST = 65_536  # of any number in a model's arguments: widths, sides of images, classes
LAYERS = re.compile(r"depth|layers|blocks|repeat|stages|mult")  # arguments that say how much there is of everything
MOST_LAYERS = 1024
# Arguments of timm.create_model that say where to look for weights or what to do with them.
SOURCES = re.compile(r"pretrained|checkpoint_path|cache_dir|features_only|feature_c|url$|file$|hf_hub")


def limited(value: Any, what: str, most: int = 20_000) -> Any:
    """A copy of what a file says, in dictionaries, lists, tuples, text, numbers and None.

    Args:
        value: As it was read; parts may be shared, and each place where they appear counts.
        what: What to call it, such as the name of the file.
        most: Values at most.

    Raises:
        WeightsError: If it is anything else, names a class to be built, or is too large to look at.
    """
    values, letters = 0, 0

    def copied(value: Any, path: str, depth: int) -> Any:
        nonlocal values, letters
        values += 1
        letters += len(value) if isinstance(value, str) else 0
        if values > most or letters > LONGEST or depth > DEEPEST:
            limits = f"{most} values in {DEEPEST} levels and {LONGEST} letters are read"
            raise WeightsError(f"{what} says more than it may, at {path[:80]}: at most {limits}; do not use it")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise WeightsError(
                        f"{what} has a key of type {type(key).__name__} in {path[:80]}: only text may be one"
                    )
            return {checked_text(key): copied(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [copied(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, str):
            return checked_text(value)
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**53):
            return value
        shown = "a number of 2^53 or more" if isinstance(value, int) else type(value).__name__
        raise WeightsError(f"{what} has {shown} at {path[:80]}: only text, numbers, lists and mappings may be there")

    def checked_text(text: str) -> str:
        if "class_path" in text or "init_args" in text:
            raise WeightsError(f"{what} names a class to be built ({text[:40]!r}), which no file may: do not use it")
        return text

    return copied(value, "it", 0)


def check_sizes(arguments: Mapping[str, Any], what: str) -> None:
    """Refuse arguments of a model that would make it enormous, or that are none of the model itself.

    Args:
        arguments: From a file, after ``limited``.
        what: What to call the file.

    Raises:
        WeightsError: Naming the argument, its value and the limit.
    """
    for key, value in arguments.items():
        if SOURCES.match(key):
            raise WeightsError(f"{what} sets {key}, which only you may, when you build the model: remove it there")
        numbers = list(_numbers(value))
        if isinstance(value, Mapping):
            check_sizes(value, what)
        largest = max(map(abs, numbers), default=0)
        if not largest <= LARGEST:
            raise WeightsError(f"{what} asks for {key} = {largest}: files may ask for {LARGEST} at most")
        if LAYERS.search(key) and sum(map(abs, numbers)) > MOST_LAYERS:
            raise WeightsError(f"{what} asks for {key} of {sum(numbers)}: files may ask for {MOST_LAYERS} in all")


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
