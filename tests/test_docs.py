"""The library's page names every public name, and the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
API = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "book").glob("api*.md"))
PACKAGES = ("medbudget", "medbudget.metrics", "medbudget.studies", "medbudget.stylegan3")
# whoever reads these for the first time wants to see one call
WITH_EXAMPLES = {
    "medbudget": "load_base describe make_phantoms save_images invert sample interpolate ellipse "
    "inpaint evaluate frechet_distance parse_prompt Embedding.save Score",
    "medbudget.sampling.sampler": "total_guidance",
    "medbudget.metrics": "compute_auc delong hanley_mcneil detectable_difference membership_inference",
    "medbudget.metrics.neighbours": "wilson",
    "medbudget.reader": "compute_preference required_pairs",
    "medbudget.data.splits": "split_patients",
}


def find(path: str) -> Any:
    """Return what a dotted name names; where a module and a function share it, the function."""
    first, *parts = path.split(".")
    found, name = importlib.import_module(first), first
    for part in parts:
        name = f"{name}.{part}"
        if not hasattr(found, part):
            importlib.import_module(name)
        found = getattr(found, part)
    return found


def listed() -> list[Any]:
    """Return every object that the page documents."""
    found = []
    for path, members in re.findall(r":: (medbudget[\w.]*)(?:\n   :members: (.*))?", API):
        found += [find(path)] + [find(f"{path}.{name}") for name in re.findall(r"\w+", members)]
    return found


def public() -> dict[str, Any]:
    """Return the functions and classes of `__all__`, and those that a chapter imports."""
    names = {f"{package}.{name}" for package in PACKAGES for name in find(package).__all__}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for node in ast.walk(ast.parse("".join(cell["source"]))):
                    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medbud"):
                        names |= {f"{node.module}.{name.name}" for name in node.names}
    found = {name: find(name) for name in sorted(names)}
    return {name: it for name, it in found.items() if inspect.isfunction(it) or inspect.isclass(it)}


def test_every_public_name_stands_on_the_page_with_a_docstring() -> None:
    there = {id(it) for it in listed()}
    missing = [name for name, it in public().items() if id(it) not in there]
    assert not missing, f"book/api*.md lack {missing}"
    silent = [it for it in listed() if not (it.__doc__ or "").strip()]
    assert not silent


def test_what_is_used_most_has_an_example() -> None:
    for module, names in WITH_EXAMPLES.items():
        for name in names.split():
            assert ">>> " in (find(f"{module}.{name}").__doc__ or ""), f"{module}.{name}"


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "medbudget").rglob("*.py")
    if "\n    >>> " in path.read_text(encoding="utf-8")
    or "\n        >>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    assert runner.tries > 0 and runner.failures == 0, "".join(said)
    assert list(tmp_path.iterdir()) == [], "an example left files behind"


def test_the_overview_was_drawn_with_this_base(tiny: Any) -> None:
    from PIL import Image

    with Image.open(ROOT / "book" / "_static" / "overview.png") as image:
        assert image.info["base_hash"] == tiny.hash, "run python book/overview.py"
