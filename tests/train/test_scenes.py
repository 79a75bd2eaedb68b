import numpy as np
import pytest
import torch

from visionattn.errors import UserError
from visionattn.train.data import SceneMasks, SceneObjects
from visionattn.train.data.scenes import Scenes, digits, make_scene


def scene(seed=0, **settings):
    return make_scene(np.random.default_rng(seed), "train", **settings)


def test_a_scene_depends_on_its_seed_alone():
    a, b, other = scene(3), scene(3), scene(4)
    assert np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)
    assert not np.array_equal(a.image, other.image)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_masks_and_classes_agree(seed):
    s = scene(seed, size=96)
    assert s.image.shape == (96, 96, 3) and 1 <= len(s.labels) <= 4
    assert s.masks.sum(0).max() == 1  # no pixel belongs to two
    for mask, (left, top, right, bottom), label in zip(s.masks, s.boxes.astype(int), s.labels, strict=True):
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
        assert (s.classes[mask] == label + 1).all()
    assert (s.classes[~s.masks.any(0)] == 0).all()


def test_digits_stand_out_from_the_photograph():
    for seed in range(10):
        s = scene(seed, objects=(1, 1))
        (left, top, right, bottom), inside = s.boxes[0].astype(int), s.masks[0]
        around = s.image[top:bottom, left:right][~inside[top:bottom, left:right]]
        assert abs(float(s.image[inside].mean()) - float(around.mean())) > 20


def test_no_digit_is_in_both_splits():
    train, val = ({glyph.tobytes() for glyph in digits(split)[0]} for split in ("train", "val"))
    assert not train & val


def test_fresh_scenes_follow_numpy_s_random_numbers_and_others_their_index():
    fresh, fixed = (Scenes("train", 4, kind, 64, (1, 2), (0.3, 0.5)) for kind in (True, False))
    np.random.seed(1)
    a, b = fresh[0].image, fresh[0].image
    np.random.seed(1)
    assert np.array_equal(fresh[0].image, a) and not np.array_equal(a, b)
    assert np.array_equal(fixed[1].image, fixed[1].image) and not np.array_equal(fixed[0].image, fixed[1].image)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(img_size=8), "scenes of side 8"),
        (dict(train_scenes=0), "0 scenes"),
        (dict(objects=(0, 3)), "data.objects"),
        (dict(sides=(0.5, 0.2)), "data.sides"),
    ],
)
def test_impossible_scenes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SceneObjects(**arguments).dataset("train")


def test_batches_for_both_tasks():
    batch = next(iter(SceneMasks(img_size=64, batch_size=3, train_scenes=6).train_dataloader()))
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.targets.shape == (3, 64, 64) and len(batch.indices) == 3 and batch.unreadable.sum() == 0
    batch = next(iter(SceneObjects(img_size=64, batch_size=2, train_scenes=6).train_dataloader()))
    assert [image.shape for image in batch.images] == [(3, 64, 64)] * 2
    for target in batch.targets:
        count = len(target["labels"])
        assert target["boxes"].shape == (count, 4) and target["masks"].shape == (count, 64, 64)
