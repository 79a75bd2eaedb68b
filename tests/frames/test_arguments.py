"""What every network refuses, with the name of the argument, its value and what is allowed."""

from inspect import signature

import numpy as np
import pytest
import torch

from tests.backbones.test_contract import SMALL, each_family, images, outline, small
from visionattn.hosts import Swin

WRONG = {
    "num_classes": [-1, 1.5, "10", True],
    "in_chans": [0, -3, 2.0],
    "drop_rate": [-0.1, 1.5, "0.1"],
    "drop_path_rate": [-1, 2, True],
    "proj_drop_rate": [-1, 2],
    "img_size": [0, -224, "224", (224, 0), (224, 224, 3), 22.5],
    "embed_dim": [0, -8, 8.0],
    "embed_dims": [(0, 8, 8, 8), (8, 8, 8, -8)],
    "depth": [0, "4"],
    "depths": [(1, 1, -1, 1), (1, 1, 1, 1.5)],
    "num_heads": [0, -2],
    "patch_size": [0],
    "mlp_ratio": [-1, "x", float("nan"), [4]],
    "global_pool": [1, "x"],
    "layer_scale": ["x", True],
    "mixer_args": [1, "x"],
    "dilations": [1],
}


@each_family
@pytest.mark.parametrize(("argument", "value"), [(a, v) for a, values in WRONG.items() for v in values])
def test_arguments_that_mean_nothing_are_named(name, argument, value):
    if argument not in signature(type(outline(name))).parameters:
        pytest.skip("the family has no such argument")
    with pytest.raises(ValueError, match=rf"{argument} must be .*, got"):
        small(name, **{argument: value, "device": "meta"})


@each_family
def test_stages_with_one_entry_too_few_are_counted(name):
    short = {a: v[:-1] for a, v in SMALL[name].items() if a in ("depths", "num_heads") and isinstance(v, tuple)}
    if not short:
        pytest.skip("one stage")
    argument = next(iter(short))
    with pytest.raises(ValueError, match=f"one entry a stage, got .*{argument} 3"):
        small(name, **{argument: short[argument]})


@each_family
def test_no_images_are_named(name):
    model = small(name).eval()
    for x, found in (
        (None, "NoneType"),
        (np.zeros((1, 3, 64, 64), dtype=np.float32), "ndarray"),
        (torch.zeros(3, 64, 64), r"\(3, 64, 64\)"),
        (torch.zeros(1, 3, 0, 64), r"\(1, 3, 0, 64\)"),
    ):
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=f"x must be .*images.*, got .*{found}"):
                call(x)


def test_numbers_of_numpy_are_numbers():
    model = small("van_b0", num_classes=np.int64(3), drop_path_rate=np.float32(0.1))
    assert model(images()).shape == (2, 3)


def test_classes_check_without_the_registry():
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 0, got -1"):
        Swin(num_classes=-1)
    with pytest.raises(TypeError, match="unexpected"):
        Swin(classes=3)
