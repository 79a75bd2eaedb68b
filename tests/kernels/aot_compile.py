"""Compile what operators launch for a GPU that need not be here; print what each kernel needs, as JSON.

    python -m tests.kernels.aot_compile sm_90 bf16,fp32 every
    python -m tests.kernels.aot_compile sm_90 bf16 every linear_queries_bwd

"typical" instead of "every" takes a few launches only, names of kernels at the end take those. Must run without
TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tests.kernels.launch_lists import lists
from visionattn.kernels.common.jit import load_kernels
from visionattn.kernels.common.launch import NAMES, Launch

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {name: dtype for dtype, name in NAMES.items()}
DIVISIBLE = [["tt.divisibility", 16]]


def compiled(launch: Launch, target: GPUTarget):
    """The program of a launch."""
    scope, name = launch.kernel.fn.__globals__, launch.kernel.fn.__name__
    load_kernels(scope)
    kernel, constants = scope[name], dict(launch.constants)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages") if option in constants}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.arg_names):
        if parameter in constants:
            signature[parameter] = "constexpr"
            continue
        types = launch.arguments[parameter]
        if isinstance(types, tuple):
            signature[parameter] = tuple(t.removesuffix(":16") for t in types)
            attributes |= {(index, i): DIVISIBLE for i, t in enumerate(types) if t.endswith(":16")}
        else:
            signature[parameter] = types.removesuffix(":16")
            attributes |= {(index,): DIVISIBLE} if types.endswith(":16") else {}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def resources(program) -> dict[str, int]:
    """Registers per thread, spills (bytes; on AMD registers, scalar ones besides) and shared memory of a kernel."""
    shared = program.metadata.shared
    if "amdgcn" in program.asm:
        found = dict(re.findall(r"\.([vs]gpr_(?:spill_)?count):\s+(\d+)", program.asm["amdgcn"]))
        names = {"registers": "vgpr_count", "spilled": "vgpr_spill_count", "scalars_spilled": "sgpr_spill_count"}
        return {name: int(found[key]) for name, key in names.items()} | {"shared": shared}
    name = re.search(r"\.target\s+(sm_\w+)", program.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(program.asm["ptx"])
        ptx.flush()
        ptxas = get_ptxas(program.metadata.target.arch).path
        command = [ptxas, "-v", f"--gpu-name={name}", ptx.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    used = int(re.search(r"Used (\d+) registers", log)[1])  # the compiler knows of no scalar registers
    return {"registers": used, "spilled": spilled, "scalars_spilled": 0, "shared": shared}


# Of an SM or a compute unit: its registers of 32 bits, in what steps a thread gets them, threads of a warp.
FILES = {"cuda": (65_536, 8, 32), "hip": (131_072, 8, 64)}


def programs(row: dict, target: GPUTarget, warps: int) -> int:
    """How many programs the registers of one SM hold."""
    registers, unit, threads = FILES[target.backend]
    return registers // (-(-row["registers"] // unit) * unit * threads * warps)


def main() -> None:
    target, dtypes, extent, *names = sys.argv[1:]
    rows = []
    for dtype in dtypes.split(","):
        for launches in lists().values():
            for launch in launches(DTYPES[dtype], target.startswith("gfx")):
                name = launch.kernel.fn.__name__
                if (extent == "every" or launch.typical) and (not names or name in names):
                    row = {"kernel": name, "dtype": dtype, "may_spill": launch.may_spill}
                    row |= {name: value for name, value in launch.constants.items() if name != "ACC"}
                    row |= resources(compiled(launch, TARGETS[target]))
                    rows.append(row | {"programs": programs(row, TARGETS[target], row.get("num_warps", 4))})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
