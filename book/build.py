"""Run every chapter in a staging folder and build the site from what came out.

The notebooks in the repository are only ever read: a failing chapter would write its error into
them. Prints the time of each chapter and where the site is; exits with 1 if a chapter failed or
the site has warnings (the other chapters run all the same).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
STAGE = BUILD / "stage"
SITE = BUILD / "html"
PUBLISHED = ("book", "notebooks", "results", "_config.yml", "_toc.yml", "README.md", "CITATION.cff")


def set_environment() -> None:
    """Make runs quiet, offline, and the same whoever starts them."""
    from medbudget.artifacts import count_cores

    defaults = {
        "OMP_NUM_THREADS": str(min(count_cores(), 8)),  # the embedded base is too small for more
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
    folders = (ROOT / "benchmarks" / "results", ROOT / "results")
    for name in ("timings", "reliability"):
        page = STAGE / "book" / f"{name}.md"
        if page.is_file():
            from timings import fill_page

            text = fill_page(name, page.read_text(encoding="utf-8"), *folders)
            page.write_text(text, encoding="utf-8")
    return sorted((STAGE / "notebooks").glob("*.ipynb"))


def run_chapter(notebook: Path) -> str | None:
    """Execute one staged notebook in place; return the error, if there is one."""
    import papermill

    try:
        papermill.execute_notebook(
            notebook,
            notebook,
            cwd=notebook.parent,
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
        )
    except Exception as error:  # whatever a chapter raises, the others should still run
        return str(error)
    return None


def build_site() -> bool:
    """Build the staged book; warnings count as failure."""
    shutil.rmtree(SITE, ignore_errors=True)
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", os.fspath(STAGE)]
    command += ["--path-output", os.fspath(ROOT), "-W", "-n", "--keep-going", "--quiet"]
    return subprocess.run(command).returncode == 0 and (SITE / "index.html").exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="run only these, e.g. 00_quickstart")
    chosen = parser.parse_args().chapters
    set_environment()
    notebooks = stage()
    names = [n.stem for n in notebooks]
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no chapter {', '.join(unknown)}; there are {', '.join(names)}")

    seconds: dict[str, float] = {}
    failed: list[str] = []
    for notebook in notebooks:
        name = notebook.stem
        if chosen and name not in chosen:
            continue
        print(f"running {name} …", flush=True)
        start = time.monotonic()
        error = run_chapter(notebook)
        seconds[name] = round(time.monotonic() - start, 1)
        if error:
            failed.append(name)
            print(f"{error}\n{name} FAILED after {seconds[name]:.0f} s", flush=True)
    (BUILD / "timings.json").write_text(json.dumps(seconds, indent=1) + "\n")

    print("building the site …", flush=True)
    start = time.monotonic()
    built = build_site()
    print(f"\n{'chapter':<28}{'seconds':>8}")
    for name, value in seconds.items():
        print(f"{name:<28}{value:>8.1f}{'  FAILED' if name in failed else ''}")
    print(f"{'site':<28}{time.monotonic() - start:>8.1f}{'' if built else '  FAILED'}")
    if failed:
        print(f"{len(failed)} of {len(seconds)} chapters failed; the error of each stands above")
    if not built:
        print("the site has warnings, shown above; each counts as an error")
    if (SITE / "index.html").exists():
        print(f"the book is at {SITE / 'index.html'}")
    return 1 if failed or not built else 0


if __name__ == "__main__":
    sys.exit(main())
