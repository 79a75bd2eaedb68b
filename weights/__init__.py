"""The checkpoint manifest: which weights exist, where they lie and how their images are prepared."""

import tomllib
from functools import cache
from importlib import resources

__all__ = ["manifest", "pretrained_cfgs"]

# Rows carry facts that timm's cfg has no field for; they stay in the manifest.
_NOT_FOR_TIMM = {"params_m", "gmacs", "top1"}


@cache
def manifest() -> dict[str, dict[str, dict]]:
    """``{family: {"arch.tag": row}}``, each row completed by the family's ``defaults``."""
    families = tomllib.loads(resources.files(__name__).joinpath("manifest.toml").read_text(encoding="utf-8"))
    return {
        family: {name: {**table.get("defaults", {}), **row} for name, row in table["models"].items()}
        for family, table in families.items()
    }


def _timm_rows(family: str):
    for name, row in manifest()[family].items():
        yield name, {key: value for key, value in row.items() if key not in _NOT_FOR_TIMM}


def pretrained_cfgs(family: str, **common) -> dict[str, dict]:
    """A family's rows in the form of timm's ``generate_default_cfgs``.

    Args:
        family: Table of the manifest.
        common: Fields of every cfg that belong to the code, such as ``first_conv`` and ``classifier``.
    """
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} | common
        for name, row in _timm_rows(family)
    }
