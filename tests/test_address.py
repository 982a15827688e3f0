"""The repository's address stands in one place; the book is the same whenever it is built."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

nbformat = pytest.importorskip("nbformat", reason="needs the `book` extra")
pytest.importorskip("jupyter_book", reason="needs the `book` extra")

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://github.com/someone/budget"
CHAPTER = "11_your_data"
COLAB = (
    f"https://colab.research.google.com/github/someone/budget/blob/main/notebooks/{CHAPTER}.ipynb"
)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    monkeypatch.delitem(sys.modules, "build", raising=False)  # PyPI's, if a test before used it
    return load_script(ROOT / "book" / f"{name}.py")


def copy_book(folder: Path, address: str = ADDRESS) -> Path:
    """Copy what the address is written to, and fill it in as a maintainer would."""
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CITATION.cff", "_config.yml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "results").symlink_to(ROOT / "results")
    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results")
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = re.sub(r'^(# )?Repository = ".*"$', "", text, flags=re.MULTILINE)
    line = f'[project.urls]\nRepository = "{address}"' if address else "[project.urls]"
    project.write_text(text.replace("[project.urls]", line), encoding="utf-8")
    return folder


def test_every_file_is_in_line_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = load("address", monkeypatch).apply_address(ROOT)
    assert not stale, "run python book/address.py"


def test_an_address_goes_everywhere_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("address", monkeypatch)
    folder = copy_book(tmp_path)
    texts = module.apply_address(folder)
    chapters = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(p.name for p in texts) == sorted([*chapters, "README.md", "CITATION.cff"])
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    assert module.apply_address(folder) == {}
    notebook = nbformat.read(folder / "notebooks" / f"{CHAPTER}.ipynb", as_version=4)
    assert f"]({COLAB})" in notebook.cells[0].source
    assert f' or "medbudget @ git+{ADDRESS}"\n' in notebook.cells[2].source
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"git clone {ADDRESS} && cd budget\nmake book" in readme
    assert readme.count(f"]({COLAB.replace(CHAPTER, '00_ten_pictures')})") == 1
    assert f'repository-code: "{ADDRESS}"\n' in (folder / "CITATION.cff").read_text("utf-8")
    copy = copy_book(tmp_path / "none", address="")
    for path, text in texts.items():
        (copy / path.relative_to(folder)).write_text(text, encoding="utf-8")
    for path, text in module.apply_address(copy).items():
        path.write_text(text, encoding="utf-8")
    if not module.read_address(ROOT):
        for path in texts:
            name = path.relative_to(folder)
            assert (copy / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_another_host_than_github_gets_no_colab_badge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("address", monkeypatch)
    other = "https://gitlab.com/a/b"
    texts = module.apply_address(copy_book(tmp_path, other))
    assert all("colab-badge" not in text for text in texts.values())
    config = {"launch_buttons": {}, "html": {}}
    assert "colab_url" not in module.turn_on_buttons(config, other)["launch_buttons"]


def test_an_address_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="must be like https://HOST/OWNER/NAME"):
        load("address", monkeypatch).read_address(copy_book(tmp_path, "git@github.com:a/b.git"))


def hash_site(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]], str]:
    """Two builds of one commit, each with its own run of a chapter: site, hashes, printed."""
    folder = copy_book(tmp_path_factory.mktemp("book"))
    toc = f"format: jb-book\nroot: book/glossary\nchapters:\n- file: notebooks/{CHAPTER}\n"
    (folder / "_toc.yml").write_text(toc, encoding="utf-8")
    path = folder / "notebooks" / f"{CHAPTER}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [notebook.cells[0], notebook.cells[3]]  # title, parameters; no PyTorch
    figure = "import matplotlib.pyplot as plt\nplt.plot([n_patients, size])\nplt.show()"
    carries = {"tags": ["carries"], "mystnb": {"image": {"alt": "A line."}}}  # goes to the top
    notebook.cells.append(nbformat.v4.new_code_cell(figure, id="figure", metadata=carries))
    nbformat.write(notebook, path)
    (folder / ".gitignore").write_text("_build\n__pycache__\n", encoding="utf-8")
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    small = ["-p", "n_patients", "12", "-p", "size", "32"]
    command = [sys.executable, "book/build.py", CHAPTER, "--fresh", *small]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    hashes = []
    for _ in range(2):
        (folder / "_build" / "site.txt").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert f"running {CHAPTER} -p n_patients 12" in done.stdout, done.stderr
        assert "FAILED after" not in done.stdout, done.stdout
        hashes.append(hash_site(folder / "_build" / "html"))
    return folder / "_build" / "html", hashes, done.stdout


@pytest.mark.slow
def test_two_builds_of_one_commit_are_the_same(
    builds: tuple[Path, list[dict[str, str]], str],
) -> None:
    _, (one, two), _ = builds
    assert one and {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} == (
        set()
    )


@pytest.mark.slow
def test_an_address_turns_the_buttons_on(builds: tuple[Path, list[dict[str, str]], str]) -> None:
    site, _, said = builds
    assert "fill in `Repository`" not in said
    page = (site / "notebooks" / f"{CHAPTER}.html").read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"]+)"', page))
    path = f"notebooks/{CHAPTER}.ipynb"
    assert {
        COLAB,
        f"https://mybinder.org/v2/gh/someone/budget/main?urlpath=lab/tree/{path}",
        ADDRESS,
        f"{ADDRESS}/edit/main/{path}",
    } <= links
    assert any(link.startswith(f"{ADDRESS}/issues/new") for link in links)
    assert "colab-badge" not in page, "an image from the network"


def test_without_an_address_the_build_says_which_line_to_fill_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = load("build", monkeypatch)
    copy_book(tmp_path, address="")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STAGE", tmp_path / "stage")
    build.stage()
    assert "fill in `Repository` under [project.urls] in pyproject.toml" in capsys.readouterr().out
    config = (tmp_path / "stage" / "_config.yml").read_text(encoding="utf-8")
    assert config == (ROOT / "_config.yml").read_text(encoding="utf-8")


def test_links_that_are_gone_are_told_from_a_network_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summarise = load("links", monkeypatch).summarise
    place = {"filename": "book/x.md", "lineno": 3}
    fine = {"uri": "https://a.org", "status": "working", "info": "", **place}
    gone = {"uri": "https://b.org", "status": "broken", "info": "404 Client Error", **place}
    lost = {**gone, "info": "Failed to resolve 'b.org' ([Errno -3])"}
    inside = {**lost, "uri": "setup.html", "status": "unchecked"}
    assert summarise([fine, inside]) == ("1 links to other sites: 1 working", 0)
    text, code = summarise([fine, gone])
    assert code == 1 and "book/x.md:3: https://b.org: 404" in text
    text, code = summarise([lost, lost, inside])
    assert code == 0 and "no internet here: nothing could be asked" in text
    assert summarise([fine, lost])[1] == 1
