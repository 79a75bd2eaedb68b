"""Runs the Triton cases of every operator, ``triton_cases.py``, in Triton's interpreter or on a GPU.

Interpreting must be on before Triton is imported and stays on for the whole process, hence a process for each file.
Cases are few programs large: a program step takes some milliseconds there.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
CASES = {str(path.parent.relative_to(HERE)): str(path) for path in sorted(HERE.glob("**/triton_cases.py"))}
every_operator = pytest.mark.parametrize("cases", CASES.values(), ids=CASES)


@every_operator
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
def test_kernels_in_the_interpreter(run_python, cases):
    run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")


@pytest.mark.gpu
@every_operator
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_kernels_on_the_gpu(run_python, cases):
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not gpu", cases)
    print(run_python(*command, TRITON_INTERPRET=None))
