"""What the package imports: the trainer never, the rest of ours not below its commands, little for the manifest."""

import importlib
import re
import subprocess
import sys

import pytest

from tests.test_architecture import ROOT, imported, sources
from visionattn import weights

MODULES = sorted(name for name in sources() if name.startswith("visionattn.weights"))
BELOW = ("visionattn.errors", "visionattn.weights")

ONLY_WEIGHTS = """
import sys, types
package = types.ModuleType("visionattn")  # stands for the package, whose own import needs timm
package.__path__ = ["visionattn", "."]
sys.modules["visionattn"] = package
import visionattn.weights
assert visionattn.weights.checkpoints()["van_nano.digits"]["model"]
print(*sorted({"torch", "timm"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_trainer_and_only_commands_the_rest(module):
    names = {name for name in imported(sources()[module]) if name in sources()}
    assert not {name for name in names if name.startswith("visionattn.train")}
    if not module.startswith("visionattn.weights.commands"):
        assert all(name.startswith(BELOW) and not name.startswith("visionattn.weights.commands") for name in names)


def test_the_manifest_is_read_without_torch_and_timm():
    done = subprocess.run([sys.executable, "-c", ONLY_WEIGHTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


@pytest.mark.parametrize("module", [name for name in MODULES if name != "visionattn.weights"])
def test_no_function_hides_the_module_of_its_name(module):
    found = importlib.import_module(module)
    package, _, name = module.rpartition(".")
    assert getattr(sys.modules[package], name) is found


def test_the_package_says_what_each_module_is_for():
    names = [name.removeprefix("visionattn.weights.") for name in MODULES if name.count(".") == 2]
    missing = [name for name in names if not re.search(rf"^{name}[ /]", weights.__doc__, re.MULTILINE)]
    assert not missing, f"say in weights/__init__.py what {missing} are for"
