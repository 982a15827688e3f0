"""Claims under test: engines cost little, a second worker nearly halves the time, bytes are equal.

Three measurements on Table 1 cut down to seconds: the time that an engine adds to each task (a
study of phantoms alone, which take next to nothing), the time of 1 and 2 workers from nothing to
the report, and whether two shares made the same bytes as one run.

    python benchmarks/studies.py [--tasks 200] [--record]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medbudget import load_base
from medbudget.progress import quiet
from medbudget.results import write_result
from medbudget.studies import Store, Study, Task, in_order, make_study, run, study_settings

SMALL = replace(
    study_settings("table1", "tiny"), n=64, steps=10, extractors=("layout",),
    overrides={"steps": 60},
    grid={"CFG scale": (1, 2, 3, 5), "vectors": (8, 16, 32, 64), "cases": (5, 10, 50, 100)},
)  # fmt: skip


def plan_small() -> Study:
    """Return the study that is timed: 7 short trainings and 40 blocks of images."""
    return make_study("table1", "tiny", base_hash=load_base("tiny").hash, settings=SMALL)


def timed(tasks: Any, folder: Path, **options: Any) -> float:
    """Return the seconds of a run."""
    start = time.monotonic()
    run(tasks, Store(folder), **options)
    return time.monotonic() - start


def overhead(count: int, folder: Path) -> dict[str, float]:
    """Return what each engine adds to a task, seconds, start left out: `count` against 8 tasks."""

    def tasks(n: int) -> list[Task]:
        same = {"source": "phantoms", "kind": "chest", "label": "healthy", "split": "train"}
        return [Task("images", same | {"seed": 0, "n": 1, "size": 32 + i}) for i in range(n)]

    start = time.monotonic()
    for task in tasks(count):  # what they cost without any engine
        from medbudget import make_phantoms

        make_phantoms("chest", "healthy", 1, size=task.settings["size"])
    bare = (time.monotonic() - start) / count
    found = {"phantom alone": bare}
    engines: dict[str, dict[str, Any]] = {"local": {}, "local, 2 workers": {"workers": 2}}
    if find_spec("ray"):
        engines["ray"] = {"engine": "ray"}
    for name, options in engines.items():
        place = folder / name.replace(" ", "")
        timed(tasks(8), place / "few", **options)
        few = timed(tasks(8), place / "few2", **options)
        many = timed(tasks(count), place / "many", **options)
        found[name] = (many - few) / (count - 8) - bare / options.get("workers", 1)
    return found


def results(tasks: Any, folder: Path) -> list[bytes]:
    """Return the bytes of every result, in the study's order."""
    store = Store(folder)
    return [store.path(task).read_bytes() for task in in_order(tasks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=200, help="for the overhead of a task")
    parser.add_argument("--record", action="store_true", help="write results/studies.json")
    parser.add_argument("--share", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    study = plan_small()
    if args.share:
        run(study.tasks, Store(Path(args.share[0])), shard=args.share[1])
        return
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values: dict[str, Any] = {"tasks": len(in_order(study.tasks))}
        values["seconds"] = {
            str(n): timed(study.tasks, folder / f"workers{n}", workers=n) for n in (1, 2)
        }
        values["speed-up"] = values["seconds"]["1"] / values["seconds"]["2"]
        shares = [
            subprocess.Popen([sys.executable, __file__, "--share", folder / "shared", f"{i}/2"])
            for i in (1, 2)
        ]
        if any(share.wait() for share in shares):
            raise RuntimeError("a share failed")
        alone = results(study.tasks, folder / "workers1")
        values["two workers, equal bytes"] = alone == results(study.tasks, folder / "workers2")
        values["two shares, equal bytes"] = alone == results(study.tasks, folder / "shared")
        values["overhead per task (s)"] = overhead(args.tasks, folder)
    for name, value in values.items():
        print(f"{name}: {value}")
    if args.record:
        command = f"python benchmarks/studies.py --tasks {args.tasks} --record"
        print(f"wrote {write_result('studies', values, command=command)}")


if __name__ == "__main__":
    main()
