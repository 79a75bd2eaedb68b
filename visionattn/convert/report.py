"""What a replacement of attention changed, in a form that prints well."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

__all__ = ["Replacement"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Replacement:
    """What :func:`visionattn.convert.replace_attention` did to a model; ``print`` it.

    Attributes:
        mixer: Name of the mixer's class.
        replaced: Names of the attention modules that are now mixers.
        exact: Whether the model computes the same as before, but for rounding.
        kept: Shapes of the parameters that the mixers took over, by name in the model.
        new: Shapes of the parameters that did not exist before and are untrained.
        dropped: Shapes of the parameters that are gone.
        warnings: What to know before using the model.
    """

    mixer: str
    replaced: tuple[str, ...]
    exact: bool
    kept: Shapes
    new: Shapes
    dropped: Shapes
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        same = "computes the same as before" if self.exact else "computes another function"
        lines = [f"{self.mixer} in {len(self.replaced)} attention modules: the model {same}"]
        lines.append(f"replaced: {', '.join(_grouped(self.replaced))}")
        for title, shapes in (("kept", self.kept), ("new, untrained", self.new), ("dropped", self.dropped)):
            if shapes:
                total = sum(prod(shape) for shape in shapes.values())
                lines.append(f"{title}: {len(shapes)} parameters, {total:,} numbers")
                lines += [f"  {names} {list(shapes[first])}" for names, first in _grouped(shapes).items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _grouped(names: Iterable[str]) -> dict[str, str]:
    """Names that differ in the number of the block only as one, ``blocks.{0,1,2}.attn``, and the first of each."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        block, attn, rest = name.partition(".attn")
        stage, _, number = block.rpartition(".")
        groups.setdefault((f"{stage}." if stage else "", attn + rest), []).append(number)
    grouped = {}
    for (stage, rest), numbers in groups.items():
        together = f"{{{','.join(numbers)}}}" if len(numbers) > 1 else numbers[0]
        grouped[f"{stage}{together}{rest}"] = f"{stage}{numbers[0]}{rest}"
    return grouped
