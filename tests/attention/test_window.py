"""Window attention as a layer: what it adds to the operator."""

import torch
from torch.nn import functional as F

from visionattn.attention import WindowAttention

ANY = torch.export.Dim.DYNAMIC


def copies(layer: torch.nn.Module) -> int:
    """How often the graph of a layer, exported for maps of any size, picks rows or columns."""
    shapes = ({1: ANY, 2: ANY},)
    graph = torch.export.export(layer.eval(), (torch.randn(2, 9, 11, 16),), dynamic_shapes=shapes).graph
    return sum("index_select" in str(node.target) for node in graph.nodes)


def test_an_exported_map_is_cropped_once():
    """By the operator: two copies, and two for each of both shifts."""
    assert copies(WindowAttention(16, 2, window_size=4, shift=True, input_size=(8, 8))) == 6


def test_a_projection_that_somebody_changed_sees_a_whole_map():
    layer = WindowAttention(16, 2, window_size=4, input_size=(8, 8)).eval()
    x = torch.randn(2, 9, 11, 16)
    expected = layer(x)
    seen = []
    layer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    torch.testing.assert_close(layer(x), expected)
    assert seen == [F.pad(x, (0, 0, 0, 1, 0, 3)).shape]
