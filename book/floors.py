"""Print the lowest version of each dependency that pyproject.toml allows, as ``name==version``.

``make floors`` installs these, and runs the quick tests with them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

# what the tests need
EXTRA = ("pytest", "pytest-xdist", "hypothesis", "pyyaml", "nibabel")


def list_floors(pyproject: str) -> list[str]:
    """Return ``name==version`` for each dependency, and for the tools of the tests."""
    project = tomllib.loads(pyproject)["project"]
    tools = [t for t in project["optional-dependencies"]["dev"] if t.startswith(EXTRA)]
    floors = []
    for line in [*project["dependencies"], *tools]:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", line)
        if match is None:
            raise ValueError(f"{line!r} has no floor: write name>=version")
        floors.append(f"{match[1]}=={match[2]}")
    return floors


if __name__ == "__main__":
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(list_floors(text)))
