"""Print constraints.txt: the installed versions of all that medbudget asks for, and their needs."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import Requirement

HEADER = """\
# The versions that the book was last built and tested with, on Python 3.11 and later; an older
# Python takes what pip finds within the bounds of pyproject.toml.
# `make constraints` writes this file anew from a fresh environment without constraints.
"""
OF_TORCH = re.compile(r"(nvidia|cuda|triton)(-|$)")  # torch pins its own, by platform


def installed_closure(root: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Return name -> version of what `root[extras]` needs here, directly or not."""
    found: dict[str, str] = {}
    seen = set()
    todo = [(root, extras)]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker and not any(need.marker.evaluate({"extra": e}) for e in ("", *extras)):
                continue
            key = re.sub(r"[-_.]+", "-", need.name).lower()
            found[key] = metadata.version(key)
            todo.append((key, tuple(sorted(need.extras))))
    return found


if __name__ == "__main__":
    print(HEADER, end="")
    for name, version in sorted(installed_closure("medbudget", ("book", "dev")).items()):
        if not OF_TORCH.match(name) and name != "medbudget":
            print(f'{name}=={version.split("+")[0]} ; python_version >= "3.11"')
