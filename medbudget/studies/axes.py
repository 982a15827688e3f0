"""Figures 2 and 8 with a number beside them: is every step from healthy to diseased one?

The paper draws them with a CFG scale of 2; a stronger one is tried beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from medbudget.data.phantoms import KINDS as PHANTOMS
from medbudget.files import write_json
from medbudget.metrics import disease_axis, disease_score
from medbudget.studies.drawing import (
    describe_images,
    plan_blocks,
    plan_folder,
    plan_phantoms,
    plan_word,
)
from medbudget.studies.study import Row, Study, StudySettings
from medbudget.studies.table2 import PROBLEMS, find_folder
from medbudget.studies.tasks import Store, Task, kind

# ------------------------------------------------------------------------------- what tasks do


@kind("disease", ".json")
def _run_disease(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    (images,) = store.read_sets(task)
    s = task.settings
    (score,) = disease_axis({0.0: images}, s["kind"], s["label"]).values()
    write_json(path, {"disease score": score.to_dict()})


@kind("rise", ".json")
def _run_rise(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    s = task.settings
    now, before = (disease_score(images, s["kind"], s["label"]) for images in store.read_sets(task))
    difference = float((now - before).mean())
    write_json(path, {"difference": difference, "p_value": float(ttest_rel(now, before).pvalue)})


# ------------------------------------------------------------------------------- their planning


def _plan_axes(
    s: StudySettings, sources: Mapping[str, Path]
) -> list[tuple[str, str, Task, Task, bool]]:
    """Return each axis: kind, disease, cases of either end, and whether phantoms stand for them."""
    given = [name for name in PROBLEMS if name in sources]
    if s.phantoms and not given:

        def cases(name: str, label: str) -> Task:
            return plan_phantoms(name, label, "train", s.cases, s.size)

        return [
            (name, label, cases(name, healthy), cases(name, label), True)
            for name, (healthy, *labels) in PHANTOMS.items()
            for label in labels
        ]
    if not given:
        raise ValueError(
            "the axes need real images: --data prostate=FOLDER, chest=FOLDER or "
            "histology=FOLDER, each as medbudget prepare writes it"
        )
    axes = []
    for name in given:
        healthy = find_folder(sources, name, "train", 0)
        first = plan_folder(sources, healthy, s.cases, s.size)
        folders = sorted(p.name for p in (sources[name] / "train").iterdir() if p.is_dir())
        for folder in (f"{name}/train/{folder}" for folder in folders):
            if folder != healthy:
                ill = plan_folder(sources, folder, s.cases, s.size)
                axes.append((name, Path(folder).name, first, ill, False))
    return axes


def make_interpolation(s: StudySettings, base_hash: str, sources: Mapping[str, Path]) -> Study:
    """Images along the axes from healthy to each disease, from the same seeds at each share.

    Phantoms get a disease score at each share. It is fitted on phantoms, so images of real cases
    get none.
    """

    def draw(words: tuple[Task, Task], share: float, cfg_scale: float) -> tuple[Task, ...]:
        options: dict[str, Any] = {"n": s.n, "cfg_scale": cfg_scale}
        if share in (0, 1):  # one word: shared by all axes from it, and by other studies
            return plan_blocks(s, base_hash, [words[int(share)]], **options)
        prompt = f"<healthy>:{1 - share!r} AND <disease>:{share!r}"
        options["tokens"] = ("<healthy>", "<disease>")
        return plan_blocks(s, base_hash, words, prompt, **options)

    rows = []
    axes = _plan_axes(s, sources)
    for (name, label, healthy, ill, phantoms), cfg_scale in product(axes, s.grid["CFG scale"]):
        words = plan_word(s, base_hash, healthy), plan_word(s, base_hash, ill)
        before: tuple[Task, ...] = ()
        for share in s.grid["share"]:
            images = draw(words, share, cfg_scale)
            score = rise = None
            if phantoms:
                axis = {"kind": name, "label": label}
                score = Task("disease", axis | {"sets": [[len(images), s.n]]}, images)
                if before:
                    sets = [[len(images), s.n], [len(before), s.n]]
                    rise = Task("rise", axis | {"sets": sets}, (*images, *before))
            rows.append(Row(f"{label}, CFG {cfg_scale:g}", share, score, rise, images=images))
            before = images
    scores = (
        "Disease score: log odds of a classifier fitted on phantoms, above 0 more like the "
        "diseased; mean over images. p: paired t test against the share before. "
    )
    about = (
        f"{describe_images(s, axes[0][-1])} Composed of the healthy word and the disease's by "
        f"weighted prediction, {s.steps} steps, {s.n} images from the same seeds at each share. "
        f"{scores if axes[0][-1] else ''}The paper shows such axes and has no number for them."
    )
    return Study(tuple(rows), about, head=("axis", "share"))
