"""Compile the Triton kernels for a GPU that need not be here; print what each needs, as JSON.

    python tests/kernels/aot_compile.py sm_90 bf16,fp32 every

"some" instead of "every" takes the largest kernel only. Must run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from visionattn.kernels import (
    _bilevel_kernels,
    _focused_triton,
    _linear_kernels,
    _linear_triton,
    _neighborhood_kernels,
    _neighborhood_launch,
    _triton,
    _window_kernels,
    bilevel_triton,
    depthwise_conv2d,
    gated_pointwise,
    window_triton,
)

depthwise, pointwise = (sys.modules[op.__module__] for op in (depthwise_conv2d, gated_pointwise))
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SIZES = ("N", "n_runs", "runs_per_row", "C", "H", "W", "dilation", "M", "D", "heads", "across", "regions", "K")
SIZES += ("rows", "total")
TENSORS = ("grad", "q", "k", "v", "out", "dq", "dk", "dv")
TUPLES = {  # arguments that are tuples of integers
    _neighborhood_kernels.__name__: {"shape": 3, "dilation": 3, "tiles": 2}
    | {f"{name}_strides": 5 for name in TENSORS},
    _bilevel_kernels.__name__: dict.fromkeys(("shape", "key_shape", "region", "key_region"), 2)
    | {f"{name}_strides": 4 for name in TENSORS},
    _window_kernels.__name__: {"shape": 2, "windows": 2, "qkv_strides": 5, "grad_strides": 4},
    _linear_kernels.__name__: {f"{name}_strides": 3 for name in "kvwqrgo"},
    _focused_triton.__name__: {"x_strides": 2, "grad_strides": 2},
}
INTEGERS = {"routes": "i64", "sources": "i32", "starts": "i32"}  # of what such tensors are
SUMS = ("lse", "delta", "bias_parts", "padding_parts", "added")
LINEAR_SUMS = ("weights", "cos", "sin", "state", "key_sum", "value_sum", "value_mean", "dstate", "dkey_sum")
LINEAR_SUMS += ("dvalue_sum", "dvalue_mean", "dweights")
LINEAR = [(64, 64), (96, 96), (32, 32), (24, 24)]  # features, width of a value
FOCUSED = [64, 96, 512, 1024, 4096]  # channels
FOCUSED_SUMS = ("grad", "factor", "parts")
NEIGHBORHOOD = [  # head dim, window, ranks of the longest residue, whether there is dilation
    (32, (1, 7, 7), (1, 56, 56), False),
    (32, (1, 7, 7), (1, 14, 14), True),
    (24, (1, 7, 7), (1, 56, 56), False),
    (64, (1, 7, 7), (1, 56, 56), False),
    (128, (1, 7, 7), (1, 56, 56), False),
    (32, (1, 3, 3), (1, 28, 28), False),
    (32, (1, 13, 13), (1, 56, 56), False),
    (32, (1, 1, 31), (1, 1, 500), False),
    (32, (3, 7, 7), (8, 28, 28), True),
]
BILEVEL = [(32, 32, 64), (32, 32, 16), (32, 32, 4), (24, 24, 64), (64, 64, 64), (128, 128, 64), (32, 64, 30)]  # D, E, T
WINDOW = [  # head dim, sides of the window
    (32, (7, 7)),
    (32, (12, 12)),
    (32, (4, 4)),
    (24, (8, 8)),
    (64, (7, 7)),
    (128, (7, 7)),
    (64, (24, 24)),
]


def launches(dtype: str, every: bool, hip: bool):
    """Yield kernel, constants and the divisibility by 16 of its channel counts, for every launch of a dtype."""
    acc = tl.float64 if dtype == "fp64" else tl.float32
    for C, config in depthwise.launch_configs(DTYPES[dtype]):
        if every or (config["RUN"], config["K"]) == (5, 7):
            steps = {"STEPS": depthwise.WEIGHT_GRAD_STEPS}
            yield depthwise._depthwise_bwd_weight, config | steps | {"ACC": acc}, C % 16 == 0
            for bias in (True, False) if every else (True,):  # without: the gradient of the input
                yield depthwise._depthwise_fwd, config | {"HAS_BIAS": bias, "ACC": acc}, C % 16 == 0
    for C, D, config in pointwise.launch_configs(DTYPES[dtype]):
        for precision in ("ieee", "tf32") if every and dtype == "fp32" else ("ieee",):
            constants = {"C": C, "HAS_BIAS": True, "ACC": acc, "PRECISION": precision}
            yield pointwise._gated_pointwise_fwd, config | constants, D % 16 == 0
    yield from neighborhood_launches(dtype, acc, every)
    yield from linear_launches(dtype, acc, every, hip)
    yield from bilevel_launches(dtype, acc, every)
    for C in FOCUSED if every else FOCUSED[2:3]:
        constants = _focused_triton.launch_config(C, DTYPES[dtype]) | {"POWER": 3, "ACC": acc}
        yield _focused_triton._focused_fwd, constants, C % 16 == 0
        yield _focused_triton._focused_bwd, constants | {"STEPS": 16}, C % 16 == 0
    yield from window_launches(dtype, acc, every, hip)


def neighborhood_launches(dtype: str, acc: tl.dtype, every: bool):
    kernels, sizes = _neighborhood_kernels, _neighborhood_launch
    for D, window, lengths, dilated in NEIGHBORHOOD if every else NEIGHBORHOOD[:1]:
        for kernel, name, biases in (
            (kernels._neighborhood_fwd, sizes.FORWARD, (True, False)),
            (kernels._neighborhood_bwd_dq, sizes.GRAD_QUERY_BIAS, (True,)),
            (kernels._neighborhood_bwd_dq, sizes.GRAD_QUERY, (False,)),
            (kernels._neighborhood_bwd_dkv, sizes.GRAD_KEY, (True, False)),
        ):
            for bias in biases:
                if every or bias:
                    config = sizes.launch_config(name, D, window, lengths, (False,) * 3, bias, DTYPES[dtype])
                    constants = {"ACC": acc, "PRECISION": "ieee"} | ({} if dilated else {"dilation": (1, 1, 1)})
                    yield kernel, config | constants, D % 16 == 0


def linear_launches(dtype: str, acc: tl.dtype, every: bool, hip: bool):
    kernels, launch = _linear_kernels, _linear_triton
    form = {"MAP": "elu+1", "ROTARY": True, "ACC": acc, "PRECISION": launch.precision(DTYPES[dtype], hip)}
    epilogue = {"NORMALIZER": "magnitude", "RESIDUAL": True, "GATE": True}
    widest = launch.MAX_WIDTH[DTYPES[dtype].itemsize]
    for D, V in [sizes for sizes in LINEAR if max(sizes) <= widest] if every else LINEAR[:1]:
        for name, kernel, rest in (
            (launch.KEYS, kernels._linear_keys, {"WEIGHTED": True, "STEPS": 16}),
            (launch.QUERIES, kernels._linear_queries, epilogue),
            (launch.QUERIES_BWD, kernels._linear_queries_bwd, epilogue | {"STEPS": 16}),
            (launch.KEYS_BWD, kernels._linear_keys_bwd, {"WEIGHTED": True}),
        ):
            config = launch.launch_config(name, D, V, DTYPES[dtype], hip)
            yield kernel, config | form | rest | {"D": D, "V": V}, D % 16 == 0


def bilevel_launches(dtype: str, acc: tl.dtype, every: bool):
    limit = bilevel_triton.MAX_HEAD_DIM[DTYPES[dtype].itemsize]
    for D, E, tokens in [row for row in BILEVEL if row[0] <= limit][: None if every else 1]:
        for kernel, name in (
            (_bilevel_kernels._bilevel_fwd, bilevel_triton.FORWARD),
            (_bilevel_kernels._bilevel_bwd_dq, bilevel_triton.GRAD_QUERY),
            (_bilevel_kernels._bilevel_bwd_dkv, bilevel_triton.GRAD_KEY),
        ):
            config = bilevel_triton.launch_config(name, D, E, tokens, DTYPES[dtype])
            steps = {} if name == bilevel_triton.GRAD_KEY else {"STEPS": 4}
            yield kernel, config | steps | {"ACC": acc, "PRECISION": "ieee"}, D % 16 == 0


def window_launches(dtype: str, acc: tl.dtype, every: bool, hip: bool):
    for D, window in WINDOW if every else WINDOW[:2]:
        whole = window_triton.in_one_program(D, window, DTYPES[dtype])
        if not (whole or every or window == (12, 12)):
            continue
        rows = [(_window_kernels._window_fwd, window_triton.FORWARD, {"RUN": 4})]
        if whole:
            rows.append((_window_kernels._window_bwd, window_triton.BACKWARD, {"RUN": 16, "BIAS_GRAD": True}))
        else:
            dkv = _window_kernels._window_bwd_dkv
            rows.append((_window_kernels._window_bwd_dq, window_triton.GRAD_QUERY, {}))
            rows.append((dkv, window_triton.GRAD_KEY, {"RUN": 1, "BIAS_GRAD": False}))
            rows.append((dkv, window_triton.GRAD_BIAS, {"RUN": 16, "BIAS_GRAD": True}))
        for kernel, name, rest in rows:
            for bias, padding in ((True, True), (False, False)) if every else ((True, True),):
                if bias or not rest.get("BIAS_GRAD"):
                    config = window_triton.launch_config(name, D, window, DTYPES[dtype], hip)
                    form = {"SHIFT": (window[0] // 2,) * 2, "HAS_BIAS": bias, "HAS_PADDING": padding}
                    yield kernel, config | form | rest | {"ACC": acc, "PRECISION": "ieee"}, D % 16 == 0


def compiled(kernel, dtype: str, constants: dict, divisible: bool, target: GPUTarget):
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    sums = "fp64" if dtype == "fp64" else "fp32"
    partial = kernel is depthwise._depthwise_bwd_weight
    signature, attributes, tuples = {}, {}, TUPLES.get(kernel.__module__, {})
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in tuples:
            signature[name] = ("i32",) * tuples[name]
            if divisible and name.endswith("strides"):
                attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(tuples[name])}
            continue
        elif name.startswith(("scale", "masked")) or name == "eps":
            signature[name] = "fp32"
        elif name in SIZES:
            signature[name] = "i32"
        elif name in INTEGERS:
            signature[name] = "*" + INTEGERS[name]
        else:
            precise = name in SUMS or (partial and name == "out")
            precise |= kernel.__module__ == _linear_kernels.__name__ and name in LINEAR_SUMS
            precise |= kernel.__module__ == _focused_triton.__name__ and name in FOCUSED_SUMS
            precise |= kernel is _focused_triton._focused_fwd and name == "out"
            signature[name] = "*" + (sums if precise else dtype)
        if signature[name].startswith("*") or (divisible and name in ("C", "D") and name not in constants):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def resources(program) -> dict[str, int]:
    """Registers per thread, spills (bytes; on AMD registers) and shared memory of a compiled kernel."""
    shared = program.metadata.shared
    if "amdgcn" in program.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", program.asm["amdgcn"]))
        return {"registers": int(found["vgpr_count"]), "spilled": int(found["vgpr_spill_count"]), "shared": shared}
    name = re.search(r"\.target\s+(sm_\w+)", program.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(program.asm["ptx"])
        ptx.flush()
        command = [
            get_ptxas(program.metadata.target.arch).path,
            "-v",
            f"--gpu-name={name}",
            ptx.name,
            "-o",
            "/dev/null",
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spilled": spilled, "shared": shared}


def main() -> None:
    target, dtypes, extent = sys.argv[1:]
    modules = (_neighborhood_kernels, _linear_kernels, _bilevel_kernels, _focused_triton, _window_kernels)
    for module in (depthwise, pointwise, *modules):
        _triton.load_kernels(vars(module))
    rows = []
    for dtype in dtypes.split(","):
        for kernel, constants, divisible in launches(dtype, extent == "every", target.startswith("gfx")):
            row = {"kernel": kernel.__name__, "dtype": dtype, "divisible": divisible}
            row |= {name: value for name, value in constants.items() if name != "ACC"}
            rows.append(row | resources(compiled(kernel, dtype, dict(constants), divisible, TARGETS[target])))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
