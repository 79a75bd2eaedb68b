"""Models of timm with mixers of this library: the same function where it is the same, and everything that works."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from tests.parity import relative_error
from visionattn.attention import (
    AgentAttention,
    LinearAttention,
    Mixer,
    SoftmaxAttention,
)
from visionattn.attention.hedgehog import transfer
from visionattn.attention.mixer import short_names
from visionattn.benchmark.converted import CONVERTED, convert
from visionattn.convert import replace_attention
from visionattn.layers.blocks import Linear

VIT = dict(img_size=64, embed_dim=16, depth=3, num_heads=2, num_classes=5)
SWIN = dict(img_size=64, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5)
GLOBAL = ["agent", "inline", "flatten", "pola", "slab", "hedgehog", "softplus", "selective", "flow"]


def randomize_(model: nn.Module) -> nn.Module:
    """Biases, tables and tokens off their neutral initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.eval()


def vit(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(timm.create_model(name, **{**VIT, **kwargs}))


def swin(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, **kwargs}))


def swapped(model: nn.Module, mixer="agent", **kwargs) -> nn.Module:
    torch.manual_seed(1)
    replace_attention(model, mixer, **kwargs)
    return model


def image(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(2))


class Where(Mixer):
    """Tells which map it was told, and where its prefix ends."""

    def attend(self, q, k, v, H, W, context):
        self.told = (H, W)
        map = self.map(v, H, W).roll(1, 1).flatten(1, 2)
        return torch.cat([v[:, : self.num_prefix_tokens], map], 1)


# --- the same function -----------------------------------------------------------------------------------------------

VITS = {
    "class token": dict(),
    "distilled": dict(name="deit_small_distilled_patch16_224"),
    "registers, layer scale": dict(name="vit_small_patch14_reg4_dinov2", img_size=56),
    "no class token": dict(name="vit_base_patch16_gap_224"),
    "no class token but registers": dict(class_token=False, reg_tokens=2, global_pool="avg"),
    "no bias": dict(qkv_bias=False, proj_bias=False),
    "norm before": dict(name="vit_base_patch16_clip_224"),
    "tokens without position": dict(no_embed_class=True),
    "dropout and stochastic depth": dict(proj_drop_rate=0.2, drop_path_rate=0.2),
    "oblong": dict(img_size=(48, 80)),
}


@pytest.mark.parametrize("mixer", ["softmax", SoftmaxAttention])
@pytest.mark.parametrize("kwargs", VITS.values(), ids=VITS)
def test_softmax_leaves_a_vit_as_it_is(kwargs, mixer):
    model = vit(**kwargs)
    x = image(*model.patch_embed.img_size)
    before, names = model(x), list(model.state_dict())
    parameters = dict(model.named_parameters())
    report = replace_attention(model, mixer)
    assert report.exact and not report.new and not report.dropped and not report.warnings
    assert report.replaced == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert relative_error(model(x), before) < 1e-5
    assert sorted(model.state_dict()) == sorted(names)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_and_dropout_are_those_of_the_original(mode):
    def step(model):
        torch.manual_seed(3)
        model.train(mode == "train")(image()).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    # Window attention drops out on the map, not by window, hence other numbers.
    for model, mixer in (
        (vit(proj_drop_rate=0.2, drop_path_rate=0.2), "softmax"),
        (swin(drop_path_rate=0.2), "window"),
    ):
        expected = step(model)
        model.zero_grad()
        found = step(swapped(model, mixer))
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


SWINS = {
    "at home": (dict(), (64, 64)),
    "windows larger than the map": (dict(window_size=99), (64, 64)),
    "a map that is no multiple": (dict(img_size=72), (72, 72)),
    "always in windows": (dict(img_size=24, always_partition=True, window_size=5), (24, 24)),
    "any size, odd": (dict(strict_img_size=False), (100, 76)),
    "any size, small": (dict(strict_img_size=False), (12, 60)),
    "any size, oblong": (dict(dynamic_img_size=True, img_size=(64, 96)), (128, 40)),
    "windows by stage": (dict(window_size=((3, 3), (5, 5))), (64, 64)),
    "no bias": (dict(qkv_bias=False), (64, 64)),
}


@pytest.mark.parametrize("case", SWINS)
def test_windows_leave_a_swin_as_it_is(case):
    kwargs, size = SWINS[case]
    model = swin(**kwargs)
    x = image(*size)
    before, state = model(x), model.state_dict()
    report = replace_attention(model, "window")
    assert report.exact and not report.new and not report.dropped
    assert any("relative_position_bias_table" in name for name in report.kept)
    assert relative_error(model(x), before) < 1e-5
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("sizes", [dict(img_size=96), dict(img_size=(96, 64), window_size=4), dict(window_size=8)])
def test_set_input_size_after_the_swap(sizes):
    theirs, ours = swin(), swapped(swin(), "window")
    both = [theirs, ours, swapped(swin(), "agent")]
    for model in both:
        model.set_input_size(**sizes)
    x = image(*theirs.patch_embed.img_size)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    assert both[2](x).shape == (2, 5)
    model = swapped(vit(), Where)
    model.set_input_size(img_size=(48, 96))
    model(image(48, 96))
    assert model.blocks[2].attn.told == (3, 6)


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("deit_small_patch16_224", "softmax"),
        ("swin_tiny_patch4_window7_224", "window"),
        ("vit_base_patch16_224", "softmax"),
    ],
)
def test_published_models_keep_their_logits(name, mixer):
    model = timm.create_model(name).eval()
    x = image(224, 224, batch=1)
    with torch.no_grad():
        before = model(x)
        report = replace_attention(model, mixer, linear=True)
        assert report.exact and len(report.replaced) == 12
        assert relative_error(model(x), before) < 1e-5
    assert sum(isinstance(m, Linear) for m in model.modules()) >= 48


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_what_the_benchmark_compares_is_the_same_model(make):
    x = image()
    for candidate, linear in CONVERTED.items():
        model = convert(make(), candidate)
        assert relative_error(model(x), make()(x)) < 1e-5
        layers = [type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear)]
        assert all(layers) if linear else any(layers) is (linear is not None)


# --- other mixers ----------------------------------------------------------------------------------------------------

MODELS = {
    "vit": vit,
    "vit without class token": lambda: vit("vit_base_patch16_gap_224"),
    "vit of any size": lambda: vit(dynamic_img_size=True),
    "swin": swin,
    "swin of any size": lambda: swin(strict_img_size=False),
}


@pytest.mark.parametrize("mixer", GLOBAL)
@pytest.mark.parametrize("kind", MODELS)
def test_every_mixer_in_every_model(kind, mixer):
    model = MODELS[kind]()
    old = dict(model.named_parameters())
    report = replace_attention(model, mixer)
    new = dict(model.named_parameters())
    assert not report.exact and "another function" in str(report)
    assert set(report.new) == new.keys() - old.keys() and set(report.dropped) == old.keys() - new.keys()
    assert all(new[name] is old[name] for name in new.keys() & old.keys())
    assert {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} <= {n.split(".attn.")[-1] for n in report.kept}
    x = image(*((48, 80) if "any" in kind else ()))
    model.train()(x).sum().backward()
    assert all(new[name].grad is not None for name in (*report.new, *report.kept))
    again = swapped(MODELS[kind](), mixer)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_mixers_that_take_maps_only():
    for mixer, kwargs in (("window", dict(window_size=3)), ("neighborhood", dict(kernel_size=3))):
        for make in (lambda: vit("vit_base_patch16_gap_224"), swin):
            if mixer == "window" and make is swin:
                continue
            assert swapped(make(), mixer, mixer_args=kwargs)(image()).shape == (2, 5)
    linear = swapped(swin(), LinearAttention, mixer_args=dict(gate=False, rotary=False))
    assert linear(image()).shape == (2, 5)
    assert swapped(swin(), "cross_shaped", mixer_args=dict(split_size=2))(image()).shape == (2, 5)


def test_every_short_name_is_of_a_class_and_documented():
    assert {"softmax", "window", *GLOBAL} <= short_names().keys()
    assert "agent" in visionattn.hosts.Swin(mixer="agent", depths=(1,) * 4).stages[0].blocks[0].attn.short_name


def test_mixers_are_told_the_map_and_the_prefix():
    for kwargs, size, prefix in (
        (dict(img_size=(48, 80)), (3, 5), 1),
        (dict(name="deit_small_distilled_patch16_224", img_size=(80, 48)), (5, 3), 2),
        (dict(dynamic_img_size=True), (3, 5), 1),
        (dict(dynamic_img_size=True, dynamic_img_pad=True), (3, 5), 1),
    ):
        model = swapped(vit(**kwargs), Where)
        model(image(*(16 * n - 3 * ("dynamic_img_pad" in kwargs) for n in size)))
        assert all(block.attn.told == size for block in model.blocks)
        assert model.blocks[0].attn.num_prefix_tokens == prefix


def test_first_blocks_by_stage_and_blocks_by_name():
    def mixed(model):
        return [name for name, module in model.named_modules() if isinstance(module, AgentAttention)]

    assert mixed(swapped(swin(), mixer_depths=(None, 1))) == [
        "layers.0.blocks.0.attn",
        "layers.0.blocks.1.attn",
        "layers.1.blocks.0.attn",
    ]
    assert mixed(swapped(swin(), blocks=r"layers\.1")) == ["layers.1.blocks.0.attn", "layers.1.blocks.1.attn"]
    model = swapped(vit(), blocks=lambda name: name.endswith("1"))
    assert mixed(model) == ["blocks.1.attn"]
    agents = swapped(swin(), mixer_args=[dict(num_agents=4), dict(num_agents=9)]).layers[1].blocks[0].attn.an_bias
    assert agents.shape[1] == 9
    report = replace_attention(model, "softmax", mixer_depths=[2])  # the second has one already
    assert report.replaced == ("blocks.0.attn",) and mixed(model) == ["blocks.1.attn"]


def test_hedgehog_learns_from_the_model_that_it_replaces():
    model = swapped(vit(), "hedgehog")
    expected = vit()(image())
    with torch.no_grad():
        maps = [module for module in model.modules() if hasattr(module, "feature_map_q")]
    loss = transfer(model, image())
    loss.backward()
    assert loss > 0 and all(layer.feature_map_q.mlp.layer.grad is not None for layer in maps)
    assert expected.shape == model(image()).shape


# --- what users do with models ---------------------------------------------------------------------------------------

TINY_VIT, TINY_SWIN = dict(depth=1), dict(depths=(2,), num_heads=(2,))
USED = [(vit, "softmax"), (vit, "agent"), (vit, "slab"), (swin, "window"), (swin, "inline")]


@pytest.mark.parametrize(("make", "mixer"), USED)
def test_compiles_exports_and_scripts(make, mixer):
    small = TINY_VIT if make is vit else TINY_SWIN
    model, x = swapped(make(**small), mixer), image()
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with timm.layers.set_scriptable(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, timm's clients still use it
        scripted = torch.jit.script(swapped(make(**small), mixer))
        torch.testing.assert_close(scripted(x), swapped(make(**small), mixer)(x))


def test_scripts_after_set_input_size():
    with timm.layers.set_scriptable(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = swapped(vit(depth=1), "slab")
        model.set_input_size(img_size=(48, 96))
        torch.testing.assert_close(torch.jit.script(model)(image(48, 96)), model(image(48, 96)))


@pytest.mark.parametrize(
    ("make", "mixer"), [(lambda: vit(dynamic_img_size=True), "agent"), (vit, "slab"), (swin, "agent")]
)
def test_copies_and_pickles_live_by_themselves(make, mixer):
    model, x = swapped(make(), mixer), image()
    expected = model(x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(copy.deepcopy(copies[0]))
    for other in copies:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        torch.testing.assert_close(other(x), expected)
        assert other.state_dict().keys() == model.state_dict().keys()
    model.set_input_size(img_size=(48, 96))
    assert model(image(48, 96)).shape == (2, 5)
    torch.testing.assert_close(copies[0](x), expected)  # whose grid is its own


def test_dynamic_sizes_compile_export_and_change():
    model = swapped(vit(dynamic_img_size=True, depth=1), Where)
    sizes = [(48, 80), (80, 48), (32, 96)]
    expected = [model(image(*size)) for size in sizes]
    for dynamic in (None, True):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
        for size, y in zip(sizes[: 3 if dynamic else 1], expected, strict=False):
            torch.testing.assert_close(compiled(image(*size)), y, rtol=1e-4, atol=1e-5)
    height, width = (torch.export.Dim(name, min=1, max=20) for name in ("rows", "columns"))
    shapes = ((torch.export.Dim.STATIC, torch.export.Dim.STATIC, 16 * height, 16 * width),)
    exported = torch.export.export(model, (image(*sizes[0]),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(image(*sizes[1])), expected[1])
    torch.testing.assert_close(copy.deepcopy(model)(image(*sizes[1])), expected[1])


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_gradient_checkpointing_changes_nothing(make):
    model, x = swapped(make(drop_path_rate=0.0), "agent").train(), image()
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_recomputed_activations_are_those_of_their_own_map():
    model = swapped(vit(dynamic_img_size=True), Where).train()
    several = [image(48, 80), image(64, 64), image(80, 80)]

    def grads(images, checkpointing):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        losses = [model(x).square().sum() for x in images]
        with torch.no_grad():
            model(image(96, 32))  # an evaluation in between
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    torch.testing.assert_close(grads(several, True), grads(several, False))
    for size in ((48, 80), (80, 48), (48, 80)):  # one after the other
        assert any(grad.any() for grad in grads([image(*size)], True))
    with pytest.raises(RuntimeError, match=r"\(3, 5\), \(5, 3\)"):
        grads([image(48, 80), image(80, 48)], True)


def test_features_and_intermediates_and_heads():
    model, x = swapped(vit()), image()
    final, maps = model.forward_intermediates(x, indices=[0, 2])
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 2
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers(1)
    torch.testing.assert_close(pruned.forward_intermediates(x, 1, intermediates_only=True)[0], maps[1])
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    backbone = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN)
    assert "layers_0.blocks.1.attn" in replace_attention(backbone, "window").replaced
    getter = timm.create_model("vit_tiny_patch16_224", features_only=True, **VIT)
    assert replace_attention(getter, "agent").replaced[0] == "model.blocks.0.attn" and len(getter(x)) == 3
    graph = timm.create_model("vit_tiny_patch16_224", features_only=True, feature_cls="fx", **VIT)
    with pytest.raises(ValueError, match="no attention to replace"):
        replace_attention(graph, "agent")  # a graph has no blocks


@pytest.mark.parametrize(("make", "mixer"), [(vit, "softmax"), (vit, "agent"), (swin, "window")])
def test_traces_to_a_graph(make, mixer):
    model, x = swapped(make(), mixer), image()
    (found,) = timm.models.FeatureGraphNet(model, out_indices=(1,))(x)
    seen = []
    block = model.get_submodule("blocks.1" if make is vit else "layers.1")
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    torch.testing.assert_close(found, seen[0])


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_devices_dtypes_modes_and_frozen_weights_stay(make):
    assert all(p.is_meta for p in swapped(make().to("meta")).parameters())
    half = swapped(make().to(torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(image().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert swapped(make())(image()).isfinite().all()
    frozen = make().requires_grad_(False).train()
    report = replace_attention(frozen, "agent")
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == set(report.new)
    assert all(module.training for module in frozen.modules())
    assert not any(module.training for module in swapped(make()).modules())


# --- what cannot be replaced -----------------------------------------------------------------------------------------


def hooked():
    model = vit()
    model.blocks[1].attn.proj.register_forward_hook(lambda *_: None)
    return model


def gated():
    model = vit()
    model.blocks[1].attn.gate = nn.Linear(16, 16)
    return model


def rescaled():
    model = vit()
    model.blocks[2].attn.scale = 0.1
    return model


def lora():
    model = vit()
    model.blocks[2].attn.qkv = nn.utils.parametrizations.weight_norm(model.blocks[2].attn.qkv)
    return model


IMPOSSIBLE = {
    "query norm": (lambda: vit(qk_norm=True), "softmax", r"blocks.0.attn: it has a q_norm.*and 5 more"),
    "norm of the output": (lambda: vit(scale_attn_norm=True), "agent", "blocks.0.attn: it has a norm"),
    "gate": (gated, "agent", "blocks.1.attn: it has a gate"),
    "dropout of weights": (lambda: vit(attn_drop_rate=0.1), "softmax", "attn_drop.p = 0.1"),
    "dropout of weights, swin": (lambda: swin(attn_drop_rate=0.1), "window", "attn_drop.p = 0.1"),
    "difference of attentions": (lambda: vit(attn_layer="diff"), "softmax", "DiffAttention"),
    "width of heads": (lambda: swin(head_dim=8), "window", "its 2 heads have 16 channels together, not 8"),
    "scale": (rescaled, "softmax", "blocks.2.attn: scale is 0.1"),
    "hooks": (hooked, "softmax", "blocks.1.attn: its hooks"),
    "not a layer itself": (lora, "softmax", "blocks.2.attn: qkv is Parametrized"),
    "rotary embedding": (lambda: vit("vit_small_patch16_rope_224"), "softmax", "it has .*Attention"),
    "swin v2": (lambda: timm.create_model("swinv2_tiny_window8_256", depths=(1, 1)), "window", "it has Window"),
    "blocks of another kind": (lambda: vit("vit_small_patch16_18x2_224"), "softmax", "Attention in Sequential;"),
    "norms after": (lambda: vit("vit_base_patch16_rpn_224"), "agent", "Attention in ResPostBlock"),
    "no attention": (lambda: timm.create_model("resnet18"), "softmax", "none that is called so"),
    "a model of ours": (lambda: visionattn.hosts.DeiT(depth=1), "agent", "take mixer="),
    "prefix tokens": (vit, "window", "WindowAttention takes maps only, not the 1 prefix"),
    "patches left out": (lambda: vit(patch_drop_rate=0.5), "agent", "patch_drop"),
    "other projections": (swin, "visionattn.attention.HiLoAttention", "HiLoAttention cannot keep.*qkv.*NoneType"),
    "gated projections": (swin, LinearAttention, r"cannot keep.*\[24, 8\].*\[32, 8\]"),
    "arguments of the model": (vit, ("agent", dict(num_prefix_tokens=3)), "leave num_prefix_tokens to the model"),
    "arguments of the window": (swin, ("window", dict(window_size=3)), "leave window_size to the model"),
    "oblong windows": (lambda: swin(window_size=(4, 8)), "window", r"blocks.0.attn: windows of \(4, 8\)"),
    "windows shifted along one axis": (lambda: swin(img_size=(16, 64)), "window", r"1.attn.*shifted by \(0, 2\)"),
    "unknown mixer": (vit, "attention", "short names are .*agent"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_replaced_raises_and_nothing_has_changed(case):
    make, mixer, message = IMPOSSIBLE[case]
    mixer, mixer_args = mixer if isinstance(mixer, tuple) else (mixer, None)
    model = make()
    before = {name: (type(m), m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        replace_attention(model, mixer, mixer_args=mixer_args, linear=True)
    assert {name: (type(m), m) for name, m in model.named_modules()} == before


def test_choices_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="choose none of blocks.0, blocks.1, blocks.2"):
        replace_attention(vit(), "agent", blocks="layers")
    with pytest.raises(ValueError, match="choose none"):
        replace_attention(swapped(vit()), "agent")
    with pytest.raises(ValueError, match="mixer_depths.*one entry a stage, 2"):
        replace_attention(swin(), "agent", mixer_depths=(1, 1, 1))
    with pytest.raises(ValueError, match=r"blocks must be a regular expression, got '\('"):
        replace_attention(vit(), "agent", blocks="(")
    with pytest.raises(ValueError, match="blocks must be a regular expression or a function"):
        replace_attention(vit(), "agent", blocks=3)


def test_tokens_and_masks_that_do_not_fit_raise():
    model = swapped(vit())
    with pytest.raises(ValueError, match=r"1 \+ 4 \* 4 tokens, got 16"):
        model.blocks(torch.randn(1, 16, 16))
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        model(image(), is_causal=True)
    with pytest.raises(ValueError, match=r"windows of \(6, 4\)"):
        swapped(swin(), "window").set_input_size(img_size=(96, 64))
    with pytest.raises(ValueError, match="TorchScript needs a model of one image size"):
        torch.jit.script(swapped(vit(dynamic_img_size=True)))
