"""The authors' figures: fetched, checked, credited; a placeholder where one is not there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGE = "Text\n\n![A chest, synthetic.](../book/authors/a.png)\n\n*Credit.*\n"


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a repository of one figure and its licence in a folder."""
    module = load_script(ROOT / "book" / "figures.py")
    there = tmp_path / "theirs"
    there.mkdir()
    Image.new("L", (4, 4)).save(there / "a.png")
    (there / "LICENSE").write_text("MIT")
    files = {}
    for name in ("a.png", "LICENSE"):
        content = (there / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files[name] = module.AuthorsFile(name, len(content), digest, "a synthetic chest")
    monkeypatch.setattr(module, "URL", there.as_uri() + "/")
    monkeypatch.setattr(module, "FIGURES", {"a": files["a.png"]})
    monkeypatch.setattr(module, "LICENCE", files["LICENSE"])
    monkeypatch.delenv(module.SWITCH, raising=False)
    for part in ("book/_static", "notebooks"):
        (tmp_path / "stage" / part).mkdir(parents=True)
    (tmp_path / "stage" / "book" / "page.md").write_text(PAGE)
    return module


def test_the_build_uses_what_is_there_and_fetches_only_when_asked(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stage, folder = tmp_path / "stage", tmp_path / "ours"
    page, placed = stage / "book" / "page.md", stage / "book" / "authors" / "a.png"
    figures.place_figures(stage, folder)
    assert not folder.exists() and "`make figures`" in capsys.readouterr().out
    assert Image.open(placed).width > 400
    assert "![A placeholder; make figures fetches the figure: A chest" in page.read_text()
    page.write_text(PAGE)
    monkeypatch.setenv(figures.SWITCH, "1")
    figures.place_figures(stage, folder)
    assert placed.read_bytes() == (tmp_path / "theirs" / "a.png").read_bytes()
    assert page.read_text() == PAGE
    assert (stage / "book" / "_static" / "authors_licence.txt").read_text() == "MIT"
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_the_pinned_one_is_refused(
    figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "theirs" / "a.png").write_bytes(b"other")
    (problem,) = figures.fetch_all(tmp_path / "ours")
    assert re.search(r"a\.png: .*has SHA-256 \w{12}…, not \w{12}…", problem)
    assert not (tmp_path / "ours" / "a.png").exists()
    (tmp_path / "ours" / "a.png").write_bytes(b"other")  # nor is one that lies there used
    figures.place_figures(tmp_path / "stage", tmp_path / "ours")
    assert "placeholder" in (tmp_path / "stage" / "book" / "page.md").read_text()
    (tmp_path / "theirs" / "a.png").unlink()
    monkeypatch.setenv(figures.SWITCH, "1")  # offline: a note, and the build goes on
    (tmp_path / "stage" / "book" / "page.md").write_text(PAGE)
    figures.place_figures(tmp_path / "stage", tmp_path / "ours")
    assert "note: a.png" in capsys.readouterr().out


def test_a_page_that_names_an_unknown_figure_is_refused(
    figures: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "stage" / "book" / "page.md").write_text("![b](authors/b.png)")
    with pytest.raises(ValueError, match=r"page\.md names authors/b\.png; .*has: a"):
        figures.place_figures(tmp_path / "stage", tmp_path / "ours")


def test_every_page_credits_the_authors_under_their_figure() -> None:
    module = load_script(ROOT / "book" / "figures.py")
    pages = module.read_pages(ROOT)
    for page, text in pages.items():
        for match in module.IMAGE.finditer(text):
            below = text[match.end() : match.end() + 800]
            assert "MIT licence" in below and "dewilde2024budget" in below, f"{page}: {match[0]}"


def test_nothing_of_the_authors_is_committed() -> None:
    assert "/book/authors/" in (ROOT / ".gitignore").read_text().splitlines()
