"""Figures 2 and 8 with a number beside them: is every step from healthy to diseased one?

The paper draws them with a CFG scale of 2; a stronger one is tried beside it.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from scipy.stats import ttest_rel

from medbudget.data.phantoms import KINDS as PHANTOMS
from medbudget.metrics import disease_axis, disease_score
from medbudget.studies.drawing import Plan
from medbudget.studies.study import Row, Study
from medbudget.studies.table2 import find_folder, find_given, list_classes
from medbudget.studies.tasks import Store, Task, kind, score_sets


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
    """Images along the axes from healthy to each disease, from the same seeds at each share.

    Phantoms get a disease score at each share. It is fitted on phantoms, so images of real cases
    get none.
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
