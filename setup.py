"""Finds the packages; everything else is in pyproject.toml, which cannot rename the packages it discovers."""

from setuptools import find_namespace_packages, find_packages, setup

MAPPED = ("backbones", "kernels", "configs", "weights")


def below(top: str) -> list[str]:
    """Sub-packages of a top-level folder; folders of data files alone count too."""
    return [f"{top}.{name}" for name in find_namespace_packages(top, exclude=["*__pycache__*"])]


setup(
    packages=find_packages(include=["visionattn", "visionattn.*"])
    + [f"visionattn.{name}" for top in MAPPED for name in (top, *below(top))]
)
