"""Window attention: the reference against timm's Swin, the paths in PyTorch's operators against the reference."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.kernels import set_backend, window_attention, window_attention_export
from visionattn.kernels.window import cpu
from visionattn.kernels.window.geometry import relative_index

INF = float("inf")
CASES = {  # B, H, W, h, D, window, shift
    "whole windows": (2, 6, 9, 2, 4, 3, 0),
    "shifted": (2, 6, 9, 2, 4, 3, 1),
    "a remainder on both axes": (1, 7, 5, 2, 3, 3, 1),
    "a remainder on one axis": (2, 4, 5, 1, 4, 4, 2),
    "map smaller than the window": (2, 2, 3, 2, 4, 4, 2),
    "map as large as the window": (3, 4, 4, 2, 4, 4, 0),
    "map as large as the window, shifted": (1, 4, 4, 2, 4, 4, 2),
    "another window per axis": (1, 6, 7, 2, 4, (2, 3), (1, 2)),
    "shifted along rows alone": (1, 6, 6, 2, 4, 3, (2, 0)),
    "shifted along columns alone": (2, 5, 6, 1, 4, (3, 2), (0, 1)),
    "window of one token": (1, 3, 4, 2, 4, 1, 0),
    "one row": (1, 1, 9, 2, 4, (1, 4), (0, 2)),
    "more windows than fit into one step": (1, 35, 42, 3, 4, 7, 3),
    "no image": (0, 6, 6, 2, 4, 3, 1),
}


def make(B, H, W, h, D, window, shift, dtype=torch.float64, biased=True, padded=True):
    """qkv, bias, padding and the other arguments."""
    window, shift = (t if isinstance(t, tuple) else (t, t) for t in (window, shift))
    qkv = torch.randn(B, H, W, 3, h, D, dtype=dtype).requires_grad_()
    bias = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), h, dtype=dtype).requires_grad_() if biased else None
    padding = torch.randn(3, h, D, dtype=dtype).requires_grad_() if padded else None
    return qkv, bias, padding, (window, shift)


def paths(qkv, bias, padding, sizes, masked=-100.0, scale=0.7):
    """The result of every path, that for CPUs without gradients last."""
    yield "eager", window_attention(qkv, *sizes, bias, padding, masked, scale, backend="torch")
    arguments = (qkv, *map(list, sizes), bias, padding, masked, scale)
    yield "export", window_attention_export(*arguments)
    yield "export for any size", window_attention_export(*arguments, True, torch.tensor(1))
    with torch.no_grad():
        yield "inference", window_attention(qkv, *sizes, bias, padding, masked, scale, backend="torch")
        yield "export, inference", window_attention_export(*arguments)


def gradients(out, tensors, weight):
    """Of tensors that a path does not use: zeros."""
    found = torch.autograd.grad(out, tensors, weight, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 7), (5, 16)])
def test_reference_equals_the_block_of_timm(size, shift):
    H, W = size
    whole = (H + -H % 4, W + -W % 4)
    block = SwinTransformerBlock(8, whole, num_heads=2, window_size=4, shift_size=shift, always_partition=True).double()
    attn = block.attn
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    # The authors pad before they shift; timm shifts first.
    expected = block._attn(F.pad(x, (0, 0, 0, whole[1] - W, 0, whole[0] - H)))[:, :H, :W]
    qkv, padding = attn.qkv(x).unflatten(-1, (3, 2, 4)), attn.qkv.bias.view(3, 2, 4)
    table = attn.relative_position_bias_table
    out = window_attention(qkv, attn.window_size, block.shift_size, table, padding, backend="reference")
    torch.testing.assert_close(attn.proj(out.flatten(3)), expected)


@pytest.mark.parametrize("window", [(7, 7), (2, 5), (1, 3)])
def test_bias_table_is_indexed_as_in_swin(window):
    index = WindowAttention(4, 1, window_size=window).relative_position_index.flatten()
    assert torch.equal(relative_index(*window, torch.device("cpu")), index)


def test_gradcheck_of_the_reference():
    qkv, bias, padding, sizes = make(1, 3, 5, 1, 2, (2, 3), (1, 1))
    assert gradcheck(
        lambda *t: window_attention(t[0], *sizes, *t[1:], backend="reference"), (qkv, bias, padding), fast_mode=True
    )


def test_half_precision_reference_sums_in_float32():
    qkv, bias, padding, sizes = make(1, 24, 24, 1, 64, 24, 0, torch.bfloat16)
    out = window_attention(qkv, *sizes, bias, padding, backend="reference")
    truth = window_attention(qkv.double(), *sizes, bias.double(), padding.double(), backend="reference")
    assert (out.double() - truth).norm() / truth.norm() < 2**-8  # one rounding, of the result


# --- PyTorch's operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("biased, padded", [(True, True), (True, False), (False, True)])
def test_every_path_equals_the_reference(case, biased, padded):
    qkv, bias, padding, sizes = make(*case, biased=biased, padded=padded)
    tensors = [t for t in (qkv, bias, padding) if t is not None]
    expected = window_attention(qkv, *sizes, bias, padding, scale=0.7, backend="reference")
    weight = torch.randn_like(expected)
    wanted = gradients(expected, tensors, weight)
    for name, out in paths(qkv, bias, padding, sizes):
        torch.testing.assert_close(out, expected, msg=name)
        assert out.is_contiguous(), name
        if out.requires_grad:
            torch.testing.assert_close(gradients(out, tensors, weight), wanted, msg=name)


@pytest.mark.parametrize("masked", [-1.5, 0.0, -INF])
@pytest.mark.parametrize("biased", [True, False])
def test_any_mask(masked, biased):
    qkv, bias, padding, sizes = make(1, 7, 6, 2, 4, 3, 1, biased=biased)
    expected = window_attention(qkv, *sizes, bias, padding, masked, 0.7, backend="reference")
    for name, out in paths(qkv, bias, padding, sizes, masked):
        torch.testing.assert_close(out, expected, msg=name)


def test_windows_that_may_be_shifted_or_not():
    qkv, bias, padding, (window, shift) = make(1, 7, 6, 2, 4, 3, 1)
    for shifted in (0, 1):
        steps = tuple(shifted * s for s in shift)
        expected = window_attention(qkv, window, steps, bias, padding, backend="reference")
        arguments = (qkv, list(window), list(shift), bias, padding, -100.0, 0.5, True, torch.tensor(shifted))
        torch.testing.assert_close(window_attention_export(*arguments), expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", [(1, 3, 5, 1, 2, (2, 3), (1, 1)), (2, 4, 2, 2, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("path", ["eager", "export"])
def test_gradcheck(case, biased, path):
    qkv, bias, padding, sizes = make(*case, biased=biased)

    def attend(qkv, padding, bias=None):
        if path == "eager":
            return window_attention(qkv, *sizes, bias, padding, backend="torch")
        return window_attention_export(qkv, *map(list, sizes), bias, padding, -100.0, 0.5)

    assert gradcheck(attend, (qkv, padding, bias) if biased else (qkv, padding), fast_mode=True)


@pytest.mark.parametrize("frozen", ["qkv", "bias", "padding"])
def test_gradients_of_what_is_trained_alone(frozen):
    qkv, bias, padding, sizes = make(1, 7, 5, 2, 4, 3, 1)
    tensors = {"qkv": qkv, "bias": bias, "padding": padding}
    tensors[frozen].requires_grad_(False)
    trained = [t for t in tensors.values() if t.requires_grad]
    results = [window_attention(qkv, *sizes, bias, padding, backend=b) for b in ("torch", "reference")]
    grads = [torch.autograd.grad(out.sin().sum(), trained) for out in results]
    torch.testing.assert_close(*grads)


def test_parameters_take_the_path_for_cpus():
    qkv, bias, padding, sizes = make(1, 4, 4, 1, 2, 2, 1)
    assert cpu.covers(qkv, torch.nn.Parameter(bias.detach()), padding)
    out = window_attention(qkv, *sizes, torch.nn.Parameter(bias.detach()), padding)
    assert "WindowAttention" in type(out.grad_fn).__name__


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, tolerance):
    qkv, bias, padding, sizes = make(2, 9, 13, 2, 16, 4, 2, dtype)
    exact = [t.detach().double() for t in (qkv, bias, padding)]
    truth = window_attention(exact[0], *sizes, *exact[1:], backend="reference")
    for backend in ("torch", "reference"):
        out = window_attention(qkv, *sizes, bias, padding, backend=backend)
        assert out.dtype == dtype
        assert (out.double() - truth).norm() / truth.norm() < tolerance
        grads = torch.autograd.grad(out.float().square().sum(), (qkv, bias, padding))
        assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


def test_any_strides():
    wide = torch.randn(2, 5, 16, 3, 2, 8)
    views = [
        wide[:, :, ::2],
        wide.transpose(1, 2),
        wide.permute(0, 1, 2, 3, 5, 4),
        wide[:1].expand(3, -1, -1, -1, -1, -1),
    ]
    for view in views:
        bias = torch.randn(view.shape[4], 35).t()
        expected = window_attention(view, (3, 4), 1, bias, backend="reference")
        torch.testing.assert_close(window_attention(view, (3, 4), 1, bias, backend="torch"), expected)
        tracked = view.detach().requires_grad_()
        torch.testing.assert_close(window_attention(tracked, (3, 4), 1, bias, backend="torch"), expected)


def test_large_logits():
    qkv, bias, padding, sizes = make(1, 6, 6, 2, 4, 3, 1, torch.float32)
    with torch.no_grad():
        qkv *= 100
    expected = window_attention(qkv.double(), *sizes, bias.double(), padding.double(), backend="reference")
    for _, out in paths(qkv, bias, padding, sizes, scale=0.5):
        # Logits of some ten thousand carry the rounding of their size into the exponential.
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_vmap_and_functional_gradients():
    qkv, bias, padding, sizes = make(3, 5, 6, 2, 4, 3, 1)

    def loss(qkv, bias):
        return window_attention(qkv[None], *sizes, bias, padding).sin().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(qkv.detach(), bias.detach())
    for i in range(3):
        out = window_attention(qkv[i : i + 1], *sizes, bias, padding, backend="reference").sin().sum()
        expected = torch.autograd.grad(out, (qkv, bias))
        torch.testing.assert_close((grads[0][i], grads[1][i]), (expected[0][i], expected[1]))


# With symbols for heads and channels, too, tracing takes half a minute.
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_as_one_graph(dynamic):
    def layer(qkv, bias, padding, backend=None):
        return window_attention(qkv, 3, 1, bias, padding, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for H, W in ((6, 6), (7, 5)):
        tensors = make(2, H, W, 2, 4, 3, 1)[:3]
        expected = layer(*tensors, backend="reference")
        out = compiled(*tensors)
        torch.testing.assert_close(out, expected)
        grads = [gradients(o, tensors, torch.ones_like(o)) for o in (out, expected)]
        torch.testing.assert_close(*grads)


def test_scripts():
    scripted = torch.jit.script(window_attention_export)
    for case in ("shifted", "a remainder on both axes"):
        qkv, bias, padding, sizes = make(*CASES[case])
        expected = window_attention(qkv, *sizes, bias, padding, scale=0.7, backend="reference")
        torch.testing.assert_close(scripted(qkv, *map(list, sizes), bias, padding, -100.0, 0.7), expected)


def test_autocast():
    qkv, bias, padding, sizes = make(1, 7, 6, 2, 8, 3, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = [window_attention(qkv, *sizes, bias, padding, backend=b) for b in ("torch", "reference")]
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    assert (results[0] - results[1]).float().norm() / results[1].float().norm() < 1.5e-2
    grads = torch.autograd.grad(results[0].float().sum(), (qkv, bias, padding))
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_inference_mode_before_training_on_maps_of_one_size():
    qkv, bias, padding, sizes = make(1, 5, 10, 2, 4, 5, 2)
    cpu._tables.cache_clear()
    with torch.inference_mode():
        window_attention(qkv, *sizes, bias, padding)
    window_attention(qkv, *sizes, bias, padding).sum().backward()
    assert qkv.grad is not None


def test_flops_do_not_depend_on_the_path():
    from torch.utils.flop_counter import FlopCounterMode

    qkv, bias, padding, sizes = make(2, 6, 6, 2, 4, 3, 1, torch.float32)
    product = 2 * 2 * 36 * 2 * 4 * 9
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = window_attention(qkv, *sizes, bias, padding)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * product  # the weights are kept


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(qkv=torch.randn(1, 4, 4, 24)), r"qkv must be \[B, H, W, 3, heads, D\], got shape \(1, 4, 4, 24\)"),
        (dict(qkv=torch.randn(1, 4, 4, 2, 2, 4)), "qkv must be"),
        (dict(qkv=torch.randn(1, 0, 4, 3, 2, 4)), "at least one row"),
        (dict(qkv=torch.ones(1, 4, 4, 3, 2, 4, dtype=torch.int64)), "floating point, got torch.int64"),
        (dict(window_size=0), "window_size must be at least 1, got 0 for spatial axis 0"),
        (dict(window_size=(2, 2, 2)), "window_size must be an int or 2"),
        (dict(window_size=2.0), "window_size must be an int"),
        (dict(shift=2), r"shift must be 0 to window_size - 1 = 1, got 2 for spatial axis 0"),
        (dict(shift=(0, -1)), "got -1 for spatial axis 1"),
        (dict(bias=torch.randn(2, 9)), r"bias must be .* = \(9, 2\), got \(2, 9\)"),
        (dict(bias=torch.randn(9, 2).double()), "bias must be torch.float32 as x is"),
        (dict(padding=torch.randn(24)), r"padding must be \[3, heads, D\] = \(3, 2, 4\), got shape \(24,\)"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_arguments(change, words):
    arguments = dict(qkv=torch.randn(1, 4, 4, 3, 2, 4), window_size=2) | change
    with pytest.raises(ValueError, match=words):
        window_attention(**arguments)


def test_backend_that_cannot_run_is_told():
    set_backend("triton")
    with pytest.raises(RuntimeError, match="window_attention: backend 'triton' cannot run"):
        window_attention(torch.randn(1, 4, 4, 3, 2, 4), 2)
