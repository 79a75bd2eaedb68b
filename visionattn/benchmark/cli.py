"""Command line: ``ops``, ``layers`` and ``models`` measure what they are told, ``gpu`` a fixed set whose results it
writes."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import timm
import torch

from visionattn.benchmark.converted import CONVERTED
from visionattn.benchmark.families import FAMILIES, Grid, run_families
from visionattn.benchmark.figures import draw_growth
from visionattn.benchmark.layers import LAYERS, layer_case
from visionattn.benchmark.measure import copy_bandwidth, one_line
from visionattn.benchmark.models import DEFAULT_CANDIDATES, model_case
from visionattn.benchmark.ops import OPS, SIZE_SETS, Size, op_case, parse_candidate
from visionattn.benchmark.reduced import REDUCED
from visionattn.benchmark.report import Report, describe, format_header, format_rows, markdown_rows, write_atomic
from visionattn.benchmark.runner import MODES, Case, Row, Settings, run_case

__all__ = ["main"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PROGRAM = "python -m visionattn.benchmark"


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _known(kind: str, names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The names, if all are allowed; otherwise a ValueError with close matches, or all where they are few."""
    names, allowed = list(names), list(allowed)
    for name in names:
        if name not in allowed:
            close = get_close_matches(name, allowed, n=4, cutoff=0.5)
            if len(allowed) <= 12:
                hint = f"allowed are {', '.join(allowed)}"
            else:
                hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has the names"
            raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return names


def _comma_list(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def _positive(kind: type):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'number' if kind is float else 'integer'}")
        return value

    return parse


def _build_parser() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    common.add_argument("--batch", type=_positive(int), help="default: 2 (ops), 8 (others) on the CPU, 128 on a GPU")
    common.add_argument("--mode", default=",".join(MODES), help="infer, train or infer,train (default)")
    common.add_argument("--candidates", help="comma list; name[+channels_last][+compile]")
    common.add_argument("--baseline", help="candidate that ratios and errors refer to (default: the first)")
    common.add_argument("--threads", type=_positive(int), help="CPU threads (default: torch's)")
    common.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for busy machines"
    )
    common.add_argument("--repeats", type=_positive(int), default=30, help="rounds at most (default 30)")
    common.add_argument("--seconds", type=_positive(float), default=20.0, help="time per table, at least 3 rounds")
    common.add_argument("--check", action="store_true", help="exit with 1 if a candidate differs from the baseline")
    common.add_argument("--tolerance", type=_positive(float), help="largest relative difference that passes --check")
    common.add_argument("--tf32", action="store_true", help="let float32 use TF32 on a GPU")
    common.add_argument("--json", type=Path, metavar="FILE", help="write header and rows")

    parser = _Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ops|layers|models|gpu")
    ops = commands.add_parser(
        "ops",
        parents=[common],
        help="single operators",
        epilog="operators: " + "; ".join(f"{op.name}: {op.summary}" for op in OPS.values()),
    )
    ops.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(OPS)} (default: all)")
    ops.add_argument("--sizes", help=f"comma list of HxWxC or of {', '.join(SIZE_SETS)}")
    layers = commands.add_parser(
        "layers",
        parents=[common],
        help="layers, beside what they are an alternative to",
        epilog="layers: " + "; ".join(f"{name}: {layer.summary}" for name, layer in LAYERS.items()),
    )
    layers.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(LAYERS)} (default: all)")
    layers.add_argument("--sizes", help="comma list of HxWxC")
    layers.add_argument("--plot", type=Path, metavar="FILE", help="draw how the cost of one layer grows with the map")
    models = commands.add_parser("models", parents=[common], help="whole networks")
    models.add_argument("names", nargs="*", metavar="NAME", help="timm model names (default: van_b0 van_b2)")
    models.add_argument("--img-size", default="224", help="comma list (default 224)")
    models.add_argument("--features", action="store_true", help="the maps of features_only=True instead of logits")
    models.add_argument("--plot", type=Path, metavar="FILE", help="draw how the cost of one model grows with the image")
    models.add_argument("--amp", action="store_true", help="float32 weights under autocast to --dtype")
    models.add_argument(
        "--all-families",
        type=Path,
        metavar="FILE",
        help="one small model of every family beside its authors' composition, at batch 1 and 8, with 1 and 2 threads, "
        "with all instructions and with AVX2, and in bfloat16 and int8: ratios as JSON to FILE, a table beside it; "
        "goes on where it stopped",
    )
    gpu = commands.add_parser("gpu", help="the fixed set for a GPU; writes JSON and Markdown")
    gpu.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="FOLDER")
    gpu.add_argument("--budget", type=_positive(float), default=270.0, help="seconds; sections after that are skipped")
    return parser


@dataclass
class _Plan:
    """Parsed and checked arguments of ``ops``, ``layers`` or ``models``."""

    cases: list[Case]
    modes: list[str]
    settings: Settings
    dtype: str


def _op_cases(args: argparse.Namespace, batch: int, candidates: list[str] | None) -> list[Case]:
    sizes = []
    for text in _comma_list(args.sizes or ""):
        if text not in SIZE_SETS and not text[0].isdigit():
            _known("size set", [text], SIZE_SETS)
        sizes += SIZE_SETS[text] if text in SIZE_SETS else [Size.parse(text)]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    ops = [OPS[name] for name in _known("operator", args.names or OPS, OPS)]
    functions = dict.fromkeys(name for op in ops for name in op.functions())
    _known("candidate", [parse_candidate(c)[0] for c in candidates or []], functions)
    return [
        op_case(op, size, batch, device, dtype, candidates) for op in ops for size in sizes or SIZE_SETS[op.size_set]
    ]


def _layer_cases(args: argparse.Namespace, batch: int, candidates: list[str] | None) -> list[Case]:
    sizes = [Size.parse(text) for text in _comma_list(args.sizes or "")]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    names = _known("layer", args.names or LAYERS, LAYERS)
    allowed = dict.fromkeys(candidate for name in names for candidate in LAYERS[name].candidates())
    _known("candidate", [parse_candidate(c)[0] for c in candidates or []], allowed)
    _check_plot(args, names)
    return [
        layer_case(name, size, batch, device, dtype, candidates)
        for name in names
        for size in sizes or LAYERS[name].sizes
    ]


def _check_plot(args: argparse.Namespace, names: Sequence[str]) -> None:
    if args.plot and len(names) != 1:
        raise ValueError(f"--plot draws one of those named, not {', '.join(names)}")


def _model_cases(args: argparse.Namespace, batch: int, candidates: list[str] | None) -> list[Case]:
    known = timm.list_models() + timm.list_models(pretrained=True)
    names = _known("model", args.names or ["van_b0", "van_b2"], known)
    _check_plot(args, names)
    candidates = candidates or (["ours"] if args.features else list(DEFAULT_CANDIDATES))
    _known("candidate", [parse_candidate(c)[0] for c in candidates], ["plain", "ours", *CONVERTED, *REDUCED, *known])
    sizes = [_positive(int)(size) for size in _comma_list(args.img_size)]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    options = (batch, device, dtype, candidates, args.amp, args.features)
    return [model_case(name, size, *options) for name in names for size in sizes]


def _plan(args: argparse.Namespace) -> _Plan:
    """Check all arguments before any work starts; raises ValueError in one line."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; allowed is cpu")
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if getattr(args, "amp", False) and args.dtype not in ("bfloat16", "float16"):
        raise ValueError(f"--amp needs --dtype bfloat16 or float16, not {args.dtype}")
    for option in ("json", "plot"):
        path = getattr(args, option, None)
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"--{option} {path}: folder {path.parent} does not exist")
    modes = _known("mode", _comma_list(args.mode), MODES)
    candidates = _comma_list(args.candidates) if args.candidates else None
    for candidate in candidates or []:
        parse_candidate(candidate)
    operators = args.command == "ops"
    batch = args.batch or (128 if device.type == "cuda" else 2 if operators else 8)
    cases = {"ops": _op_cases, "layers": _layer_cases, "models": _model_cases}[args.command](args, batch, candidates)
    if args.baseline:
        for case in cases:
            _known("baseline", [args.baseline], [candidate.name for candidate in case.candidates])
    settings = Settings(
        device,
        DTYPES[args.dtype],
        args.baseline,
        args.repeats,
        args.seconds,
        args.tolerance,
        device_time=operators and device.type == "cuda",
        clock=args.clock,
    )
    return _Plan(cases, modes, settings, f"autocast {args.dtype}" if getattr(args, "amp", False) else args.dtype)


def _set_up(args: argparse.Namespace, plan: _Plan) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if plan.settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the strongest form of the convolutions we compare with
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
        if plan.settings.device_time:
            plan.settings.bandwidth = copy_bandwidth(plan.settings.device)


def _run(args: argparse.Namespace, plan: _Plan, command: str, deadline: float | None = None) -> Report:
    """Run all cases, printing each table when it is done and saving the JSON as it grows."""
    _set_up(args, plan)
    report = Report(describe(command, plan.settings.device, plan.dtype, plan.settings.clock, plan.settings.bandwidth))
    print(format_header(report.header), flush=True)
    for case in plan.cases:
        for mode in plan.modes:
            print(f"\n{case.name} {case.shape} {mode}", flush=True)
            if deadline is not None and time.monotonic() > deadline:
                rows = [Row(case.name, case.shape, mode, "all", case.unit, reason="n/a: the time budget is used up")]
            else:
                rows = run_case(case, mode, plan.settings)
            print(format_rows(rows), flush=True)
            report.rows += rows
            if args.json:
                write_atomic(args.json, report.to_json())
    return report


def _check(report: Report) -> int:
    """Exit status of ``--check``: 1 if any candidate differs or the baseline of a table did not run."""
    bad = [row for row in report.rows if row.differs or (row.baseline and row.median_ms is None)]
    for row in bad:
        why = f"error {row.error:.1e}" if row.error is not None else row.reason
        print(f"check failed: {row.case} {row.shape} {row.mode}: {row.candidate}: {why}", file=sys.stderr)
    return 1 if bad else 0


def _caption(plan: _Plan, report: Report) -> str:
    batch = plan.cases[0].shape.partition("x")[0]
    device = report.header.get("gpu") or f"{report.header['cpu']}, {report.header['threads']} threads"
    return f"{plan.cases[0].name}: {device}, {plan.dtype}, batch {batch}"


# Most wanted first: what the time budget cuts off is at the end. Compilation is most of the time.
GPU_SET = (
    "ops lka --device cuda --seconds 1 --repeats 50 --candidates "
    "reference,reference+channels_last,torch+channels_last,triton+channels_last,reference+channels_last+compile",
    "ops neighborhood7 --device cuda --seconds 0.5 --repeats 50",
    "ops neighborhood7_nobias neighborhood7_dilated --device cuda --seconds 0.3 --repeats 30 --candidates "
    "reference,torch,triton,masked_sdpa",
    "ops neighborhood7 --device cuda --batch 32 --sizes nat_512 --seconds 0.3 --repeats 20 --candidates "
    "reference,torch,triton,masked_sdpa",
    "ops neighborhood7 --device cuda --batch 8 --sizes nat_1024 --seconds 0.3 --repeats 20 --candidates "
    "torch,triton,masked_sdpa",
    "ops neighborhood7_nobias --device cuda --sizes 56x56x64 --seconds 0.3 --repeats 30 --candidates triton,flex",
    "ops neighborhood7 --device cuda --batch 8 --sizes 128x128x64 --seconds 0.3 --repeats 30 --candidates triton,flex",
    "ops rala mala --device cuda --seconds 0.3 --repeats 30",
    "ops window7 window7_shifted --device cuda --seconds 0.3 --repeats 30 --candidates timm,torch,triton,timm+compile",
    "models van_b0 --device cuda --seconds 3 --candidates "
    "plain,plain+channels_last,ours,ours+compile,resnet50+channels_last,convnext_tiny+channels_last,"
    "swin_tiny_patch4_window7_224,deit_small_patch16_224",
    "models van_b2 --device cuda --seconds 3 --candidates plain,plain+channels_last,ours",
    "models nat_tiny --device cuda --seconds 3 --candidates plain,ours,swin_tiny_patch4_window7_224",
    "layers agent inline flatten slab cross_shaped --device cuda --seconds 0.3 --repeats 30",
    "models agent_swin_t inline_swin_t flatten_swin_t slab_swin_t --device cuda --seconds 2 --candidates "
    "plain,ours,swin_tiny_patch4_window7_224",
    "models ravlt_t mavit_t --device cuda --seconds 2 --candidates plain,ours",
    "models van_b0 van_b2 --device cuda --mode infer --batch 1 --seconds 1 --candidates plain,ours",
    "ops depthwise5 depthwise7d3 gated_pointwise --device cuda --seconds 1 --repeats 50 --candidates "
    "reference,reference+channels_last,torch+channels_last,triton+channels_last",
    "ops lka --device cuda --seconds 1 --repeats 50 --sizes large --batch 32 --candidates "
    "reference,reference+channels_last,torch+channels_last,triton+channels_last",
    "models van_b2 --device cuda --mode infer --seconds 3 --candidates ours,ours+compile",
)


def _run_gpu(args: argparse.Namespace, sections: Sequence[str]) -> int:
    if not torch.cuda.is_available() and any("--device cuda" in section for section in sections):
        raise ValueError("gpu: torch sees no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    label = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    stem = args.out / "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
    deadline = time.monotonic() + args.budget
    merged, parts, status = None, [], 0
    for section in sections:
        try:
            words = _build_parser().parse_args(shlex.split(section))
            report = _run(words, _plan(words), f"{PROGRAM} {section}", deadline)
        except Exception as error:  # one section must not cost the others
            print(f"n/a: {section}: {one_line(error)}", file=sys.stderr)
            parts.append(f"## `{section}`\n\nn/a: {one_line(error)}")
            status = 1
        else:
            merged = merged or Report({**report.header, "command": f"{PROGRAM} gpu", "sections": list(sections)})
            merged.rows += report.rows
            status |= _check(report)
            parts.append(f"## `{section}`\n\n```\n{format_header(report.header)}\n```\n\n{markdown_rows(report.rows)}")
        if merged is not None:
            write_atomic(stem.with_suffix(".json"), merged.to_json())
        title = f"# {label}\n\nWritten by `{PROGRAM} gpu`; README.md explains the columns.\n\n"
        write_atomic(stem.with_suffix(".md"), title + "\n\n".join(parts) + "\n")
    print(f"\nwrote {stem}.json and {stem}.md")
    return status


def _run_families(args: argparse.Namespace, command: str) -> int:
    if args.device != "cpu" or args.candidates or args.features or args.amp or args.dtype not in (None, "float32"):
        raise ValueError("--all-families measures plain,ours in float32 on the CPU: leave out what says otherwise")
    if not args.all_families.resolve().parent.is_dir():
        raise ValueError(f"--all-families {args.all_families}: folder {args.all_families.parent} does not exist")
    grid = Grid(
        models=_known("model", args.names or FAMILIES, FAMILIES),
        threads=(args.threads,) if args.threads else (1, 2),
        batches=(args.batch,) if args.batch else (1, 8),
        modes=_known("mode", _comma_list(args.mode), MODES),
        reduced=tuple(REDUCED) if "infer" in _comma_list(args.mode) else (),
        clock=args.clock,
        seconds=min(args.seconds, 3.0),
    )
    return run_families(grid, args.all_families, command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 (a check failed) or 2 (bad arguments)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _build_parser().parse_args(argv)
    try:
        if args.command == "gpu":
            return _run_gpu(args, GPU_SET)
        if getattr(args, "all_families", None):
            return _run_families(args, f"{PROGRAM} {shlex.join(argv)}")
        plan = _plan(args)
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = _run(args, plan, f"{PROGRAM} {shlex.join(argv)}")
    if getattr(args, "plot", None):
        try:
            draw_growth(report.rows, args.plot, _caption(plan, report))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return _check(report) if args.check else 0
