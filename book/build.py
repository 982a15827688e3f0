"""Run every chapter in a staging folder and build the site from what came out.

The notebooks in the repository are only ever read: a failing chapter would write its error into
them. A chapter whose notebook, parameters and surroundings (library, recorded results, packages,
device) are those of an earlier run comes from the cache. Prints the time of each chapter and where
the site is; exits with 1 if a chapter failed or the site has warnings (the other chapters run all
the same).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(str(getattr(find_spec("medbudget"), "origin", ROOT))).parent
BUILD = ROOT / "_build"
STAGE = BUILD / "stage"
SITE = BUILD / "html"
CACHE = BUILD / "chapters"
KEPT = 3  # cache entries of each chapter, so that going back to a branch costs nothing
WIDGET = "application/vnd.jupyter.widget-view+json"
# what a run's outcome may depend on; see set_environment
SWITCHES = ("OMP_NUM_THREADS", "PYTHONHASHSEED", "HF_HUB_OFFLINE", "MEDBUDGET_SD2")
PUBLISHED = (
    "book", "notebooks", "pretraining", "results",
    "_config.yml", "_toc.yml", "README.md", "CHANGELOG.md",
)  # fmt: skip


def set_environment() -> None:
    """Make runs quiet, offline, and the same whoever starts them."""
    from medbudget.results import count_cores

    defaults = {
        "OMP_NUM_THREADS": str(min(count_cores(), 8)),  # the embedded base is too small for more
        "OMP_WAIT_POLICY": "PASSIVE",  # beside another busy process, spinning costs tenfold
        "TQDM_DISABLE": "1",  # progress bars write to stderr, which counts as a warning
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one of the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def list_files() -> list[Path]:
    """Return the repository's files, relative: what git tracks, or what would be tracked."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        print(
            f"note: {ROOT} is not a git checkout that can be read ({reason.decode().strip()}); "
            f"copying everything in {', '.join(PUBLISHED)} instead",
            flush=True,
        )
        tops = [ROOT / name for name in PUBLISHED]
        paths = [p for top in tops for p in ([top] if top.is_file() else top.rglob("*"))]
        return [p.relative_to(ROOT) for p in paths if p.is_file() and "__pycache__" not in p.parts]
    return [Path(os.fsdecode(name)) for name in found.stdout.split(b"\0") if name]


def stage() -> list[Path]:
    """Copy the files afresh, with the same relative paths, and return the staged notebooks."""
    shutil.rmtree(STAGE, ignore_errors=True)
    for file in list_files():
        if file.parts[0] in PUBLISHED and (ROOT / file).is_file():
            target = STAGE / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, target)
    from pages import put_numbers, set_buttons

    set_buttons(STAGE, ROOT)
    folders = (ROOT / "benchmarks" / "results", ROOT / "results")
    for name in ("timings", "reliability"):
        page = STAGE / "book" / f"{name}.md"
        if page.is_file():
            from timings import fill_page

            text = fill_page(name, page.read_text(encoding="utf-8"), *folders)
            page.write_text(text, encoding="utf-8")
    put_numbers(STAGE, folders)
    return sorted((STAGE / "notebooks").glob("*.ipynb"))


# --------------------------------------------------------------------------- chapters


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder that is neither hidden nor compiled Python."""
    from medbudget.files import hash_file

    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != "__pycache__"]
    return {
        p.relative_to(folder).as_posix(): hash_file(p) for p in files if not p.name.startswith(".")
    }


def describe_surroundings() -> dict[str, Any]:
    """Return all that a chapter's outputs depend on, but for its notebook and parameters."""
    import torch

    from medbudget.files import hash_file

    return {
        "library": hash_folder(LIBRARY),
        "results": hash_folder(ROOT / "results"),
        "build": hash_file(__file__),
        "packages": sorted({f"{d.metadata['Name']} {d.version}" for d in distributions()}),
        "python": f"{platform.python_version()} {platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "switches": {name: os.environ.get(name) for name in SWITCHES},
    }


def find_entry(notebook: Path, parameters: Mapping[str, Any], surroundings: dict[str, Any]) -> Path:
    """Return the cache's file for one run of a staged notebook, which need not be there."""
    from medbudget.files import hash_file, hash_settings

    key = {"notebook": hash_file(notebook), "parameters": dict(parameters), **surroundings}
    return CACHE / f"{notebook.stem}-{hash_settings(key)}.json"


def read_entry(path: Path) -> tuple[str, float] | None:
    """Return a cached notebook's text and the seconds that its run took; None if there is none."""
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return str(entry["notebook"]), float(entry["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        print(f"note: {path} cannot be read ({type(error).__name__}); the chapter runs anew")
        return None


def write_entry(path: Path, notebook: Path, seconds: float) -> None:
    """Put an executed notebook into the cache, and drop the oldest entries of its chapter."""
    from medbudget.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"seconds": seconds, "notebook": notebook.read_text(encoding="utf-8")})
    entries = sorted(path.parent.glob(f"{notebook.stem}-*.json"), key=lambda p: p.stat().st_mtime)
    for old in entries[:-KEPT]:
        old.unlink()


def run_chapter(notebook: Path, parameters: Mapping[str, Any]) -> str | None:
    """Execute one staged notebook in place; return the error, if there is one."""
    import papermill

    try:
        papermill.execute_notebook(
            notebook,
            notebook,
            parameters=dict(parameters),
            cwd=notebook.parent,
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
            extra_arguments=["--IPKernelApp.log_level=40"],  # not that its port is unencrypted
        )
        return clean_notebook(notebook)
    except Exception as error:  # whatever a chapter raises, the others should still run
        return str(error)


def clean_notebook(path: Path) -> str | None:
    """Take out what differs between two runs, or needs a kernel; return what cannot stay."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"
        if cell.cell_type != "code":
            continue
        joined: list[Any] = []
        for output in [] if "remove-output" in tags else cell.outputs:
            if WIDGET in output.get("data", {}):
                return (
                    f"cell {cell.id} shows a widget, which stays blank on a page without Python: "
                    "show frames (medbudget.widgets.show_frames), or tag the cell remove-output"
                )
            same = joined and output.output_type == joined[-1].output_type == "stream"
            if same and output.name == joined[-1].name:  # pieces come as the kernel flushes them
                joined[-1].text += output.text
            else:
                joined.append(output)
        cell.outputs = joined
    nbformat.write(notebook, path)
    return None


def record_times(seconds: Mapping[str, float]) -> None:
    """Write the chapters' times down, and into the README."""
    from timings import fill_readme

    from medbudget.files import write_text
    from medbudget.results import write_result

    command = "python book/build.py --fresh --record"
    values = {"seconds": dict(seconds)}
    write_result("chapter_times", values, command=command, folder=ROOT / "book")
    readme = ROOT / "README.md"
    write_text(readme, fill_readme(readme.read_text(encoding="utf-8"), dict(seconds)))


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse names that a chapter's `parameters` cell does not have.

    Raises
    ------
    ValueError
    """
    import papermill

    allowed = papermill.inspect_notebook(notebook) if parameters else {}
    unknown = sorted(set(parameters) - set(allowed))
    if unknown:
        raise ValueError(
            f"{notebook.stem} has no parameter {', '.join(unknown)}; it has {', '.join(allowed)}"
        )


def parse_value(text: str) -> Any:
    """Read a number, a truth value or a quoted string; anything else is the string itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# --------------------------------------------------------------------------- site


def read_date() -> dict[str, str]:
    """Return the commit's date as the site's, so that a build on another day is the same."""
    command = ["git", "log", "-1", "--format=%ct"]
    try:
        date = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git: list_files has said so
        return {}
    return {"SOURCE_DATE_EPOCH": date} if date else {}


def build_site() -> bool:
    """Build the staged book; warnings count as failure."""
    for folder in (SITE, BUILD / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", os.fspath(STAGE)]
    command += ["--path-output", os.fspath(ROOT), "-W", "-n", "--keep-going", "--quiet"]
    done = subprocess.run(command, env={**read_date(), **os.environ})
    from address import read_address
    from meta import describe_site
    from pages import redirect_pages

    redirect_pages(SITE)
    describe_site(SITE, read_address(ROOT) if (ROOT / "pyproject.toml").is_file() else "")
    return done.returncode == 0 and (SITE / "index.html").exists()


def build_site_if_changed(surroundings: dict[str, Any]) -> tuple[bool, bool]:
    """Build the site unless the one there is of the same pages; return (good, built now)."""
    from medbudget.files import hash_settings, write_text

    stamp = BUILD / "site.txt"
    key = hash_settings({"stage": hash_folder(STAGE), "date": read_date(), **surroundings})
    if stamp.is_file() and (SITE / "index.html").is_file() and stamp.read_text() == key:
        return True, False
    stamp.unlink(missing_ok=True)
    good = build_site()
    if good:
        write_text(stamp, key)
    return good, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="run only these, e.g. 00_ten_pictures")
    parser.add_argument("--fresh", action="store_true", help="run them even if the cache has them")
    parser.add_argument(
        "--record",
        action="store_true",
        help="on an idle machine: write the times down, in README and book/chapter_times.json",
    )
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="set a parameter of these chapters, e.g. -p steps 5; may be repeated",
    )
    arguments = parser.parse_args()
    chosen = arguments.chapters
    parameters = {name: parse_value(value) for name, value in arguments.parameters}
    if arguments.record and (chosen or parameters or not arguments.fresh):
        parser.error(
            "--record is for the times of all chapters as they are: only --fresh beside it"
        )
    set_environment()
    notebooks = stage()
    names = [n.stem for n in notebooks]
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no chapter {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        for notebook in notebooks:
            if notebook.stem in (chosen or names):
                check_parameters(notebook, parameters)
    except ValueError as error:
        parser.error(str(error))

    surroundings = describe_surroundings()
    seconds: dict[str, float] = {}
    failed: list[str] = []
    cached: list[str] = []
    for notebook in notebooks:
        name = notebook.stem
        wanted = not chosen or name in chosen
        given = parameters if wanted else {}
        path = find_entry(notebook, given, surroundings)
        entry = None if arguments.fresh and wanted else read_entry(path)
        if entry is not None:
            text, seconds[name] = entry
            notebook.write_text(text, encoding="utf-8")
            cached.append(name)
            continue
        if not wanted:
            continue
        said = "".join(f" -p {key} {value}" for key, value in given.items())
        print(f"running {name}{said} …", end=" ", flush=True)
        start = time.monotonic()
        error = run_chapter(notebook, given)
        seconds[name] = round(time.monotonic() - start, 1)
        if error:
            failed.append(name)
            print(f"\n{error}\n{name} FAILED after {seconds[name]:.0f} s", flush=True)
        else:
            print(f"{seconds[name]:.0f} s", flush=True)
            write_entry(path, notebook, seconds[name])
    from figures import place_figures
    from pages import lead_with_picture

    for notebook in notebooks:
        if notebook.stem in seconds and notebook.stem not in failed:
            try:
                lead_with_picture(notebook)
            except ValueError as error:
                failed.append(notebook.stem)
                print(f"{error}\n{notebook.stem} FAILED", flush=True)
    place_figures(STAGE, ROOT / "book" / "authors")
    (BUILD / "timings.json").write_text(json.dumps(seconds, indent=1) + "\n")
    if arguments.record and not failed:
        record_times(seconds)
    page = STAGE / "book" / "timings.md"
    if page.is_file():
        from timings import fill_chapters

        text = fill_chapters(page.read_text(encoding="utf-8"), seconds)
        page.write_text(text, encoding="utf-8")

    print("building the site …", flush=True)
    start = time.monotonic()
    good, built = build_site_if_changed(surroundings)
    print(f"\n{'chapter':<28}{'seconds':>8}")
    for name, value in seconds.items():
        note = "  FAILED" if name in failed else "  from the cache" if name in cached else ""
        print(f"{name:<28}{value:>8.1f}{note}")
    note = "" if built else "  unchanged"
    print(f"{'site':<28}{time.monotonic() - start:>8.1f}{note if good else '  FAILED'}")
    if cached:
        print("from the cache: the time is that of the run; --fresh runs every chapter again")
    if failed:
        print(f"{len(failed)} of {len(seconds)} chapters failed; the error of each stands above")
    if not good:
        print("the site has warnings, shown above; each counts as an error")
    if (SITE / "index.html").exists():
        print(f"the book is at {SITE / 'index.html'}")
    return 1 if failed or not good else 0


if __name__ == "__main__":
    sys.exit(main())
