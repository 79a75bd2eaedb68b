"""What every attention layer refuses, with the name of the argument, its value and what is allowed."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from visionattn import attention
from visionattn.attention import AgentAttention, Mixer, WindowAttention
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


EVERY = [cls for cls in vars(attention).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
KINDS = {
    "int": [-1, 1.5, True, "x", None, [1], float("nan")],
    "bool": [1, "no", None, [True]],
    "float": ["x", True, None, [0.5], float("nan"), float("inf")],
    "str": [1, None, "nonsense"],
}


def declared_arguments(cls):
    for name, parameter in inspect.signature(cls).parameters.items():
        kinds = getattr(parameter.annotation, "__name__", str(parameter.annotation)).split(" | ")
        if name not in ("dim", "num_heads", "head_dim", "device", "dtype") and kinds[0] in KINDS:
            yield from ((name, v) for v in KINDS[kinds[0]] if v is not None or "None" not in kinds)


def build(cls, **arguments):
    required = {"dim": 16, "num_heads": 4, "head_dim": 4}
    return cls(**{k: v for k, v in required.items() if k in inspect.signature(cls).parameters} | arguments)


@pytest.mark.parametrize("cls", EVERY)
def test_arguments_that_are_not_what_they_are_declared_to_be_are_named(cls):
    for name, value in declared_arguments(cls):
        with pytest.raises(ValueError, match=f"{name} .*must be .*, got") as error:
            build(cls, **{name: value, "device": "meta"})
        assert repr(value) in str(error.value), (name, value)


@pytest.mark.parametrize("cls", EVERY)
def test_no_window_is_so_large_that_a_small_map_padded_to_it_fills_the_memory(cls):
    names = {"window_size", "radius", "split_size", "sr_ratio", "block_size", "halo_size", "kernel_size", "dilation"}
    for name in names & inspect.signature(cls).parameters.keys():
        with pytest.raises(ValueError, match=f"{name} .*must .*at most .*, got .*1000000000"):
            build(cls, **{name: 10**9, "device": "meta"})


@pytest.mark.parametrize("shape", [1.5, "7", (7,), (7, 0), (7, 7, 7), float("nan"), True])
def test_shapes_of_agents_are_rows_and_columns(shape):
    with pytest.raises(ValueError, match="agent_shape must be a positive integer or two"):
        AgentAttention(16, 4, agent_shape=shape)


@pytest.mark.parametrize("cls", [cls for cls in LAYERS if issubclass(cls, Mixer) and cls is not WindowAttention])
def test_mixers_of_sequences_name_other_lengths_and_maps(cls):
    mixer, expected = cls(16, 4, num_prefix_tokens=1), r"\[B, 1 \+ 7 \* 7, C\]"
    with pytest.raises(ValueError, match="size must be given to a mixer with prefix tokens"):
        mixer(torch.zeros(1, 7, 7, 16))
    for x, found in ((torch.zeros(1, 51, 16), r"\(1, 51, 16\)"), (torch.zeros(1, 7, 7, 16), r"\(1, 7, 7, 16\)")):
        with pytest.raises(ValueError, match=f"x must be a sequence {expected}.*, got shape {found}"):
            mixer(x, (7, 7))
