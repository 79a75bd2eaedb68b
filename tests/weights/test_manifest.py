"""Every row of the manifest: says what it must, and leads to a model that can take its weights."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg

import visionattn
from tests.backbones.test_parity import CASES
from tests.parity import load_fixture
from visionattn.weights import WeightsError
from visionattn.weights.commands.count import count
from visionattn.weights.commands.table import find, markdown
from visionattn.weights.commands.translate import shadow, translated
from visionattn.weights.locate import cache_name, first_url
from visionattn.weights.manifest import FACTS, checkpoints, link, manifest, pretrained_cfgs

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}
MODELS = [name for name, row in checkpoints().items() if row["model"]]
every_row = pytest.mark.parametrize("name", checkpoints())
every_model = pytest.mark.parametrize("name", MODELS)


@every_row
def test_row_is_well_formed(name):
    row = checkpoints()[name]
    unknown = row.keys() - FIELDS - FACTS.keys() - {"family", "model"}
    assert not unknown, f"explain {unknown} in FACTS of weights/manifest.py, or use a field of timm's PretrainedCfg"
    assert link(row) in ("direct", "hub", "browser", "bundled", "none")
    assert row.get("task", "classify") in ("classify", "detect", "segment", "restore")
    assert row["license"] and row["origin_url"].startswith("https://")
    for key in ("url", "by_hand"):
        if key in row:
            assert (row[key] if isinstance(row[key], str) else row[key][0]).startswith("https://")
    for key in ("top1", "miou"):
        assert 20 < row.get(key, 50) <= 100
    assert len(row.get("sha256", "0" * 64)) == 64 and row.get("size", 1) > 0
    assert isinstance(row.get("verified", ""), str), "say what was run"
    assert link(row) != "none" or "description" in row, "say that no weights are published, or where they are: by_hand"


@every_model
def test_model_builds_on_the_meta_device_and_its_preprocessing_resolves(name):
    net = shadow(name.partition(".")[0])
    cfg = timm.get_pretrained_cfg(name)
    row = checkpoints()[name]
    assert cfg.num_classes == row["num_classes"] and cfg.license == row["license"]
    if row["num_classes"] == 1000:
        close = 1e-3 if "params_m" in row.get("counted", ()) else 0.03  # of what is rounded to whole millions
        number = sum(p.numel() for p in net.parameters()) / 1e6
        assert abs(number - row["params_m"]) / row["params_m"] < close, f"{number:.4g} million parameters"
    config = resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert config["input_size"] == tuple(row["input_size"])
    assert len(config["mean"]) == len(config["std"]) == row["input_size"][0]
    assert create_transform(**config) is not None


@pytest.mark.parametrize("case", [case for case in CASES if not case.kwargs], ids=lambda case: case.fixture)
def test_translation_accepts_the_authors_names_and_shapes(case):
    fixture = load_fixture(case.fixture)
    names = {name: torch.empty(shape, device="meta") for name, shape in fixture["params"]}
    result = translated(case.name, names)
    assert result.fits, result.lines()
    assert result.num_classes == fixture["output"]["shape"][-1]


GMACS = ["van_b4.untrained", "flatten_pvt_v2_b0.in1k", "prepbn_deit_t.in1k", "litv2_small.in1k", "nat_mini.in1k"]


def compare(name):
    """The row of a checkpoint and what is counted; GMAC of papers leave out or count more of the small operations."""
    row, counted = checkpoints()[name], count(name)
    for key, rounding in (("params_m", 0.03), ("gmacs", 0.1)):
        close = 1e-3 if key in row.get("counted", ()) else rounding
        assert abs(counted[key] - row[key]) / row[key] <= close, (name, key, counted)


@pytest.mark.parametrize("name", GMACS)
def test_operations_are_those_that_are_counted_on_the_model(name):
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, row in checkpoints().items() if row["model"] or "timm" in row])
def test_all_parameters_and_operations_are_those_that_are_counted(name):
    compare(name)


def test_a_name_without_a_model_cannot_be_counted():
    for name in ("maxim", "nothing"):
        with pytest.raises(WeightsError, match=f"{name} is no checkpoint of a model that can be built here"):
            count(name)


def test_every_model_says_how_large_it_is_and_limits_drop_none_that_does_not():
    rows = checkpoints()
    assert all({"params_m", "gmacs"} <= row.keys() for row in rows.values() if row["model"] or "timm" in row)
    assert find(max_params=1e9) == rows == find(min_params=0)
    assert "flatten_pvt_t.in1k" in find(max_params=13) and "flatten_pvt_t.in1k" not in find(max_params=12)


def test_every_model_has_a_row_and_every_row_a_model():
    assert {name.partition(".")[0] for name in MODELS} == set(visionattn.list_models())
    assert {name for table in manifest().values() for name in table} == set(MODELS)


def test_a_family_without_rows_is_told_which_to_write():
    with pytest.raises(ValueError, match=r'manifest.toml has no row \[new.models."ARCH.TAG"\]'):
        pretrained_cfgs("new")


def test_every_published_link_has_a_row():
    """Of the families that are here; an author of a new one finds its links in the same list."""
    rows = checkpoints()
    links = {first_url(row) for row in rows.values()} | {row.get("by_hand") for row in rows.values()}
    families = {row["family"] for row in rows.values()}
    lines = (ROOT / "tests" / "fixtures" / "published_links.txt").read_text().splitlines()
    wanted = [line.split() for line in lines if not line.startswith("#")]
    missing = [url for family, url in wanted if any(f.startswith(family) for f in families) and url not in links]
    assert not missing, "add rows to weights/manifest.toml: FAMILY.models, or FAMILY.files for what is no model here"


def test_downloads_have_different_names_in_the_cache():
    names = {}
    for name, row in checkpoints().items():
        if url := first_url(row):
            assert names.setdefault(cache_name(url, name), url) == url


def test_models_that_timm_has_are_named_as_timm_names_them():
    for name, row in checkpoints().items():
        if "timm" in row:
            assert row["timm"] in timm.list_pretrained(row["timm"]), name


def test_the_table_of_the_documentation_is_that_of_the_manifest():
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    assert text == markdown(), "run: python -m visionattn weights table --out docs/weights.md"
