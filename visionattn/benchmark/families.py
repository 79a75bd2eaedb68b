"""One small model of every family beside its authors' composition, on all that this CPU can be told to be.

Each cell of the table is a process of its own, as instructions and threads are settled when PyTorch starts. What is
done is in the file after each of them, so that a run which ends early goes on where it was.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from visionattn.benchmark.reduced import REDUCED
from visionattn.benchmark.report import describe, write_atomic
from visionattn.benchmark.runner import MODES

__all__ = ["CAPABILITIES", "FAMILIES", "Grid", "markdown", "run_families"]

FAMILIES = (
    "van_b0",
    "nat_mini",
    "dinat_mini",
    "biformer_tiny",
    "litv2_small",
    "flowformer",
    "ravlt_t",
    "mavit_t",
    "nalaformer_t",
    "agent_swin_t",
    "inline_swin_t",
    "flatten_swin_t",
    "pola_swin_t",
    "slab_swin_t",
    "cswin_tiny_224",
    "pvt_tiny",
    "transnext_micro",
)
# What PyTorch and oneDNN are told to use; a processor that lacks it has no such rows.
CAPABILITIES = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        models: Names of models that have a plain composition.
        capabilities: Of ``CAPABILITIES``.
        threads: Numbers of threads.
        batches: Images a batch.
        modes: Of ``infer`` and ``train``.
        reduced: Of ``REDUCED``: ours in fewer bits, in inference with all instructions.
        clock: ``"wall"`` or ``"cpu"``.
        seconds: Time for each mode of a cell, at least three rounds.
    """

    models: Sequence[str] = FAMILIES
    capabilities: Sequence[str] = tuple(CAPABILITIES)
    threads: Sequence[int] = (1, 2)
    batches: Sequence[int] = (1, 8)
    modes: Sequence[str] = tuple(MODES)
    reduced: Sequence[str] = ()
    clock: str = "wall"
    seconds: float = 3.0

    def columns(self, capability: str) -> list[str]:
        """What is measured in a cell: modes, then ours in fewer bits."""
        return [*self.modes, *(self.reduced if capability == "native" else ())]

    def cells(self) -> list[tuple[str, int, int, str]]:
        """Capability, threads, images and model, what matters most to a user first."""
        capabilities = [
            c for c in self.capabilities if c == "native" or torch.backends.cpu.get_cpu_capability() != "AVX2"
        ]
        return [(c, t, b, m) for b in self.batches for t in self.threads for c in capabilities for m in self.models]


def run_families(grid: Grid, out: Path, command: str) -> int:
    """Measure what is missing in ``out`` and write it there, with a table in Markdown beside it.

    Args:
        grid: What is measured.
        out: JSON file; cells in it that were measured with the same versions on the same processor are kept.
        command: How this was called, for the file.

    Returns:
        Exit status: 1 if a cell failed.
    """
    header = describe(command, torch.device("cpu"), "float32", grid.clock)
    done = _kept(out, header)
    failed = 0
    for cell in grid.cells():
        missing = [mode for mode in grid.columns(cell[0]) if "/".join(map(str, (*cell, mode))) not in done]
        if not missing:
            continue
        print(" ".join(map(str, cell)), end=": ", flush=True)
        rows, reason = _measure(cell, missing, grid)
        for mode in missing:
            run, ours = ("infer", mode) if mode in grid.reduced else (mode, "ours")
            plain, ours = (
                next((r for r in rows if (r["mode"], r["candidate"]) == (run, who)), None) for who in ("plain", ours)
            )
            if not (plain and ours and plain["median_ms"] and ours["median_ms"]):
                failing = (r["reason"] for r in rows if r["mode"] == run and r["reason"])
                reason = reason or next(failing, "no result")
                failed += 1
                continue
            done["/".join(map(str, (*cell, mode)))] = {
                "plain_ms": plain["median_ms"],
                "ours_ms": ours["median_ms"],
                "ratio": plain["median_ms"] / ours["median_ms"],
                "plain_mb": plain["peak_mb"],
                "ours_mb": ours["peak_mb"],
                "error": ours["error"],
                "load": rows[0]["load"],
            }
        print(reason or " ".join(f"{mode} {done['/'.join(map(str, (*cell, mode)))]['ratio']:.2f}" for mode in missing))
        write_atomic(out, json.dumps({"header": header, "cells": done}, indent=1) + "\n")
        write_atomic(out.with_suffix(".md"), markdown(header, done))
    print(f"wrote {out} and {out.with_suffix('.md')}")
    return 1 if failed else 0


SAME = ("cpu", "torch", "timm", "visionattn", "clock", "python")


def _kept(out: Path, header: dict) -> dict[str, dict]:
    try:
        before = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = all(before.get("header", {}).get(key) == header[key] for key in SAME)
    return before["cells"] if same else {}


def _measure(cell: tuple[str, int, int, str], modes: Sequence[str], grid: Grid) -> tuple[list[dict], str]:
    capability, threads, batch, model = cell
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        reduced = [mode for mode in modes if mode in grid.reduced]
        runs = dict.fromkeys("infer" if mode in reduced else mode for mode in modes)
        words = f"models {model} --batch {batch} --threads {threads} --mode {','.join(runs)} --clock {grid.clock}"
        words += f" --seconds {grid.seconds} --candidates {','.join(['plain', 'ours', *reduced])} --json {file}"
        environment = {**os.environ, **CAPABILITIES[capability], "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "visionattn.benchmark", *words.split()]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not file.is_file():
            return [], (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [{**row, "load": load} for row in rows], ""


def markdown(header: dict, cells: dict[str, dict]) -> str:
    """The ratios, a row for each model and a column for each way to run it."""
    found = {tuple(key.split("/")): value["ratio"] for key, value in cells.items()}
    order = [*MODES, *REDUCED]
    columns = sorted(
        {(c, t, b, mode) for c, t, b, _, mode in found},
        key=lambda key: (order.index(key[3]), int(key[2]), int(key[1]), key[0] != "native"),
    )
    models = list(dict.fromkeys(key[3] for key in found))
    names = {"native": header["capability"], "avx2": "AVX2"}
    names_of_modes = {"bfloat16": "infer bfloat16", "int8": "infer int8"}
    titles = [f"{names_of_modes.get(mode, mode)} {b}, {t} thr, {names.get(c, c)}" for c, t, b, mode in columns]
    lines = ["| model | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for model in models:
        ratios = [found.get((c, t, b, model, mode)) for c, t, b, mode in columns]
        lines.append(f"| `{model}` | " + " | ".join("–" if r is None else f"{r:.2f}" for r in ratios) + " |")
    means = []
    for c, t, b, mode in columns:
        ratios = [found[c, t, b, model, mode] for model in models if (c, t, b, model, mode) in found]
        means.append(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")
    lines.append("| geometric mean | " + " | ".join(means) + " |")
    facts = ", ".join(f"{key} {header[key]}" for key in ("cpu", "cpu_count", "torch", "timm", "visionattn", "clock"))
    return (
        "# One small model of every family beside its authors' composition, on a CPU\n\n"
        f"Time of the authors' composition in float32 over ours at 224 px: above 1 is faster.\n{facts}; "
        f"{header['date']}.\nWritten by `{header['command']}`.\n\n" + "\n".join(lines) + "\n"
    )
