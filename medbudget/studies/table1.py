"""Table 1 and Figures 2, 5 and 8: what changes with one setting, or from healthy to diseased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from scipy.stats import ttest_rel

from medbudget.data.phantoms import KINDS as PHANTOMS
from medbudget.files import hash_file
from medbudget.metrics import disease_axis, disease_score, permutation_test
from medbudget.metrics.evaluation import frechet_score
from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.metrics.features import compute_features
from medbudget.studies.drawing import Plan
from medbudget.studies.study import Row, Study
from medbudget.studies.table2 import find_folder, find_given, list_classes
from medbudget.studies.tasks import Store, Task, kind, score_sets

# de Wilde et al. 2024, Table 1: FID, MFID (T2W, healthy prostate, 1000 real and 1000 generated).
TABLE1 = {
    ("sampling steps", 25): (118, 4.04), ("sampling steps", 50): (106, 3.38),
    ("sampling steps", 75): (101, 3.11), ("sampling steps", 100): (99, 2.87),
    ("CFG scale", 1): (85, 4.50), ("CFG scale", 2): (99, 2.87),
    ("CFG scale", 3): (146, 4.51), ("CFG scale", 5): (173, 61.4),
    ("vectors", 8): (100, 2.92), ("vectors", 16): (110, 3.22),
    ("vectors", 32): (149, 2.86), ("vectors", 64): (99, 2.87),
    ("cases", 5): (158, 2.55), ("cases", 10): (106, 3.25),
    ("cases", 50): (96, 3.41), ("cases", 100): (99, 2.87),
}  # fmt: skip
SPLITS = {"train": "train", "reference": "test", "floor": "val"}  # roles, as splits of phantoms
CLASS = ("prostate", "healthy")
RULES = {"none": "", "paper": ", z-scored"}  # normalisations, and what they add to a score's name


def load_extractors(task: Task, store: Store) -> list[Extractor]:
    """Load the extractors that a task's settings name: ``extractors``, or one ``extractor``."""
    names = task.settings.get("extractors") or [task.settings["extractor"]]
    return [load_extractor(name, weights=store.sources.get(name)) for name in names]


@kind("score", needs=load_extractors)
def _run_score(task: Task, store: Store) -> dict[str, Any]:
    generated, real = store.read_sets(task)
    rules = list(RULES)[: 1 + bool(task.settings.get("z_scored"))]
    scores: dict[str, Any] = {}
    for extractor, rule in product(load_extractors(task, store), rules):
        x, y = (compute_features(i, extractor, normalize=rule) for i in (real, generated))
        score = frechet_score(x, y, extractor, normalize=rule)
        scores[score.name + RULES[rule]] = score.to_dict()
    return scores


@kind("compare", needs=load_extractors)
def _run_compare(task: Task, store: Store) -> dict[str, Any]:
    s, (extractor,) = task.settings, load_extractors(task, store)
    a, b, real = (compute_features(images, extractor) for images in store.read_sets(task))
    test = permutation_test(a, b, real, paired=s["paired"], repeats=s["repeats"], seed=0)
    return {"difference": test.difference, "p_value": test.p_value}


def name_extractors(p: Plan, *, first: bool = False) -> dict[str, Any]:
    """Return the extractors, or the first one, as settings of a task, with hashes of given weights."""
    names = p.s.extractors[:1] if first else p.s.extractors
    weights = {name: hash_file(p.sources[name])[:12] for name in names if name in p.sources}
    named = {"extractor": names[0]} if first else {"extractors": list(names)}
    return named | ({"weights": weights} if weights else {})


def plan_compare(
    p: Plan, a: Sequence[Task], b: Sequence[Task], real: Sequence[Task], n: int, *, paired: bool
) -> Task:
    """Return the test of the first distance to `n` real images between two sets of `p.s.n`."""
    settings = {"paired": paired, "repeats": 1000} | name_extractors(p, first=True)
    return score_sets("compare", settings, (a, p.s.n), (b, p.s.n), (real, n))


def uses_phantoms(p: Plan) -> bool:
    """Tell whether phantoms stand in for real images."""
    return p.s.phantoms and not set(SPLITS) & set(p.sources)


def plan_cases(p: Plan, role: str, n: int) -> Task:
    """Return the task of `n` real images for a role: ``train``, ``reference`` or ``floor``."""
    return p.phantoms(*CLASS, SPLITS[role], n) if uses_phantoms(p) else p.folder(role, n)


def _plan_score(p: Plan, images: tuple[Task, ...], real: Task) -> Task:
    settings = name_extractors(p) | ({"z_scored": True} if p.s.z_scored else {})
    return score_sets("score", settings, (images, p.s.n), ([real], p.s.n))


def make_table1(p: Plan) -> Study:
    """Table 1: steps, guidance, vectors and cases, one at a time from the final configuration."""
    s = p.s
    train = plan_cases(p, "train", int(max(s.cases, *s.grid.get("cases", ()), 0)))
    real = plan_cases(p, "reference", s.n)
    final: dict[str, float] = {
        "sampling steps": s.steps, "CFG scale": s.cfg_scale, "vectors": s.vectors,
        "cases": s.cases,
    }  # fmt: skip

    def draw(**changes: float) -> tuple[Task, ...]:
        chosen = final | changes
        word = p.word(train, vectors=int(chosen["vectors"]), cases=int(chosen["cases"]))
        steps, cfg_scale = int(chosen["sampling steps"]), float(chosen["CFG scale"])
        return p.blocks([word], n=s.n, steps=steps, cfg_scale=cfg_scale)

    best, rows = draw(), []
    for group, value in [(group, value) for group, values in s.grid.items() for value in values]:
        images = draw(**{group: value})
        changed = value != final[group]
        compare = plan_compare(p, images, best, [real], s.n, paired=True) if changed else None
        paper = dict(zip(("FID", "MFID"), TABLE1.get((group, int(value)), ())))
        rows.append(Row(group, value, _plan_score(p, images, real), compare, paper, images))
    floor = None
    if uses_phantoms(p) or "floor" in p.sources:
        floor = _plan_score(p, (plan_cases(p, "floor", s.n),), real)
    about = (
        f"{_describe(p)} n = {s.n} generated against {s.n} real. p: permutation test of the first "
        "distance against the unchanged configuration, images paired by seed. The paper's FID and "
        "MFID have other features, images and n: compare directions, not values."
    )
    return Study(tuple(rows), about, floor)


def _describe(p: Plan) -> str:
    s = p.s
    return (
        f"{p.describe(uses_phantoms(p))} One setting at a time is changed from {s.steps} sampling "
        f"steps, CFG {s.cfg_scale:g}, {s.vectors} vectors and {s.cases} cases."
    )


def make_figure5(p: Plan) -> Study:
    """Figure 5: the same seeds on every line of Table 1, without the scores."""
    study, real = make_table1(p), plan_cases(p, "reference", p.s.n)
    rows = tuple(replace(row, score=None, compare=None, paper={}) for row in study.rows)
    return Study(rows, _describe(p), extra=(real,))


@kind("disease")
def _run_disease(task: Task, store: Store) -> dict[str, Any]:
    (images,), s = store.read_sets(task), task.settings
    (score,) = disease_axis({0.0: images}, s["kind"], s["label"]).values()
    return {"disease score": score.to_dict()}


@kind("rise")
def _run_rise(task: Task, store: Store) -> dict[str, Any]:
    s = task.settings
    now, before = (disease_score(images, s["kind"], s["label"]) for images in store.read_sets(task))
    difference = float((now - before).mean())
    return {"difference": difference, "p_value": float(ttest_rel(now, before).pvalue)}


def _plan_axes(p: Plan, given: list[str]) -> list[tuple[str, str, Task, Task]]:
    """Return each axis: kind, disease, and the words of either end."""
    axes = []
    for name in given or PHANTOMS:
        if given:
            healthy = find_folder(p.sources, name, "train", 0).rpartition("/")[2]
            labels = list_classes(p.sources[name] / "train")
            ends = {label: p.folder(f"{name}/train/{label}", p.s.cases) for label in labels}
        else:
            healthy = next(iter(PHANTOMS[name]))
            ends = {label: p.phantoms(name, label, "train", p.s.cases) for label in PHANTOMS[name]}
        words = {label: p.word(train) for label, train in ends.items()}
        first = words.pop(healthy)
        axes += [(name, label, first, word) for label, word in words.items()]
    return axes


def make_interpolation(p: Plan) -> Study:
    """Figures 2 and 8: images along the axes from healthy to each disease, from the same seeds.

    Each has a disease score beside it, which is fitted on phantoms: images of real cases get none.
    The paper draws them with a CFG scale of 2; a stronger one is tried beside it.
    """
    s, given = p.s, find_given(p)
    rows = []
    for (name, label, *ends), cfg_scale in product(_plan_axes(p, given), s.grid["CFG scale"]):
        before: tuple[Task, ...] = ()
        for share in s.grid["share"]:
            changes: dict[str, Any] = {"cfg_scale": float(cfg_scale)}
            words = ends
            if share in (0, 1):  # one word: shared by all axes from it, and by other studies
                words = [ends[int(share)]]
            else:
                changes["prompt"] = f"<healthy>:{1 - share!r} AND <disease>:{share!r}"
                changes["tokens"] = ["<healthy>", "<disease>"]
            images = p.blocks(words, n=s.n, **changes)
            score = rise = None
            if not given:
                axis = {"kind": name, "label": label}
                score = score_sets("disease", axis, (images, s.n))
                if before:
                    rise = score_sets("rise", axis, (images, s.n), (before, s.n))
            rows.append(Row(f"{label}, CFG {cfg_scale:g}", share, score, rise, images=images))
            before = images
    scores = (
        "Disease score: log odds of a classifier fitted on phantoms, above 0 more like the "
        "diseased; mean over images. p: paired t test against the share before. "
    )
    about = (
        f"{p.describe(not given)} Composed of the healthy word and the disease's by weighted "
        f"prediction, {s.steps} steps, {s.n} images from the same seeds at each share. "
        f"{'' if given else scores}The paper shows such axes and has no number for them."
    )
    return Study(tuple(rows), about, head=("axis", "share"))
