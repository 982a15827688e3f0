"""Compare images with each other and class names with patients, before anything is written."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from medbudget.data.dicom import get_text, quiet, read_dataset
from medbudget.data.listed import Entry
from medbudget.data.render import hash_values
from medbudget.data.splits import join_patients
from medbudget.data.volumes import Source, read_pixels
from medbudget.images import is_prepared, read_record

NUMBERS = ("PatientID", "OtherPatientIDs")
NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName")
UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae"})


@dataclass(frozen=True)
class Person:
    """What tags, a table or a path say of who a patient is."""

    numbers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@quiet()
def _read_person(path: Path) -> Person:
    """Read who the patient of a DICOM file is."""
    data = read_dataset(path, pixels=False)
    names = [form for name in NAMES for form in get_text(data, name).split("=")]
    return Person(tuple(get_text(data, name) for name in NUMBERS), tuple(names))


def is_identity(label: str, people: Sequence[Person]) -> bool:
    """Tell whether a class name is a number or a name of one of its patients, or has one in it.

    Letter case, accents, punctuation, the order of names and leading zeros make no difference. A
    text that all of three or more patients carry is no identity.
    """
    words = _split(label)
    whole = "".join(words).lstrip("0")
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    runs |= {word.lstrip("0") for word in words}
    keys = [_list_keys(person) for person in people]
    shared = set.intersection(*(one | part for one, part in keys)) if len(keys) >= 3 else set()
    return any(whole in one - shared or runs & (part - shared) for one, part in keys)


def _list_keys(person: Person) -> tuple[set[str], set[str]]:
    """Return what tells a patient as a whole class name, and as a part of one."""
    numbers = [_split(text) for text in person.numbers]
    names = [_split(form) for t in person.names for form in (t, t.casefold().translate(UMLAUTS))]
    whole = {"".join(words) for words in (*numbers, *names)}
    part = {one for one in map("".join, numbers) if len(one) >= 3 and re.search(r"\d", one)}
    part |= {w.lstrip("0") for words in numbers for w in words if w.isdigit() and len(w) >= 4}
    part |= {w for words in names for w in words if w.isalpha() and len(w) >= 2 + w.isascii()}
    return {key.lstrip("0") for key in whole if len(key) > 1}, part - {""}


def _split(text: str) -> list[str]:
    """Split into folded words without accents; digits are words of their own."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W\d_]+|\d+", "".join(c for c in plain if not unicodedata.combining(c)))


def leave_out(
    root: Path, sources: Sequence[Source], masks: str | os.PathLike[str] | None, notes: list[str]
) -> list[Source]:
    """Leave out what was prepared, drawn or is a mask, and say so."""
    prepared = [p.parent for p in sorted(root.rglob("settings.json")) if is_prepared(p.parent)]
    kept, counts = [], Counter[str]()
    for source in sources:
        path = root / source.files[0]
        if folder := next((f for f in prepared if path.is_relative_to(f)), None):
            counts[f"{folder} was made by `medbudget prepare`: its images are left out"] += 1
        elif masks is not None and path.resolve().is_relative_to(Path(masks).resolve()):
            counts["masks are left out of the images"] += 1
        elif "prepared" not in (read_record(path) or ["prepared"]):
            counts["synthetic images and contact sheets of medbudget are left out"] += 1
        else:
            kept.append(source)
    notes += [f"{text} ({n})" for text, n in counts.items()]
    return kept


def inspect(source: Source, *, root: Path, plane: str) -> tuple[str, Person, int]:
    """Return a hash of the pixels ("" if they cannot be read), the patient, and how many slices."""
    person, key, slices = Person(), "", 0
    with suppress(ValueError, RuntimeError, OSError, EOFError):  # making the image will say why
        if source.kind == "dicom":
            person = _read_person(root / source.files[0])
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
    patients: dict[str, list[Person]] = {}
    for entry in entries:
        person = people[entry.source.files]
        if not entry.patient.startswith("file:"):
            person = replace(person, numbers=(*person.numbers, entry.patient))
        patients.setdefault(entry.label, []).append(person)
    if by_folder:
        patients.pop("all", None)
    named = [label for label, own in patients.items() if is_identity(label, [*{*own}])]
    if not named:
        return [*entries]
    if by_folder and len(named) == len(patients):
        notes.append(
            "the folders are named after their patients, so that all images are of one class, all; "
            "name classes in a table (--labels)"
        )
        return [replace(entry, label="all") for entry in entries]
    raise ValueError(
        f"{len(named)} of {len(patients)} classes are named after their patients, and would be "
        "written everywhere; name the classes by what they show, in a table (--labels)"
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
        groups.setdefault(hashes[entry.source.files] or entry.source.files[0], []).append(entry)
    kept, joined = [], []
    for group in groups.values():
        if len({entry.label for entry in group}) == 1:
            kept += group
            joined += [group] if len(group) > 1 else []
        for entry in group:
            other = next((e for e in group if e.label != entry.label), None)
            if other is not None:
                reason = (
                    f"in class {entry.label}, has the same pixels as {other.source.files[0]} in "
                    f"class {other.label}: keep it in the right one"
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
    return [replace(entry, group=group_of.get(entry.patient, entry.patient)) for entry in kept]
