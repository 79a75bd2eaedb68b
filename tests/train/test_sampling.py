import random

import numpy as np
import pytest
import torch

from visionattn.train.data.sampling import IGNORED, EpochSampler, Samples


class Noisy:
    """Ten 'images' with random augmentation; some may be unreadable."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("image file is truncated")
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()]), index


def keys(rank=0, world=1, epoch=0, shuffle=True, skip=0):
    sampler = EpochSampler(Noisy(), world, rank, shuffle=shuffle, seed=0)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    return list(sampler)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_image_counts_once_however_many_processes(world):
    dealt = [keys(rank, world, shuffle=False) for rank in range(world)]
    assert len({len(part) for part in dealt}) == 1
    assert sorted(key.index for part in dealt for key in part if key.counts) == list(range(10))


def test_two_processes_see_the_batches_of_one():
    one, halves = keys(), [keys(rank, 2) for rank in range(2)]
    for start in range(0, 8, 4):
        mine = {key for part in halves for key in part[start // 2 : start // 2 + 2]}
        assert mine == set(one[start : start + 4])


def test_order_depends_on_the_epoch_only():
    assert keys(epoch=3) == keys(epoch=3)
    assert [key.index for key in keys(epoch=3)] != [key.index for key in keys(epoch=4)]


def test_a_skipped_start_leaves_the_rest_of_the_epoch_as_it_was():
    assert keys(epoch=2, skip=4) == keys(epoch=2)[4:]


def test_augmentation_depends_on_image_and_epoch_and_leaves_other_random_numbers_alone():
    samples = Samples(Noisy(), str, training=True)
    key, later = keys(epoch=1)[0], next(key for key in keys(epoch=2) if key.index == keys(epoch=1)[0].index)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = samples[key][0], samples[key][0], samples[later][0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)


def test_training_replaces_an_unreadable_image_and_counts_it(capfd):
    samples = Samples(Noisy(broken=(4, 5)), "photo-{}.jpg".format, training=True)
    entries = [samples[key] for key in keys()]
    assert sorted(int(target) for _, target, *_ in entries) == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9]
    assert sum(bad for *_, bad in entries) == 2
    messages = capfd.readouterr().err
    assert messages.count("photo-4.jpg") == 1 and messages.count("photo-5.jpg") == 1 and "truncated" in messages


def test_validation_leaves_an_unreadable_image_out():
    samples = Samples(Noisy(broken=(4,)), str, training=False)
    entries = [samples[key] for key in keys(shuffle=False)]
    assert [target for _, target, *_ in entries] == [0, 1, 2, 3, IGNORED, 5, 6, 7, 8, 9]
    assert torch.equal(entries[4][0], torch.zeros(4)) and entries[4][3] == 1


def test_a_bug_in_a_transform_is_not_taken_for_an_unreadable_image():
    class Buggy(Noisy):
        def __getitem__(self, index):
            raise KeyError("oops")

    with pytest.raises(KeyError):
        Samples(Buggy(), str, training=True)[keys()[0]]
