"""The book's build: originals stay as they are, one failing chapter stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

nbformat = pytest.importorskip("nbformat", reason="needs the `book` extra")
pytest.importorskip("papermill", reason="needs the `book` extra")

SCRIPT = Path(__file__).resolve().parent.parent / "book" / "build.py"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script at work in a small repository of two chapters, of which the first fails."""
    module = load_script(SCRIPT)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(module, "STAGE", tmp_path / "_build" / "stage")
    monkeypatch.setattr(module, "SITE", tmp_path / "_build" / "html")
    monkeypatch.setattr(module, "CACHE", tmp_path / "_build" / "chapters")

    def build_site() -> bool:
        module.SITE.mkdir(parents=True, exist_ok=True)
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
    assert build.read_date() == {}
    monkeypatch.setenv("PATH", "")
    assert [p.stem for p in build.stage()] == ["00_bad", "01_good"] and build.read_date() == {}


def count_runs(build: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """Build; return the chapters that were run, not taken from the cache."""
    ran = []
    run_chapter = build.run_chapter

    def watched(notebook: Path, parameters: dict[str, object]) -> str | None:
        ran.append(notebook.stem)
        return run_chapter(notebook, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(build, "run_chapter", watched)
        patch.setattr(sys, "argv", ["build.py", *arguments])
        build.main()
    return ran


def run_quickly(path: Path, parameters: dict[str, object]) -> str | None:
    """Stand in for papermill, which takes a second."""
    notebook = nbformat.read(path, as_version=4)
    text = f"ran with {parameters.get('steps', 7)}\n"
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    nbformat.write(notebook, path)
    return None


def printed(build: ModuleType, chapter: str = "01_good") -> str:
    notebook = nbformat.read(build.STAGE / "notebooks" / f"{chapter}.ipynb", as_version=4)
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture
def small(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One chapter with a parameter, a library of one file, one result; built once."""
    (tmp_path / "notebooks" / "00_bad.ipynb").unlink()
    cell = nbformat.v4.new_code_cell("steps = 7", metadata={"tags": ["parameters"]})
    cells = [cell, nbformat.v4.new_code_cell("print('ran with', steps)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, tmp_path / "notebooks" / "01_good.ipynb")
    for name in ("library/code.py", "results/one.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n", encoding="utf-8")
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "library")
    monkeypatch.setattr(build, "run_chapter", run_quickly)
    assert count_runs(build, monkeypatch) == ["01_good"]
    return build


def test_an_unchanged_chapter_comes_from_the_cache_with_its_time(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timings, notebook = small.BUILD / "timings.json", small.STAGE / "notebooks" / "01_good.ipynb"
    before, text = timings.read_bytes(), notebook.read_bytes()
    assert "from the cache" not in capfd.readouterr().out
    assert count_runs(small, monkeypatch) == []
    assert timings.read_bytes() == before and notebook.read_bytes() == text
    out = capfd.readouterr().out
    assert "01_good" in out and "from the cache" in out and "unchanged" in out
    assert count_runs(small, monkeypatch, "--fresh") == ["01_good"]


def test_two_runs_write_the_same_notebook(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = small.STAGE / "notebooks" / "01_good.ipynb"
    monkeypatch.undo()  # papermill itself, and no cache
    source = notebook.read_bytes()
    texts = []
    for _ in range(2):
        notebook.write_bytes(source)
        assert small.run_chapter(notebook, {"steps": 5}) is None
        texts.append(notebook.read_bytes())
    assert texts[0] == texts[1] and b"ran with 5" in texts[0]


@pytest.mark.parametrize(
    "changed", ["library/code.py", "results/one.json", "library/new.bin", "results/new.json"]
)
def test_a_changed_library_file_or_result_runs_the_chapter_again(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    (tmp_path / changed).write_text("2\n", encoding="utf-8")
    assert count_runs(small, monkeypatch) == ["01_good"]
    assert count_runs(small, monkeypatch) == []
    if not changed.endswith(("new.bin", "new.json")):
        (tmp_path / changed).write_text("1\n", encoding="utf-8")
        assert count_runs(small, monkeypatch) == [], "going back costs a run"


def test_other_packages_or_switches_run_the_chapter_again(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        count_runs(small, monkeypatch)
    monkeypatch.setattr(small, "distributions", lambda: [])
    assert count_runs(small, monkeypatch) == ["01_good"]


def test_parameters_are_never_mixed_up(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert printed(small) == "ran with 7\n"
    for steps in ("5", "6"):
        assert count_runs(small, monkeypatch, "-p", "steps", steps) == ["01_good"]
        assert printed(small) == f"ran with {steps}\n"
    assert count_runs(small, monkeypatch, "-p", "steps", "5") == []
    assert printed(small) == "ran with 5\n"
    assert count_runs(small, monkeypatch) == []
    assert printed(small) == "ran with 7\n"
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["build.py", "-p", "stepz", "5"])
    with pytest.raises(SystemExit):
        small.main()
    assert "01_good has no parameter stepz; it has steps" in capfd.readouterr().err


def test_a_damaged_entry_is_said_and_run_again(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (entry,) = small.CACHE.iterdir()
    entry.write_bytes(entry.read_bytes()[:50])
    assert count_runs(small, monkeypatch) == ["01_good"]
    assert "cannot be read (JSONDecodeError)" in capfd.readouterr().out


def test_a_failed_chapter_is_not_cached(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run_chapter", lambda notebook, _: "no" * ("bad" in notebook.stem))
    for names in (["00_bad", "01_good"], ["00_bad"]):
        assert count_runs(build, monkeypatch) == names


def test_what_differs_between_runs_or_needs_python_does_not_stay(
    build: ModuleType, tmp_path: Path
) -> None:
    output = nbformat.v4.new_output
    view = output("display_data", {build.WIDGET: {"model_id": "x"}})
    cell = nbformat.v4.new_code_cell("w", outputs=[view], metadata={"tags": ["remove-output"]})
    cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01"}
    said = [output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    cells = [cell, nbformat.v4.new_code_cell("p", outputs=said)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {}, "widgets": {}})
    nbformat.write(notebook, tmp_path / "x.ipynb")
    assert build.clean_notebook(tmp_path / "x.ipynb") is None
    found = nbformat.read(tmp_path / "x.ipynb", as_version=4)
    assert not {"papermill", "widgets"} & set(found.metadata)
    assert found.cells[0].outputs == [] and "execution" not in found.cells[0].metadata
    assert [o.text for o in found.cells[1].outputs] == ["a\nb\n"]
    cell.metadata["tags"] = []
    nbformat.write(notebook, tmp_path / "x.ipynb")
    problem = build.clean_notebook(tmp_path / "x.ipynb")
    assert problem is not None and "blank" in problem and "remove-output" in problem


def test_only_whole_fresh_builds_are_recorded(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "| a | [01_good](notebooks/01_good.ipynb) | `c` | not measured yet | ? | s |\n"
    (tmp_path / "README.md").write_text(row, encoding="utf-8")
    for arguments in (["--record"], ["--record", "--fresh", "01_good"]):
        with pytest.raises(SystemExit):
            count_runs(small, monkeypatch, *arguments)
    assert count_runs(small, monkeypatch, "--record", "--fresh") == ["01_good"]
    record = json.loads((tmp_path / "book" / "chapter_times.json").read_text(encoding="utf-8"))
    seconds = record["values"]["seconds"]["01_good"]
    assert record["command"].endswith("--fresh --record")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == row.replace("not measured yet", f"{seconds:.0f} s")
