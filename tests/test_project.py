"""The promises of README, Makefile and metadata agree with each other."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import medbudget

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))


def test_every_make_command_in_prose_is_a_target() -> None:
    prose = README + "".join(p.read_text(encoding="utf-8") for p in (ROOT / "book").glob("*.md"))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", prose, flags=re.MULTILINE))
    assert {"book", "test"} <= named <= make_targets()


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line.split(" <")[0] for line in lines if line.startswith("make")] == [
        "make test",
        "make book",
    ]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_version_stands_in_one_place() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == medbudget.__version__
    assert 'dynamic = ["version"]' in PYPROJECT
    assert not re.search(r'^version\s*=\s*"', PYPROJECT, flags=re.MULTILINE)


def test_citation_is_complete_and_cites_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("Medical diffusion on a budget")
    assert [a["family-names"] for a in paper["authors"]] == [
        "Wilde",
        "Saha",
        "Rooij",
        "Huisman",
        "Litjens",
    ]
    assert paper["year"] == 2024


def test_conda_environment_installs_what_make_installs() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    command = re.search(r"pip install (.*)", MAKEFILE)
    assert command is not None
    assert " ".join(pip) == command[1].replace('"', "")
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    floor = re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)
    assert floor is not None
    assert int(python.split(".")[1]) >= int(floor[1])


def test_extras_of_the_install_command_exist() -> None:
    command = re.search(r'--editable "\.\[([a-z,]+)\]"', MAKEFILE)
    assert command is not None
    for extra in command[1].split(","):
        assert re.search(rf"^{extra} = \[", PYPROJECT, flags=re.MULTILINE), extra


def test_constraints_pin_every_dependency_and_name_no_place() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    from packaging.requirements import Requirement
    from packaging.version import Version

    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|file:|://|@", text)
    lines = [Requirement(s) for s in text.splitlines() if not s.startswith("#")]
    pinned = {re.sub(r"[-_.]+", "-", r.name).lower(): r for r in lines}
    project = tomllib.loads(PYPROJECT)["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["book"] + extras["dev"]:
        wanted = Requirement(line)
        pin = pinned[re.sub(r"[-_.]+", "-", wanted.name).lower()]
        (spec,) = pin.specifier
        assert spec.operator == "=="
        assert wanted.specifier.contains(Version(spec.version), prereleases=True), line
        assert pin.marker is not None
        assert not pin.marker.evaluate({"python_version": "3.10"})
        assert pin.marker.evaluate({"python_version": "3.12"})


def test_every_dependency_declares_its_floor() -> None:
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    sys.path.insert(0, str(ROOT / "book"))
    from floors import list_floors

    floors = dict(line.split("==") for line in list_floors(PYPROJECT))
    assert {"torch": "2.6", "transformers": "5.6", "pytest": "8"}.items() <= floors.items()
    broken = PYPROJECT.replace('"torch>=2.6"', '"torch"')
    with pytest.raises(ValueError, match="'torch' has no floor"):
        list_floors(broken)


def test_makefile_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text(
        f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8); $1"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "book", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode != 0
    assert "Python 3.11 or later" in done.stderr
    assert "3.8" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_every_chapter_and_page_of_the_contents_exists() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [contents["root"]]
    files += [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    for file in files:
        assert any((ROOT / f"{file}{end}").is_file() for end in (".md", ".ipynb")), file
    chapters = {f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert chapters == {file for file in files if file.startswith("notebooks/")}


def test_links_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


COLAB = dict(
    line.split("==")
    for line in (ROOT / "tests" / "colab.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)
REPLACED = {"filelock"}  # before 3.32.7, a forked process inherits locks


def find_replaced(packages: dict[str, str]) -> set[str]:
    """Return what pip would replace where `packages` stand, to install what we need."""
    lines = re.findall(r"^dependencies = \[(.*?)^\]", PYPROJECT, flags=re.DOTALL | re.MULTILINE)[0]
    wanted = [Requirement(text) for text in re.findall(r'"([^"]+)"', lines)]
    return {w.name for w in wanted if w.name in packages and packages[w.name] not in w.specifier}


def test_colabs_own_packages_are_left_alone() -> None:
    assert {"torch", "transformers", "ipywidgets", "numpy"} <= COLAB.keys()
    assert find_replaced(COLAB) == REPLACED
    assert find_replaced({**COLAB, "torch": "2.1.0"}) == {*REPLACED, "torch"}


def test_the_colab_cell_pins_nothing() -> None:
    import json

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        setup = next("".join(c["source"]) for c in cells if "google.colab" in "".join(c["source"]))
        (command,) = re.findall(r"command = (\[.*?\])", setup)
        assert '"install"' in command and "source" in command, path.stem
        assert re.search(r' or "(medbudget @ git\+https://[\w./-]+)?"\n', setup), path.stem
        for replacing in ("--upgrade", "-U", "--force", "constraints", "torch"):
            assert replacing not in command, (path.stem, replacing)


def list_imports(path: Path, modules: set[str]) -> tuple[set[str], set[str]]:
    """Return the modules of ours that a file imports: all, and those inside functions.

    Imports for type checkers alone are left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typed = {inner for node in checking for inner in ast.walk(node)}
    every, hidden = set(), set()
    for node in set(ast.walk(tree)) - typed:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part in modules else str(node.module) for part in parts]
        ours = modules & {*names}
        every |= ours
        hidden |= set() if node in tree.body else ours
    return every, hidden


def find_modules(package: Path) -> dict[str, Path]:
    parts = {
        path: path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")
    }
    return {".".join(p.parts).removesuffix(".__init__"): path for path, p in parts.items()}


def test_files_import_downward_and_hide_no_import() -> None:
    modules = find_modules(ROOT / "medbudget")
    imports = {name: list_imports(path, {*modules}) for name, path in modules.items()}
    TopologicalSorter({n: every - {n} for n, (every, _) in imports.items()}).prepare()  # no circle
    # commands import what they need when they run, so that help is fast
    hidden = {n: inside for n, (_, inside) in imports.items() if inside and ".cli" not in n}
    assert not hidden


def test_rooms_stand_on_seven_floors_and_files_are_read_in_one_sitting() -> None:
    """A room is a folder or a file of the package; the door of ``python -m`` stands above them."""
    modules = find_modules(ROOT / "medbudget")
    assert max(path.read_text("utf-8").count("\n") for path in modules.values()) <= 350
    needs: dict[str, set[str]] = {}
    for name, path in modules.items():
        rooms = {
            ours.partition(".")[2].partition(".")[0] for ours in list_imports(path, {*modules})[0]
        }
        room = name.partition(".")[2].partition(".")[0]
        needs.setdefault(room, set()).update(rooms - {room})
    floors: dict[str, int] = {}
    for room in TopologicalSorter(needs).static_order():
        floors[room] = 1 + max((floors[below] for below in needs[room]), default=0)
    assert max(floor for room, floor in floors.items() if room != "__main__") <= 7, floors


def test_the_test_of_imports_sees_a_hidden_one(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from medbudget import b\n\ndef f():\n    import medbudget.c\n")
    ours = {"medbudget", "medbudget.b", "medbudget.c"}
    assert list_imports(tmp_path / "a.py", ours) == (
        {"medbudget.b", "medbudget.c"},
        {"medbudget.c"},
    )


def test_no_file_is_too_long_to_read() -> None:
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "medbudget").rglob("*.py")
    }
    assert not {path: n for path, n in lengths.items() if n > 350}
