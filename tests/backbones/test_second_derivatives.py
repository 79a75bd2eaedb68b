"""Second derivatives of models: products with the Hessian against differences of gradients, in float64."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.backbones.test_contract import SMALL, small
from visionattn.convert import replace_attention

REFUSED = {"litv2_small"}  # bilinear samples by torch's embedding_bag, which has first derivatives only, and says so


def check(model):
    """With attention outside the operators by products: PyTorch's fused kernels refuse second derivatives."""
    model = model.double().eval()
    for p in model.parameters():  # of layer scales of 1e-6 and tables of zeros nothing would be seen
        if p.dim() <= 1 or not p.any():
            torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    v = torch.randn_like(x)
    parameter = next(p for name, p in model.named_parameters() if ".qkv.weight" in name or p.dim() >= 2)

    def gradient(x, graph=False):
        x = x.detach().requires_grad_()
        return x, torch.autograd.grad(model(x).square().sum(), (x, parameter), create_graph=graph)

    with sdpa_kernel(SDPBackend.MATH):
        leaf, (g, _) = gradient(x, graph=True)
        exact = torch.autograd.grad((g * v).sum(), (leaf, parameter))
        step = 1e-6
        ends = [gradient(x + sign * step * v)[1] for sign in (1, -1)]
    for found, up, down in zip(exact, *ends, strict=True):
        differences = (up - down) / (2 * step)
        error = (found - differences).norm() / differences.norm()
        assert error < 1e-5, f"relative error {error:.1e}"  # a lost path gives 1e-4 to 0.3, these differences 1e-8


@pytest.mark.parametrize("name", sorted(SMALL.keys() - REFUSED))
def test_products_with_the_hessian(name):
    torch.manual_seed(0)
    check(small(name))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_second_derivatives_refuses_them(name):
    with pytest.raises(RuntimeError, match="derivative for"):
        check(small(name))


def test_products_with_the_hessian_of_a_model_on_shifted_windows():
    torch.manual_seed(0)
    sizes = dict(img_size=64, embed_dim=8, depths=(1, 1, 1, 2), num_heads=(1, 2, 2, 2), mlp_ratio=2, window_size=2)
    check(timm.create_model("agent_swin_t", num_classes=5, **sizes))


def test_products_with_the_hessian_of_a_swin_that_timm_made():
    torch.manual_seed(0)
    sizes = dict(img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    replace_attention(model, "window")
    check(model)
