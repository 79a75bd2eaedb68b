"""Runs the cases of neighborhood_triton_cases.py in a process of their own, in Triton's interpreter or on a GPU; tests
the sizes of launches, which need neither.
"""

import itertools
from pathlib import Path

import pytest
import torch

from visionattn.kernels.neighborhood.geometry import window_start
from visionattn.kernels.neighborhood.launches import halo

CASES = str(Path(__file__).with_name("neighborhood_triton_cases.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
def test_kernels_in_the_interpreter(run_python):
    pytest.importorskip("triton")
    run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_kernels_on_the_gpu(run_python):
    pytest.importorskip("triton")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not gpu", CASES)
    print(run_python(*command, TRITON_INTERPRET=None))


@pytest.mark.parametrize("viewers", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 13, 20])
def test_halos_hold_all_that_a_tile_sees(window, causal, viewers):
    for length, tile in itertools.product(range(window, 45), (1, 8)):
        for n in {length, max(length - 1, window)}:  # residues differ by one
            rank = torch.arange(n)
            start = window_start(rank, torch.full_like(rank, n), window, causal)
            stop = rank if causal else start + window - 1
            pairs = (rank[None, :] >= start[:, None]) & (rank[None, :] <= stop[:, None])  # query key
            for rows in (pairs.T if viewers else pairs).split(tile):
                seen = rows.any(0).nonzero()
                assert seen.max() - seen.min() + 1 <= halo(length, tile, window, causal, viewers)


def test_few_sizes_of_maps_need_kernels_of_their_own():
    sizes = {(halo(n, 8, 7, False, False), halo(n, 8, 7, False, True)) for n in range(7, 500)}
    assert len(sizes) <= 4
