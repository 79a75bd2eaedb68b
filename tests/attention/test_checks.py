"""What every attention layer refuses, with the name of the argument, its value and what is allowed."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from visionattn import attention
from visionattn.attention import AgentAttention, Mixer
from visionattn.attention.softmax import SelfAttention

LAYERS = [
    cls
    for cls in vars(attention).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not Mixer
    if {"dim", "num_heads"} <= inspect.signature(cls).parameters.keys()
]
MAPS = [cls for cls in LAYERS if not issubclass(cls, SelfAttention) and "Cross" not in cls.__name__[:9]]
each_layer = pytest.mark.parametrize("cls", LAYERS)


@each_layer
@pytest.mark.parametrize("num_heads", [0, -2, 3, 2.0, None])
def test_heads_that_do_not_divide_the_channels_are_named(cls, num_heads):
    with pytest.raises(ValueError, match=f"num_heads must .*, got {num_heads}"):
        cls(16, num_heads)


@each_layer
@pytest.mark.parametrize("dim", [0, -16, 16.0])
def test_no_channels_are_named(cls, dim):
    with pytest.raises(ValueError, match=f"dim must be a positive integer, got {dim}"):
        cls(dim, 4)


@pytest.mark.parametrize("cls", [cls for cls in LAYERS if issubclass(cls, Mixer)])
@pytest.mark.parametrize("size", [14, (14,), (14, 0), (14, 14, 3), "14"])
def test_sizes_of_tables_are_rows_and_columns(cls, size):
    with pytest.raises(ValueError, match="input_size must be two positive integers, rows and columns, got"):
        cls(16, 4, input_size=size)


@pytest.mark.parametrize("agents", [-4, 0, 5, 4.0])
def test_numbers_of_agents_are_squares(agents):
    with pytest.raises(ValueError, match=f"num_agents must be a square number, got {agents}"):
        AgentAttention(16, 4, agents)


@pytest.mark.parametrize("cls", MAPS)
@pytest.mark.parametrize("x", [torch.zeros(2, 49, 16), None, np.zeros((2, 8, 8, 16), dtype=np.float32)])
def test_layers_of_maps_name_what_is_none(cls, x):
    found = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
    with pytest.raises(ValueError, match="x must be .*, got ") as error:
        cls(16, 4)(x)
    assert found in str(error.value) or "spatial axes" in str(error.value)
