"""Every model computes what its authors' code computed: one row a fixture."""

from dataclasses import dataclass, field

import pytest
import timm
import torch

import visionattn  # noqa: F401
from tests.parity import fixture_image, fixture_weights, load_fixture, map_error, output_error


@dataclass
class Case:
    """A recorded model: fixture, timm name, bound on the relative error, and which module makes which recorded map."""

    fixture: str
    name: str
    tolerance: float
    maps: dict[str, str] = field(default_factory=dict)
    kwargs: dict = field(default_factory=dict)
    slow: bool = False  # run by `pytest -m slow`; a quicker one tests the same modules
    map_tolerance: float = 2e-6  # maps carry 256 samples each, so their error scatters more than the whole output's


VAN_MAPS = {"patch_embed1": "stem", "pooled": "head.global_pool", "stage4_before_norm": "stages.3.blocks"} | {
    f"stage{i + 1}": f"stages.{i}" for i in range(4)
}
NAT_MAPS = {"embed": "stem", "final_norm": "norm"} | {f"stage{i}": f"stages.{i}" for i in range(4)}
RAVLT_MAPS = {"patch_embed": "stem"} | {f"stage{i + 1}": f"stages.{i}" for i in range(4)}
BIFORMER_MAPS = {"stem": "stem", "norm": "norm", "pooled": "head.global_pool"} | {
    f"stage{i + 1}": f"stages.{i}" for i in range(4)
}
FLOW_MAPS = {"pre_logits": "head.global_pool"} | {f"stage{i + 1}": f"stages.{i}" for i in range(4)}
LITV2_MAPS = (
    {"patch_embed": "stem", "norm": "norm", "pooled": "head.global_pool"}
    | {f"stage{i + 1}": f"stages.{i}" for i in range(4)}
    | {f"downsample{i}": f"stages.{i}.downsample" for i in range(1, 4)}
    | {"stage1_dtm_offset": "stages.1.downsample.conv_offset"}
)
HOST_MAPS = {f"stage{i}": f"stages.{i}" for i in range(4)}
STAGE_MAPS = {f"stage{i + 1}": f"stages.{i}" for i in range(4)}
CSWIN_MAPS = {"norm": "norm"} | STAGE_MAPS
PVT_MAPS = {f"stage{i + 1}": f"stages.{i}" for i in range(3)}
DEIT_MAPS = {f"block{i}": f"stages.{i}" for i in (2, 5, 8, 11)}
CASES = [
    # 1.5e-6 tells the wrong eps of a norm (3.2e-6) or of the flows (2.5e-6) from rounding (7e-7).
    Case("flowformer/flowformer_224", "flowformer", 1.5e-6, FLOW_MAPS),
    # 1e-6 tells a wrong eps of the layer norms in biformer_tiny (9e-6) from rounding (3e-7).
    Case("biformer/biformer_tiny", "biformer_tiny", 1e-6, BIFORMER_MAPS),
    Case("biformer/biformer_stl_nchw", "biformer_stl_nchw", 1e-6, BIFORMER_MAPS),
    # 1e-6 tells a wrong norm eps (2.5e-6) from rounding (4e-7).
    Case("van/van_b0", "van_b0", 1e-6, VAN_MAPS),
    Case("van/van_b2", "van_b2", 1e-6, VAN_MAPS),
    # 1.5e-6 tells a wrong eps in the tokenizer (2e-6) from rounding (4e-7).
    Case("nat/nat_mini", "nat_mini", 1.5e-6, NAT_MAPS),
    Case("nat/nat_mini_pad_256x192", "nat_mini", 1.5e-6, NAT_MAPS),
    Case("nat/nat_small", "nat_small", 1.5e-6, NAT_MAPS),
    Case("dinat/dinat_mini", "dinat_mini", 1.5e-6, NAT_MAPS),
    Case("dinat/dinat_mini_250x230", "dinat_mini", 1.5e-6, NAT_MAPS),
    Case("dinat/dinat_small", "dinat_small", 1.5e-6, NAT_MAPS),
    Case("dinat/dinat_s_tiny", "dinat_s_tiny", 1.5e-6, NAT_MAPS),
    # 2e-6 tells the smallest of the mistakes tried, a wrong eps in one of the norms (4e-6), from rounding (8e-7).
    Case("ravlt/ravlt_t", "ravlt_t", 2e-6, RAVLT_MAPS, map_tolerance=3e-6),
    Case("ravlt/ravlt_t_256x192", "ravlt_t", 2e-6, RAVLT_MAPS, map_tolerance=3e-6),
    Case("ravlt/ravlt_s", "ravlt_s", 2e-6, RAVLT_MAPS, map_tolerance=3e-6),
    Case("mavit/mavit_t", "mavit_t", 2e-6, RAVLT_MAPS, map_tolerance=3e-6),
    Case("mavit/mavit_s", "mavit_s", 2e-6, RAVLT_MAPS, map_tolerance=3e-6),
    # 1e-6 tells a wrong eps of the norm in attention (1.4e-6) from rounding (4e-7).
    Case("nalaformer/nalaformer_t", "nalaformer_t", 1e-6, STAGE_MAPS, map_tolerance=3e-6),
    # 5e-6 tells a wrong eps (6e-6) from rounding (1e-6), which sampling at computed places amplifies in the maps.
    Case("litv2/litv2_small", "litv2_small", 5e-6, LITV2_MAPS, map_tolerance=1e-5),
    Case("litv2/litv2_medium", "litv2_medium", 5e-6, LITV2_MAPS, map_tolerance=1e-5),
    # 2e-6 is five times rounding; a missing bias table moves the logits by 6e-5 at least.
    Case("agent/agent_swin_t", "agent_swin_t", 2e-6, HOST_MAPS, slow=True),
    Case("agent/agent_pvt_t", "agent_pvt_t", 2e-6, HOST_MAPS, slow=True),
    Case("agent/agent_cswin_t", "agent_cswin_t", 2e-6, HOST_MAPS),
    Case("agent/agent_deit_t", "agent_deit_t", 2e-6, DEIT_MAPS, slow=True),
    Case("inline/inline_swin_t", "inline_swin_t", 2e-6, HOST_MAPS, slow=True),
    Case("inline/inline_pvt_t", "inline_pvt_t", 2e-6, HOST_MAPS, slow=True),
    Case("inline/inline_deit_t", "inline_deit_t", 2e-6, DEIT_MAPS),
    Case("flatten/flatten_swin_t", "flatten_swin_t", 2e-6, HOST_MAPS, slow=True),
    Case("flatten/flatten_pvt_t", "flatten_pvt_t", 2e-6, HOST_MAPS),
    # 4e-6 and 2e-6 tell an eps of the patch embeddings (4.5e-6) and of the blocks (5e-6) from rounding (1e-6, 4e-7).
    Case("pola/pola_pvt_t", "pola_pvt_t", 4e-6, STAGE_MAPS, map_tolerance=1e-5),
    Case("pola/pola_swin_t", "pola_swin_t", 2e-6, STAGE_MAPS, slow=True, map_tolerance=4e-6),
    Case("slab/slab_swin_t", "slab_swin_t", 2e-6, HOST_MAPS),
    Case("slab/slab_pvt_t", "slab_pvt_t", 2e-6, HOST_MAPS, slow=True),
    # 2e-6 tells a wrong eps of a norm (4.8e-6, in patches 3e-6) from rounding (6e-7).
    Case("cswin/cswin_tiny_224", "cswin_tiny_224", 2e-6, CSWIN_MAPS, map_tolerance=4e-6, slow=True),
    Case("pvt/pvt_tiny", "pvt_tiny", 2e-6, PVT_MAPS, map_tolerance=4e-6),
    # 3e-6 tells a wrong eps of a norm (4.6e-6) from rounding (6e-7).
    Case("transnext/transnext_micro", "transnext_micro", 3e-6, STAGE_MAPS, map_tolerance=5e-6),
    Case("transnext/transnext_micro_256", "transnext_micro", 3e-6, STAGE_MAPS, map_tolerance=5e-6, slow=True),
    Case("slab/slab_deit_t", "slab_deit_t", 2e-6, DEIT_MAPS, slow=True),
]


@pytest.fixture(
    scope="module", params=[pytest.param(c, id=c.fixture, marks=[pytest.mark.slow] * c.slow) for c in CASES]
)
def run(request, tmp_path_factory):
    """The fixture's weights through the path a download takes, the model's output and recorded maps."""
    case = request.param
    fixture = load_fixture(case.fixture)
    file = tmp_path_factory.mktemp("release") / "checkpoint.pth"
    torch.save({"state_dict": fixture_weights(fixture)}, file)
    model = timm.create_model(
        case.name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **case.kwargs
    ).eval()
    maps = {}
    for label, path in case.maps.items():
        model.get_submodule(path).register_forward_hook(lambda _m, _x, y, label=label: maps.__setitem__(label, y))
    with torch.inference_mode():
        output = model(fixture_image(fixture))
    return case, fixture, model, output, maps


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same map as it is, with its channels last, and as a sequence; each author has another."""
    if x.ndim != 4:
        return [x]
    last = x.permute(0, 2, 3, 1)
    return [x, last, x.flatten(1, 2), last.flatten(1, 2)]


def test_output_equals_the_authors(run):
    case, fixture, _, output, _ = run
    assert output_error(fixture, output) < case.tolerance


def test_intermediate_maps_equal_the_authors(run):
    case, fixture, _, _, maps = run
    recorded = {feature["label"]: feature for feature in fixture["features"]}
    for label in case.maps:
        expected = recorded[label]
        actual, shape = maps[label], expected["shape"]
        fitting = [y for y in layouts(actual) if list(y.shape) == shape]
        assert fitting, f"{label}: a map {list(actual.shape)} is in no layout the authors' {shape}"
        assert min(map_error(expected, y) for y in fitting) < case.map_tolerance, label
        assert actual.mean().item() == pytest.approx(expected["mean"], abs=1e-5), label


def test_parameter_count_equals_the_authors(run):
    _, fixture, model, _, _ = run
    assert sum(p.numel() for p in model.parameters()) == fixture["n_params"]
