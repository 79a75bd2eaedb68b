"""Runs the cases of some operators, in a process of their own: in Triton's interpreter, or on a GPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = [str(Path(__file__).with_name(name)) for name in ("triton_cases.py", "window_triton_cases.py")]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
def test_kernels_in_the_interpreter(run_python, cases):
    run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("cases", CASES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_kernels_on_the_gpu(run_python, cases):
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not gpu", cases)
    print(run_python(*command, TRITON_INTERPRET=None))
