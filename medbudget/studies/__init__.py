"""The paper's tables and figures as studies that run on a laptop, a GPU, a cluster or an array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medbudget.studies import budget, rivals, table1, table2
from medbudget.studies.drawing import Plan
from medbudget.studies.report import (
    check_report,
    format_values,
    read_values,
    record_table,
    save_lines,
    write_report,
)
from medbudget.studies.study import Row, Study, StudySettings, parse_changes, parse_sources
from medbudget.studies.tasks import Store, Task, check_needs, count, in_order, run

__all__ = [
    "STUDIES", "Row", "Store", "Study", "StudySettings", "Task", "check_needs", "check_report",
    "count", "format_values", "in_order", "make_study", "parse_changes", "parse_sources",
    "read_values", "record_table", "run", "save_lines", "study_settings", "write_report",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a study is planned."""

    make: Callable[[Plan], Study]
    roles: tuple[str, ...]  # the folders of real images, and other files, that it can be given
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # to presets


_SHARES = {"share": (0.0, 0.25, 0.5, 0.75, 1.0)}
_CASES = {"cases": (5, 20, 100)}
_AXES = {"grid": {"CFG scale": (2.0,), **_SHARES}, "extractors": (), "n": 16}
STUDIES = {
    "table1": Recipe(table1.make_table1, tuple(table1.SPLITS)),
    "figure5": Recipe(table1.make_figure5, tuple(table1.SPLITS)),
    "table2": Recipe(
        table2.make_table2, (*table2.PROBLEMS, table2.PCAM),
        # noise: so that classifiers of 200 phantoms reach about the paper's AUCs on validation cases
        {"tiny": {"noise": {"chest": 64.0, "histology": 224.0}}},
    ),
    "interpolation": Recipe(
        table1.make_interpolation, tuple(table2.PROBLEMS),
        {
            "tiny": {"grid": {"CFG scale": (2.0, 5.0), **_SHARES}, "extractors": ()},
            "colab": _AXES, "paper": _AXES,
        },
    ),
    "stylegan3": Recipe(
        rivals.make_rivals, ("train", "reference", rivals.START),
        {"tiny": {"n": 200, "extractors": ("efficientnet-lite0",)}},
    ),
    "budget": Recipe(
        # learning rates: the best of three for each of word, LoRA and full tuning after 150 steps on
        # 100 cases, by the distance to validation phantoms
        budget.make_budget, (*table2.PROBLEMS, budget.OWN, rivals.START),
        {
            "tiny": {
                "grid": _CASES, "n": 48, "steps": 15, "runs": 2, "changes": {"steps": 75},
                "overrides": {"steps": 150, "lr": 0.1},
            },
            "colab": {"grid": _CASES}, "paper": {"grid": _CASES},
        },
    ),
}  # fmt: skip


def study_settings(name: str, preset: str, **changes: Any) -> StudySettings:
    """Return the settings of a study: a preset of `StudySettings` as the study wants it.

    Changes of a setting that is a mapping change its entries. An unknown study, preset or setting
    raises ValueError.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; allowed are {', '.join(STUDIES)}")
    own = STUDIES[name].changes.get(preset, {})
    before = vars(StudySettings.preset(preset, **own))
    for key, value in changes.items():
        if isinstance(value, Mapping) and key in before:
            changes[key] = {**before[key], **value}
    settings: StudySettings = StudySettings.preset(preset, **{**own, **changes})
    return settings


def make_study(
    name: str,
    preset: str,
    *,
    base_hash: str,
    sources: Mapping[str, Path] | None = None,
    settings: StudySettings | None = None,
) -> Study:
    """Plan the study of a name in `STUDIES`.

    `base_hash` is that of the base that the settings name. `sources` are folders of real images by
    role (see `Recipe.roles`), needed where there are no phantoms: for Table 1 ``train``,
    ``reference`` and, for the floor, ``floor``. `settings` are in place of the preset's. An unknown
    role, or too few images, raise ValueError.
    """
    settings = settings or study_settings(name, preset)
    recipe = STUDIES[name]
    given = {role: Path(path) for role, path in (sources or {}).items()}
    if unknown := sorted(set(given) - set(recipe.roles)):
        raise ValueError(
            f"study {name} takes no folder {unknown[0]!r}; its roles are {', '.join(recipe.roles)}"
        )
    pairs = [text.partition("=") for text in settings.extractors]
    given |= {extractor: Path(weights) for extractor, _, weights in pairs if weights}
    named = replace(settings, extractors=tuple(extractor for extractor, _, _ in pairs))
    study = recipe.make(Plan(named, base_hash, given))
    return replace(
        study, name=name, preset=preset, settings=settings, base_hash=base_hash, sources=given
    )
