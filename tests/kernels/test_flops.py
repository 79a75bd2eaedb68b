"""FLOPs of the operators are counted, whoever is imported first, without a hook on the imports of others."""

import pytest

IMPORT_COUNTER = "from torch.utils.flop_counter import FlopCounterMode"
COUNT = """
import torch, visionattn
x, weight = torch.empty(1, 4, 5, 6, device="meta"), torch.empty(4, 1, 3, 3, device="meta")
with FlopCounterMode(display=False) as counter:
    torch.ops.visionattn.depthwise_conv2d(x, weight, None, 1)
assert counter.get_total_flops() == 2 * (4 * 5 * 6) * 9, counter.get_total_flops()
"""


@pytest.mark.parametrize("first", [IMPORT_COUNTER, "import visionattn", "import timm", "import visionattn.kernels"])
def test_flops_are_counted_whatever_is_imported_first(run_python, first):
    run_python("-c", "\n".join([first, IMPORT_COUNTER, COUNT]))


def test_importing_the_package_leaves_the_import_system_alone(run_python):
    run_python("-c", "import sys, timm; before = [*sys.meta_path]; import visionattn; assert sys.meta_path == before")


def test_without_triton_flops_are_counted_and_nothing_is_logged(run_python):
    quiet = "import io, sys; sys.modules['triton'] = None; sys.stderr = io.StringIO(); import visionattn"
    run_python("-c", "\n".join([quiet, IMPORT_COUNTER, COUNT, "assert not sys.stderr.getvalue()"]))
