"""Every place where a string becomes an object, and who may write the string; a new one has to be added here."""

import ast
import re

from tests.test_architecture import sources

US = "a literal in this file"
OURS = "whoever installs the package: the names of its own files"
PLACES = {
    "visionattn.attention.mixer": "anyone: short names, layers of ours, or what the user lists in VISIONATTN_MIXERS",
    "visionattn.backbones": OURS,
    "visionattn.benchmark.models": OURS,
    "visionattn.kernels.common.flops": US,
    "visionattn.kernels.neighborhood.natten": US,
    "visionattn.train.dense.heads": US,
    "visionattn.train.cli": "the user's command: a configuration given to the command line is code",
    "visionattn.weights.limits": "nobody: a file that names a class is refused",
    "visionattn.weights.read": "anyone: what a pickle names is never looked up beyond PyTorch's weights_only list",
}
CALLS = {"import_module", "__import__", "eval", "exec", "get_class", "import_object", "torch_load", "unsafe_load"}
ATTRIBUTES = {
    ("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"), ("runpy", "run_path"),
    ("hub", "load"), ("importlib", "import_module"),
}  # fmt: skip


def makes_objects(text: str) -> bool:
    """Whether a module turns strings into objects: imports by name, unpickling, evaluation, class paths."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS:
                return True
            if isinstance(function, ast.Attribute):
                owner = function.value
                owner = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if (owner, function.attr) in ATTRIBUTES:
                    return True
    return bool(re.search(r"\bLightningCLI\b|\bimport yaml\b|\"class_path\"", text))


def test_every_place_is_listed():
    found = {name for name, path in sources().items() if makes_objects(path.read_text(encoding="utf-8"))}
    assert found == PLACES.keys()


def test_the_search_finds_what_it_should():
    for text in (
        "from importlib import import_module as m\nimport_module(x)",
        "import torch\ntorch.load(x)",
        "eval(x)",
    ):
        assert makes_objects(text)
    assert not makes_objects("model.eval()\nre.compile(x)")
