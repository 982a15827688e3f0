"""A reader's own images: any folder of medical images to image sets, split by patient.

What is written carries no header, no file name and no identifier of the source: patients get
numbers, sources are named by a hash. Text burnt into pixels cannot be detected.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medbudget.data.prepare import (
    BrokenCase,
    Item,
    Made,
    Report,
    check_settings,
    prepare_items,
    read_table,
)
from medbudget.data.splits import (
    SPLITS,
    choose_reference,
    shuffle,
    split_in_proportion,
    split_patients,
)
from medbudget.data.volumes import (
    PLANES,
    Array,
    Pixels,
    Source,
    Window,
    count_slices,
    find_sources,
    read_mask,
    read_pixels,
    separate,
)
from medbudget.files import check_writable, hash_file, write_text
from medbudget.images import fit_square, from_pil

PERCENTILES = (0.5, 99.5)
PROPORTIONS = (0.6, 0.2, 0.2)
BURNT_IN = (
    "text burnt into the pixels cannot be detected: look at every image before you share "
    "one, and before you train on them"
)


@dataclass(frozen=True)
class Entry:
    """A source with its class and its patient, as the reader calls them."""

    source: Source
    label: str
    patient: str


def prepare_folder(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    file_column: str = "file",
    label_column: str = "class",
    patient_column: str = "patient",
    patient_pattern: str | None = None,
    proportions: Sequence[float] = PROPORTIONS,
    per_class: int | None = None,
    allow_fewer: bool = False,
    reference: int = 0,
    disjoint: bool = True,
    slices: str = "middle",
    masks: str | os.PathLike[str] | None = None,
    plane: str = "native",
    window: str = "auto",
    size: int = 512,
    seed: int = 0,
    key: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> Report:
    """Turn a folder of medical images into image sets, split by patient.

    Reads DICOM files and series, NIfTI, MHA, NRRD, PNG, JPEG, TIFF, BMP and WebP, at any depth.

    Parameters
    ----------
    root : path
        One folder for each class, or all of them with a table of `labels`. Images that lie in
        `root` itself are a class named "all".
    out : path
        Gets ``{train,val,test}/{class}/*.png``, ``manifest.csv``, ``settings.json`` and
        ``contact_sheet.png``.
    labels : path, optional
        CSV with the columns `file_column` (relative to `root`; a folder stands for all in it),
        `label_column` and, if it is known, `patient_column`. Files not listed are left out.
    patient_pattern : str, optional
        Regular expression on the relative path, whose first group names the patient. Else the
        patient is the table's, DICOM's Patient ID, or each file its own.
    proportions : sequence of float
        Of patients in train, val and test, or in train alone.
    per_class : int, optional
        Patients of each class in each split, instead of all in proportion.
    reference : int
        Also write the images of that many patients of each class to ``reference``, for distances.
        With `disjoint` these stand in no split, so `per_class` has to leave some.
    slices : str
        Of a volume: ``middle``, ``mask`` (where the mask is largest), or ``every:K``.
    masks : path, optional
        Folder with a mask for each volume, under the volume's own relative name (for a DICOM
        series, its folder's) and any of the volume suffixes.
    plane : {"native", "axial", "coronal", "sagittal"}
        Which way to slice volumes.
    window : str
        ``tags`` (DICOM's), ``percentile`` (0.5 to 99.5 of image or volume), ``LOW,HIGH``, or
        ``auto``: tags where there are any, else 8-bit values as they are, else percentile. Colour
        stays as it is.
    size : int
        Pixels of the longest edge; the rest is padded with black to a square.
    key : path, optional
        Write which number is which patient to this CSV, outside of `out`. Keep it safe.
    workers : int

    Raises
    ------
    FileNotFoundError
        No such folder or table.
    ValueError
        Options that do not exist, nothing to read, a table that does not fit, too few patients.
    """
    check_settings(
        size=size, seed=seed, workers=workers, per_class=1 if per_class is None else per_class,
        reference=reference,
    )  # fmt: skip
    step = _check_options(slices, masks, plane, window, proportions)
    root, out = Path(root), Path(out)
    if key is not None and Path(key).resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"the key {key} lies in {out}, which is meant to be shared; put it elsewhere"
        )
    notes = [BURNT_IN]
    sources = find_sources(root, notes=notes)
    if not sources:
        raise ValueError(
            f"no images in {root}; allowed are DICOM, NIfTI, MHA, NRRD, PNG, JPEG, TIFF, BMP, WebP"
        )
    entries = (
        _read_table(root, Path(labels), sources, file_column, label_column, patient_column, notes)
        if labels is not None
        else [Entry(s, _class_of(s), s.patient) for s in sources]
    )
    entries = _name_patients(entries, patient_pattern, notes)
    flagged = sum(entry.source.burnt_in for entry in entries)
    if flagged:
        notes.append(f"{flagged} DICOM images say that they have text in their pixels")
    strata = _stratify(entries)
    splits, left = _split(strata, proportions, per_class, allow_fewer, seed)
    extra: dict[str, str] = {}
    for label, queue in left.items() if reference else ():
        mine = {p: split for p, split in splits.items() if strata[p] == label}
        chosen, said = choose_reference(mine, queue, reference, disjoint=disjoint)
        extra |= chosen
        notes += [f"class {label}: {text}" for text in said]
    numbers = {p: f"p{i + 1:05d}" for i, p in enumerate(shuffle({*splits, *extra}, seed=seed))}
    items = _list_items(root, entries, splits, extra, numbers, step, slices, plane)
    settings = {
        "dataset": "folder",
        "size": size,
        "seed": seed,
        "proportions": list(proportions) if per_class is None else None,
        "per_class": per_class,
        "reference": reference,
        "disjoint": disjoint,
        "slices": slices,
        "plane": plane,
        "window": window,
    }
    make = partial(
        _make, root=root, masks=None if masks is None else Path(masks), plane=plane, window=window,
        size=size,
    )  # fmt: skip
    report = prepare_items(items, make, out, settings=settings, notes=notes, workers=workers)
    if key is not None:
        _write_key(Path(key), entries, numbers)
    return report


def _check_options(
    slices: str, masks: Any, plane: str, window: str, proportions: Sequence[float]
) -> int | None:
    """Raise for options that cannot be; return K of ``every:K``."""
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; allowed are {', '.join(PLANES)}")
    if window not in ("auto", "tags", "percentile"):
        _parse_window(window)
    if len(proportions) not in (1, len(SPLITS)):
        raise ValueError(f"proportions of train, val and test, or of train; got {proportions}")
    if (slices == "mask") != (masks is not None):
        raise ValueError("slices='mask' and a folder of masks (--masks) belong together")
    every = re.fullmatch(r"every:([1-9]\d*)", slices)
    if not every and slices not in ("middle", "mask"):
        raise ValueError(f"unknown slice rule {slices!r}; allowed are middle, mask, every:K")
    return int(every[1]) if every else None


def _parse_window(window: str) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in window.split(","))
    except ValueError:
        raise ValueError(
            f"unknown window {window!r}; allowed are auto, tags, percentile, LOW,HIGH"
        ) from None
    if not low < high:
        raise ValueError(f"window {window}: the first value must be below the second")
    return low, high


def _class_of(source: Source) -> str:
    """Return the first folder of a path, or "all"."""
    parts = Path(source.files[0]).parts
    return parts[0] if len(parts) > 1 else "all"


def _read_table(
    root: Path,
    table: Path,
    sources: Sequence[Source],
    file_column: str,
    label_column: str,
    patient_column: str,
    notes: list[str],
) -> list[Entry]:
    """Match the rows of a CSV with sources; a row without one becomes a source with a problem."""
    rows = read_table(table)
    missing = [c for c in (file_column, label_column) if not rows or c not in rows[0]]
    if missing:
        raise ValueError(
            f"{table} has the columns {list(rows[0]) if rows else []}, but no {missing}; name them "
            "with --file-column and --label-column"
        )
    listed: dict[str, dict[str, str]] = {}
    for row in rows:
        name = Path(row[file_column]).as_posix()
        if name in listed:
            raise ValueError(f"{table} lists {name} twice")
        if not row[label_column]:
            raise ValueError(f"{table} gives {name} no {label_column}")
        listed[name] = row

    def find_row(file: str) -> str | None:
        names = [p.as_posix() for p in (Path(file), *Path(file).parents)]
        return next((name for name in names if name in listed), None)

    single = [  # slices with rows of their own stay images of their own
        one
        for source in sources
        for one in (separate(source) if len({*map(find_row, source.files)}) > 1 else [source])
    ]
    entries, used = [], set()
    for source in single:
        match = find_row(source.files[0])
        if match is not None:
            used.add(match)
            row = listed[match]
            patient = row.get(patient_column) or source.patient
            entries.append(Entry(source, row[label_column], patient))
    if not entries:
        raise ValueError(
            f"no file of {table} is in {root}; its paths must be relative to that folder, "
            f"such as {sources[0].files[0]}"
        )
    if len(entries) < len(single):
        notes.append(f"{len(single) - len(entries)} images are not in the table and were left out")
    for name in sorted(set(listed) - used):
        row = listed[name]
        absent = Source((name,), "picture", problem="listed in the table, but not in the folder")
        entries.append(Entry(absent, row[label_column], row.get(patient_column) or ""))
    return entries


def _name_patients(entries: Sequence[Entry], pattern: str | None, notes: list[str]) -> list[Entry]:
    """Give every entry a patient: by the pattern, as known, or its own path."""
    if pattern is not None:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"patient pattern {pattern!r} is no regular expression: {error}"
            ) from None
        if expression.groups < 1:
            raise ValueError(f"patient pattern {pattern!r} needs a group in parentheses")
        named = []
        for entry in entries:
            match = expression.search(entry.source.files[0])
            if not match or not match[1]:
                raise ValueError(
                    f"patient pattern {pattern!r} does not fit {entry.source.files[0]}"
                )
            named.append(Entry(entry.source, entry.label, match[1]))
        return named
    unknown = sum(not entry.patient for entry in entries)
    if unknown:
        notes.append(
            f"the patients of {unknown} images are unknown, and each counts as its own: if one "
            "patient has several, name them (a column of the table, or --patient-pattern), or "
            "splits will leak"
        )
    return [Entry(e.source, e.label, e.patient or f"file:{e.source.files[0]}") for e in entries]


def _stratify(entries: Sequence[Entry]) -> dict[str, str]:
    """Patient to class; one with several classes counts for that which the fewest patients have."""
    having: dict[str, set[str]] = {}
    for entry in entries:
        having.setdefault(entry.label, set()).add(entry.patient)
    strata: dict[str, str] = {}
    for label in sorted(having, key=lambda one: (len(having[one]), one)):
        for patient in having[label]:
            strata.setdefault(patient, label)
    return strata


def _split(
    strata: Mapping[str, str],
    proportions: Sequence[float],
    per_class: int | None,
    allow_fewer: bool,
    seed: int,
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split patients; also return class to those that are left."""
    parts, labels = dict(zip(SPLITS, proportions)), sorted({*strata.values()})
    if per_class is None:
        return split_in_proportion(strata, parts, seed=seed), {label: [] for label in labels}
    sizes = {split: dict.fromkeys(labels, per_class) for split in parts}
    return split_patients(strata, sizes, seed=seed, allow_fewer=allow_fewer)


def _list_items(
    root: Path,
    entries: Sequence[Entry],
    splits: Mapping[str, str],
    extra: Mapping[str, str],
    numbers: Mapping[str, str],
    step: int | None,
    slices: str,
    plane: str,
) -> list[Item]:
    """One item an image, or one for every K-th slice; again for patients of the reference set."""
    folders: dict[str, str] = {}
    for label in sorted({entry.label for entry in entries}):
        folder = re.sub(r"[^\w.-]+", "_", label).strip("._")
        if not folder or folder in folders.values():
            raise ValueError(f"class {label!r} gives no folder name of its own; rename it")
        folders[label] = folder
    items = []
    counts: dict[str, int] = {}
    for entry in sorted(entries, key=lambda e: e.source.files):
        places = {}
        if entry.patient in splits:
            places[splits[entry.patient]] = ""
        if entry.patient in extra:
            other = extra[entry.patient]
            places["reference"] = f"also in {other}" if other else ""
        if not places:
            continue
        rules: list[str | int] = [slices]
        if step is not None:
            try:
                n = count_slices(root, entry.source, plane=plane) if not entry.source.problem else 1
                rules = list(range(min(step // 2, n - 1), n, step))
            except BrokenCase:
                rules = ["middle"]  # reading it will say what is wrong
        for rule in rules:
            number = numbers[entry.patient]
            counts[number] = counts.get(number, 0) + 1
            name = f"{number}_{counts[number]:03d}"
            job = (entry.source, rule)
            for split, note in places.items():
                items.append(Item(name, folders[entry.label], split, number, job, note))
    return items


def _make(
    item: Item, *, root: Path, masks: Path | None, plane: str, window: str, size: int
) -> Made:
    source, rule = item.job
    try:
        pixels = read_pixels(root, source, plane=plane)
        index = _choose_slice(pixels, rule, root, source, masks, plane)
    except BrokenCase as error:  # the table names the file: it is shown to the reader, not written
        raise BrokenCase(f"{source.files[0]}: {error}") from None
    values, said = _apply_window(pixels, index, window)
    height, width = values.shape[:2]
    row, column = pixels.spacing or pixels.aspect
    scale = size / max(height * row, width * column)
    image = Image.fromarray(values).convert("RGB")
    shape = (max(1, round(width * column * scale)), max(1, round(height * row * scale)))
    image = image.resize(shape, Image.Resampling.LANCZOS)
    volume = len(pixels.values) > 1
    return Made(
        from_pil(fit_square(image, size)),
        (f"sha256:{hash_file(root / source.files[0])}",),
        window=said + (f", {pixels.note}" if pixels.note else ""),
        slice_index=index if volume else None,
        spacing=(1 / scale, 1 / scale) if pixels.spacing else None,
        crop=f"all {height} x {width} px" + (f" of {len(pixels.values)} slices" if volume else ""),
    )


def _choose_slice(
    pixels: Pixels, rule: str | int, root: Path, source: Source, masks: Path | None, plane: str
) -> int:
    if isinstance(rule, int):
        return rule
    if rule == "middle" or masks is None:
        return len(pixels.values) // 2
    area = read_mask(masks, source, pixels, plane=plane).reshape(len(pixels.values), -1).sum(axis=1)
    if not area.any():
        raise BrokenCase("its mask is empty")
    return int(area.argmax())


def _apply_window(pixels: Pixels, index: int, window: str) -> tuple[Array, str]:
    """Return one slice as ``(H, W[, 3]) uint8``, and how that came about."""
    values = pixels.values[index]
    if values.ndim == 3:
        return values, "as stored (colour)"
    padding = None if pixels.padding is None else pixels.padding[index]
    asked = pixels.windows[index] if pixels.windows else None
    kind = window
    if window == "auto":
        eight = values.dtype == np.uint8
        kind = "tags" if asked else "stored" if eight else "percentile"
    if kind == "stored":
        chosen, said = Window(0, 255), "as stored (8 bit)"
    elif kind == "tags":
        if asked is None:
            raise BrokenCase("it has no window tags; use --window percentile or LOW,HIGH")
        chosen, said = asked, f"tags: {asked}"
    else:
        if kind == "percentile":
            seen = pixels.values if pixels.padding is None else pixels.values[~pixels.padding]
            if not seen.size:
                raise BrokenCase("all of it is padding")
            low, high = np.percentile(seen, PERCENTILES)
            chosen = Window(float(low), float(high))
        else:
            chosen, kind = Window(*_parse_window(window)), "fixed"
        said = f"{kind}: {chosen}"
    scaled = chosen.apply(values)
    if pixels.inverted:
        scaled, said = 1 - scaled, f"{said}, inverted"
    if padding is not None:
        scaled, said = np.where(padding, 0, scaled), f"{said}, padding black"
    return np.rint(scaled * 255).astype(np.uint8), said


def _write_key(key: Path, entries: Sequence[Entry], numbers: Mapping[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("number", "patient", "file"))
    rows = [
        (numbers[e.patient], e.patient, e.source.files[0]) for e in entries if e.patient in numbers
    ]
    writer.writerows(sorted(rows))
    check_writable(key)
    write_text(key, text.getvalue())
