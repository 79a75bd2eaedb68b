"""Every release that is listed converts completely, by the names and shapes of its authors' parameters."""

import math

import pytest
import torch

from tests.parity import FIXTURES, load_fixture
from tests.weights.release_names import RELEASES, STATISTICS, Names
from visionattn.weights import checkpoints, link
from visionattn.weights.commands.translate import shadow, translated
from visionattn.weights.read import read_weights

PUBLISHED = {n.partition(".")[0]: row for n, row in checkpoints().items() if row["model"] and link(row) != "none"}
FAMILIES = sorted({row["family"] for row in checkpoints().values() if row["model"]} | {"releases"})
RECORDED = {path.name.partition(".")[0]: path for family in FAMILIES for path in (FIXTURES / family).glob("*.json.gz")}
RECORDED["flowformer"] = FIXTURES / "flowformer" / "flowformer_224.json.gz"


def listed(name: str) -> Names:
    """The authors' names and shapes of a model."""
    function, arguments, options, _ = RELEASES[name]
    return function(*arguments, **options)


def release(names: Names) -> dict[str, torch.Tensor]:
    """Tensors of these names without storage."""
    whole = dict(dtype=torch.int64, device="meta")
    return {n: torch.empty(s, **whole) if s == () else torch.empty(s, device="meta") for n, s in names.items()}


def test_every_published_model_is_listed():
    bundled = {name for name, row in PUBLISHED.items() if link(row) == "bundled"}
    assert RELEASES.keys() >= PUBLISHED.keys() - bundled
    for name in bundled:
        assert translated(name, read_weights(PUBLISHED[name]["file"])).fits


@pytest.mark.parametrize("name", RELEASES)
def test_the_list_has_as_many_parameters_as_the_authors_model(name):
    assert listed(name).parameters == RELEASES[name][3]


@pytest.mark.parametrize("name", sorted(RECORDED.keys() & RELEASES.keys()))
def test_the_list_is_the_recorded_one(name):
    fixture = load_fixture("/".join(RECORDED[name].with_suffix("").with_suffix("").parts[-2:]))
    names = listed(name)
    recorded = {name: tuple(shape) for name, shape, *_ in fixture["params"]}
    buffers = {name: tuple(shape) for name, shape, *_ in fixture.get("buffers", [])}
    assert {k: s for k, s in names.items() if k in recorded or not k.endswith(STATISTICS)} == recorded
    assert {k: s for k, s in names.items() if k in buffers} == buffers


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_converts_without_missing_or_unexpected_keys(name):
    names = listed(name)
    result = translated(name, release(names))
    assert result.fits, result.lines()
    own = shadow(name).state_dict()
    assert result.state.keys() == own.keys() and result.num_classes == 1000
    assert {key: value.shape for key, value in result.state.items()} == {key: v.shape for key, v in own.items()}
    # Nothing is made up, lost or interpolated but for what depends on the size of the map alone.
    made = sum(v.numel() for k, v in result.state.items() if not k.endswith(STATISTICS))
    assert made == names.parameters, result.lines()


@pytest.mark.parametrize("name", ["agent_swin_t", "slab_cswin_t", "van_b0", "litv2_small"])
def test_a_list_with_a_name_too_few_or_another_shape_does_not_pass(name):
    names = listed(name)
    for key in [k for k in names if math.prod(names[k]) > 1 and not k.endswith(STATISTICS)][:: len(names) // 4]:
        less = release(names)
        del less[key]
        other = release(names) | {key: torch.empty(*(side + 1 for side in names[key]), device="meta")}
        foreign = release(names) | {f"{key}.foreign": torch.empty(1, device="meta")}
        for state in (less, other, foreign):
            assert not translated(name, state).fits or key.startswith("head"), key


@pytest.mark.parametrize("name", ["slab_cswin_t", "slab_cswin_s"])
def test_the_scale_that_slab_stores_in_cswin_has_its_place(name):
    result = translated(name, release(listed(name)))
    assert result.fits, result.lines()
    assert len([key for key in result.state if key.endswith("unused.scale")]) == 6
