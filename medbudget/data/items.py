"""What a preparation wants, makes and reports: items, images and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medbudget.settings import check_number

SIZES = (8, 4096)  # pixels of an edge that can be asked for
Cells = dict[tuple[str, str], int]  # split and class to a number


class BrokenCase(ValueError):
    """A case that cannot be used; the message is its reason in the table at the end."""


@dataclass(frozen=True)
class Item:
    """One image that is wanted."""

    name: str  # file name without suffix
    label: str
    split: str
    patient: str
    job: Any = None  # what the making function needs to know; small and picklable
    note: str = ""  # for the manifest, e.g. that a reference case stands in another split too
    source: str = ""  # says which image of which file it is, where the name does not

    @property
    def file(self) -> str:
        """Path of the image in the output folder."""
        return f"{self.split}/{self.label}/{self.name}.png"


@dataclass(frozen=True, eq=False)
class Made:
    """One image that was made, with what the manifest says of it."""

    image: torch.Tensor  # (3, H, W) uint8
    sources: tuple[str, ...]  # files it came from, relative to the dataset's folder
    window: str = ""  # how intensities became 0..255
    slice_index: int | None = None
    spacing: tuple[float, float] | None = None  # mm of a pixel of the output: row, column
    crop: str = ""  # which part of the source it shows
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)  # name to (H, W) bool
    note: str = ""
    pixels: str = ""  # hash of the source's pixels, which may be in one split and one class alone


@dataclass(frozen=True)
class Report:
    """What a preparation did."""

    out: Path
    counts: Cells  # images there
    made: int  # images made by this run
    kept: int  # images found from an earlier run
    broken: tuple[tuple[str, str], ...] = ()  # case and reason
    short: Cells = field(default_factory=dict)  # images missing
    notes: tuple[str, ...] = ()  # what the reader should know
    patients: Cells = field(default_factory=dict)
    size: int = 0  # pixels of an edge

    def __str__(self) -> str:
        wide = max([22, *(len(label) for _, label in self.counts)]) + 2
        lines = [f"{'split':<12}{'class':<{wide}}{'patients':>9}{'images':>9}"]
        for cell, n in self.counts.items():
            missing = f"  ({self.short[cell]} missing)" if cell in self.short else ""
            patients = self.patients.get(cell, 0)
            lines.append(f"{cell[0]:<12}{cell[1]:<{wide}}{patients:>9}{n:>9}{missing}")
        edge = f", {self.size} x {self.size} pixels" if self.size else ""
        lines.append(f"{self.made} made, {self.kept} kept from an earlier run, in {self.out}{edge}")
        lines += [f"note: {note}" for note in self.notes]
        if self.broken:
            n = len(self.broken)
            lines.append(f"{n} broken case{'s were' if n > 1 else ' was'} left out:")
            width = max(len(name) for name, _ in self.broken)
            lines += [f"  {name:<{width}}  {reason}" for name, reason in self.broken]
        text = "\n".join(lines)
        return text.encode("utf-8", "backslashreplace").decode()  # names in unknown encodings


def check_settings(*, size: int, **numbers: int) -> None:
    """Raise ValueError for numbers that are out of range."""
    for name, value in numbers.items():
        check_number(name, value, 0 if name in ("seed", "reference") else 1, whole=True)
    check_number("size", size, *SIZES, whole=True)
