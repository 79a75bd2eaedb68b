"""The recipes of papers for dense tasks: every one is accepted, and runs on data in the layout of the real set."""

from pathlib import Path

import pytest
import yaml

from tests.train.dense_data import ade20k, coco
from visionattn.train.cli import run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = ["segment/upernet_ade20k", "segment/fpn_ade20k", "detect/mask_rcnn_1x", "detect/mask_rcnn_3x"]
FAMILIES = sorted(path.stem for path in (CONFIGS / "dense").glob("*.yaml"))


def files(recipe, family):
    return ["-c", str(CONFIGS / f"{recipe}.yaml"), "-c", str(CONFIGS / "dense" / f"{family}.yaml")]


def dev_run(recipe, family, folder, *flags):
    segment = recipe.startswith("segment")
    root = (ade20k if segment else coco)(folder)
    size = ["--data.img_size=64"] if segment else ["--model.min_size=[64]", "--model.max_size=96"]
    common = [f"--data.root={root}", "--data.num_workers=0", "--model.pretrained=false", "--trainer.fast_dev_run=true"]
    return run(["fit", *files(recipe, family), *common, *size, *flags])


@pytest.mark.parametrize(
    "recipe, family",
    [*((recipe, "van") for recipe in RECIPES), *((RECIPES[n % 4], family) for n, family in enumerate(FAMILIES))],
)
def test_recipes_are_accepted(recipe, family, capsys):
    with pytest.raises(SystemExit) as exit:
        run(["fit", *files(recipe, family), "--print_config"])
    assert not exit.value.code
    given = yaml.safe_load((CONFIGS / "dense" / f"{family}.yaml").read_text())["model"]["init_args"]
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert {key: model["init_args"][key] for key in given} == given
    assert model["init_args"]["lr_batch"] == 16


@pytest.mark.parametrize("recipe", RECIPES[:3])  # the last differs from the third by its numbers only
def test_recipes_run_a_step(recipe, tmp_path):
    small = "{embed_dims: [8, 16, 16, 24], depths: [1, 1, 1, 1], mlp_ratios: [2, 2, 2, 2], drop_path_rate: 0.1}"
    narrow = {"upernet": "{width: 16}", "fpn": "{width: 16, pyramid: 16}"}
    flags = [f"--model.head_args={value}" for key, value in narrow.items() if key in recipe]
    flags += ["--model.fpn_channels=16"] if recipe.startswith("detect") else []
    cli = dev_run(recipe, "van", tmp_path, f"--model.model_args={small}", *flags)
    assert cli.trainer.global_step == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_run_a_step_with_the_real_models(recipe, family, tmp_path):
    assert dev_run(recipe, family, tmp_path).trainer.global_step == 1


def test_a_dev_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data=SceneMasks", "--data.img_size=64", "--model=Segmentation", "--model.name=test_resnet"]
    flags += ["--model.head=mlp", "--model.head_args={width: 16}", "--trainer.fast_dev_run=true"]
    run(["fit", *flags])
    assert not list(tmp_path.iterdir())
