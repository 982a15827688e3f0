"""Record measured values for the book, and refuse those of another base."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medbudget.files import check_writable, write_json

RESULT_KEYS = ("date", "command", "base_hash", "device", "values")


class StaleResultError(ValueError):
    """A recorded result that belongs to another base; the message names the command to repeat."""


def results_folder() -> Path:
    """Return the folder of recorded results: ``results/`` of the checkout, else the package's."""
    checkout = Path(__file__).resolve().parents[1] / "results"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parent / "results"


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> str:
    """Return cores and threads in words."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"CPU, {count_cores()} cores ({platform.machine()}), OMP_NUM_THREADS {threads}"


def describe_device() -> str:
    """Return cores, threads and load in words: what a measured time depends on."""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{describe_machine()}{load}"


def write_result(
    name: str, values: Mapping[str, Any], *, command: str, base_hash: str | None = None,
    device: str | None = None, folder: str | os.PathLike[str] | None = None,
) -> Path:  # fmt: skip
    """Record measured values as ``results/NAME.json``, with what is needed to measure them again.

    The values are JSON types; `command` is the line that makes this file, from the repository's root.
    `base_hash` is that of the base on whose weights they depend, None where they depend on none.
    """
    path = check_writable(Path(folder or results_folder()) / f"{name}.json")
    today = datetime.date.today().isoformat()
    record = (today, command, base_hash, device or describe_device(), dict(values))
    write_json(path, dict(zip(RESULT_KEYS, record)))
    return path


def load_result(
    name: str, *, base_hash: str | None = None, folder: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Return the values recorded as ``results/NAME.json``.

    Results that depend on a base are refused (`StaleResultError`) unless `base_hash` is that of
    the base at hand.
    """
    path = Path(folder or results_folder()) / f"{name}.json"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no recorded result {name!r} in {path.parent}; there are: {have}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["base_hash"] not in (None, base_hash):
        raise StaleResultError(
            f"{path.name} was measured on a base with hash {record['base_hash']}, the one at hand "
            f"has {base_hash}; measure it again: {record['command']}"
        )
    return dict(record["values"])
