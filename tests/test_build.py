"""The book's build: originals stay as they are, one failing chapter stops no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the `book` extra")
pytest.importorskip("papermill", reason="needs the `book` extra")

SCRIPT = Path(__file__).resolve().parent.parent / "book" / "build.py"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script at work in a small repository of two chapters, of which the first fails."""
    spec = importlib.util.spec_from_file_location("book_build", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(module, "STAGE", tmp_path / "_build" / "stage")
    monkeypatch.setattr(module, "SITE", tmp_path / "_build" / "html")

    def build_site() -> bool:
        module.SITE.mkdir(parents=True)
        (module.SITE / "index.html").touch()
        return True

    monkeypatch.setattr(module, "build_site", build_site)
    monkeypatch.setattr(sys, "argv", ["build.py"])
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, source in {"00_bad": "1 / 0", "01_good": "print(6 * 7)"}.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return module


def test_one_failing_chapter(
    build: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    originals = {p: p.read_bytes() for p in (tmp_path / "notebooks").iterdir()}
    assert build.main() == 1
    out = capfd.readouterr().out
    assert "ZeroDivisionError" in out and "00_bad FAILED" in out
    assert "1 of 2 chapters failed" in out and "01_good FAILED" not in out
    assert str(tmp_path / "_build" / "html" / "index.html") in out
    assert {p: p.read_bytes() for p in (tmp_path / "notebooks").iterdir()} == originals
    good = nbformat.read(build.STAGE / "notebooks" / "01_good.ipynb", as_version=4)
    assert good.cells[0].outputs[0].text == "42\n"
    assert set(json.loads((build.BUILD / "timings.json").read_text(encoding="utf-8"))) == {
        "00_bad",
        "01_good",
    }


def test_only_the_chapters_asked_for(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", "01_good"])
    assert build.main() == 0
    assert "00_bad" not in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["build.py", "09_other"])
    with pytest.raises(SystemExit):
        build.main()
    assert "no chapter 09_other; there are 00_bad, 01_good" in capfd.readouterr().err


def test_what_git_ignores_is_not_copied(build: ModuleType, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "."], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("*.tmp\n")
    (tmp_path / "notebooks" / "x.tmp").touch()
    build.stage()
    names = sorted(p.name for p in (build.STAGE / "notebooks").iterdir())
    assert names == ["00_bad.ipynb", "01_good.ipynb"]


def test_without_git_it_says_so_and_goes_on(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_DIR", "nowhere")
    assert [p.stem for p in build.stage()] == ["00_bad", "01_good"]
    assert "is not a git checkout" in capsys.readouterr().out
