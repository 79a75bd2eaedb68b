"""How a call is timed, how its memory and arithmetic are counted, and how two results are compared."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Timer", "compare", "copy_bandwidth", "count_flops", "one_line", "peak_memory", "time_interleaved"]

MEGABYTE = 1e6
MIN_ROUNDS = 3
MAX_FILLS = 256


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an exception's message, for a table cell or a one-line error."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if not isinstance(error, (ValueError, RuntimeError, NotImplementedError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Timer:
    """Times one call at a time, in seconds.

    On the CPU this is the wall clock, or the processor time of all threads together (``clock="cpu"``), which other
    programs on the machine disturb less; with one thread and nothing else running the two agree. On a GPU it is the
    time between two device events; with ``device_time`` the device is first given a long memory fill, which evicts the
    L2 cache and keeps the device busy while the CPU queues the call. The events then enclose kernels back to back and
    not the CPU's launch overhead.

    Args:
        device: Where the calls run.
        device_time: Hide the launch overhead and start from a cold cache (GPU only).
        clock: ``"wall"`` or ``"cpu"`` (CPU only).
    """

    def __init__(self, device: torch.device, device_time: bool = False, clock: str = "wall") -> None:
        self.device = device
        self.now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.buffer = None
        self.seconds_per_fill = 0.0
        if device.type == "cuda" and device_time:
            self.buffer = torch.empty(2**28, dtype=torch.int8, device=device)  # several times any L2 of today
            for _ in range(3):
                self.buffer.zero_()
            self.seconds_per_fill = self._events(self.buffer.zero_)

    def _events(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launch_seconds(self, call: Callable[[], object]) -> float:
        """How long the CPU is busy queueing ``call``; 0 where nothing has to be hidden."""
        if self.buffer is None:
            return 0.0
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return queued

    def __call__(self, call: Callable[[], object], launch_seconds: float = 0.0) -> float:
        """Seconds that ``call`` takes; ``launch_seconds`` of it are the CPU's and get hidden."""
        if self.device.type != "cuda":
            start = self.now()
            call()
            return self.now() - start
        torch.cuda.synchronize(self.device)
        if self.buffer is not None:
            # Twice the launch time: the CPU is slower while the device runs than it was alone.
            for _ in range(min(MAX_FILLS, 1 + math.ceil(2 * launch_seconds / self.seconds_per_fill))):
                self.buffer.zero_()
        return self._events(call)


def time_interleaved(
    calls: dict[str, Callable[[], object]], timer: Timer, repeats: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every call once per round, in the given order, round after round.

    Args:
        calls: What to time, by name. They should have been called before, so that nothing is compiled here.
        timer: Times one call.
        repeats: Rounds to make at most.
        seconds: Start no further round after this long, but make at least three (or ``repeats``, if fewer).

    Returns:
        The seconds of each call by name, and the reasons of the calls that failed on the way.
    """
    samples = {name: [] for name in calls}
    failures = {}
    launch = {}
    for name, call in calls.items():
        try:
            launch[name] = timer.launch_seconds(call)
        except Exception as error:
            failures[name] = one_line(error)
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            if name in failures:
                continue
            try:
                samples[name].append(timer(call, launch[name]))
            except Exception as error:
                failures[name] = one_line(error)
    return {name: values for name, values in samples.items() if name not in failures}, failures


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``call`` has allocated at its worst moment, beyond what was allocated before it.

    On the CPU this is the highest sum of live allocations of torch's allocator, from the profiler's memory events.
    Scratch space that a library takes from the system by itself is not seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes its start and stop to the screen
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of ``call`` (two per multiply-add), from torch's formulas of each operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def compare(results: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, float]:
    """Largest and root-mean-square difference between two lists of tensors, relative to the references.

    Returns:
        ``max|result - reference| / max|reference|`` and ``|result - reference| / |reference|`` (2-norms), each the
        worst over the list; infinite where either side has a NaN or Inf.

    Raises:
        ValueError: If the lists' lengths or shapes differ.
    """
    shapes = [tuple(t.shape) for t in results]
    expected = [tuple(t.shape) for t in references]
    if shapes != expected:
        raise ValueError(f"results have shapes {shapes}, the baseline's {expected}")
    worst_max = worst_l2 = 0.0
    for result, reference in zip(results, references, strict=True):
        reference = reference.detach().double()
        difference = result.detach().to(reference) - reference
        # A tensor of zeros has no scale of its own: its absolute difference is what is left to report.
        scale, norm = reference.abs().max().item() or 1.0, reference.norm().item() or 1.0
        largest, l2 = difference.abs().max().item() / scale, difference.norm().item() / norm
        worst_max = max(worst_max, largest if math.isfinite(largest) else math.inf)
        worst_l2 = max(worst_l2, l2 if math.isfinite(l2) else math.inf)
    return worst_max, worst_l2


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second (read plus written) of a large copy within a GPU's memory, the ceiling for any kernel."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    for _ in range(3):
        target.copy_(source)
    times = sorted(timer(lambda: target.copy_(source)) for _ in range(11))
    return 2 * size / times[len(times) // 2]
