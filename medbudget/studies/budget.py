"""Is a word enough? Words, adapters, full tuning and a GAN at an equal budget.

Every method learns the same cases in the time that the word of 64 vectors takes, and at the largest
number of cases also from as many images seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medbudget.cases import order_classes
from medbudget.inversion import InversionSettings
from medbudget.lora import TuneSettings
from medbudget.studies import budgeting  # noqa: F401  (its kinds of tasks)
from medbudget.studies.classifying import plan_runs
from medbudget.studies.drawing import BLOCK, Plan
from medbudget.studies.rivals import plan_gan_blocks, read_start
from medbudget.studies.study import Row, Study
from medbudget.studies.table1 import name_extractor, name_extractors
from medbudget.studies.table2 import PROBLEMS, find_folder, find_given, list_classes
from medbudget.studies.tasks import Task
from medbudget.stylegan3 import StyleGAN3Settings

REFERENCE = "word 64"  # that sets the time, and that the others are tested against
SHARED = ("steps", "batch_size", "schedule", "loss", "latents", "seed")  # of words and adapters
OWN = "own"  # role of a folder with any two classes, as `medbudget prepare folder` writes it
DRAWS = 4  # noises and times for each image's loss
MEMBERS = 50  # cases, at most, and others, that membership is tested with


@dataclass(frozen=True)
class Method:
    """A way to learn a class from cases."""

    vectors: int = 0  # of a word; 0: none is trained
    rank: int | str | None = None  # of an adapter; None: none
    pace: float = 1.0  # processor time for an image seen, in that of a word of 64 vectors (tiny)


GAN = "StyleGAN3"
METHODS = {
    "word 1": Method(1), "word 8": Method(8), REFERENCE: Method(64),
    "LoRA 4": Method(0, 4, 1.07), "LoRA 16": Method(0, 16, 1.07),
    "LoRA 16 + word 8": Method(8, 16, 1.07), "full tuning": Method(0, "full", 1.45),
    GAN: Method(pace=3.2),
}  # fmt: skip


@dataclass(frozen=True)
class _Problem:
    """Two classes, and their images: by label, the cases, and others for validation and test."""

    name: str
    label: str  # of the ill, as phantoms have it; "" for real images
    train: tuple[Task, Task]
    val: tuple[Task, Task]
    test: tuple[Task, Task]
    n: int  # images of a class in validation and in test


def _find_classes(root: Path) -> tuple[str, str]:
    """Return the two classes of a prepared folder, the healthy one first where a name tells it."""
    train = root / "train"
    names = list_classes(train)
    if len(names) != 2:
        raise ValueError(
            f"{train} has {len(names)} folders of classes, 2 are needed: "
            "{train,val,test}/{first class,second class}, as medbudget prepare writes them"
        )
    return order_classes(names, None, root)


def _plan_problem(p: Plan, name: str, cases: int) -> _Problem:
    real = name in p.sources
    others = p.s.cases if real else max(p.s.n, p.s.cases)
    labels = ("", "") if name == OWN else PROBLEMS[name].phantoms
    classes = _find_classes(p.sources[OWN]) if name == OWN else None

    def plan(split: str, n: int) -> tuple[Task, Task]:
        if classes:
            first, last = (p.folder(f"{name}/{split}/{one}", n) for one in classes)
        elif real:
            first, last = (p.folder(find_folder(p.sources, name, split, k), n) for k in (0, 1))
        else:
            first, last = (p.phantoms(name, label, split, n) for label in labels)
        return first, last

    sets = plan("train", cases), plan("val", others), plan("test", others)
    return _Problem(name, "" if real else labels[1], *sets, others)


@dataclass(frozen=True)
class _Cell:
    """A method at work: by label, what it trained, and the images drawn; and its classifiers."""

    trained: tuple[Task, ...]
    drawn: tuple[tuple[Task, ...], ...]
    runs: tuple[Task, ...]


def _plan_training(p: Plan, method: str, train: Task, cases: int, seen: int) -> Task:
    """Return the task that trains a method on `cases` images until it has seen `seen`."""
    s, m = p.s, METHODS[method]
    if method == GAN:
        kimg = max(1, seen) / 1000
        gan = StyleGAN3Settings.preset(
            s.stylegan3, **{**s.gan, "kimg": kimg, "snapshot_kimg": kimg}
        )
        start = read_start(p.sources)
        if train.settings["n"] != cases:
            train = Task("images", {**train.settings, "n": cases})
        settings = {"stylegan3": asdict(gan), "start": start.hash} | name_extractor(p)
        return Task("stylegan3", settings, p.shrink([train], start.generator.architecture.size))
    word = InversionSettings.preset(s.inversion, **s.overrides)
    steps = max(1, round(seen / word.batch_size))
    if m.rank is None:
        training: Any = replace(word, n_vectors=m.vectors, steps=steps)
    else:
        shared = {key: getattr(word, key) for key in SHARED} | {"steps": steps}
        extent = {"rank": m.rank, "n_vectors": m.vectors, "word_lr": word.lr}
        training = TuneSettings.preset(s.inversion, **extent, **(shared | {**s.tuning}))
    settings = {
        "base": s.base, "base_hash": p.base_hash, "cases": cases, "training": asdict(training),
        "adapter": m.rank is not None,
    }  # fmt: skip
    return Task("trained", settings, (train,))


def _plan_cell(p: Plan, problem: _Problem, method: str, cases: int, seen: int) -> _Cell:
    s = p.s
    trained = tuple(_plan_training(p, method, train, cases, seen) for train in problem.train)
    drawn: list[tuple[Task, ...]] = []
    for label, network in enumerate(trained):
        if method == GAN:
            drawn.append(plan_gan_blocks(network, s.n, label * 1_000_000))
            continue
        settings = {
            "base": s.base, "base_hash": p.base_hash, "steps": s.steps, "size": s.size,
            "cfg_scale": float(s.cfg_scale), "seed": label * 1_000_000,
        }  # fmt: skip
        blocks = range(-(-s.n // BLOCK))
        drawn.append(tuple(Task("drawn", settings | {"block": i}, (network,)) for i in blocks))
    return _Cell(trained, tuple(drawn), _plan_classifiers(p, problem, drawn, s.n))


def _plan_classifiers(
    p: Plan, problem: _Problem, images: Sequence[Sequence[Task]], n: int, role: str = "synthetic"
) -> tuple[Task, ...]:
    """Return trainings on `images`, by label, that are validated and tested on real ones."""
    parts = [(role, label, tasks, n) for label, tasks in enumerate(images)]
    for name, split in (("val", problem.val), ("test", problem.test)):
        parts += [(name, label, [task], problem.n) for label, task in enumerate(split)]
    return plan_runs(p, problem.name, parts)


def _plan_row(
    p: Plan, problem: _Problem, group: str, method: str, cell: _Cell, reference: _Cell | None,
    cases: int,
) -> Row:  # fmt: skip
    s, size = p.s, p.s.size
    if method == GAN:  # its images are compared at their size
        size = read_start(p.sources).generator.architecture.size
    train, val, real = (
        p.shrink([own[1]], size) for own in (problem.train, problem.val, problem.test)
    )
    counted = {"runs": s.runs, "repeats": s.repeats}
    gain = Task("gain", counted, (*cell.runs, *reference.runs)) if reference else None
    others = [Task("auc", counted, (*cell.runs, *((gain,) if gain else ())))]
    if cell.trained:
        base = {"base": s.base, "base_hash": p.base_hash, "draws": DRAWS}
        inputs = (cell.trained[1], *train, *val)
        sizes = {"n": [min(cases, MEMBERS), min(problem.n, MEMBERS)]}
        others.append(Task("leak", base | sizes, inputs))
    sets = [*cell.drawn, real, train]
    cuts = [[len(own), n] for own, n in zip(sets, (s.n, s.n, problem.n, cases))]
    about = {"sets": cuts, "kind": problem.name if problem.label else "", "label": problem.label}
    about |= {"trained": bool(cell.trained)} | name_extractors(p)
    weigh = Task("weigh", about, (*(task for own in sets for task in own), *others))
    compare = None
    if reference:
        same = method != GAN  # images from the same seeds
        other = p.shrink(reference.drawn[1], size)
        tests = [[len(cell.drawn[1]), s.n], [len(other), s.n], [1, problem.n]]
        test = {"sets": tests, "paired": same, "repeats": 1000} | name_extractor(p)
        compare = Task("compare", test, (*cell.drawn[1], *other, *real))
    price = Task("price", {}, (cell.trained[1],)) if cell.trained else None
    return Row(group, method, weigh, compare, {}, cell.drawn[1], price)


def make_budget(p: Plan) -> Study:
    """Plan every method on every problem and number of cases, in equal time and on equal images."""
    s = p.s
    if unknown := sorted({*s.methods, *s.paces} - set(METHODS)):
        raise ValueError(f"unknown method {unknown[0]!r}; allowed are {', '.join(METHODS)}")
    given = find_given(p, OWN)
    if unknown := sorted(set(s.problems) - set(PROBLEMS)):
        raise ValueError(f"unknown problem {unknown[0]!r}; allowed are {', '.join(PROBLEMS)}")
    word = InversionSettings.preset(s.inversion, **s.overrides)
    budget, numbers = word.steps * word.batch_size, sorted(map(int, s.grid["cases"]))
    first = REFERENCE if REFERENCE in s.methods else s.methods[0]
    rows: list[Row] = []
    for name in given or s.problems:
        problem = _plan_problem(p, name, numbers[-1])
        for cases in numbers:
            cells: dict[str, _Cell] = {}
            for method in (first, *(m for m in s.methods if m != first)):
                pace = s.paces.get(method, METHODS[method].pace)
                seen = max(1, int(budget / pace))
                cells[method] = _plan_cell(p, problem, method, cases, seen)
            group = f"{name}, {cases} cases"
            rows += [
                _plan_row(
                    p, problem, group, m, cells[m], None if m == first else cells[first], cases
                )
                for m in s.methods
            ]
        for method in s.methods:  # the largest number of cases again, with as many images seen
            if s.paces.get(method, METHODS[method].pace) != 1:
                cell = _plan_cell(p, problem, method, numbers[-1], budget)
                group = f"{name}, {numbers[-1]} cases, equal images"
                rows.append(_plan_row(p, problem, group, method, cell, cells[first], numbers[-1]))
        count = min(problem.n, numbers[-1])
        runs = _plan_classifiers(p, problem, [[one] for one in problem.train], count, "real")
        floor = _Cell((), tuple((one,) for one in problem.val), runs)
        group = f"{name}, {'real images' if given else 'phantoms'}"
        rows.append(_plan_row(p, problem, group, "none", floor, None, count))
    real = "images given" if given else "phantoms"
    about = (
        f"{p.describe(not given)} Every method learns each class from the same cases, in the "
        f"processor time in which {first} sees {budget} images (time for an image: as measured on "
        f"tiny, on one core, unless set); in the rows 'equal images' each sees {budget}. Distances: "
        f"n = {s.n} images of the ill class against {problem.n} held-out {real}. Classifiers: "
        f"trained on {s.n} images of either class, tested on held-out {real}. Gain, by a bootstrap "
        f"over cases and runs, and p, by a permutation test of the first distance: against {first} "
        "on the same cases, images paired by seed but for the GAN. No p is corrected for the number "
        "of tests. Copied share: held-out images have 1 %. Membership: 0.5 is guessing. Disease "
        "AUC: – where images are too far from phantoms for a disease score. Seconds and kB: of the "
        "ill class's training and file. The last row of a problem: images that no model made."
    )
    return Study(tuple(rows), about, head=("trained on", "method"))
