"""RepBN and PRepBN: the schedule, the statistics, and that folding computes the same."""

import copy

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn

import visionattn  # noqa: F401
from visionattn.layers.norms import Affine, PRepBN, RepBN, create_norm, estimate_statistics

# Values of y[0, 0] and of the running mean after each pass of the authors' module over arange(12) * (t + 1), [1, 4, 3].
TRACE = [
    ((-1.22474, 0, 1.22474), (0, 0, 0)),
    ((-1.22474, 0, 1.22474), (0.9, 1.1, 1.3)),
    ((-1.25397, -0.29582, 0.66233), (2.16, 2.64, 3.12)),
    ((-1.28319, -0.34164, 0.59991), (3.744, 4.576, 5.408)),
    ((-1.31242, -0.13746, 1.03749), (5.6196, 6.8684, 8.1172)),
    ((-1.34164, 0.31672, 1.97508), (7.75764, 9.48156, 11.20548)),
    ((-1.34164, 0.81672, 2.97508), (10.13188, 12.3834, 14.63493)),
]


def ramp(t: int = 0) -> torch.Tensor:
    return torch.arange(12.0).view(1, 4, 3) * (t + 1)


def traced() -> PRepBN:
    norm = PRepBN(3, total_step=4, warmup=1)
    with torch.no_grad():
        norm.norm2.alpha.fill_(0.5)
        norm.norm2.bn.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return norm


def test_schedule_and_statistics_follow_the_authors():
    norm = traced()
    for t, (y, mean) in enumerate(TRACE):
        torch.testing.assert_close(norm(ramp(t))[0, 0], torch.tensor(y), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            norm.norm2.bn.running_mean, torch.tensor(mean, dtype=torch.float32), atol=1e-5, rtol=0
        )
    assert [norm.warm.item(), norm.iter.item(), norm.total_step.item()] == [0, 0, 4]
    expected = torch.tensor((-0.74917, -1.18342, -1.80275))
    torch.testing.assert_close(norm.eval()(ramp())[0, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.norm2.bn.running_var, torch.full((3,), 182.90274), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["layernorm", "prepbn", "repbn"])
@pytest.mark.parametrize("training", [True, False])
def test_maps_with_channels_first_are_normalized_alike(kind, training):
    last, first = (create_norm(kind, 5, 1e-5, nchw=nchw).train(training) for nchw in (False, True))
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), last(x))


def test_recomputation_under_gradient_checkpointing_is_no_step_of_the_schedule():
    norm = PRepBN(3, total_step=4)
    x = ramp().requires_grad_()
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert norm.iter.item() == 3
    twin = PRepBN(3, total_step=4)
    z = ramp().requires_grad_()
    twin(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_two_passes_before_a_backward_pass():
    norm, x = PRepBN(3, total_step=4), ramp().requires_grad_()
    (norm(x) + norm(x * 2)).square().sum().backward()
    assert x.grad.isfinite().all()


def test_schedule_resumes_from_a_checkpoint():
    norm = PRepBN(3, total_step=4)
    norm(ramp())
    again = PRepBN(3, total_step=4)
    again.load_state_dict(norm.state_dict())
    assert again.iter.item() == 3
    torch.testing.assert_close(again(ramp(1)), norm(ramp(1)))


def test_warmup_of_a_checkpoint_goes_on():
    norm = PRepBN(3, total_step=4)
    norm.load_state_dict(PRepBN(3, total_step=4, warmup=2).state_dict())
    for _ in range(2):
        torch.testing.assert_close(norm(ramp()), norm.norm1(ramp()))
    assert norm.norm2.bn.num_batches_tracked == 0 and norm.warm == 0
    norm(ramp())
    assert norm.norm2.bn.num_batches_tracked == 1


def test_statistics_are_estimated_anew_without_training():
    norm = PRepBN(3, total_step=1)
    frozen = nn.Dropout(0.5).eval()
    model = nn.Sequential(norm, frozen)
    norm.norm2.bn.momentum = None  # an average of equal weights
    estimate_statistics(model, [ramp(t) for t in range(3)])
    expected = torch.stack([ramp(t)[0].mean(0) for t in range(3)]).mean(0)
    torch.testing.assert_close(norm.norm2.bn.running_mean, expected)
    assert norm.iter == 1  # no step of the schedule
    assert norm.training and norm.norm2.bn.training and not frozen.training


def test_unsuitable_arguments_raise():
    with pytest.raises(ValueError, match="total_step.*0"):
        PRepBN(3, total_step=0)
    with pytest.raises(ValueError, match="layernorm.*batchnorm"):
        create_norm("batchnorm", 3, 1e-5)


PVT = dict(embed_dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 2), mlp_ratios=(2,) * 4, depths=(1,) * 4)
SWIN = dict(embed_dim=8, num_heads=(1, 2, 2, 2), mlp_ratio=2, depths=(1, 1, 2, 1))
FOLDED = {
    "slab_swin_t": dict(SWIN, img_size=64, window_size=3),
    "slab_pvt_t": dict(PVT, img_size=64),
    "slab_cswin_t": dict(embed_dim=8, num_heads=(2,) * 4, mlp_ratio=2, depths=(1,) * 4, img_size=64),
    "slab_deit_t": dict(embed_dim=8, depth=2, num_heads=2, img_size=64),
    "prepbn_deit_t": dict(embed_dim=8, depth=2, num_heads=2, img_size=64),
    "prepbn_pvt_t": dict(PVT, img_size=64),
    "prepbn_swin_t": dict(SWIN, img_size=64, window_size=3),
    # Combinations that nobody has published, for the layers that fold in their own way.
    "inline_cswin_t": dict(norm_layer="repbn", embed_dim=8, num_heads=(2,) * 4, mlp_ratio=2, depths=(1,) * 4),
    "inline_pvt_t": dict(PVT, num_heads=(2,) * 4, norm_layer="repbn"),
    "agent_deit_t": dict(norm_layer="prepbn", embed_dim=8, depth=2, num_heads=2, img_size=64),
}


def trained(name: str) -> nn.Module:
    """A small model whose norms do something: statistics, scales and alphas off their initial values."""
    model = timm.create_model(name, num_classes=5, **FOLDED[name]).double().eval()
    for module in model.modules():
        if isinstance(module, RepBN):
            nn.init.uniform_(module.alpha, 0.3, 0.6)
            nn.init.uniform_(module.bn.weight, -1, 1)
            nn.init.normal_(module.bn.bias)
            module.bn.running_mean.normal_()
            module.bn.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_folded_model_computes_the_same_without_norms(name):
    model = trained(name)
    x = torch.randn(1, 3, 70, 50, dtype=torch.float64)  # maps that are no whole windows, stripes or patches
    expected = model(x)
    by_timm = reparameterize_model(model)
    ours = copy.deepcopy(model)
    ours.reparameterize()
    for folded in (by_timm, ours):
        assert not any(isinstance(m, RepBN | PRepBN | nn.BatchNorm1d) for m in folded.modules())
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, Affine) for m in ours.modules())
    assert model.state_dict().keys() != ours.state_dict().keys()  # the original is untouched
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_final_norm_folds_into_the_classifier_only_where_that_is_the_same(pool):
    model = timm.create_model("slab_swin_t", num_classes=5, global_pool=pool, **FOLDED["slab_swin_t"]).double().eval()
    nn.init.uniform_(model.norm.norm2.bn.weight, -1, 1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    model.reparameterize()
    assert isinstance(model.norm, nn.Identity if pool == "avg" else Affine)
    torch.testing.assert_close(model(x), expected)
