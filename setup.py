"""Finds the packages; everything else is in pyproject.toml, which cannot rename the packages it discovers."""

from setuptools import find_packages, setup

MAPPED = ("backbones", "kernels", "configs", "weights")

setup(
    packages=find_packages(include=["visionattn", "visionattn.*"])
    + [f"visionattn.{name}" for top in MAPPED for name in (top, *(f"{top}.{child}" for child in find_packages(top)))]
)
