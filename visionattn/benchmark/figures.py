"""Pictures of measured results."""

from collections.abc import Sequence
from pathlib import Path

from visionattn.benchmark.runner import Row

__all__ = ["draw_growth"]


def draw_growth(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time, peak memory and operations of every candidate of one case over the sizes it was measured at.

    Args:
        rows: Of one case, any sizes and modes; training has its own panel.
        path: Picture to write.
        title: What was measured, on what.

    Raises:
        ValueError: If the training extra, which draws, is not installed, or nothing was measured.
    """
    try:
        from visionattn.train.figures import BLUE, GREY, ORANGE, RED, STYLE, plt
    except ImportError as error:
        raise ValueError(f"--plot needs the training extra, pip install 'visionattn[train]': {error}") from error
    rows = [row for row in rows if row.median_ms is not None]
    if not rows:
        raise ValueError("nothing was measured that could be drawn")
    colors = [GREY, BLUE, ORANGE, RED, "#3a8f5c", "#7d5ba6"]
    names = list(dict.fromkeys(row.candidate for row in rows))
    sizes = list(dict.fromkeys(row.shape for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    panels = [(f"Time, {mode} (ms)", mode, "median_ms") for mode in modes]
    panels += [(f"Peak memory, {mode} (MB)", mode, "peak_mb") for mode in modes]
    panels.append(("Multiply-adds (10⁹)", modes[0], "gmac"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        for axis, (label, mode, field) in zip(axes, panels, strict=True):
            for name, color in zip(names, colors * 2, strict=False):
                group = [row for row in rows if row.candidate == name and row.mode == mode]
                places = [sizes.index(row.shape) for row in group]
                axis.plot(places, [getattr(row, field) for row in group], "o-", color=color, label=name, markersize=4)
            axis.set(title=label, yscale="log", xticks=range(len(sizes)))
            axis.set_xticklabels([shape.partition("x")[2] for shape in sizes], fontsize=8)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(path)
        plt.close(figure)
