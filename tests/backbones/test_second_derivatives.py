"""Second derivatives of models, and what torch.func makes of them."""

import pytest
import timm
import torch

from tests.backbones.test_contract import SMALL, small
from visionattn.convert import replace_attention


def check(model):
    """Products with the Hessian against differences of gradients, in float64, and by forward mode over reverse."""
    model = model.double().eval()
    for name, p in model.named_parameters():  # of layer scales of 1e-6 and tables of zeros nothing would be seen
        if p.dim() <= 1 or not p.any():
            torch.nn.init.normal_(p, std=0.1 if "offset" in name else 0.5)  # far offsets leave the map
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    v = torch.randn_like(x)
    parameter = next(p for name, p in model.named_parameters() if ".qkv.weight" in name or p.dim() >= 2)

    def gradient(x, graph=False):
        x = x.detach().requires_grad_()
        return x, torch.autograd.grad(model(x).square().sum(), (x, parameter), create_graph=graph)

    leaf, (g, _) = gradient(x, graph=True)
    exact = torch.autograd.grad((g * v).sum(), (leaf, parameter))
    step = 1e-6
    ends = [gradient(x + sign * step * v)[1] for sign in (1, -1)]
    for found, up, down in zip(exact, *ends, strict=True):
        differences = (up - down) / (2 * step)
        assert differences.any()
        error = (found - differences).norm() / differences.norm()
        assert error < 1e-5, f"relative error {error:.1e}"  # a lost path gives 1e-4 to 0.3, these differences 1e-8
    _, moved = torch.func.jvp(torch.func.grad(lambda x: model(x).square().sum()), (x,), (v,))
    torch.testing.assert_close(moved, exact[0], rtol=1e-5, atol=1e-9 * float(exact[0].abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_products_with_the_hessian(name):
    torch.manual_seed(0)
    check(small(name))


def shifted():
    sizes = dict(img_size=64, embed_dim=8, depths=(1, 1, 1, 2), num_heads=(1, 2, 2, 2), mlp_ratio=2, window_size=2)
    return timm.create_model("agent_swin_t", num_classes=5, **sizes)


def converted():
    sizes = dict(img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    replace_attention(model, "window")
    return model


@pytest.mark.parametrize("make", [shifted, converted])
def test_products_with_the_hessian_of_models_on_shifted_windows(make):
    torch.manual_seed(0)
    check(make())


BIASED = {  # by tables that are trained
    "nat": lambda: small("nat_small"),
    "dinat": lambda: small("dinat_small"),
    "agent": lambda: small("agent_deit_t"),
    "flatten": lambda: small("flatten_swin_t"),
    "shifted": shifted,
    "converted": converted,
}


@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED)
@pytest.mark.parametrize("trained", [True, False])
def test_an_ensemble_by_vmap_equals_a_loop(make, trained):
    torch.manual_seed(0)
    models = [make().eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 64, 64)
    run = lambda p, b: torch.func.functional_call(models[0], (p, b), (x,))  # noqa: E731
    with torch.set_grad_enabled(trained):
        found = torch.func.vmap(run)(parameters, buffers)
        expected = [model(x) for model in models]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    if not trained:
        return
    found.square().sum().backward()
    torch.stack(expected).square().sum().backward()
    for name, parameter in models[1].named_parameters():
        torch.testing.assert_close(parameters[name].grad[1], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("make", [BIASED[name] for name in ("nat", "flatten", "shifted", "converted")])
def test_forward_mode_agrees_with_the_backward_pass(make):
    torch.manual_seed(0)
    model = make().double().eval()
    x, tangent = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    out, moved = torch.func.jvp(model, (x,), (tangent,))
    x.requires_grad_()
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad(model(x), x, weight)
    torch.testing.assert_close((moved * weight).sum(), (grad * tangent).sum())
