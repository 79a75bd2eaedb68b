"""Neighborhood attention: reference against loops, the PyTorch path against the reference."""

import io
import itertools
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from visionattn.benchmark.measure import peak_memory
from visionattn.kernels import neighborhood_attention, neighborhood_attention_export
from visionattn.kernels.common.checks import per_axis
from visionattn.kernels.neighborhood import tiles
from visionattn.kernels.neighborhood.geometry import axis_windows, map_windows

BACKENDS = ("torch", "reference")

# B, spatial, h, D, kernel_size, dilation, is_causal
LOOPS = [
    (2, (10,), 2, 4, 3, 1, False),
    (1, (11,), 1, 3, 3, 2, False),
    (1, (9,), 1, 3, 3, 3, False),
    (1, (12,), 2, 3, 4, 2, False),
    (1, (8,), 1, 4, 3, 2, True),
    (1, (5,), 1, 4, 1, 2, False),
    (1, (5, 7), 2, 4, 3, 1, False),
    (1, (7, 8), 1, 3, (3, 5), (2, 1), False),
    (1, (6, 5), 1, 3, 3, 1, (True, False)),
    (1, (7, 5), 1, 3, (2, 3), (3, 1), (False, True)),
    (1, (3, 5, 4), 1, 2, (3, 3, 2), (1, 1, 2), False),
    (1, (4, 4, 5), 1, 2, (2, 3, 2), (2, 1, 1), (False, True, False)),
]


def tensors(B, spatial, h, D, K, biased=True, dtype=torch.float32, scale=1.0):
    shape = (B, *spatial, h, D)
    sides = K if isinstance(K, tuple) else (K,) * len(spatial)
    made = [torch.randn(shape) for _ in range(3)]
    if biased:
        made.append(torch.randn(h, *(2 * side - 1 for side in sides)))
    return [(t * scale).to(dtype).requires_grad_() for t in made]


def call(inputs, K, d, causal, backend=None, **kwargs):
    q, k, v, *bias = inputs
    if backend == "export":  # what is exported and scripted
        given = (K, int), (d, int), (causal, bool)
        K, d, causal = (list(per_axis("", x, q.dim() - 3, kind)) for x, kind in given)
        return neighborhood_attention_export(q, k, v, K, d, *bias or [None], causal, q.shape[-1] ** -0.5)
    return neighborhood_attention(q, k, v, K, d, *bias, is_causal=causal, backend=backend, **kwargs)


def seen(i, L, K, d, causal):
    """Key positions of a query on an axis, by counting: the window is moved one step at a time until it fits."""
    group = range(i % d, L, d)
    rank = list(group).index(i)
    if causal:
        return [group[r] for r in range(rank - K + 1, rank + 1) if r >= 0]
    first = rank - K // 2
    while first < 0:
        first += 1
    while first + K > len(group):
        first -= 1
    return [group[r] for r in range(first, first + K)]


def loops(q, k, v, K, d, bias, causal, scale):
    B, *spatial, h, D = q.shape
    axes = len(spatial)
    K, d, causal = (t if isinstance(t, tuple) else (t,) * axes for t in (K, d, causal))
    out = torch.zeros_like(q)
    for b, head in itertools.product(range(B), range(h)):
        for i in itertools.product(*map(range, spatial)):
            keys = list(itertools.product(*(seen(i[a], spatial[a], K[a], d[a], causal[a]) for a in range(axes))))
            logits = []
            for j in keys:
                logit = (q[(b, *i, head)] * k[(b, *j, head)]).sum() * scale
                if bias is not None:
                    logit = logit + bias[(head, *((j[a] - i[a]) // d[a] + K[a] - 1 for a in range(axes)))]
                logits.append(logit)
            weights = torch.stack(logits).softmax(0)
            out[(b, *i, head)] = sum(w * v[(b, *j, head)] for w, j in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_reference_equals_loops(case, biased):
    *shape, K, d, causal = case
    inputs = [t.detach() for t in tensors(*shape, K, biased, torch.float64)]
    out = call(inputs, K, d, causal, "reference", scale=0.7)
    torch.testing.assert_close(out, loops(*inputs[:3], K, d, inputs[3] if biased else None, causal, 0.7))


@pytest.mark.parametrize(
    ("length", "K", "d", "first_keys", "first_offsets"),
    [  # worked out by hand
        (10, 3, 1, "0 0 1 2 3 4 5 6 7 7", "2 1 1 1 1 1 1 1 1 0"),
        (9, 3, 2, "0 1 0 1 2 3 4 3 4", "2 2 1 1 1 1 1 0 0"),
        (11, 3, 2, "0 1 0 1 2 3 4 5 6 5 6", "2 2 1 1 1 1 1 1 1 0 0"),
        (16, 7, 2, "0 1 0 1 0 1 0 1 2 3 2 3 2 3 2 3", "6 6 5 5 4 4 3 3 3 3 2 2 1 1 0 0"),
    ],
)
def test_windows_move_inwards_at_borders(length, K, d, first_keys, first_offsets):
    keys, offsets, exists = axis_windows(length, K, d, False, torch.device("cpu"))
    assert keys[:, 0].tolist() == [int(n) for n in first_keys.split()]
    assert offsets[:, 0].tolist() == [int(n) for n in first_offsets.split()]
    assert exists.all()


# B, spatial, h, D, kernel_size, dilation, is_causal: one tile, tiles of three kinds, residues of two lengths, odd D
SHAPES = [
    (2, (57,), 3, 5, 7, 1, False),
    (1, (61,), 2, 8, 4, 3, False),
    (2, (40,), 2, 8, 5, 3, True),
    (1, (300,), 1, 4, 65, 2, False),
    (1, (26, 31), 2, 12, 7, 1, False),
    (3, (13, 17), 2, 7, 3, 2, False),
    (2, (15, 13), 2, 8, 7, 1, (True, False)),
    (1, (30, 25), 2, 6, 7, (4, 3), False),
    (2, (14, 21), 1, 8, 7, (2, 3), False),
    (2, (7, 7), 2, 8, 7, 1, False),
    (1, (9, 40), 1, 3, (3, 6), 1, True),
    (1, (1, 30), 2, 4, (1, 5), 1, False),
    (0, (20, 20), 2, 4, 5, 1, False),
    (1, (6, 9, 11), 2, 4, (3, 5, 4), (1, 1, 2), (True, False, False)),
    (2, (3, 12, 13), 1, 8, (3, 3, 5), 1, False),
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_forward_and_gradients(shape, biased):
    *sizes, K, d, causal = shape
    inputs = tensors(*sizes, K, biased)
    results = []
    for backend in BACKENDS:
        out = call(inputs, K, d, causal, backend)
        assert out.is_contiguous() and out.shape == inputs[0].shape
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        with torch.no_grad():  # another path through the code than with gradients
            for other in (backend, "export"):
                torch.testing.assert_close(call(inputs, K, d, causal, other), out, rtol=1e-4, atol=1e-5)
    # The same sums in another order; a gradient of the bias adds up to some thousand terms.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spatial", [(17, 20), (9, 9)], ids=str)
def test_views_of_a_projection_give_gradients_of_the_projection(spatial):
    qkv = torch.randn(2, *spatial, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 9, 9)
    results = []
    for backend in BACKENDS:
        out = neighborhood_attention(*qkv.unbind(3), 5, bias=bias, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_strided_views_of_any_kind():
    wide = torch.randn(2, 24, 23, 4, 16)
    views = {
        "heads first": wide.permute(0, 1, 2, 4, 3)[:, :, :, :2],
        "every other row and head": wide[:, ::2, :, ::2],
        "mirrored axes": wide.transpose(1, 2),
        "expanded": wide[:1].expand(3, -1, -1, -1, -1),
    }
    for name, x in views.items():
        expected = neighborhood_attention(x, x * 2, x, 7, backend="reference")
        out = neighborhood_attention(x, x * 2, x, 7)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert out.is_contiguous()


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 1, 2)], ids=str)
def test_frozen_inputs(frozen):
    inputs = tensors(1, (15, 16), 2, 4, 5)
    for index in frozen:
        inputs[index].requires_grad_(False)
    wanted = [t for t in inputs if t.requires_grad]
    grads = [torch.autograd.grad(call(inputs, 5, 1, False, backend).square().sum(), wanted) for backend in BACKENDS]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [((13,), 5, 2, False), ((10, 8), 3, 1, False), ((4, 5, 4), 2, 1, True)], ids=str)
def test_derivatives_of_first_and_second_order(case, backend):
    spatial, K, d, causal = case
    inputs = tensors(1, spatial, 1, 2, K, dtype=torch.float64)
    for given in (inputs, inputs[:3]):
        run = lambda *t: call(t, K, d, causal, backend)  # noqa: E731
        assert gradcheck(run, given, fast_mode=True)
        assert gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("trained", [True, False])
def test_low_precision_is_as_close_to_float64_as_the_reference(trained):
    exact = [t.bfloat16().double() for t in (t.detach() for t in tensors(2, (20, 19), 2, 16, 7, dtype=torch.float64))]
    truth = call(exact, 7, 1, False, "reference")
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        inputs = [t.to(dtype).requires_grad_(trained) for t in exact]
        errors = {
            backend: (call(inputs, 7, 1, False, backend).double() - truth).norm() / truth.norm() for backend in BACKENDS
        }
        # With gradients the logits, here up to some 10, are rounded to the dtype; the reference rounds its result only.
        assert errors["torch"] <= errors["reference"] + (4 if trained else 1) * step


def test_autocast_follows_scaled_dot_product_attention():
    inputs = tensors(1, (16, 15), 2, 8, 5)
    for backend in BACKENDS:
        exact = call(inputs, 5, 1, False, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(inputs, 5, 1, False, backend)
            mixed = call([inputs[0].bfloat16(), *inputs[1:]], 5, 1, False, backend)
        assert out.dtype == mixed.dtype == torch.bfloat16
        torch.testing.assert_close(out, mixed)
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)  # q, k, v and logits in bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("trained", [True, False])
def test_large_values_stay_finite(trained):
    inputs = [t.detach().requires_grad_(trained) for t in tensors(1, (20, 21), 2, 8, 5, scale=1e6)]
    out = call(inputs, 5, 1, False)
    assert out.isfinite().all()
    torch.testing.assert_close(out, call(inputs, 5, 1, False, "reference"), rtol=1e-3, atol=1e3)  # of values of 1e6


def sees(spatial, K, d, causal, at):
    """Which queries see a position. [*spatial]"""
    found = torch.zeros(spatial, dtype=torch.bool)
    for i in itertools.product(*map(range, spatial)):
        found[i] = all(at[a] in seen(i[a], spatial[a], K, d, causal) for a in range(len(spatial)))
    return found


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("case", [((20, 17), 5, 1, False), ((17, 15), 3, 2, True), ((50,), 7, 1, False)], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "export"])
def test_non_finite_values_reach_only_the_windows_that_see_them(case, value, trained, backend):
    spatial, K, d, causal = case
    at = tuple(L // 2 for L in spatial)
    reached = sees(spatial, K, d, causal, at)
    for name in "qkv":
        inputs = {n: t.detach() for n, t in zip("qkvb", tensors(1, spatial, 2, 4, K), strict=True)}
        clean = call(inputs.values(), K, d, causal, "reference")
        inputs[name] = inputs[name].clone()
        inputs[name][(0, *at, 0)] = value
        inputs["b"].requires_grad_(trained)
        out = call(inputs.values(), K, d, causal, backend).detach()
        touched = torch.zeros_like(out, dtype=torch.bool)
        touched[0, ..., 0, :] = reached[..., None]
        if name == "q":
            touched[:] = False
            touched[(0, *at, 0)] = True
        torch.testing.assert_close(out[~touched], clean[~touched], rtol=1e-4, atol=1e-5)
        if value != value:
            assert out[touched].isnan().all()


def test_compiles_as_one_graph():
    def double(qkv, bias):
        return 2 * neighborhood_attention(*qkv.unbind(3), 5, 1, bias, (False, True))

    compiled = torch.compile(double, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, H, W in ((2, 15, 16), (3, 15, 16), (1, 6, 22)):
        inputs = (torch.randn(B, H, W, 3, 2, 4, requires_grad=True), torch.randn(2, 9, 9, requires_grad=True))
        results = []
        for function in (compiled, double):
            out = function(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), results[1][0], rtol=1e-4, atol=1e-5)


def test_compiled_code_keeps_non_finite_values_in_their_windows():
    qkv = torch.randn(1, 12, 13, 3, 1, 8)
    qkv[0, 6, 6, 1:] = torch.nan
    out = torch.compile(lambda x: neighborhood_attention(*x.unbind(3), 5), fullgraph=True)(qkv)
    touched = sees((12, 13), 5, 1, False, (6, 6))
    assert torch.equal(out.isnan()[0, ..., 0, 0], touched)


class Layer(torch.nn.Module):
    def __init__(self, K, d):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(2, 2 * K - 1, 2 * K - 1))
        self.K, self.d = K, d

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), self.K, self.d, self.bias)


@pytest.mark.parametrize(("size", "K", "d"), [((20, 17), 7, 1), ((9, 8), 3, 2), ((7, 7), 7, 1)])
def test_exports_as_operators_of_pytorch(size, K, d):
    layer = Layer(K, d)
    x, larger = torch.randn(2, *size, 3, 2, 4), torch.randn(5, *size, 3, 2, 4)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(larger), layer(larger), rtol=1e-4, atol=1e-5)
    assert all("visionattn" not in str(node.target) for node in exported.graph.nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and timm still offers it
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


def test_exports_to_onnx():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer = Layer(5, 1).eval()
    x, larger = torch.randn(2, 16, 13, 3, 2, 4), torch.randn(5, 16, 13, 3, 2, 4)
    program = torch.onnx.export(
        layer, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    (out,) = session.run(None, {session.get_inputs()[0].name: larger.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer(larger).detach(), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients_by_vmap():
    qkv, bias = torch.randn(3, 12, 13, 3, 1, 4), torch.randn(1, 9, 9)
    loss = lambda b, x: neighborhood_attention(*x[None].unbind(3), 5, 1, b).square().sum()  # noqa: E731
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(bias, qkv)
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(bias, qkv[1]), rtol=1e-4, atol=1e-4)
    bias.requires_grad_()
    torch.testing.assert_close(grads[2], *torch.autograd.grad(loss(bias, qkv[2]), bias), rtol=1e-4, atol=1e-4)


def test_a_call_in_inference_mode_leaves_nothing_that_stops_training():
    inputs = tensors(1, (19, 23), 1, 4, 5)
    with torch.inference_mode():
        call(inputs, 5, 1, False)
    call(inputs, 5, 1, False).sum().backward()


def test_memory_is_a_fraction_of_the_gather_s():
    inputs = [t.detach() for t in tensors(1, (56, 56), 2, 32, 7)]
    peaks = {b: peak_memory(lambda b=b: call(inputs, 7, 1, False, b), torch.device("cpu")) for b in BACKENDS}
    assert peaks["torch"] < peaks["reference"] / 4


@pytest.mark.parametrize("spatial", [(1,), (7,), (8,), (23,), (64,), (7, 9), (30, 11), (5, 6, 9)], ids=str)
@pytest.mark.parametrize("K", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_cover_every_query_once_and_every_key_it_sees(spatial, K, d, causal):
    if K * d > min(spatial):
        return
    axes = len(spatial)
    settings = (K,) * axes, (d,) * axes, (causal,) * axes
    groups = tiles.plan(spatial, *settings, 2)
    made = tiles.tables(groups, spatial, *settings, torch.device("cpu"))
    keys, offsets, exists = map_windows(spatial, *settings, torch.device("cpu"))
    order = torch.cat(made.queries)
    assert torch.equal(order[made.inverse], torch.arange(keys.shape[0]))
    table = torch.randn((1, *(2 * K - 1,) * axes))
    expected = torch.full((keys.shape[0], keys.shape[0]), -torch.inf)
    query, slot = exists.nonzero().T
    expected[query, keys[query, slot]] = table.flatten()[offsets[query, slot]]
    masks = tiles.additive_masks(table, groups, made, settings[0], torch.float32)
    found = torch.full_like(expected, -torch.inf)
    for group, mask, q, k in zip(groups, masks, made.queries, made.keys, strict=True):
        for queries, tile_keys in zip(q.view(-1, group.queries), k.view(-1, group.keys), strict=True):
            found[queries[:, None], tile_keys] = mask[0]
    assert torch.equal(found, expected)


def test_bad_input_is_refused_before_anything_runs():
    x = torch.ones(1, 8, 9, 2, 4)
    good = {"q": x, "k": x, "v": x, "kernel_size": 3}
    for change, message in [
        ({"q": torch.ones(8, 2, 4)}, r"q must be \[B, \*spatial, heads, D\] with 1 to 3 spatial axes.*\(8, 2, 4\)"),
        ({"k": x[:, 1:]}, r"k must be \(1, 8, 9, 2, 4\) as q is, got shape \(1, 7, 9, 2, 4\)"),
        ({"v": x[..., 1:]}, r"v must be .* as q is, got shape"),
        ({"k": x.double()}, "k must be torch.float32 as q is, got torch.float64"),
        ({"v": x.to("meta")}, "v must be on cpu as q is, got meta"),
        ({"q": x.long(), "k": x.long(), "v": x.long()}, "q must be floating point, got torch.int64"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0 for spatial axis 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be an int or 2 of them.*\(3, 3, 3\)"),
        ({"kernel_size": 3.0}, "kernel_size must be an int or 2 of them.*3.0"),
        ({"kernel_size": 9}, r"must not exceed the map: 9 \* 1 = 9 on spatial axis 0 of length 8"),
        ({"dilation": (2, 4)}, r"must not exceed the map: 3 \* 4 = 12 on spatial axis 1 of length 9"),
        ({"dilation": -1}, "dilation must be at least 1, got -1"),
        ({"is_causal": 1}, "is_causal must be a bool or 2 of them.*1"),
        ({"bias": torch.ones(2, 5)}, r"bias must be .*\(2, 5, 5\), got shape \(2, 5\)"),
        ({"bias": torch.ones(1, 5, 5)}, r"bias must be .*\(2, 5, 5\), got shape \(1, 5, 5\)"),
        ({"bias": torch.ones(2, 5, 5).double()}, "bias must be torch.float32 as q is, got torch.float64"),
        ({"backend": "cuda"}, "backend must be one of triton, torch, reference.*'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            neighborhood_attention(**{**good, **change})
