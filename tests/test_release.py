"""The release: small files that install, and work far from the checkout.

Dependencies are borrowed from this environment, unless MEDBUDGET_CLEAN_INSTALL=1 (`make release`)
asks for a truly clean one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import medbudget

pytest.importorskip("build", reason="needs the `dev` extra")
pytest.importorskip("hatchling", reason="needs the `dev` extra")

ROOT = Path(__file__).resolve().parent.parent
CLEAN = os.environ.get("MEDBUDGET_CLEAN_INSTALL") == "1"
LIMIT = 60e6  # bytes

pytestmark = pytest.mark.slow


def call(command: list[str | Path], folder: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel made of it."""
    out = Path(os.environ.get("MEDBUDGET_DIST", tmp_path_factory.mktemp("dist")))
    shutil.rmtree(out, ignore_errors=True)
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_both_files_are_small_and_complete(files: tuple[Path, Path]) -> None:
    sdist, wheel = files
    for file in files:
        size = file.stat().st_size
        print(f"{file.name}: {size / 1e6:.1f} MB")
        assert size < LIMIT, f"{file.name} has {size / 1e6:.1f} MB"
        assert f"-{medbudget.__version__}" in file.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = call(["git", "ls-files", "medbudget", "results"], ROOT).split()
    for name in tracked:
        inside = f"medbudget/{name}" if name.startswith("results/") else name
        assert inside in names, f"the wheel lacks {inside}"
    outside = {n for n in names if not n.startswith(("medbudget/", "medbudget-"))}
    assert not outside, outside
    with tarfile.open(sdist) as archive:
        inner = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"} <= inner


def test_the_wheel_works_outside_the_checkout(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = files
    home = tmp_path / "venv"
    venv.create(home, with_pip=CLEAN)
    bin_folder = home / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    if CLEAN:
        pins = ["--constraint", ROOT / "constraints.txt"]
        call([python, "-m", "pip", "install", "--quiet", *pins, wheel], tmp_path)
    else:
        pip = [sys.executable, "-m", "pip", "--python", python]
        call([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
        where = call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home)
        Path(where.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = "import medbudget; from medbudget.results import results_folder as f; "
    where += "print(medbudget.__file__, *f().glob('*.json'), sep='\\n')"
    package, *results = call([python, "-c", where], tmp_path).split("\n")
    assert Path(package).is_relative_to(home) and any(results)
    command = bin_folder / "medbudget"
    assert call([command, "--version"], tmp_path) == f"medbudget {medbudget.__version__}\n"
    small = "--steps 2 --batch-size 2 --n-vectors 2 --samples 0"
    commands = (
        "doctor",
        "phantoms real --n 6",
        f"invert real --token <x> --out x.safetensors {small}",
        "sample <x> --embeddings x.safetensors --out made --n 2 --steps 2",
    )
    code = "from contextlib import suppress\nfrom medbudget.cli import main\n"
    for line in commands:  # in one process: imports are slow
        code += f"with suppress(SystemExit):\n    main({line.split()})\n"
    said = call([python, "-c", code], tmp_path)
    assert f"medbudget {medbudget.__version__}" in said and "base tiny: ready" in said
    assert len(list((tmp_path / "made").glob("0*.png"))) == 2


@pytest.mark.network
def test_the_setup_cell_works_among_colabs_packages(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Several GB; MEDBUDGET_COLAB_PYTHON names a Python of Colab's version."""
    own = os.environ.get("MEDBUDGET_COLAB_PYTHON", "python3.13")
    if not shutil.which(own):
        pytest.skip(f"no {own}; set MEDBUDGET_COLAB_PYTHON")
    call([own, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    listed = ROOT / "tests" / "colab.txt"
    call([python, "-m", "pip", "install", "--quiet", "--requirement", listed], tmp_path)
    before = {*call([python, "-m", "pip", "freeze"], tmp_path).split("\n")}
    chapter = json.loads(next((ROOT / "notebooks").glob("00_*.ipynb")).read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "code"]
    code = [
        "import os, sys, types",
        "sys.modules['google.colab'] = types.ModuleType('google.colab')",
        f"os.environ['MEDBUDGET_SOURCE'] = {str(files[1])!r}",
        *cells[:3],
        "print(medbudget.__file__, preset, invert)",
        "from medbudget import widgets",
    ]
    (tmp_path / "cells.py").write_text("\n".join(code), encoding="utf-8")
    said = call([python, "cells.py"], tmp_path)
    assert f"medbudget {medbudget.__version__} on" in said and str(tmp_path / "venv") in said
    after = {*call([python, "-m", "pip", "freeze"], tmp_path).split("\n")}
    assert [line.split("==")[0] for line in before - after] == ["filelock"]  # all else is as it was
