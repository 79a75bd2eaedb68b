"""An operator, a folder: the same file names in each, and no way around the doors."""

from pathlib import Path

import pytest

from tests.test_architecture import imported, sources

KERNELS = "visionattn.kernels"
FOLDER = Path(__file__).resolve().parents[2] / "kernels"
OPERATORS = sorted(path.name for path in FOLDER.iterdir() if (path / "op.py").is_file())
# One operator is made of another.
MADE_OF = {"flow": {"linear_attn"}, "linear_attn": {"focused_map"}}


def parts(module: str) -> list[str]:
    """Of ``visionattn.kernels.window.cpu``: window and cpu."""
    return module.split(".")[2:]


def test_every_folder_is_an_operator_or_what_they_share():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*OPERATORS, "common"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_the_same_files(operator):
    files = {path.stem for path in (FOLDER / operator).glob("*.py")}
    assert {"__init__", "op", "cpu"} <= files
    triton = {"triton", "triton_kernels", "launches"}
    assert triton <= files or not triton & files


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_have_tests_of_the_same_names(operator):
    tests = {path.name for path in (Path(__file__).parent / operator).glob("*.py")}
    wanted = {"test_op.py"} | ({"triton_cases.py"} if (FOLDER / operator / "triton.py").is_file() else set())
    assert wanted <= tests, f"tests/kernels/{operator} lacks {sorted(wanted - tests)}"


@pytest.mark.parametrize("module", sorted(name for name in sources() if name.startswith(KERNELS + ".")))
def test_operators_import_what_is_shared_and_nothing_of_each_other(module):
    own = parts(module)[0]
    for name in imported(sources()[module]):
        if not name.startswith(KERNELS + ".") or name not in sources():
            continue
        other = parts(name)
        if other[0] not in (own, "common"):
            assert own != "common", f"{module} imports {name}; what operators share knows none of them"
            assert other[0] in MADE_OF.get(own, ()), f"{module} imports {name}, of another operator"


@pytest.mark.parametrize("module", sorted(name for name in sources() if not name.startswith(KERNELS)))
def test_everybody_else_comes_in_by_the_door(module):
    """From ``visionattn.kernels`` or an operator, never from ``common`` or a file within an operator's folder."""
    for name in imported(sources()[module]):
        if name.startswith(KERNELS + ".") and name in sources():
            assert parts(name)[0] != "common" and len(parts(name)) == 1, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(sources()))
def test_underscored_names_stay_in_their_file(module):
    assert not parts(module) or not module.rpartition(".")[2].startswith("_") or module.endswith("__main__")
    ours = sources()
    for name in imported(ours[module]):
        home, _, leaf = name.rpartition(".")
        assert not (home in ours and leaf.startswith("_")), f"{module} imports {leaf}, which is private to {home}"
