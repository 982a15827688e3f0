"""Give the images of a folder classes and patients: from the rows of a table, or from paths."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medbudget.data.tables import Listing, fold, read_table
from medbudget.data.volumes import Source, separate


@dataclass(frozen=True)
class Entry:
    """A source with its class and its patient, as the reader calls them."""

    source: Source
    label: str
    patient: str
    group: str = ""  # the patient who stands for all those who share an image


def list_by_table(
    root: Path,
    table: Path,
    sources: Sequence[Source],
    columns: tuple[str, str, str | None],
    notes: list[str],
    broken: list[tuple[str, str]],
) -> list[Entry]:
    """Return the sources that a table lists; a row without a file becomes one with a problem.

    `columns` are those of file, class and patient, where None takes ``patient`` if it is there.
    `notes` gets what the reader should know, `broken` the rows without a class.
    """
    rows = read_table(table)
    if not rows:
        raise ValueError(f"{table} has no rows below its first line")
    file, label, patient = _choose_columns(table, [*rows[0]], columns, notes)
    listing = Listing(root)
    listed: dict[str, tuple[str, str]] = {}  # path to class and patient
    entries: list[Entry] = []
    absent: list[tuple[str, tuple[str, str], str]] = []
    unclear = set()
    for row in rows:
        name, own = row[file], (row[label], row[patient] if patient else "")
        path, reason = listing.find(name)
        if not own[0]:
            unclear.add(path)
            broken.append((path or name or "a row", f"{table.name} gives it no {label}"))
        elif not path:
            absent.append((name, own, reason))
        elif listed.setdefault(path, own) != own:
            both = (" of ".join(filter(None, one)) for one in (listed[path], own))
            raise ValueError(f"{table} lists {path} twice: as {' and as '.join(both)}")

    def find_row(path: str) -> str | None:
        names = [p.as_posix() for p in (Path(path), *Path(path).parents)]
        return next((name for name in names if name in listed), None)

    used, over = set(), []
    for source in sources:  # slices with rows of their own stay images of their own
        for one in separate(source) if len({*map(find_row, source.files)}) > 1 else [source]:
            match = find_row(one.files[0])
            if match is not None:
                used.add(match)
                entries.append(Entry(one, listed[match][0], listed[match][1] or one.patient))
            elif one.files[0] not in unclear:
                over.append(one.files[0])
    if not entries:
        reason = f"; {broken[0][1]}" if broken else ""
        raise ValueError(
            f"no file of {table} is in {root}; its paths must be relative to that folder, "
            f"such as {sources[0].files[0]}{reason}"
        )
    if over:
        notes.append(f"images not in the table and left out: {len(over)}, such as {over[0]}")
    absent += [(name, listed[name], "no image") for name in sorted({*listed} - used)]
    for name, own, reason in absent:
        problem = f"listed in the table, but {reason}"
        entries.append(Entry(Source((name,), "picture", problem=problem), *own))
    return entries


def _choose_columns(
    table: Path, head: list[str], columns: tuple[str, str, str | None], notes: list[str]
) -> tuple[str, str, str]:
    """Find the columns of file, class and patient ("" for none), in whatever letter case."""

    def find(name: str) -> str:
        same = [column for column in head if column.casefold() == name.strip().casefold()]
        return name if name in head else same[0] if len(same) == 1 else ""

    chosen = find(columns[0]), find(columns[1]), find(columns[2] or "patient")
    for name, column in zip(columns, chosen):
        if name is not None and not column:
            raise ValueError(
                f"{table} has the columns {head}, but no {name!r}; name those of file, class and "
                "patient with --file-column, --label-column and --patient-column"
            )
    near = [column for column in head if "patient" in column.casefold()]
    if near and not chosen[2]:
        notes.append(f"column {near[0]} is not used: --patient-column names that of the patients")
    return chosen


def name_patients(entries: Sequence[Entry], pattern: str | None, notes: list[str]) -> list[Entry]:
    """Give every entry a patient: by the pattern, as known, or its own path."""
    named = [*entries]
    if pattern is not None:
        try:
            find = re.compile(pattern).search
        except re.error as error:
            raise ValueError(
                f"patient pattern {pattern} is no regular expression: {error}"
            ) from None
        for i, entry in enumerate(entries):
            match = find(entry.source.files[0])
            if not match or not match.groups() or not (match[1] or "").strip():
                raise ValueError(
                    f"patient pattern {pattern} names no patient in {entry.source.files[0]}: its "
                    "first group, in parentheses, must; folders and ending can be used"
                )
            named[i] = replace(entry, patient=match[1].strip())
    if unknown := sum(not entry.patient for entry in named):
        notes.append(
            f"images of unknown patients: {unknown}. Each counts as its own: if one patient has "
            "several, name them (a column of the table, or --patient-pattern), or splits will leak"
        )
    spellings: dict[str, dict[str, str]] = {}  # patient to each spelling, and a file that has it
    for entry in named:
        same = spellings.setdefault(fold(entry.patient), {})
        same.setdefault(unicodedata.normalize("NFC", entry.patient), entry.source.files[0])
    if several := [[*same.values()] for same in spellings.values() if len(same) > 1]:
        notes.append(
            "patients spelled in capital and in small letters, each of which counts as one: "
            f"{len(several)}, such as that of {' and '.join(several[0][:2])}"
        )
    return [
        replace(e, patient=min(spellings[fold(e.patient)]) or f"file:{e.source.files[0]}")
        for e in named
    ]
