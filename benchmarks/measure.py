"""What the benchmarks measure with: seconds, memory, and goals that are met or not."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the value, wall-clock seconds, and processor seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def peak_memory() -> float:
    """Return this process's peak resident memory in MB (`getrusage` inherits the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [
            x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM")
        ]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_alone(script: str, *arguments: object) -> list[float]:
    """Run a part of a benchmark in a fresh process; return the numbers of its last line.

    Without the project's MALLOC settings, which trade memory for speed.
    """
    command = [sys.executable, script, *map(str, arguments)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=plain)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def judge(goals: Iterable[tuple[str, float, str, float]]) -> list[dict[str, Any]]:
    """Print and return each (name, value, "<=" or ">=", limit) with whether it is met."""
    rows = []
    for name, value, sign, limit in goals:
        met = value <= limit if sign == "<=" else value >= limit
        print(f"  {name:<48}{value:>10.3g}  {sign} {limit:<10g}{'met' if met else 'NOT met'}")
        rows.append({"name": name, "value": value, "goal": f"{sign} {limit:g}", "met": bool(met)})
    return rows
