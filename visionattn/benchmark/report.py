"""The header that says what was run on what, and the table on screen, as JSON and as Markdown."""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

import visionattn
from visionattn.benchmark.runner import Row
from visionattn.kernels import get_backend, get_tuning, machine

__all__ = ["Report", "describe", "format_header", "format_rows", "markdown_rows", "write_atomic"]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(
    command: str, device: torch.device, dtype: str, clock: str = "wall", bandwidth: float | None = None
) -> dict:
    """Everything needed to judge and repeat a run; goes above the table and into the JSON."""
    header = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": machine()["cpu"],
        "capability": machine()["capability"],
        "onednn": machine()["onednn"],
        "tuning": get_tuning(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": dtype,
        "clock": "device events" if device.type == "cuda" else clock,
        "backend": get_backend(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _installed("timm"),
        "triton": _installed("triton"),
        "visionattn": visionattn.__version__,
    }
    if device.type == "cuda":
        header |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32": torch.backends.cudnn.allow_tf32,
            "copy_gb_per_s": bandwidth / 1e9 if bandwidth else None,
        }
    return header


def format_header(header: dict) -> str:
    """The header as a few ``key value`` lines."""

    def line(*keys: str) -> str:
        return ", ".join(f"{key} {header[key]}" for key in keys if header.get(key) is not None)

    lines = [
        f"$ {header['command']}",
        line("device", "gpu", "cpu", "capability", "cpu_count", "threads", "dtype", "clock", "backend"),
        line("python", "torch", "timm", "triton", "visionattn", "cuda", "hip", "cudnn"),
    ]
    if header.get("load_average") is not None:
        lines.append(f"load average at the start {header['load_average']:.2f}, {header['date']}")
    if header.get("gpu"):
        switches = f"cudnn.benchmark {header['cudnn_benchmark']}, TF32 {header['tf32']}"
        bandwidth = header.get("copy_gb_per_s")
        lines.append(switches + (f", copy {bandwidth:.0f} GB/s read plus written" if bandwidth else ""))
    return "\n".join(lines)


def _number(value: float | None, digits: int = 2, suffix: str = "") -> str:
    if value is None:
        return "-"
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}{suffix}"
    return f"{value:.{digits}f}{suffix}"


def _cells(row: Row, images: bool, floor: bool) -> list[str]:
    name = row.candidate + (" *" if row.baseline else "")
    if row.median_ms is None:
        return [name, *["-"] * (8 + images + 2 * floor), row.reason]
    cells = [name, _number(row.median_ms, 3), _number(row.min_ms, 3), f"{row.spread:.0%}", _number(row.speedup, 2, "x")]
    if images:
        cells.append(_number(row.images_per_s, 1))
    cells += [_number(row.peak_mb, 1), _number(row.gmac, 3)]
    if floor:
        share = row.floor_ms / row.median_ms if row.floor_ms else None
        cells += [_number(row.floor_ms, 3), "-" if share is None else f"{share:.0%}"]
    cells.append("-" if row.error is None else f"{row.error:.1e}")
    note = "DIFFERS" if row.differs else ""
    return [*cells, str(row.samples), " ".join(filter(None, (note, row.reason)))]


def _titles(images: bool, floor: bool) -> list[str]:
    return [
        *("candidate", "median ms", "min ms", "spread", "speedup"),
        *(["img/s"] if images else []),
        *("peak MB", "GMAC/img" if images else "GMAC"),
        *(["floor ms", "of floor"] if floor else []),
        *("error", "n", "note"),
    ]


def _group(rows: Sequence[Row]) -> list[list[str]]:
    images, floor = rows[0].unit == "image", any(row.floor_ms for row in rows)
    return [_titles(images, floor), *(_cells(row, images, floor) for row in rows)]


def format_rows(rows: Sequence[Row]) -> str:
    """The rows of one case and mode as aligned text."""
    table = _group(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        first, *middle = (c.rjust(w) for c, w in zip(cells[:-1], widths[:-1], strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *middle, cells[-1]]).rstrip())
    return "\n".join(lines)


def markdown_rows(rows: Sequence[Row]) -> str:
    """Rows of any number of cases, one Markdown table per case and mode."""
    parts = []
    for (case, shape, mode), group in groupby(rows, key=lambda row: (row.case, row.shape, row.mode)):
        titles, *body = _group(list(group))
        lines = [titles, ["---", *["---:"] * (len(titles) - 2), "---"], *body]
        escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
        parts.append(f"#### {case} {shape}, {mode}\n\n{table}")
    return "\n\n".join(parts)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash half-way, never sees a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclass
class Report:
    """Header and rows of a run; round-trips through JSON."""

    header: dict
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> str:
        return (
            json.dumps({"header": self.header, "rows": [asdict(row) for row in self.rows]}, indent=1, allow_nan=False)
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "Report":
        data = json.loads(text)
        return cls(data["header"], [Row(**row) for row in data["rows"]])
