"""Prints pip constraints that hold every dependency in pyproject.toml at the oldest version allowed there."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
for requirement in sorted({requirement for group in groups for requirement in group if ">=" in requirement}):
    print(re.sub(r"\[.*?\]", "", requirement).replace(">=", "==", 1))  # a constraint has no extras
