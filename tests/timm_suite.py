"""Run timm's own model tests over our models: ``python -m tests.timm_suite [pytest arguments]``.

timm's release on the package index carries its tests; this fetches the one that matches the installed version, lets the
suite see our models alone, and adds our modules to its hand-written list of those with ``forward_intermediates``.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import timm

# Nothing is waived: TorchScript and FX pass too.
PLUGIN = """
import timm
import timm.models
import visionattn

from visionattn.frames.isotropic import PrefixIsotropic

_list = timm.list_models
_OURS = set(visionattn.list_models())
# timm tests networks whose last features are tokens apart, as it does its own "vit_*".
_TOKENS = {name for name in _OURS if issubclass(timm.model_entrypoint(name).__annotations__["return"], PrefixIsotropic)}


def ours(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    tokens = isinstance(filter, (list, tuple)) and "vit_*" in filter
    if filter and not tokens:
        return []  # a test written for particular models of timm
    tags = pretrained if include_tags is None else include_tags
    names = _list("", pretrained=pretrained, exclude_filters=exclude_filters,
                  name_matches_cfg=name_matches_cfg, include_tags=tags)
    wanted = _TOKENS if tokens else _OURS - _TOKENS if "vit_*" in exclude_filters else _OURS
    return [name for name in names if name.split(".")[0] in wanted]


timm.list_models = timm.models.list_models = ours
timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: []
"""
# Parametrised over every listed model; the suite's other tests name single models of timm.
TESTS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
)


def fetch_suite(folder: Path) -> Path:
    """The ``tests`` folder of the source release of the installed timm, downloaded into ``folder`` if need be."""
    name = f"timm-{timm.__version__}"
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        # fmt: off
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                        "--dest", str(folder), f"timm=={timm.__version__}"], check=True)
        # fmt: on
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / name / "tests"


def main(arguments: list[str]) -> int:
    root = Path(__file__).parent.parent
    folder = root / "build" / "timm-suite"
    folder.mkdir(parents=True, exist_ok=True)
    suite = fetch_suite(folder)
    (suite / "visionattn_suite_plugin.py").write_text(PLUGIN)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), str(suite)]))
    wanted = [f"test_models.py::{name}" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-p", "visionattn_suite_plugin", "-q", "-rs", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *wanted, *arguments], cwd=suite, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
