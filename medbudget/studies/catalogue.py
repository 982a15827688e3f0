"""Which studies there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medbudget.studies import interpolation, table2, tables
from medbudget.studies.tables import Study


@dataclass(frozen=True)
class Recipe:
    """How a study is planned.

    Attributes
    ----------
    make : callable
        ``make(name, preset, settings, base_hash, sources) -> Study``.
    presets : mapping
        Settings by preset; each names its ``base``.
    roles : tuple of str
        The folders of real images that it can be given.
    """

    make: Callable[[str, str, Any, str, Mapping[str, Path]], Study]
    presets: Mapping[str, Any]
    roles: tuple[str, ...]


_CASES = ("train", "reference", "floor")
STUDIES = {
    "table1": Recipe(tables.make_table1, tables.PRESETS, _CASES),
    "figure5": Recipe(tables.make_figure5, tables.PRESETS, _CASES),
    "interpolation": Recipe(interpolation.make_interpolation, interpolation.PRESETS, ()),
    "table2": Recipe(table2.make_table2, table2.PRESETS, tuple(table2.PROBLEMS)),
}


def find_recipe(name: str, preset: str) -> Recipe:
    """Return a study's recipe.

    Raises
    ------
    ValueError
        Unknown study, or a preset that it does not have.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; allowed are {', '.join(STUDIES)}")
    recipe = STUDIES[name]
    if preset not in recipe.presets:
        raise ValueError(f"unknown preset {preset!r}; allowed are {', '.join(recipe.presets)}")
    return recipe


def make_study(
    name: str, preset: str, *, base_hash: str, sources: Mapping[str, Path] | None = None,
    settings: Any = None,
) -> Study:  # fmt: skip
    """Plan a study.

    Parameters
    ----------
    name : str
        A key of `STUDIES`.
    preset : {"tiny", "colab", "paper"}
    base_hash : str
        `Base.hash` of the base that the preset names.
    sources : mapping of str to path, optional
        Folders of real images by role, see `Recipe.roles`; needed where the preset has no
        phantoms. For Table 1: ``train``, ``reference`` and, for the floor, ``floor``.
    settings : optional
        In place of the preset's, e.g. `StudySettings`.

    Raises
    ------
    ValueError
        Unknown study, preset or role, or images that are needed and not given.
    """
    recipe = find_recipe(name, preset)
    unknown = sorted(set(sources or {}) - set(recipe.roles))
    if unknown:
        raise ValueError(
            f"study {name} takes no folder {unknown[0]!r}; its roles are "
            f"{', '.join(recipe.roles) or 'none'}"
        )
    return recipe.make(name, preset, settings or recipe.presets[preset], base_hash, sources or {})
