"""Make recorded results again: after a new base, all that the old one made.

    python benchmarks/record.py [NAME …] [--real FOLDER] [--work _build/record] [--lanes 2] [--list]

Runs the command that each file in results/ names, in as many lanes as cores, one thread each; what
was interrupted goes on from the stores in --work where a command has one: on Ctrl-C, SIGTERM or a
closed terminal the running commands are stopped, and none is begun. Without names: every result of
another base than the package's, and whatever an interrupted recording left. The words that ship must
be of this base and of these phantoms already (`python -m pretraining.words`), and so must the disease
scores (`python -m pretraining.diseases`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medbudget import load_base, make_phantoms
from medbudget.base import Base
from medbudget.data.phantoms import KINDS
from medbudget.files import hash_tensors, hold, write_text
from medbudget.metrics import compute_auc, disease_score
from medbudget.results import StaleResultError, count_cores, load_result
from medbudget.tiny import CASES, SPECS, find_trained, load_trained

ROOT = Path(__file__).resolve().parent.parent
RENAMED = {  # commands of results that were recorded when they had another form
    "medbudget study stylegan3 --store stylegan3_tiny --preset tiny --kimg 30 --record": (
        "medbudget study stylegan3 --store stylegan3_tiny --set gan.kimg=30; "
        "python -m pretraining.rivals --store stylegan3_tiny --set gan.kimg=30"
    ),
}
XRAYS = "own=xrays"  # as a recorded command names real X-rays, prepared by:
PREPARE = (
    "medbudget prepare folder {real} --labels {real}/index.csv --patient-column patient --size 64 "
    "--split .34,.33,.33 --per-class 95 --out {out}"
)
LONGEST = (
    "tiny_base", "budget_tiny", "table2_tiny", "budget_tiny_own", "stylegan3_tiny", "interpolation_tiny",
    "table1_tiny",
)  # fmt: skip


def find_stale(folder: Path, base_hash: str) -> list[str]:
    """Return the names of the results that another base made, those that take longest first."""
    stale = []
    for path in folder.glob("*.json"):
        try:
            load_result(path.stem, base_hash=base_hash, folder=folder)
        except StaleResultError:
            stale.append(path.stem)
    return in_order(stale)


def in_order(names: list[str]) -> list[str]:
    """Return names, each once, those that take longest first: so lanes end together."""
    return sorted(set(names), key=lambda name: (*(name != long for long in LONGEST), name))


def split_command(
    text: str, *, real: Path | None, store: Path, go_on: bool = False
) -> list[list[str]]:
    """Return a recorded command's parts, ready to run; `go_on` after an interruption.

    Raises
    ------
    ValueError
        It needs real images and there is no `real`.
    """
    programs = {
        "python": sys.executable,
        "medbudget": str(Path(sys.executable).parent / "medbudget"),
    }
    parts = []
    text = RENAMED.get(text, text)
    if real is None and ("--real" in text or XRAYS in text):
        raise ValueError(f"{text!r} needs --real: name the folder of real images")
    if XRAYS in text:
        out = shlex.quote(f"{store}_data/xrays")  # a study records the folder's own name
        text = f"{PREPARE.format(real=shlex.quote(str(real)), out=out)}; {text}"
        text = text.replace(XRAYS, f"own={out}")
    for part in text.split("; "):
        program, *words = shlex.split(part)
        for option, value in (("--real", real), ("--store", store)):
            if option in words:
                words[words.index(option) + 1] = str(value)
        if words[0].endswith("tiny_base.py"):
            words += ["--store", str(store), *(["--go-on"] if go_on else [])]
        parts.append([programs[program], *words])
    return parts


class Lanes:
    """Run commands side by side, and stop them together."""

    def __init__(self, work: Path) -> None:
        self.work, self.stopped = work, False
        self.running: set[subprocess.Popen[bytes]] = set()

    def run(self, name: str, parts: list[list[str]]) -> bool:
        """Run the parts one after the other into ``NAME.log``; return whether all succeeded."""
        start = time.monotonic()
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        result = "recorded"
        with open(self.work / f"{name}.log", "a", encoding="utf-8") as log:
            for part in parts:
                if self.stopped:
                    result = "stopped"
                    break
                child = subprocess.Popen(
                    part, cwd=ROOT, env=one_thread, stdout=log, stderr=log, start_new_session=True
                )
                self.running.add(child)
                if self.stopped:  # between the look above and now
                    self.end(child)
                code = child.wait()
                self.running.discard(child)
                if code:
                    result = f"failed with {code}, see {log.name}"
                    break
        if result == "recorded":
            (self.work / f"{name}.begun").unlink(missing_ok=True)
        print(f"{name}: {result} after {time.monotonic() - start:.0f} s", flush=True)
        return result == "recorded"

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Ask a command and its workers to end: a training saves its checkpoint first."""
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)

    def catch_signals(self) -> None:
        """Stop at Ctrl-C and SIGTERM, and at a closed terminal unless nohup says to go on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        """End what runs, begin nothing more."""
        self.stopped = True
        for child in list(self.running):
            self.end(child)


def check_words(base: Base) -> None:
    """Raise unless the words that ship were learned on this base, from today's phantoms."""
    drawn: dict[tuple[str, str], torch.Tensor] = {}
    for kind, label, n_vectors, cases in SPECS:
        word = load_trained(kind, label, base, n_vectors=n_vectors, cases=cases)
        if (kind, label) not in drawn:
            drawn[kind, label] = make_phantoms(kind, label, CASES).images
        if hash_tensors({"images": drawn[kind, label][:cases]}) != word.record["images_hash"]:
            name = find_trained(kind, label, n_vectors=n_vectors, cases=cases).name
            raise ValueError(
                f"{name} was learned from other phantoms than today's: delete it and learn it again "
                "with python -m pretraining.words"
            )


def check_diseases(n: int = 24) -> None:
    """Raise unless the disease scores know today's phantoms: with others a recording is in vain."""
    for kind, labels in KINDS.items():
        sets = [make_phantoms(kind, one, n, seed=77, split="val").images for one in labels]
        for disease, images in zip(labels[1:], sets[1:]):
            scores = [disease_score(part, kind, disease) for part in (sets[0], images)]
            if (auc := compute_auc(np.repeat([0, 1], n), np.concatenate(scores))) < 0.7:
                raise ValueError(
                    f"the disease score of {disease} tells {kind} phantoms apart with an AUC of "
                    f"{auc:.2f}, at least .7 is needed; fit the scores anew with python -m "
                    "pretraining.diseases"
                )


def check_real(folder: Path) -> None:
    """Raise unless the folder has what commands want of it: hours later is too late."""
    for name in ("normal", "pneumonia", "index.csv"):
        if not (folder / name).exists():
            raise ValueError(
                f"--real {folder} has no {name}; it needs normal/, pneumonia/, index.csv"
            )


def begin(work: Path, name: str, command: str) -> None:
    """Note that a command is begun, from its beginning, and forget what an earlier one recorded."""
    for old in (work / name).glob("*.recorded"):
        old.unlink()
    write_text(work / f"{name}.begun", command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="files in results/; all stale ones"
    )
    parser.add_argument("--real", type=Path, help="folder with normal/ and pneumonia/")
    parser.add_argument("--work", type=Path, default=ROOT / "_build" / "record")
    parser.add_argument("--lanes", type=int, default=count_cores())
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args()
    folder = ROOT / "results"
    base = load_base("tiny")
    work = args.work.resolve()
    begun = {path.stem: path.read_text(encoding="utf-8") for path in work.glob("*.begun")}
    names = in_order(args.names or [*find_stale(folder, base.hash), *begun])
    unknown = sorted(set(names) - {path.stem for path in folder.glob("*.json")})
    if unknown:
        parser.error(f"no results/{unknown[0]}.json")
    real = args.real.resolve() if args.real else None
    try:
        if real:
            check_real(real)
    except ValueError as error:
        parser.error(str(error))
    commands, fresh = {}, []
    for name in names:
        go_on = name in begun
        if not go_on:
            fresh.append(name)
            begun[name] = json.loads((folder / f"{name}.json").read_text("utf-8"))["command"]
        try:
            commands[name] = split_command(begun[name], real=real, store=work / name, go_on=go_on)
        except ValueError as error:
            parser.error(str(error))
    if args.list:
        for name, parts in commands.items():
            print(f"{name}: {'; '.join(shlex.join(part) for part in parts)}")
        return
    check_words(base)
    check_diseases()
    work.mkdir(parents=True, exist_ok=True)
    with hold(work):
        for name in fresh:  # a file that has a part of its rows names a part of its command
            begin(work, name, begun[name])
        lanes = Lanes(work)
        lanes.catch_signals()
        with ThreadPoolExecutor(args.lanes) as pool:
            done = [pool.submit(lanes.run, name, parts) for name, parts in commands.items()]
            results = [future.result() for future in done]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
