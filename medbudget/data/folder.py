"""A reader's own images: any folder of medical images to image sets, split by patient.

What is written carries no header, no file name and no identifier of the source: patients get
numbers, sources are named by a hash. Text burnt into pixels cannot be detected.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from medbudget.data.channels import check_channels, join_channels
from medbudget.data.compare import check_classes, inspect, join_twins, leave_out, veil
from medbudget.data.listed import Entry, list_by_table
from medbudget.data.parallel import run_parallel
from medbudget.data.prepare import (
    BrokenCase,
    Item,
    Report,
    check_settings,
    prepare_items,
)
from medbudget.data.render import parse_window, render_item
from medbudget.data.splits import (
    SPLITS,
    choose_reference,
    shuffle,
    split_in_proportion,
    split_patients,
)
from medbudget.data.volumes import PLANES, Source, count_slices, find_sources
from medbudget.files import check_apart, check_writable, write_text
from medbudget.images import is_prepared

PROPORTIONS = (0.6, 0.2, 0.2)
BURNT_IN = (
    "text burnt into the pixels cannot be detected: look at every image before you share "
    "one, and before you train on them"
)


def prepare_folder(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    file_column: str = "file",
    label_column: str = "class",
    patient_column: str | None = None,
    patient_pattern: str | None = None,
    proportions: Sequence[float] = PROPORTIONS,
    per_class: int | None = None,
    allow_fewer: bool = False,
    reference: int = 0,
    disjoint: bool = True,
    slices: str = "middle",
    masks: str | os.PathLike[str] | None = None,
    channels: str | None = None,
    plane: str = "native",
    window: str = "auto",
    size: int = 512,
    seed: int = 0,
    key: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> Report:
    """Turn a folder of medical images into image sets, split by patient.

    Reads DICOM files and series, NIfTI, MHA, NRRD and what `medbudget.images` reads, at any depth.
    Images with the same pixels stay in one split; in two classes they are left out and named.

    Parameters
    ----------
    root : path
        One folder for each class, or all of them with a table of `labels`. Images that lie in
        `root` itself are a class named "all"; so are all, where every folder is one patient's.
    out : path
        Gets ``{train,val,test}/{class}/*.png``, ``manifest.csv``, ``settings.json`` and
        ``contact_sheet.png``.
    labels : path, optional
        CSV with the columns `file_column` (relative to `root`; a folder stands for all in it),
        `label_column` and, if it is known, `patient_column`. Files not listed are left out.
    patient_column : str, optional
        Default: ``patient``, if the table has it.
    patient_pattern : str, optional
        Regular expression on the path below `root`, whose first group names the patient. Else the
        patient is the table's, DICOM's Patient ID, or each file its own.
    proportions : sequence of float
        Of patients in train, val and test, or 1 for train alone.
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
    channels : str, optional
        Join three DICOM series of each study to red, green and blue of one image, on the grid of
        the first (linear interpolation): ``t2w,adc,hbv``, where ``t2w`` is the axial T2 series and
        ``hbv`` that of the highest b-value. Another name is a part of the series description.
    plane : {"native", "axial", "coronal", "sagittal"}
        Which way to slice volumes.
    window : str
        ``tags`` (DICOM's), ``percentile`` (0.5 to 99.5 of image or volume), ``LOW,HIGH``, or
        ``auto``: tags where there are any, else 8-bit values as they are, else percentile. Colour
        stays as it is.
    size : int
        Pixels of the longest edge; the rest is padded with black to a square. Bases resize what
        they load: ``tiny`` to 64 pixels, Stable Diffusion to 512.
    key : path, optional
        Write which number is which patient to this CSV, outside of `out`. Keep it safe.
    workers : int

    Raises
    ------
    FileNotFoundError
        No such folder or table.
    ValueError
        Options that do not exist, nothing to read, a table that does not fit, classes named after
        patients, too few patients, an `out` inside of `root`.
    """
    check_settings(
        size=size, seed=seed, workers=workers, per_class=1 if per_class is None else per_class,
        reference=reference,
    )  # fmt: skip
    step = _check_options(slices, masks, plane, window, proportions)
    names = None if channels is None else check_channels(channels)
    if names and window not in ("auto", "tags", "percentile"):
        raise ValueError("channels have a window each: auto, tags or percentile (--window)")
    root, out = Path(root), Path(out)
    check_apart(out, root, masks)
    if key is not None and Path(key).resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"the key {key} lies in {out}, which is meant to be shared; put it elsewhere"
        )
    if is_prepared(root):
        raise ValueError(f"{root} was made by `medbudget prepare`; name the folder it was made of")
    notes = [BURNT_IN]
    sources = leave_out(root, find_sources(root, notes=notes), masks, notes)
    if not sources:
        raise ValueError(
            f"no images in {root}; allowed are DICOM, NIfTI, MHA, NRRD, PNG, JPEG, TIFF, BMP, "
            "WebP, GIF, JPEG 2000, AVIF and HEIC" + "".join(f"; {note}" for note in notes[1:])
        )
    if names:
        sources = join_channels(root, sources, names, notes)
    broken: list[tuple[str, str]] = []
    if labels is None:
        entries = [Entry(source, _class_of(source), source.patient) for source in sources]
    else:
        columns = (file_column, label_column, patient_column)
        entries = list_by_table(root, Path(labels), sources, columns, notes, broken)
    entries = _name_patients(root, entries, patient_pattern, notes)
    work = partial(inspect, root=root)
    facts = {
        source.files: fact
        for source, fact in run_parallel(
            work, [entry.source for entry in entries], workers=workers, desc="comparing"
        )
    }
    people = {files: person for files, (_, person) in facts.items()}
    entries = check_classes(entries, people, labels is None, notes)
    entries = join_twins(entries, {f: fact[0] for f, fact in facts.items()}, notes, broken)
    flagged = sum(entry.source.burnt_in for entry in entries)
    if flagged:
        said = "image says that it has" if flagged == 1 else "images say that they have"
        notes.append(f"{flagged} DICOM {said} text in the pixels")
    strata = _stratify(entries)
    splits, left = _split(strata, proportions, per_class, allow_fewer, seed)
    extra: dict[str, str] = {}
    for label, queue in left.items() if reference else ():
        mine = {p: split for p, split in splits.items() if strata[p] == label}
        chosen, said_of = choose_reference(mine, queue, reference, disjoint=disjoint)
        extra |= chosen
        notes += [f"class {label}: {text}" for text in said_of]
    numbers = {p: f"p{i + 1:05d}" for i, p in enumerate(shuffle({*splits, *extra}, seed=seed))}
    items = _list_items(root, entries, splits, extra, numbers, step, slices, plane)
    everybody = [*people.values()]
    settings = {
        "dataset": "folder",
        "size": size,
        "seed": seed,
        "proportions": list(proportions) if per_class is None else None,
        "per_class": per_class,
        "reference": reference,
        "disjoint": disjoint,
        "slices": slices,
        "channels": names,
        "plane": plane,
        "window": window,
        "patient_pattern": veil(patient_pattern, everybody),
        "labels": None if labels is None else veil(Path(labels).name, everybody),
        "columns": None if labels is None else [file_column, label_column, patient_column],
    }
    make = partial(
        render_item, root=root, masks=None if masks is None else Path(masks), plane=plane,
        window=window, size=size,
    )  # fmt: skip
    report = prepare_items(
        items, make, out, settings=settings, notes=notes, workers=workers, broken=broken
    )
    if key is not None:
        _write_key(Path(key), entries, numbers)
    return report


def _check_options(
    slices: str, masks: object, plane: str, window: str, proportions: Sequence[float]
) -> int | None:
    """Raise for options that cannot be; return K of ``every:K``."""
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; allowed are {', '.join(PLANES)}")
    if window not in ("auto", "tags", "percentile"):
        parse_window(window)
    if len(proportions) not in (1, len(SPLITS)) or not abs(sum(proportions) - 1) < 1e-3:
        raise ValueError(
            "proportions are those of train, val and test and add up to 1, or 1 for train alone; "
            f"got {', '.join(f'{p:g}' for p in proportions)}"
        )
    if (slices == "mask") != (masks is not None):
        raise ValueError("slices='mask' and a folder of masks (--masks) belong together")
    every = re.fullmatch(r"every:([1-9]\d*)", slices)
    if not every and slices not in ("middle", "mask"):
        raise ValueError(f"unknown slice rule {slices!r}; allowed are middle, mask, every:K")
    return int(every[1]) if every else None


def _class_of(source: Source) -> str:
    """Return the first folder of a path, or "all"."""
    parts = Path(source.files[0]).parts
    return parts[0] if len(parts) > 1 else "all"


def _name_patients(
    root: Path, entries: Sequence[Entry], pattern: str | None, notes: list[str]
) -> list[Entry]:
    """Give every entry a patient: by the pattern, as known, or its own path."""
    if pattern is None:
        unknown = sum(not entry.patient for entry in entries)
        if unknown:
            notes.append(
                f"the patient{'s' if unknown > 1 else ''} of {unknown} "
                f"image{'s are' if unknown > 1 else ' is'} unknown, and each counts as its own: if "
                "one patient has several, name them (a column of the table, or --patient-pattern), "
                "or splits will leak"
            )
        named = list(entries)
    else:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"patient pattern {pattern} is no regular expression: {error}"
            ) from None
        if expression.groups < 1:
            raise ValueError(f"patient pattern {pattern} needs a group in parentheses")
        named = []
        for entry in entries:
            match = expression.search(entry.source.files[0])
            if not match or not (match[1] or "").strip():
                raise ValueError(
                    f"patient pattern {pattern} does not fit {entry.source.files[0]}: it is "
                    f"searched in this path below {root}, folders and ending included"
                )
            named.append(replace(entry, patient=match[1].strip()))
    spellings: dict[str, dict[str, str]] = {}  # patient to each spelling, and a file that has it
    for entry in named:
        same = spellings.setdefault(_fold(entry.patient), {})
        same.setdefault(unicodedata.normalize("NFC", entry.patient), entry.source.files[0])
    several = [same for same in spellings.values() if len(same) > 1]
    if several:
        both = " and ".join(list(several[0].values())[:2])
        notes.append(
            f"{len(several)} patient{'s are' if len(several) > 1 else ' is'} spelled in capital and "
            f"in small letters, and each counts as one, such as that of {both}"
        )
    return [
        replace(e, patient=min(spellings[_fold(e.patient)]) or f"file:{e.source.files[0]}")
        for e in named
    ]


def _fold(patient: str) -> str:
    """Write a patient in one way, whatever the letter case and the form of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", patient).casefold())


def _stratify(entries: Sequence[Entry]) -> dict[str, str]:
    """Patient to class; one with several classes counts for that which the fewest patients have."""
    having: dict[str, set[str]] = {}
    for entry in entries:
        having.setdefault(entry.label, set()).add(entry.group)
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
        if not folder or folder.casefold() in {name.casefold() for name in folders.values()}:
            raise ValueError(f"class {label!r} gives no folder name of its own; rename it")
        folders[label] = folder
    items = []
    counts: dict[str, int] = {}
    for entry in sorted(entries, key=lambda e: e.source.files):
        places = {}
        if entry.group in splits:
            places[splits[entry.group]] = ""
        if entry.group in extra:
            other = extra[entry.group]
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
            number = numbers[entry.group]
            counts[number] = counts.get(number, 0) + 1
            name = f"{number}_{counts[number]:03d}"
            job = (entry.source, rule)
            files = [file for one in (entry.source, *entry.source.others) for file in one.files]
            source = "|".join((*files, str(rule)))
            source = source.encode("utf-8", "backslashreplace").decode()
            for split, note in places.items():
                items.append(Item(name, folders[entry.label], split, number, job, note, source))
    return items


def _write_key(key: Path, entries: Sequence[Entry], numbers: Mapping[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("number", "patient", "file"))
    rows = [(numbers[e.group], e.patient, e.source.files[0]) for e in entries if e.group in numbers]
    writer.writerows(sorted(rows))
    check_writable(key)
    write_text(key, text.getvalue().encode("utf-8", "backslashreplace").decode())
