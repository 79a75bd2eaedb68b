"""What timm, torch and their clients may ask of any model, asked of every model: one row in ``SMALL`` a family.

Structure is checked for every registered name on the meta device; behaviour on a small configuration of each family.
"""

import copy
import functools
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2

import visionattn
from visionattn.benchmark.models import randomize_
from visionattn.benchmark.reduced import reduce
from visionattn.frames.isotropic import Isotropic

# One registered name of each family, with arguments that make it small without changing its kind.
SMALL = {
    "biformer_tiny": dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), head_dim=4, n_win=2, topks=(1, 2, 3, -2), drop_path_rate=0.1
    ),
    "anyvit_tiny_patch16": dict(img_size=64, embed_dim=8, depth=4, num_heads=2, mlp_ratio=2, drop_path_rate=0.1),
    "dinat_small": dict(
        embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), kernel_size=3, dilations=((4,), (1, 4), (2,), (1,))
    ),
    "flowformer": dict(img_size=64, embed_dims=(8, 12, 16, 20), depths=(1, 1, 2, 1), num_heads=2, mlp_ratio=2),
    "agent_deit_t": dict(
        img_size=64, embed_dim=8, depth=4, num_heads=2, mlp_ratio=2, mixer_depth=3, mixer_args=dict(num_agents=4)
    ),
    "flatten_swin_t": dict(
        img_size=32, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, window_size=3
    ),
    "inline_cswin_t": dict(
        img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=2, split_sizes=(1, 2, 3, 3)
    ),
    "litv2_small": dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), alpha=0.5, drop_path_rate=0.1),
    "mavit_t": dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, head_width=24),
    "nalaformer_xt": dict(
        embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, head_width=24
    ),
    "nat_small": dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), kernel_size=3, drop_path_rate=0.1),
    "pola_pvt_t": dict(
        embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), img_size=64
    ),
    "ravlt_t": dict(
        embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, drop_path_rate=0.1
    ),
    "slab_pvt_t": dict(
        embed_dims=(8, 8, 8, 8),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        mixer_depths=(None, None, 0, 0),
        img_size=64,
        drop_path_rate=0.1,
    ),
    "cswin_tiny_224": dict(
        img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=2, split_sizes=(1, 2, 3, 3)
    ),
    "pvt_tiny": dict(
        embed_dims=(8, 8, 8, 8),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        img_size=64,
        drop_path_rate=0.1,
    ),
    "transnext_micro": dict(
        embed_dims=(8, 8, 8, 8),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        drop_path_rate=0.1,
    ),
    "van_b0": dict(embed_dims=(8, 12, 16, 20), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), drop_path_rate=0.1),
}
# Any image size, but not given as a range: of linear layers on maps and a padding to whole windows torch.export would
# have to prove that 2 % (2 * ((H - 1) // 4 + 1)) is not 0, which it cannot; nor can it order the sizes of TransNeXt's
# positions on a map and on the pooled one.
EXPORTED_WITHOUT_RANGE = {
    "dinat_small",
    "cswin_tiny_224",
    "flatten_swin_t",
    "inline_cswin_t",
    "nat_small",
    "transnext_micro",
}
if torch.__version__ < "2.12":  # which takes more of a tensor's strides into an exported graph
    EXPORTED_WITHOUT_RANGE.add("litv2_small")
# Smallest side of an exported graph: unpadded convolutions leave one position of 63 pixels, and a size that may be one,
# or a number of windows that may be one, is no symbol for torch.export.
EXPORTED_FROM = dict.fromkeys(
    ("flatten_swin_t", "flowformer", "litv2_small", "pola_pvt_t", "pvt_tiny", "slab_pvt_t"), 64
)
SIZE = 64


def small(name: str, **kwargs):
    return timm.create_model(name, **{"num_classes": 5, **SMALL[name], **kwargs})


@functools.cache
def outline(name: str):
    """The model on the meta device, for looking only."""
    return timm.create_model(name, device="meta").eval()


def images(*size: int, batch: int = 2, chans: int = 3) -> torch.Tensor:
    return torch.randn(batch, chans, *(size or (SIZE, SIZE)))


def nchw(model, features: torch.Tensor) -> torch.Tensor:
    """Unpooled features as the map [B, C, H, W], from the layout that the model declares."""
    if model.num_prefix_tokens and features.ndim == 3:
        side = math.isqrt(features.shape[1] - model.num_prefix_tokens)
        features = features[:, model.num_prefix_tokens :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features


def reductions(model) -> list[int]:
    """Strides of all feature maps; pyramids have four, 4 to 32, a network of one resolution the same for each block."""
    strides = [info["reduction"] for info in model.feature_info]
    assert strides == [4, 8, 16, 32] or len(set(strides)) == 1, f"a pyramid has strides 4, 8, 16 and 32, got {strides}"
    return strides


every_model = pytest.mark.parametrize("name", visionattn.list_models())
each_family = pytest.mark.parametrize("name", SMALL)
# Their networks are those of another row with another operator or norm: what takes seconds is slow.
TWINS = {"cswin_tiny_224", "dinat_small", "mavit_t", "nalaformer_xt", "pola_pvt_t", "slab_pvt_t"}
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in SMALL]
)


def test_every_module_has_a_small_configuration():
    covered = {timm.model_entrypoint(name).__module__ for name in SMALL}
    modules = {timm.model_entrypoint(name).__module__ for name in visionattn.list_models()}
    assert covered == modules, f"add rows to SMALL for {sorted(modules - covered)}"


def test_registering_overwrites_no_model_of_timm():
    # In a fresh process, since registration happens once.
    code = "import warnings, timm; warnings.simplefilter('error'); import visionattn"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- every registered name, on the meta device -----------------------------------------------------------------------


@every_model
def test_builds_on_the_meta_device_by_argument_and_by_context(name):
    with torch.device("meta"):
        by_context = timm.create_model(name, dtype=torch.bfloat16)
    for model in (outline(name), by_context):
        assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.dtype == torch.bfloat16 for p in by_context.parameters())


@every_model
def test_cfg_describes_the_model(name):
    model = outline(name)
    cfg = model.pretrained_cfg
    state = model.state_dict()
    assert cfg["first_conv"] + ".weight" in state and cfg["classifier"] + ".weight" in state
    assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"] == model.num_classes
    assert cfg["license"] and cfg["paper_ids"] and cfg["origin_url"]
    features = nchw(model, model.forward_features(torch.empty(1, *cfg["input_size"], device="meta")))
    assert features.shape[1] == model.num_features and features.shape[2:] == cfg["pool_size"]


@every_model
def test_unknown_argument_raises(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


@every_model
def test_feature_info_names_real_modules(name):
    model = outline(name)
    for info in model.feature_info:
        assert model.get_submodule(info["module"]) is not None
    strides = reductions(model)
    assert strides == sorted(strides)


@every_model
def test_depth_groups_and_decay_exemptions_match_parameters(name):
    model = outline(name)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert groups[model.pretrained_cfg["first_conv"] + ".weight"] == 0
    assert groups[model.pretrained_cfg["classifier"] + ".weight"] == max(groups.values())
    assert len(set(groups.values())) > len(model.feature_info)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    # A network of one resolution has nothing coarser than its blocks.
    finest = len(set(groups.values())) + isinstance(model, Isotropic)
    one_block_each = all(len(getattr(stage, "blocks", ())) == 1 for stage in getattr(model, "stages", [()]))
    assert 1 < len(set(coarse.values())) < finest + one_block_each
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


# --- a small model of each family, for real --------------------------------------------------------------------------


@each_family
def test_forward_is_head_of_features(name):
    model = small(name).eval()
    x = images()
    features = model.forward_features(x)
    side = SIZE // reductions(model)[-1]
    assert nchw(model, features).shape == (2, model.num_features, side, side)
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@each_family
def test_every_parameter_gets_a_gradient(name):
    model = small(name, drop_path_rate=0.0).train()
    model(images()).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@each_family
@pytest.mark.parametrize("size", [(33, 70), (96, 64), (224, 32), (31, 31)])
def test_odd_and_oblong_images(name, size):
    model = small(name).eval()
    x = images(*size, batch=1)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert model(x).shape == (1, 5)
    for y, info in zip(maps, model.feature_info, strict=True):
        assert y.shape[1] == info["num_chs"]
        assert all(0 <= n - s // info["reduction"] <= 1 for n, s in zip(y.shape[2:], size, strict=True))


@each_family
def test_an_image_gives_the_same_logits_alone_and_in_a_batch(name):
    model = small(name).eval()
    x = images(batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)


@each_family
def test_layout_of_the_image_does_not_matter(name):
    model = small(name).eval()
    x = images()
    view = torch.randn(2, SIZE, SIZE, 6)[..., ::2].permute(0, 3, 1, 2).copy_(x)
    torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(model(x), model(view))


@each_family
@pytest.mark.parametrize("chans", [1, 4])
def test_in_chans(name, chans):
    model = small(name, in_chans=chans).eval()
    assert model.in_chans == chans
    assert model(images(chans=chans)).shape == (2, 5)


@each_family
def test_without_classifier(name):
    model = small(name, num_classes=0).eval()
    assert model.num_classes == 0
    assert model(images()).shape == (2, model.head_hidden_size)
    unpooled = small(name, num_classes=0, global_pool="").eval()
    side = SIZE // reductions(model)[-1]
    assert nchw(unpooled, unpooled(images())).shape == (2, model.num_features, side, side)


@each_family
def test_reset_classifier_keeps_pooling_device_dtype_mode_and_frozen_state(name):
    model = small(name, dtype=torch.float64).eval()
    model.reset_classifier(7)
    assert model.get_classifier().weight.dtype == torch.float64
    assert not any(m.training for m in model.modules())
    assert model(images().double()).shape == (2, 7)
    model.requires_grad_(False)
    model.reset_classifier(3, "max")
    assert not any(p.requires_grad for p in model.parameters())
    assert model(images().double()).shape == (2, 3)
    model.reset_classifier(0, "")
    assert nchw(model, model(images().double())).ndim == 4


@each_family
@pytest.mark.parametrize("cls", ["list", "dict", "hook", "getter"])
def test_features_only(name, cls):
    model = small(name).eval()
    if cls != "getter" and model.num_prefix_tokens:
        pytest.skip("blocks pass tokens, which only the wrapper that calls forward_intermediates makes maps of")
    net = small(name, features_only=True, feature_cls=cls, out_indices=(0, 1, 2, 3)).eval()
    old, new = ("", "model.") if cls == "getter" else ("stages.", "stages_")  # how the wrappers rename parameters
    state = {k.replace(old, new, 1): v for k, v in model.state_dict().items()}
    missing, _ = net.load_state_dict(state, strict=False)
    assert not missing
    x = images(70, 96)
    maps = net(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    if cls != "getter":  # which asks for maps [B, C, H, W], whatever the model's own layout
        maps = [nchw(model, y) for y in maps]
    assert net.feature_info.channels() == [y.shape[1] for y in maps]
    assert net.feature_info.reduction() == reductions(model)
    for y, expected in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(y, expected)


@each_family
def test_features_only_picks_its_indices(name):
    net = small(name, features_only=True, out_indices=(1, -1)).eval()
    assert [y.shape[1] for y in net(images())] == net.feature_info.channels()
    strides = reductions(small(name))
    assert net.feature_info.reduction() == [strides[1], strides[-1]]
    last_two = small(name, features_only=True, out_indices=2)
    assert [y.shape[2] for y in last_two(images())] == [SIZE // stride for stride in strides[-2:]]


@each_family
def test_features_only_trains_with_gradient_checkpointing(name):
    net = small(name, features_only=True, drop_path_rate=0.0)
    getattr(net, "model", net).set_grad_checkpointing()  # timm's getter, unlike its list, does not pass it on
    sum(y.sum() for y in net(images())).backward()
    assert all(p.grad is not None for p in net.parameters())


@each_family
def test_intermediates(name):
    model = small(name).eval()
    x = images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    chosen = model.forward_intermediates(x, indices=[0, -2], stop_early=True, intermediates_only=True)
    for actual, expected in zip([*last_two, *chosen], [maps[2], maps[3], maps[0], maps[2]], strict=True):
        torch.testing.assert_close(actual, expected)
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], nchw(model, final))
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(nhwc[1], maps[1].permute(0, 2, 3, 1))
    if isinstance(model, Isotropic):
        nlc = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(nlc[1], maps[1].flatten(2).transpose(1, 2))
    for unknown in ("NCL", "nchw") if isinstance(model, Isotropic) else ("NLC", "nchw"):
        with pytest.raises(ValueError, match=f"{unknown}.*NCHW"):
            model.forward_intermediates(x, output_fmt=unknown)


@each_family
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruned_network_keeps_its_maps_and_has_nothing_unused(name, index):
    model = small(name, drop_path_rate=0.0).eval()
    x = images()
    expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([index]) == [index]
    torch.testing.assert_close(pruned.forward_intermediates(x, indices=[index], intermediates_only=True)[0], expected)
    assert nchw(pruned, pruned(x)).shape[1] == pruned.num_features == model.feature_info[index]["num_chs"]
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@each_family
def test_gradient_checkpointing_changes_nothing(name):
    model = small(name, drop_path_rate=0.0).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images()
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=n)


@each_family
def test_deepcopy_pickle_and_state_dict_round_trip(name):
    model = small(name).eval()
    x = images()
    expected = model(x)
    twin = small(name).eval()
    twin.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@each_family
def test_usable_after_meta_construction(name):
    torch.manual_seed(0)
    model = small(name, device="meta").to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.no_grad():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    model.init_weights()
    assert model.eval()(images()).isfinite().all()


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    model = small(name).eval()
    expected = model(images())
    output = model.to(dtype)(images().to(dtype))
    assert output.dtype == dtype and output.shape == expected.shape and output.isfinite().all()


@each_family
def test_linear_layers_in_int8(name):
    """As PyTorch quantizes a network of its own."""
    model = randomize_(small(name)).eval()  # some start with branches and logits of nearly nothing
    reduced = reduce(copy.deepcopy(model), "int8", "infer")
    assert sum("quantized" in type(module).__module__ for module in reduced.modules()) > 0
    x = images()
    with torch.no_grad():
        expected, got = model(x), reduced(x)
    assert 0 < (got - expected).norm() < 0.5 * expected.norm()


@each_family
def test_autocast_trains(name):
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@each_family
def test_per_sample_gradients(name):
    model = small(name).eval()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = images(batch=3)

    def loss(params, image):
        return torch.func.functional_call(model, params, (image[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    single = torch.func.grad(loss)(parameters, x[1])
    for n in parameters:
        torch.testing.assert_close(grads[n][1], single[n], rtol=1e-4, atol=1e-5, msg=n)


@each_family
def test_layer_decay_groups(name):
    model = small(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 4 and max(scales) == 1.0
    undecayed = [p for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert len(undecayed) >= sum(p.ndim <= 1 for p in model.parameters())


@each_network
def test_compiles_as_one_graph_forward_and_backward(name):
    model = small(name, drop_path_rate=0.0)
    twin = copy.deepcopy(model)
    x = images()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=n, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.slow
def test_inductor_computes_the_same(name):
    model = small(name).eval()
    x = images(70, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@each_network
def test_exports_for_any_batch(name):
    model = small(name).eval()
    program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=8)}})
    assert not any("visionattn" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for x in (images(batch=1), images(batch=3)):
        torch.testing.assert_close(exported(x), model(x))


@each_network
def test_exports_for_any_image_size(name):
    model = small(name).eval()
    smallest = EXPORTED_FROM.get(name, 33)
    sides = {i: torch.export.Dim(side, min=smallest, max=1024) for i, side in ((2, "height"), (3, "width"))}
    if name in EXPORTED_WITHOUT_RANGE:
        sides = dict.fromkeys(sides, torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images(72, 104),), dynamic_shapes={"x": sides})
    exported = program.module()
    for x in (images(64, 64), images(224, 96), images(97, 131)):
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@each_network
def test_onnx_computes_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small(name).eval()
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-5)


@each_network
def test_torchscript(name):
    with timm.layers.set_scriptable(True):
        model = small(name, scriptable=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, timm's clients still use it
        scripted = torch.jit.script(model)
    x = images()
    torch.testing.assert_close(scripted(x), model(x))


@each_family
def test_saved_folder_opens_again(name, tmp_path):
    model = small(name).eval()
    save_for_hf(model, tmp_path, model_args={k: v for k, v in SMALL[name].items()}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()
    torch.testing.assert_close(again(x), model(x))


@each_family
def test_wrong_checkpoint_is_refused(name, tmp_path):
    state = small(name).state_dict()
    state.pop(next(iter(state)))
    torch.save(state, tmp_path / "partial.pth")
    overlay = dict(file=str(tmp_path / "partial.pth"), num_classes=5)
    with pytest.raises(RuntimeError, match="Missing key"):
        small(name, pretrained=True, pretrained_cfg_overlay=overlay)
