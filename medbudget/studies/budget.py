"""Is a word enough? Words, adapters, full tuning and a GAN at an equal budget.

Every method learns the same cases in the time that the word of 64 vectors takes, and at the largest
number of cases also from as many images seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medbudget.adapters import Adapter, adapt
from medbudget.metrics import disease_score
from medbudget.metrics.auc import delong
from medbudget.metrics.evaluation import evaluate
from medbudget.metrics.membership import membership_inference
from medbudget.metrics.scores import Score
from medbudget.studies.classifying import plan_auc, plan_runs
from medbudget.studies.drawing import TOKEN, Plan, load_trained
from medbudget.studies.rivals import find_size, plan_gan, plan_gan_blocks
from medbudget.studies.study import Row, Study
from medbudget.studies.table1 import load_extractors, name_extractors, plan_compare
from medbudget.studies.table2 import OWN, PROBLEMS, SPLITS, find_given, plan_class
from medbudget.studies.tasks import Store, Task, kind, load_task_base, score_sets
from medbudget.stylegan3 import StyleGAN3
from medbudget.stylegan3.model import to_float
from medbudget.training.inversion import InversionSettings, compute_image_losses, invert
from medbudget.training.lora import TuneSettings, tune

REFERENCE = "word 64"  # that sets the time, and that the others are tested against
SHARED = ("steps", "batch_size", "schedule", "loss", "latents", "seed")  # of words and adapters
DRAWS = 4  # noises and times for each image's loss
MEMBERS = 50  # cases, at most, and others, that membership is tested with
# starts of scores' names
SHOWN = ("FD", "FID", "Layout", "Precision", "Recall", "Copied share (pixels)")


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


@kind("trained", ".safetensors", heavy=True, needs=load_task_base)
def _run_trained(task: Task, store: Store) -> Callable[[Path], Any]:
    """Train a word or an adapter; the file tells the time of all steps, and a GPU's peak memory."""
    s, base = task.settings, load_task_base(task, store)
    gpu = base.device.type == "cuda"
    clock = time.monotonic if gpu else time.process_time  # so that other programs do not count
    times: list[float] = []
    options: dict[str, Any] = {
        "token": TOKEN, "checkpoint": store.scratch(task, "checkpoint"), "fast": False,
        "callback": lambda state: times.append(clock()), "data": f"{s['cases']} cases of a study",
    }  # fmt: skip
    cases = store.read_images(task.inputs)[: s["cases"]]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trained: Any
    if s["adapter"]:
        trained = tune(base, cases, settings=TuneSettings(**s["training"]), **options)
    else:
        trained = invert(base, cases, settings=InversionSettings(**s["training"]), **options)
    step = (times[-1] - times[0]) / max(1, len(times) - 1)
    record = trained.record | {
        "seconds": round(step * trained.step, 2),  # also where it went on from a checkpoint
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }
    return replace(trained, record=record).save


@kind("leak", heavy=True)
def _run_leak(task: Task, store: Store) -> dict[str, Any]:
    """Attack what was trained: can its loss, a GAN's critic, tell the cases from other images?"""
    path, s = store.path(task.inputs[0]), task.settings
    trained: Any
    sets = [store.read_images([one])[:n] for one, n in zip(task.inputs[1:], s["n"])]
    if task.inputs[0].kind == "stylegan3":
        name, critic = "critic", StyleGAN3.load(path).discriminator
        with torch.inference_mode():
            losses = [
                torch.cat([-critic(to_float(x)).flatten() for x in images.split(16)])
                for images in sets
            ]
    else:
        name, base = "loss less the base's", load_task_base(task, store)
        trained = load_trained(path)
        adapted = isinstance(trained, Adapter)
        tuned, word = (adapt(base, [trained]), trained.word) if adapted else (base, trained)
        losses = [
            compute_image_losses(tuned, word, images, draws=s["draws"])
            - compute_image_losses(base, "", images, draws=s["draws"])
            for images in sets
        ]
    cases, others = (loss.numpy() for loss in losses)
    return {"Membership AUC": membership_inference(cases, others, name=name).to_dict()}


@kind("weigh", needs=load_extractors)
def _run_weigh(task: Task, store: Store) -> dict[str, Any]:
    """Score a method: images of either class, real ones, its cases, and what other tasks found."""
    s, (healthy, ill, real, cases) = task.settings, store.read_sets(task)
    found = evaluate(
        real, ill, features=load_extractors(task, store), floor=False,
        train=cases if s["trained"] else None,
    )  # fmt: skip
    scores = {score.name: score.to_dict() for score in found if score.name.startswith(SHOWN)}
    if s["kind"]:
        with suppress(ValueError):  # too far from phantoms for a disease score
            values = [disease_score(images, s["kind"], s["label"]) for images in (healthy, ill)]
            n = (len(healthy), len(ill))
            auc = delong(np.repeat([0, 1], n), np.concatenate(values))
            note = "the classes' disease scores; DeLong interval"
            score = Score("Disease AUC", auc.value, auc.interval, n, note=note)
            scores[score.name] = score.to_dict()
    aucs, *leaks = map(store.read_json, task.inputs[sum(n for n, _ in s["sets"]) :])
    scores |= {f"Classifier {name}": aucs[name] for name in ("AUC", "gain") if name in aucs}
    for leak in leaks:
        scores |= leak
    return scores


@kind("price")
def _run_price(task: Task, store: Store) -> dict[str, Any]:
    """Tell what a method's training took, and what there is to share."""
    path = store.path(task.inputs[0])
    if task.inputs[0].kind == "stylegan3":
        network = StyleGAN3.load(path)
        numbers = sum(p.numel() for p in network.generator.parameters())
        record = {key: network.record[key] for key in ("images_seen", "seconds", "device")}
        return record | {"numbers": numbers, "bytes": 2 * numbers, "peak_bytes": None}
    trained = load_trained(path)
    tensors = trained.tensors.values() if isinstance(trained, Adapter) else [trained.vectors]
    record = {key: trained.record[key] for key in ("seconds", "device", "peak_bytes")}
    return record | {
        "images_seen": trained.step * trained.record["settings"]["batch_size"],
        "numbers": sum(tensor.numel() for tensor in tensors),
        "bytes": path.stat().st_size,
    }


@dataclass(frozen=True)
class _Problem:
    """Two classes, and their images: cases to learn, and others for validation and test."""

    name: str
    label: str  # of the ill, as phantoms have it; "" for real images
    images: dict[str, list[Task]]  # by split, of either class
    n: int  # images of a class in validation and in test


def _plan_problem(p: Plan, name: str, cases: int) -> _Problem:
    real = name in p.sources
    n = p.s.cases if real else max(p.s.n, p.s.cases)
    sizes = dict(zip(SPLITS, (cases, n, n)))
    images = {
        split: [plan_class(p, name, split, label, size) for label in (0, 1)]
        for split, size in sizes.items()
    }
    return _Problem(name, "" if real else PROBLEMS[name].phantoms[1], images, n)


@dataclass(frozen=True)
class _Cell:
    """A method at work: by label, what it trained, and the images drawn; and its classifiers."""

    trained: Sequence[Task]
    drawn: Sequence[Sequence[Task]]
    runs: Sequence[Task]


def _plan_training(p: Plan, method: str, train: Task, cases: int, seen: int) -> Task:
    """Return the task that trains a method on `cases` images until it has seen `seen`."""
    m = METHODS[method]
    if method == GAN:
        if train.settings["n"] != cases:
            train = Task("images", {**train.settings, "n": cases})
        kimg = max(1, seen) / 1000
        return plan_gan(p, train, kimg=kimg, snapshot_kimg=kimg)
    word = p.inversion()
    steps = max(1, round(seen / word.batch_size))
    if m.rank is None:
        training: Any = replace(word, n_vectors=m.vectors, steps=steps)
    else:
        shared = {key: getattr(word, key) for key in SHARED} | {"steps": steps}
        extent = {"rank": m.rank, "n_vectors": m.vectors, "word_lr": word.lr}
        training = TuneSettings.preset(p.s.inversion, **extent, **shared)
    settings = {"cases": cases, "training": asdict(training), "adapter": m.rank is not None}
    return Task("trained", p.base | settings, (train,))


def _plan_cell(p: Plan, problem: _Problem, method: str, cases: int, seen: int) -> _Cell:
    train, n = problem.images["train"], p.s.n
    trained = [_plan_training(p, method, one, cases, seen) for one in train]
    drawn = [
        plan_gan_blocks(network, n, label * 1_000_000) if method == GAN
        else p.blocks([network], n=n, kind="drawn", seed=label * 1_000_000)
        for label, network in enumerate(trained)
    ]  # fmt: skip
    return _Cell(trained, drawn, _plan_classifiers(p, problem, "synthetic", drawn, n))


def _plan_classifiers(
    p: Plan, problem: _Problem, role: str, images: Sequence[Sequence[Task]], n: int
) -> tuple[Task, ...]:
    """Return trainings on `n` images of either class, validated and tested on real ones."""
    parts = [(role, label, tasks, n) for label, tasks in enumerate(images)]
    for split in ("val", "test"):
        parts += [(split, k, [one], problem.n) for k, one in enumerate(problem.images[split])]
    return plan_runs(p, problem.name, parts)


def _plan_row(
    p: Plan, problem: _Problem, group: str, method: str, cell: _Cell, reference: _Cell | None,
    cases: int,
) -> Row:  # fmt: skip
    s = p.s
    size = find_size(p) if method == GAN else s.size  # at which images are compared
    train, val, real = (p.shrink(problem.images[split][1:], size) for split in SPLITS)
    auc, _ = plan_auc(p, cell.runs, reference.runs if reference else ())
    others, price, compare = [auc], None, None
    if cell.trained:
        attack = {"draws": DRAWS, "n": [min(n, MEMBERS) for n in (cases, problem.n)]}
        others.append(Task("leak", p.base | attack, (cell.trained[1], *train, *val)))
        price = Task("price", {}, (cell.trained[1],))
    about = {"kind": problem.name if problem.label else "", "label": problem.label}
    weigh = score_sets(
        "weigh", about | {"trained": bool(cell.trained)} | name_extractors(p),
        *((drawn, s.n) for drawn in cell.drawn), (real, problem.n), (train, cases), others=others,
    )  # fmt: skip
    if reference:
        other = p.shrink(reference.drawn[1], size)
        paired = method != GAN  # images from the same seeds
        compare = plan_compare(p, cell.drawn[1], other, real, problem.n, paired=paired)
    return Row(group, method, weigh, compare, {}, tuple(cell.drawn[1]), price)


def make_budget(p: Plan) -> Study:
    """Plan every method on every problem and number of cases, in equal time and on equal images."""
    s = p.s
    for what, names, allowed in (
        ("method", {*s.methods, *s.paces}, METHODS), ("problem", {*s.problems}, PROBLEMS),
    ):  # fmt: skip
        if unknown := sorted(names - set(allowed)):
            raise ValueError(f"unknown {what} {unknown[0]!r}; allowed are {', '.join(allowed)}")
    given = find_given(p, OWN)
    word, numbers = p.inversion(), sorted(map(int, s.grid["cases"]))
    budget = word.steps * word.batch_size
    first = REFERENCE if REFERENCE in s.methods else s.methods[0]
    paces = {method: s.paces.get(method, METHODS[method].pace) for method in s.methods}
    real, most = "images given" if given else "phantoms", numbers[-1]
    rows: list[Row] = []
    for name in given or s.problems:
        problem = _plan_problem(p, name, most)
        references = {
            cases: _plan_cell(p, problem, first, cases, max(1, int(budget / paces[first])))
            for cases in numbers
        }
        jobs = [
            (cases, method, max(1, int(budget / pace)), "")
            for cases in numbers
            for method, pace in paces.items()
        ]
        again = [method for method, pace in paces.items() if pace != 1]
        jobs += [(most, method, budget, ", equal images") for method in again]
        for cases, method, seen, note in jobs:
            cell = _plan_cell(p, problem, method, cases, seen)
            reference = references[cases] if note or method != first else None
            group = f"{name}, {cases} cases{note}"
            rows.append(_plan_row(p, problem, group, method, cell, reference, cases))
        count = min(problem.n, most)
        train, val = ([[one] for one in problem.images[split]] for split in ("train", "val"))
        floor = _Cell((), val, _plan_classifiers(p, problem, "real", train, count))
        group = f"{name}, {'real images' if given else 'phantoms'}"
        rows.append(_plan_row(p, problem, group, "none", floor, None, count))
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
