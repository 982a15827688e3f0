"""A reader's own images: any folder of medical images to image sets, split by patient.

What is written carries no header, no file name and no identifier of the source: patients get
numbers, sources are named by a hash. Text burnt into pixels cannot be detected.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from medbudget.data.channels import check_channels, join_channels
from medbudget.data.compare import check_classes, inspect, is_identity, join_twins, leave_out
from medbudget.data.listed import Entry, list_by_table, name_patients
from medbudget.data.prepare import Item, Report, check_settings, prepare_items
from medbudget.data.render import parse_window, render_item
from medbudget.data.splits import (
    SPLITS,
    choose_reference,
    shuffle,
    split_in_proportion,
    split_patients,
    stratify,
)
from medbudget.data.volumes import PLANES, find_sources
from medbudget.files import check_apart, check_writable, hash_settings, write_bytes
from medbudget.images import is_prepared
from medbudget.processes import run_parallel

PROPORTIONS = (0.6, 0.2, 0.2)


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
    """
    n = 1 if per_class is None else per_class
    check_settings(size=size, seed=seed, workers=workers, per_class=n, reference=reference)
    names = None if channels is None else check_channels(channels)
    _check_options(slices, masks, names, plane, window, proportions)
    root, out = Path(root), Path(out)
    check_apart(out, root, masks)
    if key is not None and Path(key).resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"the key {key} lies in {out}, which is meant to be shared; put it elsewhere"
        )
    if is_prepared(root):
        raise ValueError(f"{root} was made by `medbudget prepare`; name the folder it was made of")
    notes = [
        "text burnt into the pixels cannot be detected: look at every image before you share "
        "one, and before you train on them"
    ]
    broken: list[tuple[str, str]] = []
    sources = leave_out(root, find_sources(root, notes=notes), masks, notes)
    if not sources:
        raise ValueError(
            f"no images in {root}; allowed are DICOM, NIfTI, MHA, NRRD, PNG, JPEG, TIFF, BMP, "
            "WebP, GIF, JPEG 2000, AVIF and HEIC" + "".join(f"; {note}" for note in notes[1:])
        )
    if names:
        sources = join_channels(root, sources, names, notes)
    columns = (file_column, label_column, patient_column)
    if labels is None:
        entries = [
            Entry(one, [*Path(one.files[0]).parent.parts, "all"][0], one.patient) for one in sources
        ]
    else:
        entries = list_by_table(root, Path(labels), sources, columns, notes, broken)
    entries = name_patients(entries, patient_pattern, notes)
    work, every = partial(inspect, root=root, plane=plane), [entry.source for entry in entries]
    keys, people, lengths = {}, {}, {}
    for source, facts in run_parallel(work, every, workers=workers, desc="comparing"):
        keys[source.files], people[source.files], lengths[source.files] = facts
    entries = check_classes(entries, people, labels is None, notes)
    entries = join_twins(entries, keys, notes, broken)
    if flagged := sum(entry.source.burnt_in for entry in entries):
        notes.append(f"DICOM images that say they have text in the pixels: {flagged}")
    strata = stratify((entry.group, entry.label) for entry in entries)
    parts = dict(zip(SPLITS, proportions))
    left: dict[str, list[str]] = {label: [] for label in sorted({*strata.values()})}
    if per_class is None:
        splits = split_in_proportion(strata, parts, seed=seed)
    else:
        sizes = {split: dict.fromkeys(strata.values(), per_class) for split in parts}
        splits, left = split_patients(strata, sizes, seed=seed, allow_fewer=allow_fewer)
    extra: dict[str, str] = {}
    for label, queue in left.items() if reference else ():
        mine = {p: split for p, split in splits.items() if strata[p] == label}
        chosen, more = choose_reference(mine, queue, reference, disjoint=disjoint)
        extra |= chosen
        notes += [f"class {label}: {text}" for text in more]
    numbers = {p: f"p{i + 1:05d}" for i, p in enumerate(shuffle({*splits, *extra}, seed=seed))}
    items = _list_items(entries, splits, extra, numbers, slices, lengths)

    def veil(text: str | None) -> str | None:
        """Return a text for the settings, or its hash where it tells who a patient is."""
        hidden = text and is_identity(text, [*people.values()])
        return f"hash {hash_settings({'text': text})}" if hidden else text

    settings = {
        "dataset": "folder", "size": size, "seed": seed,
        "proportions": list(proportions) if per_class is None else None, "per_class": per_class,
        "reference": reference, "disjoint": disjoint, "slices": slices, "channels": names,
        "plane": plane, "window": window, "patient_pattern": veil(patient_pattern),
        "labels": None if labels is None else veil(Path(labels).name),
        "columns": None if labels is None else [*columns],
    }  # fmt: skip
    make = partial(
        render_item, root=root, masks=None if masks is None else Path(masks), plane=plane,
        window=window, size=size,
    )  # fmt: skip
    content = _list_key(entries, numbers)
    if key is not None:
        check_writable(key)
        if Path(key).exists() and Path(key).read_bytes() != content:
            raise FileExistsError(
                f"{key} is there already, and is not the key of these images: choose another place"
            )
    report = prepare_items(
        items, make, out, settings=settings, notes=notes, workers=workers, broken=broken
    )
    if key is not None:
        write_bytes(key, content)
    return report


def _check_options(
    slices: str, masks: object, channels: object, plane: str, window: str,
    proportions: Sequence[float],
) -> None:  # fmt: skip
    """Raise for options that cannot be."""
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; allowed are {', '.join(PLANES)}")
    if window not in ("auto", "tags", "percentile"):
        parse_window(window)
        if channels:
            raise ValueError("channels have a window each: auto, tags or percentile (--window)")
    if len(proportions) not in (1, len(SPLITS)) or not abs(sum(proportions) - 1) < 1e-3:
        raise ValueError(
            "proportions are those of train, val and test and add up to 1, or 1 for train alone; "
            f"got {', '.join(f'{p:g}' for p in proportions)}"
        )
    if not re.fullmatch(r"middle|mask|every:[1-9]\d*", slices):
        raise ValueError(f"unknown slice rule {slices!r}; allowed are middle, mask, every:K")
    if (slices == "mask") != (masks is not None):
        raise ValueError("slices='mask' and a folder of masks (--masks) belong together")


def _list_items(
    entries: Sequence[Entry],
    splits: Mapping[str, str],
    extra: Mapping[str, str],
    numbers: Mapping[str, str],
    slices: str,
    lengths: Mapping[tuple[str, ...], int],
) -> list[Item]:
    """One item an image, or one for every K-th slice; again for patients of the reference set."""
    folders: dict[str, str] = {}
    for label in sorted({entry.label for entry in entries}):
        folder = re.sub(r"[^\w.-]+", "_", label).strip("._")
        if not folder or folder.casefold() in {name.casefold() for name in folders.values()}:
            raise ValueError(f"class {label!r} gives no folder name of its own; rename it")
        folders[label] = folder
    items = []
    counts: Counter[str] = Counter()
    for entry in sorted(entries, key=lambda e: e.source.files):
        if entry.group not in numbers:
            continue
        number, n = numbers[entry.group], lengths[entry.source.files]
        rules: Sequence[str | int] = [slices]
        if slices.startswith("every:"):
            step = int(slices.removeprefix("every:"))
            rules = range(min(step // 2, n - 1), n, step) if n else ["middle"]  # it cannot be read
        files = [file for one in (entry.source, *entry.source.others) for file in one.files]
        for rule in rules:
            counts[number] += 1
            name = f"{number}_{counts[number]:03d}"
            source = "|".join((*files, str(rule))).encode("utf-8", "backslashreplace").decode()
            places = [(splits[entry.group], "")] if entry.group in splits else []
            if entry.group in extra:
                places.append(("reference", extra[entry.group]))
            for split, note in places:
                job = (entry.source, rule)
                items.append(Item(name, folders[entry.label], split, number, job, note, source))
    return items


def _list_key(entries: Sequence[Entry], numbers: Mapping[str, str]) -> bytes:
    """Return a table of which number is which patient."""
    import pandas as pd

    rows = [(numbers[e.group], e.patient, e.source.files[0]) for e in entries if e.group in numbers]
    table = pd.DataFrame(sorted(rows), columns=["number", "patient", "file"])
    return table.to_csv(index=False, lineterminator="\n").encode("utf-8", "backslashreplace")
