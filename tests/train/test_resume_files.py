"""Resume, validate and test with the configuration files and flags that a run was trained with."""

import pytest
import yaml

from visionattn.errors import UserError
from visionattn.train.cli import run

SMALL = {"embed_dims": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]}


@pytest.fixture
def files(tmp_path):
    """A recipe whose model and size of images are not those of the run, and a data file."""
    recipe = {
        "model": {"class_path": "visionattn.train.classify.Classification", "init_args": {"name": "nat_mini"}},
        "trainer": {"max_epochs": 2, "limit_train_batches": 6},
    }
    data = {"class_path": "visionattn.train.data.Digits", "init_args": {"batch_size": 32, "img_size": 32}}
    (tmp_path / "recipe.yaml").write_text(yaml.dump(recipe))
    (tmp_path / "data.yaml").write_text(yaml.dump(data))
    return ["-c", str(tmp_path / "recipe.yaml"), f"--data={tmp_path / 'data.yaml'}"]


@pytest.fixture
def trained(files, tmp_path):
    """Its flags, which change both."""
    flags = [*files, "--model.name=van_b0", f"--model.model_args={SMALL}", "--model.lr=0.01", "--data.img_size=48"]
    run(["fit", *flags, f"--out={tmp_path / 'run'}"])
    return flags, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"


def test_what_a_file_says_gives_way_to_the_checkpoint(files, trained):
    flags, checkpoint = trained
    for command in ("validate", "test"):
        for arguments in (files, flags):
            cli = run([command, *arguments, checkpoint])
            assert (cli.model.hparams.name, cli.datamodule.img_size) == ("van_b0", 48)


def test_a_run_goes_on_with_the_same_files_and_flags_or_without_the_flags(files, trained, tmp_path):
    flags, checkpoint = trained
    for n, arguments in enumerate((files, flags)):
        out = ["--trainer.max_epochs=3", f"--out={tmp_path / str(n)}"]
        cli = run(["fit", *arguments, checkpoint, *out])
        assert (cli.model.hparams.lr, cli.trainer.current_epoch, cli.datamodule.batch_size) == (0.01, 3, 32)


def test_what_is_typed_is_still_compared(files, trained, tmp_path):
    _, checkpoint = trained
    with pytest.raises(UserError, match="model.lr is 0.5, was 0.01"):
        run(["fit", *files, checkpoint, "--model.lr=0.5", f"--out={tmp_path / 'no'}"])
    with pytest.raises(UserError, match="model.name is 'resnet18', was 'van_b0'"):
        run(["validate", *files, checkpoint, "--model.name", "resnet18"])
