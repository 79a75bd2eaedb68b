"""PyTorch's switches for TF32, the old ones and today's, in a process of its own: they cannot be set back."""

import pytest
import torch

SWITCHES = """
import torch
from visionattn.kernels import pointwise
from visionattn.kernels.common.precision import tf32_allowed
from visionattn.kernels.linear_attn import launches

def allowed():
    found = tf32_allowed()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        tf32 = found and dtype == torch.float32
        assert pointwise._precision(dtype) == ("tf32" if tf32 else "ieee"), dtype
        sums_of_16_bits = dtype.itemsize == 2  # to whose rounding TF32 does not add
        assert launches.precision(dtype, False) == ("tf32" if tf32 or sums_of_16_bits else "ieee"), dtype
        assert launches.precision(dtype, True) == "ieee", dtype  # AMD
    return found

products = torch.backends.cuda.matmul
assert not allowed()
products.allow_tf32 = True
assert allowed()
torch.set_float32_matmul_precision("highest")
assert not allowed()
if hasattr(products, "fp32_precision"):
    torch.backends.fp32_precision = "tf32"
    assert allowed() == (products.fp32_precision == "tf32")
    products.fp32_precision = "ieee"
    assert not allowed()
    products.fp32_precision = "tf32"
    assert allowed()
    products.allow_tf32 = False  # mixed
    allowed()
"""
EVERYTHING = """
import torch
torch.backends.fp32_precision = "tf32"
from visionattn.kernels.common.precision import tf32_allowed
assert tf32_allowed()
try:
    torch.backends.cuda.matmul.allow_tf32
except RuntimeError:
    pass
else:
    raise AssertionError("the old switch can be read")
"""


def test_every_switch_is_followed_for_float32_alone(run_python):
    run_python("-c", SWITCHES)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has the old switches only")
def test_the_switch_for_everything_is_followed_where_the_old_one_raises(run_python):
    run_python("-c", EVERYTHING)
