"""What can be wrong with the outlines of objects in COCO's files, found before they become other shapes."""

import math
from typing import Any


def outline_fault(shape: Any, size: tuple[int, int]) -> str:
    """What is wrong with an outline, or nothing.

    Args:
        shape: Polygons, ``[[x1, y1, x2, y2, x3, y3, ...], ...]``, or run lengths, ``{"size", "counts"}``.
        size: Height and width of the image.
    """
    if not shape:
        return "it has no outline: annotate it, or train a detector without masks"
    if isinstance(shape, dict):
        return _runs_fault(shape, size)
    if not isinstance(shape, list):
        return (
            f"its outline is a {type(shape).__name__}: expected a list of polygons, or run lengths with size and counts"
        )
    if _are_numbers(shape):
        return "its outline is a list of numbers: expected a list of polygons, [[x1, y1, x2, y2, x3, y3, ...]]"
    faults = (f"polygon {n} {fault}" for n, polygon in enumerate(shape, 1) if (fault := _polygon_fault(polygon)))
    return next(faults, "")


def _polygon_fault(polygon: Any) -> str:
    if not isinstance(polygon, list) or not _are_numbers(polygon):
        return "is not a list of numbers: expected [x1, y1, x2, y2, x3, y3, ...]"
    if len(polygon) % 2:
        return f"has {len(polygon)} coordinates: expected an even number, x and y of each corner"
    if len(polygon) < 6:
        return f"has {len(polygon) // 2} corners: expected 3 or more"
    return ""


def _runs_fault(runs: dict, size: tuple[int, int]) -> str:
    if not {"size", "counts"} <= runs.keys() or not isinstance(runs["counts"], (str, list)):
        return "its run lengths are incomplete: expected size, and counts as a list or a string"
    if runs["size"] != list(size):
        return f"its run lengths are of height and width {runs['size']}: expected {list(size)}, those of the image"
    counts = runs["counts"]
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0:
            return "its run lengths are not all numbers of pixels: expected integers from 0"
        if sum(counts) != math.prod(size):
            return f"its run lengths add up to {sum(counts)} pixels: expected {math.prod(size)}, those of the image"
    return ""


def _are_numbers(values: list) -> bool:
    """Whether all are finite numbers; millions of coordinates pass here."""
    return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
