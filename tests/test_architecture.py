"""The rules that keep the tree easy to see: who imports whom, what an import costs, what a package holds."""

import ast
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

import visionattn

ROOT = Path(visionattn.__file__).resolve().parent.parent
TOP = {"backbones", "kernels", "configs", "weights"}  # folders of the checkout that install inside the package
# Low to high: a module imports from its own layer and from lower ones.
LAYERS = (
    {"errors", "configs"},
    {"kernels", "weights"},
    {"layers"},
    {"attention"},
    {"frames"},
    {"hosts"},
    {"backbones"},
    {"features", "natten", "convert", "tune"},
    {"train", "benchmark", "weights.commands", "__main__"},
)


@cache
def sources() -> dict[str, Path]:
    """Every module of the project by its import name."""
    found = {}
    for path in [*ROOT.glob("visionattn/**/*.py"), *(p for top in TOP for p in ROOT.glob(f"{top}/**/*.py"))]:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] in TOP:
            parts.insert(0, "visionattn")
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


@cache
def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    """Height of a module of ours; the package itself stands below what only applications do."""
    name = module.removeprefix("visionattn").removeprefix(".")
    while name and not any(name in names for names in LAYERS):
        name = name.rpartition(".")[0]  # a part of a package may have a layer of its own
    return next((i for i, names in enumerate(LAYERS) if name in names), len(LAYERS) - 1)


def test_every_module_has_a_layer():
    names = {module.split(".")[1] for module in sources() if "." in module}
    assert names == {name.partition(".")[0] for name in set().union(*LAYERS)}


@pytest.mark.parametrize("module", sorted(set(sources()) - {"visionattn"}))
def test_imports_point_one_way(module):
    modules = sources()
    ours = {name for name in imported(modules[module]) if name in modules}
    if layer(module) < len(LAYERS) - 1:
        ours -= {"visionattn"} if len(ours) > 1 else set()  # `from visionattn import x` names both
    upward = {name for name in ours if layer(name) > layer(module)}
    assert not upward, f"{module} imports {sorted(upward)}, which lie above it"


@pytest.mark.parametrize("module", sorted(name for name in sources() if name.startswith("visionattn.kernels")))
def test_kernels_need_only_torch_and_triton(module):
    roots = {name.split(".")[0] for name in imported(sources()[module])}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "visionattn"}


def test_no_module_is_hidden_by_what_its_package_exports():
    """``import visionattn.kernels.flow`` and ``from visionattn.kernels import flow`` must mean one thing."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    package, _, leaf = name.rpartition('.')\n"
        "    module = importlib.import_module(name)\n"
        "    if getattr(sys.modules[package], leaf) is not module: print(name)\n"
    )
    pytest.importorskip("lightning")  # some modules need what only training does
    assert run(code, *sorted(set(sources()) - {"visionattn"}), cwd=ROOT).split() == []


def test_nothing_is_imported_by_its_folder_s_bare_name():
    for module, path in sources().items():
        bare = {name.split(".")[0] for name in imported(path)} & TOP
        assert not bare, f"{module} imports {bare}; write visionattn.{next(iter(bare))}"


def test_private_names_of_timm_are_imported_in_one_place():
    private = re.compile(r"timm(\.\w+)*\._\w+")
    users = {m for m, path in sources().items() if any(private.fullmatch(n) for n in imported(path))}
    assert users == {"visionattn.frames.backbone"}


def run(code: str, *args: str, **kwargs) -> str:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout


def test_import_is_light():
    heavy = ("lightning", "matplotlib", "triton", "transformers", "sklearn", "jsonargparse")
    code = (
        "import sys, time, timm; before = set(sys.modules); start = time.perf_counter(); import visionattn; "
        "print(time.perf_counter() - start, *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    # The quickest of three: the first may read files from a cold disk.
    results = [run(code, cwd=ROOT).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in results) < 1.0
    assert not set(results[0][1:]) & set(heavy)


def test_works_where_triton_and_the_training_extra_are_missing():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('triton', 'lightning', 'matplotlib', 'sklearn'))); "
        "import timm, torch, visionattn; model = timm.create_model('van_b0', depths=(1, 1, 1, 1)); "
        "model(torch.randn(2, 3, 32, 32)).sum().backward(); print('ok')"
    )
    assert run(code, cwd=ROOT).strip() == "ok"


def test_works_from_a_checkout_in_any_folder(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import visionattn.kernels, visionattn.configs; print('ok')"
    assert run(code, cwd=tmp_path).strip() == "ok"


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})", cwd=checkout)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for module, path in sources().items():
        wanted.add(module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py"))
    for top in TOP:
        wanted |= {
            f"visionattn/{p.relative_to(ROOT)}"
            for p in ROOT.glob(f"{top}/**/*")
            if p.suffix in (".toml", ".yaml", ".safetensors")
        }
    assert wanted - packed == set()
    stray = {name.split("/")[0] for name in packed} - {"visionattn", "visionattn_train.py"}
    assert all(name.endswith(".dist-info") for name in stray), stray


def test_unpacked_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import timm, visionattn; "
        "assert visionattn.list_models() and visionattn.__file__.startswith(sys.path[0]); "
        "from pathlib import Path; import visionattn.configs; "
        "assert list(Path(visionattn.configs.__file__).parent.rglob('*.yaml')); "
        "timm.create_model('van_b0', device='meta'); print('ok')"
    )
    assert run(code, cwd=tmp_path).strip() == "ok"


def test_wheel_has_the_version_of_the_source_and_is_typed(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (metadata,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {visionattn.__version__}\n" in packed.read(metadata).decode()
        assert "visionattn/py.typed" in packed.namelist()
