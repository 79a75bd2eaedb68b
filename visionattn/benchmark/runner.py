"""Runs the candidates of a case: build, warm up, compare with the baseline, count, time in turn."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionattn.benchmark.measure import (
    MEGABYTE,
    Timer,
    compare,
    count_flops,
    one_line,
    peak_memory,
    time_interleaved,
)

__all__ = ["MODES", "Candidate", "Case", "Row", "Settings", "Workload", "run_case"]

MODES = ("infer", "train")
# Largest difference from the baseline, relative to its largest value, that passes for rounding: forward, and
# forward and gradients. Low precision is compared with low precision, so each side brings its own rounding.
TOLERANCES = {
    torch.float64: {"infer": 1e-10, "train": 1e-9},
    torch.float32: {"infer": 1e-4, "train": 1e-3},
    torch.float16: {"infer": 2e-2, "train": 1e-1},
    torch.bfloat16: {"infer": 5e-2, "train": 2e-1},
}


@dataclass
class Workload:
    """Something to call, with all it needs in place.

    Attributes:
        run: The function, or the compiled one.
        inputs: Its arguments.
        leaves: Tensors whose gradient a training step computes.
        gradients: After a training step, the gradients to compare with the baseline's, in a common order.
        eager: The uncompiled function, for counting operations.
        items: Images per call, by which throughput and the operation count of a model are stated.
        comparable: Whether the result should equal the baseline's.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()
    gradients: Callable[[], list[Tensor]] = lambda: []
    eager: Callable[..., Tensor] | None = None
    items: int = 1
    comparable: bool = True
    output_gradient: Tensor | None = field(default=None, init=False)

    def infer(self) -> Tensor:
        """Forward without autograd."""
        with torch.no_grad():
            return self.run(*self.inputs)

    def train(self) -> Tensor:
        """Forward and backward, gradients of the last step dropped first."""
        self.drop_gradients()
        out = self.run(*self.inputs)
        if self.output_gradient is None:
            generator = torch.Generator(out.device).manual_seed(1)  # the same for every candidate
            values = torch.randn(out.shape, generator=generator, device=out.device)
            self.output_gradient = torch.empty_like(out.detach()).copy_(values)
        out.backward(self.output_gradient)
        return out.detach()

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self, mode: str) -> Tensor:
        return self.infer() if mode == "infer" else self.train()

    def flops(self) -> int:
        """Operations of one forward call."""
        with torch.no_grad():
            return count_flops(lambda: (self.eager or self.run)(*self.inputs))

    def minimum_bytes(self, mode: str, out: Tensor) -> int:
        """Bytes a call must move if every input is read once and every output written once.

        The backward pass reads the inputs and the output's gradient and writes the inputs' gradients.
        """
        sources = sum(t.nbytes for t in self.inputs)
        if mode == "infer":
            return sources + out.nbytes
        return 2 * sources + 2 * out.nbytes + sum(t.nbytes for t in self.leaves)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case; ``build(mode)`` makes its workload, or raises if that cannot be."""

    name: str
    build: Callable[[str], Workload]


@dataclass(frozen=True)
class Case:
    """What is computed. ``unit`` is what the operation count refers to: a call or an image."""

    name: str
    shape: str
    candidates: Sequence[Candidate]
    unit: str = "call"
    default_baseline: str | None = None


@dataclass
class Settings:
    """How to run a case.

    Attributes:
        device: Where.
        dtype: Type of the tensors; chooses the tolerance.
        baseline: Candidate that ratios and errors refer to; None takes the case's own.
        repeats: Rounds at most.
        seconds: Time after which no round starts.
        tolerance: Overrides the table of tolerances.
        device_time: Time kernels without launch overhead, and state the byte floor (operators on a GPU).
        bandwidth: Bytes a second of a copy, for the floor.
        clock: What times the calls on the CPU, see ``Timer``.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    baseline: str | None = None
    repeats: int = 30
    seconds: float = 20.0
    tolerance: float | None = None
    device_time: bool = False
    bandwidth: float | None = None
    clock: str = "wall"


@dataclass
class Row:
    """The numbers of one candidate; None where there is none, and ``reason`` says why if it could not run."""

    case: str
    shape: str
    mode: str
    candidate: str
    unit: str = "call"
    baseline: bool = False
    samples: int = 0
    median_ms: float | None = None
    min_ms: float | None = None
    spread: float | None = None  # distance of the quartiles, relative to the median
    speedup: float | None = None
    images_per_s: float | None = None
    peak_mb: float | None = None
    gmac: float | None = None
    floor_ms: float | None = None
    error: float | None = None
    error_l2: float | None = None
    differs: bool = False
    reason: str = ""


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _prepare(candidate: Candidate, mode: str, row: Row, settings: Settings) -> tuple[Workload, list[Tensor]]:
    """Build and warm up; fill in what one call shows. Returns the workload and the results to compare."""
    work = candidate.build(mode)
    out = work.step(mode)
    if work.comparable:
        results = [out.clone(), *(work.gradients() if mode == "train" else [])]
    else:
        results = []
    floor = work.minimum_bytes(mode, out)
    del out
    work.step(mode)
    work.drop_gradients()  # else the freed old gradients would lower the peak
    row.peak_mb = peak_memory(lambda: work.step(mode), settings.device) / MEGABYTE
    row.gmac = work.flops() / 2 / work.items / 1e9
    if settings.bandwidth:
        row.floor_ms = floor / settings.bandwidth * 1e3
    return work, results


def _check(rows: list[Row], results: dict[str, list[Tensor]], baseline: str, settings: Settings) -> None:
    for row in rows:
        own, reference = results.get(row.candidate), results.get(baseline)
        if not own or not reference or row.candidate == baseline:
            continue
        tolerance = settings.tolerance or TOLERANCES[settings.dtype][row.mode]
        try:
            row.error, row.error_l2 = compare(own, reference)
            row.differs = not row.error <= tolerance
            if math.isinf(row.error):  # not a number that JSON knows
                row.error, row.error_l2, row.reason = None, None, "NaN or Inf in the result"
        except Exception as error:
            row.differs, row.reason = True, f"not comparable: {one_line(error)}"


def run_case(case: Case, mode: str, settings: Settings) -> list[Row]:
    """Measure all candidates of a case; one that fails gets a row with the reason and disturbs no other."""
    baseline = settings.baseline or case.default_baseline or case.candidates[0].name
    rows = {
        candidate.name: Row(case.name, case.shape, mode, candidate.name, case.unit, candidate.name == baseline)
        for candidate in case.candidates
    }
    torch.compiler.reset()  # or compiled candidates of earlier cases count towards the recompilation limit
    works, results = {}, {}
    for candidate in case.candidates:
        row = rows[candidate.name]
        try:
            works[candidate.name], results[candidate.name] = _prepare(candidate, mode, row, settings)
        except Exception as error:
            row.reason = f"n/a: {one_line(error)}"
            row.peak_mb = row.gmac = row.floor_ms = None
    _check(list(rows.values()), results, baseline, settings)
    results.clear()
    _release(settings.device)

    try:
        timer = Timer(settings.device, settings.device_time, settings.clock)
        calls = {name: (lambda work=work: work.step(mode)) for name, work in works.items()}
        samples, failures = time_interleaved(calls, timer, settings.repeats, settings.seconds)
    except Exception as error:
        samples, failures = {}, dict.fromkeys(works, one_line(error))
    for name, reason in failures.items():
        rows[name].reason = f"n/a: {reason}"
    for name, values in samples.items():
        row = rows[name]
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        median = quartiles[1]
        row.samples = len(values)
        row.median_ms, row.min_ms = median * 1e3, min(values) * 1e3
        row.spread = (quartiles[2] - quartiles[0]) / median
        if case.unit == "image":
            row.images_per_s = works[name].items / median
    reference = rows[baseline].median_ms if baseline in rows else None
    for row in rows.values():
        if reference and row.median_ms:
            row.speedup = reference / row.median_ms
    works.clear()
    _release(settings.device)
    return list(rows.values())
