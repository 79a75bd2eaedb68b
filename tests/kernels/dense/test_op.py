"""The linear map equals F.linear, eagerly and as the operator that compilers see."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import linear, linear_gelu, use_tuning
from visionattn.kernels.common.tuning import CHOICES
from visionattn.kernels.dense.cpu import FORMS

SHAPES = [(2, 8, 5), (16, 3, 3, 5), (1, 7, 11, 5), (0, 4, 5), (3, 5), (2, 40, 5), (1, 197, 5), (3, 37, 5)]


def tensors(*shape, grad=True):
    made = torch.randn(shape), torch.randn(6, shape[-1]), torch.randn(6)
    return [t.requires_grad_(grad) for t in made]


def step(function, inputs):
    out = function(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return out, *torch.autograd.grad(out.square().sum(), wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_f_linear_forward_and_gradients(shape, biased, threads):
    x, weight, bias = tensors(*shape)
    inputs = (x, weight, bias if biased else None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = step(F.linear, inputs)
        torch.testing.assert_close(step(linear, inputs), expected)
        torch.testing.assert_close(step(torch.ops.visionattn.linear, inputs), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_has_the_same_gradients(shape, biased, form, monkeypatch):
    monkeypatch.setattr(CHOICES["dense product"], "pick", lambda *key: form)
    for frozen in ((), (0,), (1,), (1, 2)):
        x, weight, bias = tensors(*shape)
        inputs = (x, weight, bias if biased else None)
        for i in frozen:
            if inputs[i] is not None:
                inputs[i].requires_grad_(False)
        expected = step(F.linear, inputs)
        # Sums over 197 positions, in another order in each library.
        close = partial(torch.testing.assert_close, expected=expected, rtol=1e-4, atol=1e-4)
        close(step(linear, inputs))
        close(step(torch.ops.visionattn.linear, inputs))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_differentiated_twice(form, monkeypatch):
    monkeypatch.setattr(CHOICES["dense product"], "pick", lambda *key: form)
    inputs = tensors(2, 8, 5)

    def penalty(function):
        (grad,) = torch.autograd.grad(function(*inputs).sin().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    # Float32 rounds several sums, in another order in each library.
    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
def test_every_form_gives_the_same_in_inference(shape, biased, form, monkeypatch):
    monkeypatch.setattr(CHOICES["dense product"], "pick", lambda *key: form)
    x, weight, bias = tensors(*shape, grad=False)
    for given in (x, x.movedim(0, -2), x[1:], x[::2]):
        arguments = (given, weight, bias if biased else None)
        expected = F.linear(*arguments)
        torch.testing.assert_close(linear(*arguments), expected)
        before = given.clone()
        torch.testing.assert_close(linear_gelu(*arguments), F.gelu(expected))
        assert torch.equal(given, before)


def test_gelu_of_the_product_has_gradients_and_transforms():
    inputs = tensors(2, 8, 5)
    torch.testing.assert_close(step(linear_gelu, inputs), step(lambda *t: F.gelu(F.linear(*t)), inputs))
    x, weight, bias = tensors(3, 2, 8, 5, grad=False)
    weights = torch.stack([weight, 2 * weight, -weight])
    with torch.no_grad():
        mapped = torch.func.vmap(linear_gelu, (0, 0, None))(x, weights, bias)
    for one, w, result in zip(x, weights, mapped, strict=True):
        torch.testing.assert_close(result, F.gelu(F.linear(one, w, bias)))
    with torch.no_grad():
        compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")(x, weight, bias)
    torch.testing.assert_close(compiled, F.gelu(F.linear(x, weight, bias)))


@pytest.mark.parametrize("function", [linear, linear_gelu])
def test_the_operations_are_counted_in_every_form(function, monkeypatch):
    x, weight, bias = tensors(2, 32, 24, grad=False)
    for form in FORMS:
        monkeypatch.setattr(CHOICES["dense product"], "pick", lambda *key, form=form: form)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(x, weight, bias)
        assert counter.get_total_flops() == 2 * 2 * 32 * 24 * 6, form


def test_the_timed_form_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONATTN_TUNE_DIR", str(tmp_path))
    inputs = tensors(2, 40, 5)
    with use_tuning("full"):
        torch.testing.assert_close(step(linear, inputs), step(F.linear, inputs))
        with torch.no_grad():
            torch.testing.assert_close(linear_gelu(*inputs), F.gelu(F.linear(*inputs)))


@pytest.mark.parametrize("frozen", [(0,), (1,), (1, 2)], ids=str)
def test_compiled_with_frozen_inputs(frozen):
    inputs = tensors(2, 8, 8, 5)
    for i in frozen:
        inputs[i].requires_grad_(False)
    compiled = torch.compile(lambda *t: 2 * linear(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, inputs), step(lambda *t: 2 * F.linear(*t), inputs))


@pytest.mark.parametrize("shape", [(2, 8, 5), (0, 4, 5), (1, 197, 5)], ids=str)
def test_passes_opcheck(shape):
    torch.library.opcheck(torch.ops.visionattn.linear, tensors(*shape))
    x, weight, _ = tensors(*shape, grad=False)
    torch.library.opcheck(torch.ops.visionattn.linear_backward, (torch.randn(*shape[:-1], 6), x, weight, [True] * 3))


def test_compiled_per_sample_gradients():
    x, weight, bias = tensors(3, 2, 8, 5, grad=False)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: linear(x[None], w, bias).square().sum()), (None, 0))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, x), per_sample(weight, x))


def test_strided_input_and_other_dtypes():
    wide = torch.randn(4, 9, 8, 5).transpose(1, 2)[:, ::2]
    weight = torch.randn(6, 5)
    for function in (linear, torch.ops.visionattn.linear):
        torch.testing.assert_close(function(wide, weight, None), F.linear(wide, weight))
    x, weight = wide.double(), weight.double()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(wide, weight.float()).dtype == torch.bfloat16


def test_operations_are_counted_as_of_a_matrix_product():
    x, weight, bias = tensors(2, 8, 5)
    counts = []
    for function in (F.linear, torch.ops.visionattn.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 16 * 5 * 6
