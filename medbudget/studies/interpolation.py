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
from medbudget.studies.tables import (
    Row,
    Study,
    StudySettings,
    describe_images,
    make_blocks,
    make_embedding,
    make_phantom_cases,
)
from medbudget.studies.tasks import KINDS, Kind, Store, Task, count_images, cut_sets, read_sets

PRESETS = {
    "tiny": StudySettings(
        base="tiny", inversion="tiny", n=64, steps=25, size=64,
        grid={"CFG scale": (2.0, 5.0), "share": (0.0, 0.25, 0.5, 0.75, 1.0)},
        extractors=(), phantom=None,
    ),
}  # fmt: skip


def _run_disease(task: Task, store: Store, path: Path, scratch: Path) -> None:
    (images,) = read_sets(task, store)
    s = task.settings
    (score,) = disease_axis({0.0: images}, s["kind"], s["label"]).values()
    write_json(path, {"disease score": score.to_dict()})


def _run_rise(task: Task, store: Store, path: Path, scratch: Path) -> None:
    s = task.settings
    now, before = (
        disease_score(images, s["kind"], s["label"]) for images in read_sets(task, store)
    )
    difference = float((now - before).mean())
    write_json(path, {"difference": difference, "p_value": float(ttest_rel(now, before).pvalue)})


KINDS["disease"] = Kind(_run_disease, ".json", cost=count_images, cut=cut_sets)
KINDS["rise"] = Kind(_run_rise, ".json", cost=count_images, cut=cut_sets)


def make_interpolation(
    name: str, preset: str, s: StudySettings, base_hash: str, sources: Mapping[str, Path]
) -> Study:
    """Disease scores along the axes from healthy to each disease, the same seeds at each share."""

    def learn(kind: str, label: str) -> Task:
        train = make_phantom_cases(kind, label, "train", s.cases, s.size)
        return make_embedding(s, base_hash, train, s.vectors, s.cases)

    def draw(healthy: Task, ill: Task, share: float, cfg_scale: float) -> tuple[Task, ...]:
        options: dict[str, Any] = {"n": s.n, "steps": s.steps, "cfg_scale": cfg_scale}
        if share in (0, 1):  # one word: shared by all axes from it, and by other studies
            return make_blocks(s, base_hash, (ill if share else healthy,), "<class>", **options)
        prompt = f"<healthy>:{1 - share!r} AND <disease>:{share!r}"
        options["tokens"] = ("<healthy>", "<disease>")
        return make_blocks(s, base_hash, (healthy, ill), prompt, **options)

    rows = []
    axes = [(k, h, label) for k, (h, *labels) in PHANTOMS.items() for label in labels]
    for (kind, healthy, label), cfg_scale in product(axes, s.grid["CFG scale"]):
        words = learn(kind, healthy), learn(kind, label)
        before: tuple[Task, ...] = ()
        for share in s.grid["share"]:
            made = draw(*words, share, cfg_scale)
            axis = {"kind": kind, "label": label}
            score = Task("disease", axis | {"sets": [[len(made), s.n]]}, made)
            rise = None
            if before:
                sets = [[len(made), s.n], [len(before), s.n]]
                rise = Task("rise", axis | {"sets": sets}, (*made, *before))
            rows.append(Row(f"{label}, CFG {cfg_scale:g}", share, score, rise, images=made))
            before = made
    about = (
        f"{describe_images(s.base, True)} Composed of the healthy word and the disease's by "
        f"weighted prediction, {s.steps} steps, {s.n} images from the same "
        "seeds at each share. Disease score: log odds of a classifier fitted on phantoms, above 0 "
        "more like the diseased; mean over images. p: paired t test against the share before. The "
        "paper shows such axes and has no number for them."
    )
    wanted = [t for row in rows for t in (row.images[0], row.score, row.compare) if t]
    return Study(
        name, preset, s.base, base_hash, tuple(rows), tuple(wanted), about,
        head=("axis", "share"),
    )  # fmt: skip
