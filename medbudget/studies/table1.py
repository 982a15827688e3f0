"""The paper's Table 1 and Figure 5: one setting at a time, its distances, and a test."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medbudget.files import hash_file, write_json
from medbudget.metrics import permutation_test
from medbudget.metrics.evaluation import frechet_score
from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.metrics.features import compute_features
from medbudget.studies.drawing import (
    describe_images,
    plan_blocks,
    plan_folder,
    plan_phantoms,
    plan_word,
)
from medbudget.studies.study import Row, Study, StudySettings
from medbudget.studies.tasks import Store, Task, kind

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
ROLES = ("train", "reference", "floor")
SPLITS = {"train": "train", "reference": "test", "floor": "val"}  # of phantoms
CLASS = ("prostate", "healthy")

# ------------------------------------------------------------------------------- what tasks do


def get_extractor(name: str, weights: Path | None = None) -> Extractor:
    """Return an extractor; its weights are loaded once in a process."""
    return load_extractor(name, weights=weights)


def need_extractors(task: Task, store: Store) -> list[tuple[Hashable, ...]]:
    """Return what a task needs whose settings name ``extractors``, or one ``extractor``."""
    names = task.settings.get("extractors") or [task.settings["extractor"]]
    return [(get_extractor, name, store.sources.get(name)) for name in names]


@kind("score", ".json", needs=need_extractors)
def _run_score(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    generated, real = store.read_sets(task)
    scores: dict[str, Any] = {}
    for name in task.settings["extractors"]:
        extractor = get_extractor(name, store.sources.get(name))
        x, y = compute_features(real, extractor), compute_features(generated, extractor)
        scores[extractor.distance_name] = frechet_score(x, y, extractor).to_dict()
    write_json(path, scores)


@kind("compare", ".json", needs=need_extractors)
def _run_compare(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    s = task.settings
    extractor = get_extractor(s["extractor"], store.sources.get(s["extractor"]))
    a, b, real = (compute_features(images, extractor) for images in store.read_sets(task))
    test = permutation_test(a, b, real, paired=s["paired"], repeats=s["repeats"], seed=0)
    write_json(path, {"difference": test.difference, "p_value": test.p_value})


# ------------------------------------------------------------------------------- their planning


def name_extractors(s: StudySettings, sources: Mapping[str, Path]) -> dict[str, Any]:
    """Return the extractors as settings of a task: names, and a hash of weights that were given."""
    return {"extractors": list(s.extractors)} | _hash_weights(s.extractors, sources)


def name_extractor(s: StudySettings, sources: Mapping[str, Path]) -> dict[str, Any]:
    """Return the first extractor as settings of a task, as `name_extractors` does all."""
    return {"extractor": s.extractors[0]} | _hash_weights(s.extractors[:1], sources)


def _hash_weights(names: Sequence[str], sources: Mapping[str, Path]) -> dict[str, Any]:
    weights = {name: hash_file(sources[name])[:12] for name in names if name in sources}
    return {"weights": weights} if weights else {}


def plan_cases(s: StudySettings, sources: Mapping[str, Path], role: str, n: int) -> Task:
    """Return the task of `n` real images for a role: ``train``, ``reference`` or ``floor``."""
    if uses_phantoms(s, sources):
        return plan_phantoms(*CLASS, SPLITS[role], n, s.size)
    return plan_folder(sources, role, n, s.size)


def uses_phantoms(s: StudySettings, sources: Mapping[str, Path]) -> bool:
    """Tell whether phantoms stand in for real images."""
    return s.phantoms and not set(ROLES) & set(sources)


def describe(s: StudySettings, sources: Mapping[str, Path]) -> str:
    """Return what the images are, as the report says it."""
    return describe_images(s, uses_phantoms(s, sources))


def _plan_score(
    s: StudySettings, sources: Mapping[str, Path], images: tuple[Task, ...], real: Task
) -> Task:
    sets = {"sets": [[len(images), s.n], [1, s.n]]}
    return Task("score", sets | name_extractors(s, sources), (*images, real))


def make_table1(s: StudySettings, base_hash: str, sources: Mapping[str, Path]) -> Study:
    """Table 1: steps, guidance, vectors and cases, one at a time from the final configuration."""
    train = plan_cases(s, sources, "train", int(max(s.cases, *s.grid.get("cases", ()), 0)))
    real = plan_cases(s, sources, "reference", s.n)
    final = {
        "sampling steps": s.steps, "CFG scale": s.cfg_scale, "vectors": s.vectors,
        "cases": s.cases,
    }  # fmt: skip

    def draw(chosen: Mapping[str, float]) -> tuple[Task, ...]:
        word = plan_word(
            s, base_hash, train, vectors=int(chosen["vectors"]), cases=int(chosen["cases"])
        )
        steps, cfg_scale = int(chosen["sampling steps"]), chosen["CFG scale"]
        return plan_blocks(s, base_hash, [word], n=s.n, steps=steps, cfg_scale=cfg_scale)

    best = draw(final)
    rows = []
    for group, values in s.grid.items():
        for value in values:
            images = draw(final | {group: value})
            compare = None
            if value != final[group]:
                sets = [[len(images), s.n], [len(best), s.n], [1, s.n]]
                test = {"sets": sets, "paired": True, "repeats": 1000}
                test |= name_extractor(s, sources)
                compare = Task("compare", test, (*images, *best, real))
            paper = dict(zip(("FID", "MFID"), TABLE1.get((group, int(value)), ())))
            score = _plan_score(s, sources, images, real)
            rows.append(Row(group, value, score, compare, paper, images))
    floor = None
    if uses_phantoms(s, sources) or "floor" in sources:
        floor = _plan_score(s, sources, (plan_cases(s, sources, "floor", s.n),), real)
    about = (
        f"{describe(s, sources)} One setting at a time is changed from "
        f"{s.steps} sampling steps, CFG {s.cfg_scale:g}, {s.vectors} vectors and {s.cases} cases; "
        f"n = {s.n} generated against {s.n} real. p: permutation test of the first distance "
        "against the unchanged configuration, images paired by seed. The paper's FID and MFID have "
        "other features, images and n: compare directions, not values."
    )
    return Study(tuple(rows), about, floor)


def make_figure5(s: StudySettings, base_hash: str, sources: Mapping[str, Path]) -> Study:
    """Figure 5: the same seeds on every line of Table 1, without the scores."""
    study = make_table1(s, base_hash, sources)
    real = plan_cases(s, sources, "reference", s.n)
    rows = tuple(replace(row, score=None, compare=None) for row in study.rows)
    return replace(study, rows=rows, floor=None, extra=(real,))
