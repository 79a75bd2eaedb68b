"""Which backend runs, and what is said when it cannot."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

from visionattn.kernels import (
    BackendError,
    depthwise_conv2d,
    gated_pointwise,
    get_backend,
    set_backend,
    use_backend,
)
from visionattn.kernels.common import backend as rule
from visionattn.kernels.common import jit

ONLY_KERNELS = """
import sys, types
package = types.ModuleType("visionattn")  # stands for the package, whose own import needs timm, which imports Triton
package.__path__ = ["visionattn", "."]
sys.modules["visionattn"] = package
{before}
import torch, visionattn.kernels as kernels
{after}
"""


@pytest.fixture
def chosen(monkeypatch):
    """Call an operator as far as the choice of its backend."""
    x = torch.zeros(1, 2, 3, 3)
    monkeypatch.setattr(jit, "unavailable", lambda device: None)
    return lambda backend=None: rule.choose("op", x, backend, lambda: None)


def test_argument_then_setting_then_environment_then_automatic(chosen, monkeypatch):
    assert chosen() == "torch"
    monkeypatch.setenv("VISIONATTN_BACKEND", "reference")
    assert chosen() == get_backend() == "reference"
    set_backend("triton")
    assert chosen() == get_backend() == "triton"
    assert chosen("torch") == "torch"
    set_backend(None)
    assert chosen() == "reference"


def test_use_backend_restores_the_setting_even_after_an_error():
    set_backend("torch")
    with pytest.raises(KeyError), use_backend("reference"):
        assert get_backend() == "reference"
        with use_backend(None):
            assert get_backend() is None
        raise KeyError
    assert get_backend() == "torch"


def test_unknown_names_raise_and_list_the_known(monkeypatch):
    for ask in (
        set_backend,
        lambda name: depthwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), backend=name),
    ):
        with pytest.raises(ValueError, match="backend must be one of triton, torch, reference .*'cuda'"):
            ask("cuda")
    monkeypatch.setenv("VISIONATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match="VISIONATTN_BACKEND must be one of .*'fast'"):
        get_backend()


@pytest.mark.parametrize("source", ["argument", "setting", "environment"])
def test_triton_that_cannot_run_raises_whoever_asked(source, monkeypatch):
    monkeypatch.setattr(jit, "interpreting", lambda: False)
    if source == "setting":
        set_backend("triton")
    elif source == "environment":
        monkeypatch.setenv("VISIONATTN_BACKEND", "triton")
    backend = "triton" if source == "argument" else None
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(BackendError, match="depthwise_conv2d: backend 'triton' cannot run .*tensors are on cpu.*use"):
        depthwise_conv2d(x, torch.ones(4, 1, 3, 3), backend=backend)
    with pytest.raises(RuntimeError, match="gated_pointwise: backend 'triton' cannot run .*tensors are on cpu.*use"):
        gated_pointwise(x, torch.ones(4, 4, 1, 1), None, x, backend=backend)


def test_triton_names_what_its_kernels_do_not_cover(monkeypatch):
    monkeypatch.setattr(jit, "unavailable", lambda device: None)
    with pytest.raises(BackendError, match="kernel side is 9, the kernels cover 3, 5, 7"):
        depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 9, 9), backend="triton")
    x = torch.ones(1, 1, 3, 3, dtype=torch.complex64)
    with pytest.raises(BackendError, match="dtype is torch.complex64, the kernels cover torch.float32"):
        gated_pointwise(x, x[..., :1, :1], None, x, backend="triton")


class _OnGPU:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True
    device = torch.device("cuda")


def test_automatic_choice_on_a_gpu(monkeypatch):
    reasons = []
    monkeypatch.setattr(jit, "unavailable", lambda device: reasons[0] if reasons else None)

    def choose(unsupported=None, **kwargs):
        return rule.choose("op", _OnGPU(), None, lambda: unsupported, **kwargs)

    assert choose() == "triton"
    assert choose("a dtype") == "torch"
    assert choose(prefer_triton=False) == "torch"
    with forward_ad.dual_level():
        assert choose() == "torch"
    assert torch.func.vmap(lambda x: x if choose() == "torch" else -x)(torch.ones(1))
    assert choose() == "triton"
    reasons.append("not installed")
    assert choose() == "torch"
    reasons.clear()
    monkeypatch.setattr(rule, "exporting", lambda: True)
    assert choose() == "torch"


def test_importing_the_kernels_imports_neither_triton_nor_timm(run_python):
    after = "assert not {'triton', 'timm'} & set(sys.modules), sorted(sys.modules)"
    run_python("-c", ONLY_KERNELS.format(before="", after=after))


def test_everything_but_triton_works_where_it_is_not_installed(run_python):
    after = """
x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
kernels.depthwise_conv2d(x, weight)
try:
    kernels.depthwise_conv2d(x, weight, backend="triton")
except kernels.BackendError as error:
    assert "Triton is not installed (pip install triton" in str(error)
else:
    raise AssertionError("no error")
"""
    run_python("-c", ONLY_KERNELS.format(before="sys.modules['triton'] = None", after=after))


def test_compiled_code_follows_the_setting():
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 7, 7)
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum("conv" in str(node.target) for node in graph.graph.nodes))
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(lambda x: depthwise_conv2d(x, weight, None, 3), fullgraph=True, backend=backend)
    compiled(x)
    with use_backend("reference"):
        compiled(x)
    assert graphs[0] == graphs[2] == 1
    assert graphs[1] > graphs[3]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_hold_operators_of_pytorch_only(strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = torch.nn.Parameter(torch.randn(4, 1, 7, 7))
            self.pointwise = torch.nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x):
            return gated_pointwise(depthwise_conv2d(x, self.depthwise, None, 3), self.pointwise, None, x)

    x = torch.randn(2, 4, 14, 15)
    sizes = {2: torch.export.Dim("H", min=2, max=64), 3: torch.export.Dim("W", min=2, max=64)}
    program = torch.export.export(Layer(), (x,), dynamic_shapes={"x": sizes}, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["aten.conv2d.default", "aten.conv2d.default", "aten.mul.Tensor"]
    small = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(program.module()(small), Layer.forward(program.module(), small))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = str(torch.jit.trace(Layer(), x).inlined_graph)
    assert traced.count("convolution") == 2 and "pad" not in traced
