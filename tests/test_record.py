"""A module of anybody's becomes a fixture, and the fixture tells that module from others."""

import json

import pytest
import torch
from torch import nn

from tests.parity import fixture_image, fixture_weights, load_fixture, map_error, output_error
from tests.record import make_fixture, record
from visionattn.benchmark.plain import van

ORIGIN = dict(source="USER/REPOSITORY", commit="0123abc", license="MIT")


class Theirs(nn.Module):
    """Takes tokens and the grid, returns two things: nothing that timm would call a model."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8, eps=eps)
        self.scale = nn.Parameter(torch.zeros(()))
        self.again = nn.ModuleDict({"embed": self.embed})
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, tokens, H, W):
        x = self.norm(self.embed(tokens).mT)
        return {"grid": (H, W), "tokens": self.scale * x.unflatten(2, (H, W))}


def run_theirs(module, images):
    return module(images.flatten(2).mT, *images.shape[2:])["tokens"]


RECORDED = dict(ORIGIN, input_shape=(2, 3, 5, 6), run=run_theirs, maps={"embedded": "embed"})


def test_a_recorded_module_is_told_from_a_nearly_right_one(tmp_path):
    record("family/small", Theirs(), folder=tmp_path, notes="two outputs", **RECORDED)
    fixture = load_fixture("family/small", tmp_path)
    assert [name for name, _ in fixture["params"]] == [
        "scale", "embed.weight", "embed.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"
    ]  # fmt: skip
    assert fixture["n_params"] == 1 + 3 * 8 + 8 + 8 + 8 and fixture["notes"] == "two outputs"
    weights, images = fixture_weights(fixture), fixture_image(fixture)
    for eps, exact in ((1e-5, True), (1e-6, False)):
        module = Theirs(eps).eval()
        module.load_state_dict(weights, strict=False)
        assert (output_error(fixture, run_theirs(module, images)) < 1e-6) is exact
    (embedded,) = fixture["features"]
    assert map_error(embedded, module.embed(images.flatten(2).mT)) < 1e-6


def test_recording_twice_makes_the_same_bytes_and_leaves_nothing_beside(tmp_path):
    file = tmp_path / "family/small.json.gz"
    record("family/small", Theirs(), folder=tmp_path, **RECORDED)
    first = file.read_bytes()
    record("family/small", Theirs(), folder=tmp_path, **RECORDED)
    assert file.read_bytes() == first and [*file.parent.iterdir()] == [file]


def test_the_authors_fixture_comes_out_again():
    theirs = load_fixture("van/van_b0")
    ours = make_fixture(
        theirs["model"],
        van.build("van_b0"),
        **{key: theirs[key] for key in ("source", "commit", "license", "paper", "param_scale")},
        maps={"patch_embed1": "patch_embed1", "stage1_before_norm": "block1.2", "stage4_before_norm": "block4.1"},
    )
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"output", "features"}:
        assert ours[key] == json.loads(json.dumps(theirs[key])), key
    assert ours["output"].keys() == theirs["output"].keys()
    assert output_error(theirs, torch.tensor(ours["output"]["values"])) < 1e-6  # rounding is 4e-7
    recorded = {feature["label"]: feature for feature in theirs["features"]}
    for feature in ours["features"]:
        expected = recorded[feature["label"]]
        assert feature.keys() == expected.keys()
        assert feature["index"] == expected["index"] and feature["shape"] == expected["shape"]
        for key in ("mean", "std", "value"):
            assert feature[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


def test_of_a_large_output_a_sample_is_kept():
    module = nn.Conv2d(3, 16, 1)
    fixture = make_fixture("large", module, input_shape=(1, 3, 64, 64), **ORIGIN)
    assert fixture["output"]["values"] is None and len(fixture["output"]["sample"]["value"]) == 256
    assert output_error(fixture, module(fixture_image(fixture))) == 0


class Exploding(nn.Module):
    """Squares what the last block made, eight times."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(8))

    def forward(self, x):
        for block in self.blocks:
            x = 50 * block(x).square()
        return x


def test_a_module_that_explodes_is_located_and_tamed_by_param_scale(tmp_path):
    options = dict(ORIGIN, input_shape=(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"the output is not finite, which began \w+ blocks\.\d \(Conv2d\).*param_scale"
    ):
        record("family/exploding", Exploding(), folder=tmp_path, **options)
    assert not [*tmp_path.iterdir()]
    scale = [(".weight", 0.05), (".bias", 0.1), ("blocks.7.weight", 2)]
    fixture = make_fixture("exploding", Exploding(), param_scale=scale, **options)
    module = Exploding()
    module.load_state_dict(fixture_weights(fixture))
    assert output_error(fixture, module(fixture_image(fixture))) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(run=lambda module, images: module(images.flatten(2).mT, 5, 6)), "one tensor, not dict; choose it in"),
        (dict(maps={"map": "again"}), "map 'map': 'again' was not called"),
        (dict(param_scale=[("gamma", 0.1)]), "param_scale: 'gamma' is neither a parameter"),
    ],
)
def test_what_cannot_be_recorded_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        make_fixture("small", Theirs(), **{**RECORDED, **options})
