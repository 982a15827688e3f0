"""Compare images with each other and class names with patients, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from medbudget.data.identity import Person, is_identity, read_person
from medbudget.data.listed import Entry
from medbudget.data.render import hash_values
from medbudget.data.splits import join_patients
from medbudget.data.volumes import Source, read_pixels
from medbudget.files import hash_settings
from medbudget.images import is_prepared, read_record


def leave_out(
    root: Path, sources: Sequence[Source], masks: str | os.PathLike[str] | None, notes: list[str]
) -> list[Source]:
    """Leave out what was prepared, drawn or is a mask, and say so."""
    prepared = [p.parent for p in sorted(root.rglob("settings.json")) if is_prepared(p.parent)]
    kept, drawn, masked = [], 0, 0
    for source in sources:
        path = root / source.files[0]
        if any(path.is_relative_to(folder) for folder in prepared):
            continue
        if masks is not None and path.resolve().is_relative_to(Path(masks).resolve()):
            masked += 1
        elif "prepared" not in (read_record(path) or ["prepared"]):
            drawn += 1
        else:
            kept.append(source)
    for folder in prepared:
        notes.append(f"{folder} was made by `medbudget prepare`: its images are left out")
    if drawn:
        notes.append(f"synthetic images and contact sheets of medbudget are left out ({drawn})")
    if masked:
        notes.append(f"masks are left out of the images ({masked})")
    return kept


def inspect(source: Source, *, root: Path, plane: str) -> tuple[str, Person, int]:
    """Return a hash of the pixels, who the patient is, and how many slices there are in `plane`.

    The hash is "" where they cannot be read.
    """
    person, key, slices = Person(), "", 0
    with suppress(ValueError, RuntimeError, OSError, EOFError):  # making the image will say why
        if source.kind == "dicom":
            person = read_person(root / source.files[0])
        values = read_pixels(root, source, plane=plane).values
        key, slices = hash_values(values), len(values)
    return key, person, slices


def check_classes(
    entries: Sequence[Entry],
    people: Mapping[tuple[str, ...], Person],
    by_folder: bool,
    notes: list[str],
) -> list[Entry]:
    """Keep patients' names and numbers from becoming classes, which are written everywhere."""
    patients: dict[str, set[Person]] = {}
    for entry in entries:
        person = people[entry.source.files]
        if not entry.patient.startswith("file:"):
            person = replace(person, numbers=(*person.numbers, entry.patient))
        patients.setdefault(entry.label, set()).add(person)
    if by_folder:
        patients.pop("all", None)
    named = [label for label, own in patients.items() if is_identity(label, sorted(own, key=str))]
    if not named:
        return [*entries]
    if by_folder and len(named) == len(patients):
        notes.append(
            "the folders are named after their patients: all images are of one class, all, so that "
            "no name is written; name classes in a table (--labels)"
        )
        return [replace(entry, label="all") for entry in entries]
    raise ValueError(
        f"{len(named)} of {len(patients)} classes are named after their patients, as "
        f"{'DICOM tags' if by_folder else 'the table or DICOM tags'} tell, and would be written "
        "into folders, manifest and contact sheet; name the classes by what they show, in a table "
        "(--labels)"
    )


def join_twins(
    entries: Sequence[Entry],
    hashes: Mapping[tuple[str, ...], str],
    notes: list[str],
    broken: list[tuple[str, str]],
) -> list[Entry]:
    """Join patients who share an image; leave out images that are in two classes."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if hashes[entry.source.files]:
            groups.setdefault(hashes[entry.source.files], []).append(entry)
    contradictory, joined = set(), []
    for group in groups.values():
        if len({entry.label for entry in group}) == 1:
            joined += [group] if len(group) > 1 else []
            continue
        for entry in group:
            contradictory.add(entry.source.files)
            other = next(e for e in group if e.label != entry.label)
            reason = (
                f"in class {entry.label}, has the same pixels as {other.source.files[0]} in class "
                f"{other.label}: keep it in the right one"
            )
            broken.append((entry.source.files[0], reason))
    if joined:
        n = sum(map(len, joined))
        pairs = [f"{g[1].source.files[0]} is {g[0].source.files[0]}" for g in joined[:3]]
        notes.append(
            f"{n} images are {len(joined)} {'ones' if len(joined) > 1 else 'one'}, pixel for pixel "
            f"({'; '.join(pairs)}{'; …' if len(joined) > 3 else ''}): they stay in one split"
        )
    group_of = join_patients({entry.patient for entry in group} for group in joined)
    return [
        replace(entry, group=group_of.get(entry.patient, entry.patient))
        for entry in entries
        if entry.source.files not in contradictory
    ]


def veil(text: str | None, people: Sequence[Person]) -> str | None:
    """Return a text for the settings, or its hash where it tells who a patient is."""
    if text and is_identity(text, people):
        return f"hash {hash_settings({'text': text})}"
    return text
