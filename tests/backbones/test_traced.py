"""Tracers of every kind that follow a model with an example or with placeholders, and batches without images."""

import copy
import pickle
from inspect import signature

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from tests.backbones.test_contract import images
from tests.backbones.test_wrapped import each_model, small
from visionattn.layers.blocks import Linear


@each_model
@pytest.mark.parametrize("training", [False, True])
def test_symbolic_tracing_and_the_feature_extractors_built_on_it(name, training):
    model = small(name).train(training)
    x = images(70, 50)
    traced = torch.fx.symbolic_trace(model)
    net = create_feature_extractor(model, ["stages.0", "stages.2" if len(model.stages) > 2 else "stages.1"])
    if training:
        traced(x).sum().backward()
        return
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    maps = net(x)
    tokens = model.stem(x)
    first = model.stages[0](*tokens) if isinstance(tokens, tuple) else model.stages[0](tokens)
    torch.testing.assert_close(maps["stages.0"], first, rtol=0, atol=0)


def test_opaque_modules_are_copied_and_pickled_under_their_own_name():
    layer = Linear(3, 2)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is Linear and Linear.__module__ == "visionattn.layers.blocks"
        assert torch.fx.Tracer().is_leaf_module(again, "")
    assert list(signature(Linear).parameters)[:3] == ["in_features", "out_features", "bias"]


@each_model
def test_a_trace_serves_other_batches_than_its_example(name):
    model = small(name).eval()
    x = images(batch=3)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(batch=2), check_trace=False)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


@each_model
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_without_images_has_no_logits_and_gradients_of_zero(name, training):
    if training and name.startswith("van"):
        pytest.skip("PyTorch's batch norm of maps refuses it")
    x = images(batch=0).requires_grad_()
    y = small(name).train(training)(x)
    y.sum().backward()
    assert y.shape == (0, 5) and x.grad.shape == x.shape
