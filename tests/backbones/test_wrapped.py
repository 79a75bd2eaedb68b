"""Modules that others have changed: hooks, pruning, norms of weights, adapters and quantized layers, in every family.

Whatever reads another module's weights instead of calling it would pass all of these by without an error.
"""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.nn.utils import weight_norm as legacy_weight_norm

from tests.backbones.test_contract import SMALL, images
from visionattn.attention import AggregatedAttention, LargeKernelAttention
from visionattn.backbones.ravlt import DepthwiseResidual
from visionattn.layers import blocks
from visionattn.layers.blocks import Linear
from visionattn.layers.norms import Affine, PRepBN, RepBN

PVT = dict(img_size=64, embed_dims=(8, 8, 16, 16), depths=(1,) * 4, num_heads=(2,) * 4, mlp_ratios=(2,) * 4)
CSWIN = dict(img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=2)
SWIN = dict(img_size=32, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, window_size=3)
DEIT = dict(img_size=64, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, global_pool="avg")
AGENTS = dict(mixer_args=dict(num_agents=4))
# One model of every family, and every host with every kind of attention.
MODELS = SMALL | {
    "agent_cswin_t": CSWIN | AGENTS,
    "agent_swin_t": SWIN | AGENTS,
    "biformer_stl_nchw": dict(embed_dims=(8, 16, 24, 32), depths=(1,) * 4, head_dim=8, n_win=2, topks=(1, 2, 3, -1)),
    "flatten_cswin_t": CSWIN,
    "flatten_pvt_v2_b0": PVT,
    "inline_deit_t": DEIT,
    "prepbn_swin_t": SWIN,
}
FOLDING = {"prepbn_deit_t": DEIT, "inline_pvt_t": PVT, "slab_cswin_t": CSWIN, "slab_pvt_t": PVT, "slab_swin_t": SWIN}
each_model = pytest.mark.parametrize("name", MODELS)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, **MODELS[name], "drop_path_rate": 0.0})
    for layer in layers(model).values():
        if not layer.weight.any():  # which has no norm
            nn.init.normal_(layer.weight, std=0.01)
    return model


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}


class Adapter(nn.Module):
    """``base_layer(x) + delta(x)`` as packages for LoRA write it, delta zero at first, and nothing of the layer's own.

    Delta is of the class of ``base_layer``, since some convolutions take the channels last.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta = copy.deepcopy(base_layer)
        nn.init.zeros_(self.delta.weight)
        self.delta.bias = None

    def forward(self, x):
        delta = self.delta(x)
        return self.base_layer(x) + (delta - x if isinstance(self.base_layer, DepthwiseResidual) else delta)


class ForwardingAdapter(Adapter):
    """An adapter that has the attributes of the layer it wraps, its weight too."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


def wrap(model: nn.Module, adapter: type[Adapter]) -> list[nn.Parameter]:
    new = []
    for name, layer in layers(model).items():
        wrapped = adapter(layer)
        new.append(wrapped.delta.weight)
        model.set_submodule(name, wrapped)
    return new


def change(model: nn.Module, how: str) -> list[nn.Parameter]:
    """Change every layer so that it computes the same, and return what has to learn."""
    if how in ("adapter", "forwarding adapter"):
        return wrap(model, Adapter if how == "adapter" else ForwardingAdapter)
    learning = []
    for layer in layers(model).values():
        if how == "prune":
            prune.identity(layer, "weight")
            learning.append(layer.weight_orig)
        elif how == "weight norm":
            parametrizations.weight_norm(layer)
            learning += [layer.parametrizations.weight.original0, layer.parametrizations.weight.original1]
        elif how == "legacy weight norm":
            legacy_weight_norm(layer)
            learning += [layer.weight_g, layer.weight_v]
        elif how == "parametrize":
            parametrize.register_parametrization(layer, "weight", Half())
            learning.append(layer.parametrizations.weight.original)
    return learning


CHANGES = ("prune", "weight norm", "legacy weight norm", "parametrize", "adapter", "forwarding adapter")


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_every_layer_fire_on_the_whole_batch(name, training, monkeypatch):
    monkeypatch.setattr(blocks, "SLICE_BYTES", 1)  # where maps are large, inference goes through them in slices
    model = small(name).train(training)
    owners = {n for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())}
    if not training:  # after its schedule a progressive norm is its batch norm alone
        owners -= {f"{n}.norm1" for n, m in model.named_modules() if isinstance(m, PRepBN)}
    calls: dict[str, int] = {}

    def note(n):
        return lambda module, args, out: calls.__setitem__(n, calls.get(n, 0) + 1)

    for n in owners:
        model.get_submodule(n).register_forward_hook(note(n))
    with torch.set_grad_enabled(training):
        model(images(batch=2))
    twice = {f"{n}.kv" for n, m in model.named_modules() if isinstance(m, AggregatedAttention)}  # also of a pooled map
    assert calls == dict.fromkeys(owners, 1) | dict.fromkeys(twice, 2)


@each_model
@pytest.mark.parametrize("how", CHANGES)
def test_changed_layers_compute_the_same_and_learn(name, how):
    model = small(name).train()
    x = images()
    changed = copy.deepcopy(model)
    learning = change(changed, how)
    expected, y = copy.deepcopy(model)(x), changed(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    optimizer = torch.optim.SGD(changed.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        changed(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learning)
        optimizer.step()


@each_model
def test_layers_under_the_spectral_norm_of_old_learn_and_compute_with_the_normed_weights(name):
    normed = small(name)
    plain = copy.deepcopy(normed).eval()
    for layer in layers(normed).values():
        legacy_spectral_norm(layer)
    for _ in range(2):
        normed.train()(images()).square().sum().backward()
    assert all(layer.weight_orig.grad.any() for layer in layers(normed).values())
    x = images()
    y = normed.eval()(x)
    state = normed.state_dict()
    plain.load_state_dict({n: state[n] for n in state.keys() & plain.state_dict().keys()}, strict=False)
    for n, layer in layers(plain).items():
        layer.weight = nn.Parameter(normed.get_submodule(n).weight.detach().clone())
    expected = plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def with_pytorch_s(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear
    return model


@each_model
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_finds_every_linear_layer(name):
    model = small(name).eval()
    ours, expected = (
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
        for m in (model, with_pytorch_s(model))
    )
    count = sum(isinstance(m, nn.Linear) for m in model.modules())
    kinds = [type(m) for m in ours.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == count
    assert not any(issubclass(kind, nn.Linear) for kind in kinds)
    x = images(70, 50)  # maps that window attention pads
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected(x), rtol=0, atol=0)


class Stored(torch.Tensor):
    """A weight as torchao stores it: another class of tensors, which knows ``F.linear`` only."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.as_subclass(torch.Tensor), bias)
        if func.__name__ in ("__get__", "__set__", "detach", "requires_grad_", "__repr__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(f"{func} of a stored weight")


@each_model
def test_weights_of_another_class_of_tensors_are_left_to_the_linear_function(name):
    model = small(name).eval()
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Stored), requires_grad=False)
    x = images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_linear_is_pytorch_s_as_a_class_and_its_subclasses_are_not():
    class More(Linear):
        pass

    assert Linear == nn.Linear and nn.Linear == Linear and hash(Linear) == hash(nn.Linear)
    assert Linear is not nn.Linear and {nn.Linear: 1}[Linear] == 1
    assert More not in (nn.Linear, Linear) and Linear not in (nn.Conv2d, nn.Module)
    layer = parametrizations.weight_norm(Linear(3, 2))
    assert type(layer) not in (nn.Linear, Linear) and isinstance(layer, Linear)


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("how", ["prune", "legacy weight norm", "parametrize", "adapter", "forwarding adapter"])
def test_norms_fold_only_into_layers_with_weights_of_their_own(name, how):
    norm = dict(norm_layer="repbn") if name.startswith("inline") else {}
    model = timm.create_model(name, **{"num_classes": 5, **FOLDING[name], **norm}).double().eval()
    for module in model.modules():
        if isinstance(module, RepBN):
            nn.init.uniform_(module.bn.weight, -1, 1)
            nn.init.normal_(module.bn.bias)
    changed = [m for n, m in model.named_modules() if n.endswith(("attn", "mlp"))][-2:]
    for module in changed:
        change(module, how)
    x = images().double()
    expected = model(x)
    model.reparameterize()
    assert sum(isinstance(m, Affine) for m in model.modules()) == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_convolutions_of_another_geometry_are_called():
    """Someone tries other borders: the fused path, which knows zeros only, must not run."""
    model = small("van_b0").eval()
    plain = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, LargeKernelAttention):
            m.conv0 = nn.Conv2d(m.conv0.in_channels, m.conv0.in_channels, 5, padding=2, groups=m.conv0.groups)
            m.conv0.padding_mode = "circular"
            m.conv0._reversed_padding_repeated_twice = [2, 2, 2, 2]
    x = images()
    expected = copy.deepcopy(model)
    for m in expected.modules():
        if isinstance(m, LargeKernelAttention):
            m.exportable = True
    torch.testing.assert_close(model(x), expected(x))
    assert not model(x).allclose(plain(x))
