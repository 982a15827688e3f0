"""Join DICOM files of one series to volumes, where their headers say that they are one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medbudget.data import dicom
from medbudget.data.decoding import get_number, get_numbers, get_text, quiet, read_dataset
from medbudget.data.items import BrokenCase
from medbudget.data.pixels import Numbers
from medbudget.files import hash_file

# what tells apart images of a series that lie at one position, in the order of trial
REPEATS = (
    "TemporalPositionIdentifier", "DiffusionBValue", "EchoTime", "EchoNumbers", "SequenceName",
    "ImageType", "AcquisitionNumber", "TriggerTime",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One image or volume on disk."""

    files: tuple[str, ...]  # relative to the root; several for a DICOM series, in slice order
    kind: str  # "picture", "volume" or "dicom"
    patient: str = ""  # from DICOM; "" elsewhere
    problem: str = ""  # why it cannot be used, as far as that is known before reading it
    burnt_in: bool = False  # DICOM says that there is text in the pixels
    others: tuple[Source, ...] = ()  # further channels of the same study


@dataclass(frozen=True, eq=False)
class Header:
    """What decides which DICOM files are one volume."""

    file: str
    series: str
    patient: str
    burnt_in: bool
    scout: bool
    shape: tuple[str, ...]  # size and colour model
    orientation: Numbers  # () where no place is known
    position: Numbers
    spacing: Numbers | None
    instance: str
    repeats: tuple[str, ...]

    def is_beside(self, other: Header) -> bool:
        """Could both be slices of one volume?"""
        return (
            self.shape == other.shape
            and dicom.is_parallel(self.orientation, other.orientation)
            and np.allclose(self.spacing or 0, other.spacing or 0, rtol=1e-3)
        )


@quiet
def read_header(path: Path, file: str) -> Header | str:
    """Read what joining needs; for what is no image, return what it is."""
    data = read_dataset(path, pixels=False)
    kind = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    name = getattr(kind, "name", "") if getattr(kind, "is_private", True) is False else ""
    if name and name != str(kind) and not re.search("Image Storage|Parametric Map", name):
        return f"DICOM {name.removesuffix(' Storage')}"
    one = get_number(data, "NumberOfFrames", 1) <= 1
    orientation = one and get_numbers(data, "ImageOrientationPatient", 6)
    position = one and get_numbers(data, "ImagePositionPatient", 3)
    return Header(
        file,
        get_text(data, "SeriesInstanceUID") or f"none: {file}",
        get_text(data, "PatientID"),
        get_text(data, "BurnedInAnnotation") == "YES",
        "LOCALIZER" in get_text(data, "ImageType"),
        tuple(get_text(data, n) for n in ("Rows", "Columns", "PhotometricInterpretation")),
        orientation if orientation and position else (),
        position if orientation and position else (),
        get_numbers(data, "PixelSpacing", 2),
        get_text(data, "SOPInstanceUID"),
        tuple(get_text(data, name) for name in REPEATS),
    )


def join_series(root: Path, headers: Sequence[Header], said: dict[str, list[str]]) -> list[Source]:
    """Join DICOM files of one series to volumes where their headers say that they are one.

    `said` gets what was done, and a file of each series to which it was done.
    """
    sources: list[Source] = []
    for members in _group(headers, lambda header: header.series).values():

        def note(text: str, file: str = members[0].file) -> None:
            said.setdefault(text, []).append(file)

        patients = {header.patient for header in members}
        if len(patients) > 1:
            sources.append(_source(members, f"one series holds {len(patients)} patients"))
            continue
        if len({header.file.rpartition("/")[0].split("/")[0] for header in members}) > 1:
            note("its slices lie in several folders of classes, and stay images of their own")
            sources += [_source([header]) for header in members]
            continue
        unique = _leave_out_copies(root, members)
        if len(unique) < len(members):
            note("slices that are there twice, byte for byte, are used once")
        if {header.scout for header in unique} == {True, False}:
            note("scouts (localizers) among its slices are left out")
            unique = [header for header in unique if not header.scout]
        stacks: list[list[Header]] = []
        for header in unique:
            if not header.orientation:  # a view, or a file of several frames
                sources.append(_source([header]))
                continue
            stack = next((s for s in stacks if s[0].is_beside(header)), None)
            if stack is None:
                stacks.append(stack := [])
            stack.append(header)
        if len(stacks) > 1:
            note("split, as its slices lie in several planes, or differ in size or spacing")
        for stack in stacks:
            sources += _order(stack, note)
    return sources


def _group(headers: Sequence[Header], key: Callable[..., str]) -> dict[str, list[Header]]:
    groups: dict[str, list[Header]] = {}
    for header in headers:
        groups.setdefault(key(header), []).append(header)
    return groups


def _leave_out_copies(root: Path, members: Sequence[Header]) -> list[Header]:
    """Leave out files that are, byte for byte, copies of an earlier one."""
    first: dict[str, str] = {}
    unique = []
    for header in members:
        other = first.setdefault(header.instance or header.file, header.file)
        if other == header.file or hash_file(root / other) != hash_file(root / header.file):
            unique.append(header)
    return unique


def _order(stack: list[Header], note: Callable[[str], None]) -> list[Source]:
    """Put parallel slices in order; keep time points and the like apart."""
    try:
        normal = dicom.measure_axes(stack[0].orientation)[:, 2]
    except BrokenCase as error:
        return [_source(stack, str(error))]
    along = np.array([header.position for header in stack]) @ normal
    stack = [stack[i] for i in np.argsort(along, kind="stable")]
    steps = np.diff(sorted(along))
    if len(steps) and steps.min() < 1e-3:
        places = 1 + int((steps >= 1e-3).sum())
        for i, name in enumerate(REPEATS):
            groups = _group(stack, lambda header, i=i: header.repeats[i])
            if len(groups) > 1 and places > 1 and {len(g) for g in groups.values()} == {places}:
                note(f"split into {len(groups)} volumes by {name}, as slices share positions")
                return [source for group in groups.values() for source in _order(group, note)]
        return [
            _source(
                stack,
                "several images of a series lie at one position (time points, b-values?), and no "
                f"tag tells them apart ({', '.join(REPEATS)}); put them into series of their own",
            )
        ]
    if len(steps) and dicom.is_uneven(steps):
        note("its slices lie unevenly: is one missing?")
    return [_source(stack)]


def _source(members: Sequence[Header], problem: str = "") -> Source:
    files = tuple(header.file for header in members)
    burnt_in = any(header.burnt_in for header in members)
    return Source(files, "dicom", min(h.patient for h in members), problem, burnt_in)


def separate(source: Source) -> list[Source]:
    """Return the files of a DICOM series as images of their own."""
    return [replace(source, files=(file,), problem="") for file in source.files]
