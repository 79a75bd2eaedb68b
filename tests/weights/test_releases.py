"""Every release that is listed converts completely, by the names and shapes of its authors' parameters."""

import re

import pytest
import torch

from tests.parity import FIXTURES, load_fixture
from visionattn.weights import checkpoints
from visionattn.weights.commands.translate import translated

FAMILIES = sorted({row["family"] for row in checkpoints().values() if row["model"]})
NAMED = {path.name.partition(".")[0]: path for family in FAMILIES for path in (FIXTURES / family).glob("*.json.gz")}
REGISTERED = {name.partition(".")[0] for name, row in checkpoints().items() if row["model"]}


def release(fixture) -> dict[str, torch.Tensor]:
    """The parameters and statistics that a fixture lists, without storage."""
    names = [*fixture["params"], *fixture.get("buffers", [])]
    return {name: torch.empty(shape, device="meta") for name, shape, *_ in names}


def deeper(state: dict[str, torch.Tensor], depths: dict[int, int]) -> dict[str, torch.Tensor]:
    """``state`` with as many blocks in its stages as ``depths`` says, each like the first."""
    more = {}
    for key, value in state.items():
        if match := re.match(r"stage(\d)\.0\.(.*)", key):
            for block in range(depths[int(match[1])]):
                more.setdefault(f"stage{match[1]}.{block}.{match[2]}", value)
    return state | more


@pytest.mark.parametrize("name", sorted(NAMED.keys() & REGISTERED))
def test_a_release_converts_without_missing_or_unexpected_keys(name):
    fixture = load_fixture(f"{NAMED[name].parent.name}/{name}")
    result = translated(name, release(fixture))
    assert result.fits, result.lines()


@pytest.mark.parametrize("name", ["slab_cswin_t", "slab_cswin_s"])
def test_the_scale_that_slab_stores_in_cswin_has_its_place(name):
    state = release(load_fixture("releases/slab_cswin_t"))
    state = deeper(state, {1: 2, 2: 4, 3: 32, 4: 2}) if name == "slab_cswin_s" else state
    result = translated(name, state)
    assert result.fits, result.lines()
    assert len([key for key in result.state if key.endswith("unused.scale")]) == 6
    counted = [{k: v.numel() for k, v in part.items() if v.dim() > 1} for part in (state, result.state)]
    assert sum(counted[0].values()) == sum(counted[1].values())  # tables gain an axis, and none is interpolated
