"""What a study has, what it lacks, and how long that will take by measured times."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from medbudget.files import write_json
from medbudget.progress import quiet
from medbudget.studies.tasks import KINDS, Store, Task, ensure, in_order, warm_up

TRIAL = "small trial"


@dataclass(frozen=True)
class Speed:
    """How long tasks of one kind take, ``fixed + each * cost`` seconds, and how large they are.

    Attributes
    ----------
    fixed, each : float
        Seconds; `Kind.cost` gives the cost.
    bytes : float
        Of the file of one result.
    source : str
        In words, where the numbers come from.
    """

    fixed: float
    each: float
    bytes: float
    source: str

    def seconds(self, task: Task) -> float:
        """Return the estimated time of a task."""
        return max(0.0, self.fixed + self.each * KINDS[task.kind].cost(task))


@dataclass(frozen=True)
class Plan:
    """What a study has and lacks.

    Attributes
    ----------
    total, done : dict of str to int
        Tasks by kind.
    needs : dict of str to list of str
        The kinds that a kind is made from.
    speed : dict of str to Speed
        By kind; those that were never measured in this store are absent.
    seconds : dict of str to float or None
        Estimated time of the missing ones by kind, on one worker; None where the speed is not known.
    bytes : int or None
        Estimated size of what is missing.
    """

    total: dict[str, int]
    done: dict[str, int]
    needs: dict[str, list[str]]
    speed: dict[str, Speed]
    seconds: dict[str, float | None]
    bytes: int | None

    @property
    def all_seconds(self) -> float | None:
        """Estimated time of all that is missing, on one worker; None where a speed is not known."""
        known = [seconds for seconds in self.seconds.values() if seconds is not None]
        return sum(known) if len(known) == len(self.seconds) else None


def plan(tasks: Sequence[Task], store: Store) -> Plan:
    """Count what is there and what is missing, and estimate time and disk from measured ones.

    The speed of a kind is that of its results in the store, or else what `measure_speed` left.
    """
    every = in_order(tasks)
    present = {task.kind for task in every}
    kinds = [kind for kind in KINDS if kind in present]
    trial = _read_trial(store)
    needs: dict[str, list[str]] = {kind: [] for kind in kinds}
    for task in every:
        known = needs[task.kind]
        known += {t.kind: None for t in task.inputs if t.kind not in known}
    total, done, speed = {}, {}, {}
    seconds: dict[str, float | None] = {}
    size: float | None = 0.0
    for kind in kinds:
        mine = [task for task in every if task.kind == kind]
        made = [task for task in mine if store.has(task)]
        there = {task.key for task in made}
        missing = [task for task in mine if task.key not in there]
        total[kind], done[kind] = len(mine), len(made)
        if found := _speed_of(made, store) or trial.get(kind):
            speed[kind] = found
            seconds[kind] = sum(map(found.seconds, missing))
            size = None if size is None else size + found.bytes * len(missing)
        else:
            seconds[kind] = None if missing else 0.0
            size = None if missing else size
    return Plan(total, done, needs, speed, seconds, None if size is None else round(size))


def _speed_of(made: Sequence[Task], store: Store) -> Speed | None:
    timed = [(task, s) for task in made if (s := store.seconds(task)) is not None]
    if not timed:
        return None
    cost = sum(KINDS[task.kind].cost(task) for task, _ in timed)
    size = sum(store.path(task).stat().st_size for task, _ in timed) / len(timed)
    return Speed(0.0, sum(s for _, s in timed) / cost, size, f"{len(timed)} done")


def _trial_file(store: Store) -> Path:
    return store.folder / "speed.json"


def _read_trial(store: Store) -> dict[str, Speed]:
    try:
        found = json.loads(_trial_file(store).read_text(encoding="utf-8"))
        return {kind: Speed(**one) for kind, one in found.items()}
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def measure_speed(tasks: Sequence[Task], store: Store) -> dict[str, Speed]:
    """Time two small tasks of each kind of which none is done, for `plan` to estimate by.

    They have a few steps and few images, see `Kind.cut`; what they make is thrown away, and their
    times stay in the store's ``speed.json``.
    """
    speed = _read_trial(store)
    wanted: dict[str, Task] = {}
    known = plan(tasks, store).speed
    for task in in_order(tasks):
        if task.kind not in known:
            now = wanted.setdefault(task.kind, task)
            if KINDS[task.kind].cost(task) > KINDS[task.kind].cost(now):
                wanted[task.kind] = task
    for task in wanted.values():
        warm_up(task)
    with quiet(), TemporaryDirectory() as folder:
        trial = Store(Path(folder), store.sources)
        for kind, task in wanted.items():
            costs, times, size = [], [], 0
            for parts in (1, 2):
                small = cut(task, parts)
                ensure(small, trial)
                costs.append(KINDS[kind].cost(small))
                times.append(trial.seconds(small) or 0.0)
                size = trial.path(small).stat().st_size
            slope = (times[1] - times[0]) / (costs[1] - costs[0]) if costs[1] > costs[0] else 0.0
            slope = max(0.0, slope)
            speed[kind] = Speed(max(0.0, times[1] - slope * costs[1]), slope, size, TRIAL)
    if wanted:
        store.folder.mkdir(parents=True, exist_ok=True)
        write_json(_trial_file(store), {kind: asdict(one) for kind, one in speed.items()})
    return speed


def cut(task: Task, parts: int) -> Task:
    """Return a task like this one but small, made from small ones, for `measure_speed`."""
    shorten = KINDS[task.kind].cut
    small = task if shorten is None else shorten(task, parts)
    return Task(small.kind, small.settings, tuple(cut(t, parts) for t in small.inputs))


def simulate(
    tasks: Sequence[Task], seconds: Callable[[Task], float], workers: int
) -> tuple[float, float]:
    """Return when a study would end on `workers` machines, and their busy time, in seconds.

    List scheduling (Graham 1966): whoever is free takes the first task whose inputs are there.

    Parameters
    ----------
    seconds : callable
        How long a task takes.

    Raises
    ------
    ValueError
        No workers.
    """
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got {workers}")
    waiting = in_order(tasks)
    ends: dict[str, float] = {}
    running: list[tuple[float, str]] = []
    now = busy = 0.0
    while waiting or running:
        for task in list(waiting):
            if len(running) == workers:
                break
            if all(ends.get(t.key, float("inf")) <= now for t in task.inputs):
                length = seconds(task)
                ends[task.key] = now + length
                busy += length
                heapq.heappush(running, (now + length, task.key))
                waiting.remove(task)
        now, _ = heapq.heappop(running)
    return now, busy


def clean(tasks: Sequence[Task], store: Store, *, delete: bool = False) -> dict[Path, int]:
    """Return files of the store that `tasks` do not use, with their sizes, and delete them if told.

    Only what `ensure` writes is looked at: results by kind, what is said about them, and scratch.
    """
    used = {store.path(task) for task in in_order(tasks)}
    used |= {path.with_suffix(".about.json") for path in used}
    folders = [store.folder / name for name in (*KINDS, "scratch")]
    found = {
        path: path.stat().st_size
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path not in used and path.is_file() and path.suffix != ".lock"
    }
    for path in found if delete else ():
        path.unlink(missing_ok=True)
    return found
