"""Halos of tiles, which the sizes of launches follow from."""

import itertools

import pytest
import torch

from visionattn.kernels.neighborhood.geometry import window_start
from visionattn.kernels.neighborhood.launches import halo


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
