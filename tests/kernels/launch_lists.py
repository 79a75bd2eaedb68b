"""Finds, by reading the source, the Triton kernels that are launched, and the lists of launches that name them."""

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

import visionattn.kernels
from visionattn.kernels.common.launch import Launch


def modules() -> Iterator[ModuleType]:
    """Every module of the operators."""
    for info in pkgutil.walk_packages(visionattn.kernels.__path__, "visionattn.kernels."):
        yield importlib.import_module(info.name)


def functions(module: ModuleType) -> list[ast.FunctionDef]:
    """The functions of a module that are decorated with ``@jit``."""
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f for f in found if any(isinstance(d, ast.Name) and d.id == "jit" for d in f.decorator_list)]


def launched() -> set[tuple[str, str]]:
    """Module and name of every kernel that is launched: of every ``@jit`` function that no other one calls."""
    found, called = set(), set()
    for module in modules():
        for function in functions(module):
            found.add((module.__name__, function.name))
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            called |= {resolved(module, node.id) for node in calls if isinstance(node, ast.Name)}
    return found - called


def resolved(module: ModuleType, name: str) -> tuple[str, str]:
    """Where a name that a module uses is defined."""
    function = getattr(vars(module).get(name), "fn", None)
    return getattr(function, "__module__", module.__name__), name


def lists() -> dict[str, Callable[[torch.dtype, bool], Iterator[Launch]]]:
    """The function ``launches`` of every operator, by the module that it stands in."""
    found = {module.__name__: getattr(module, "launches", None) for module in modules()}
    return {name: function for name, function in found.items() if getattr(function, "__module__", None) == name}


def name_of(launch: Launch) -> tuple[str, str]:
    """Module and name of the kernel of a launch."""
    function = launch.kernel.fn
    return function.__module__, function.__name__
