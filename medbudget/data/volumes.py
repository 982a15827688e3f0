"""Find medical images in a folder and read them, in whatever format: the one door for all.

DICOM goes through `dicom`, NIfTI, MetaImage and NRRD through `itk`, PNG and its like through Pillow.
Slices of one DICOM series are one volume, where their headers say so.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medbudget.data import dicom
from medbudget.data.dicom import get_number, get_numbers, get_text, quiet, read_dataset
from medbudget.data.items import BrokenCase
from medbudget.data.itk import VOLUMES, read_volume
from medbudget.data.pixels import TURNS, Array, Numbers, Pixels, turn
from medbudget.pictures import SUFFIXES as PICTURES
from medbudget.pictures import TRANSPARENT, ImageError, describe_passed_over, open_picture

DICOM = (".dcm", ".ima", ".dicom")
PLANES = ("native", *TURNS)
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

    source: Source
    series: str
    scout: bool
    shape: tuple[str, ...]  # size and colour model
    orientation: Numbers  # () where no place is known
    position: Numbers
    spacing: Numbers | None
    repeats: tuple[str, ...]

    def is_beside(self, other: Header) -> bool:
        """Could both be slices of one volume?"""
        return (
            self.shape == other.shape
            and np.allclose(self.orientation, other.orientation, atol=1e-3)
            and np.allclose(self.spacing or 0, other.spacing or 0, rtol=1e-3)
        )


def find_sources(root: str | os.PathLike[str], *, notes: list[str] | None = None) -> list[Source]:
    """List images and volumes in `root` and below; `notes` gets what was passed over or split.

    Slices of one DICOM series are one volume where they lie in one plane, have one size and
    spacing, and in one folder of the first level, which stands for a class.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    sources: list[Source] = []
    headers: list[Header] = []
    passed: list[Path] = []
    objects: Counter[str] = Counter()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        file, name = relative.as_posix(), path.name.lower()
        if name.endswith((*VOLUMES, *PICTURES)):
            sources.append(Source((file,), "volume" if name.endswith(VOLUMES) else "picture"))
            continue
        with open(path, "rb") as opened:
            head = opened.read(132)
        certain = name.endswith(DICOM) or head[128:] == b"DICM"
        # or the first element of a file without preamble: of group 2 or 8, and short
        likely = certain or re.match(rb"[\2\x08]\0.\0([A-Z]{2}|.\0)", head, re.DOTALL)
        header: Header | str | None = None
        try:
            header = _read_header(path, file) if likely else None
        except BrokenCase as error:
            if certain:
                sources.append(Source((file,), "dicom", problem=str(error)))
                continue
        if header is None:
            passed.append(path)
        elif isinstance(header, str):
            objects[header] += 1
        else:
            headers.append(header)
    said: dict[str, list[str]] = {}
    for members in _group(headers, lambda header: header.series).values():
        sources += _join(members, said)
    if notes is not None:
        others = [describe_passed_over(passed), *(f"{n} {kind}" for kind, n in objects.items())]
        if any(others):
            notes.append(f"passed over, as no images: {', '.join(filter(None, others))}")
        notes += [
            f"{len(files)} series: {text}; such as {files[0]}" for text, files in said.items()
        ]
    return sorted(sources, key=lambda source: source.files)


@quiet()
def _read_header(path: Path, file: str) -> Header | str:
    """Read what joining needs; for what is no image, return what it is."""
    data = read_dataset(path, pixels=False)
    kind = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    if kind and kind.name != kind and not re.search("Image Storage|Parametric Map", kind.name):
        return f"DICOM {kind.name.removesuffix(' Storage')}"
    burnt_in = get_text(data, "BurnedInAnnotation") == "YES"
    one = get_number(data, "NumberOfFrames") < 2
    orientation = one and get_numbers(data, "ImageOrientationPatient", 6)
    position = one and get_numbers(data, "ImagePositionPatient", 3)
    return Header(
        Source((file,), "dicom", get_text(data, "PatientID"), burnt_in=burnt_in),
        get_text(data, "SeriesInstanceUID") or f"none: {file}",
        "LOCALIZER" in get_text(data, "ImageType"),
        tuple(get_text(data, n) for n in ("Rows", "Columns", "PhotometricInterpretation")),
        orientation if orientation and position else (),
        position if orientation and position else (),
        get_numbers(data, "PixelSpacing", 2),
        tuple(get_text(data, name) for name in REPEATS),
    )


def _join(members: list[Header], said: dict[str, list[str]]) -> list[Source]:
    """Join files of one series to volumes; `said` gets what was done, and to which."""

    def note(text: str) -> None:
        said.setdefault(text, []).append(members[0].source.files[0])

    patients = {header.source.patient for header in members}
    if len(patients) > 1:
        return [_stack(members, f"one series holds {len(patients)} patients")]
    if len({Path(header.source.files[0]).parts[:-1][:1] for header in members}) > 1:
        note("its slices lie in several folders of classes, and stay images of their own")
        return [header.source for header in members]
    if {header.scout for header in members} == {True, False}:
        note("scouts (localizers) among its slices are left out")
        members = [header for header in members if not header.scout]
    # views, and files of several frames
    sources = [header.source for header in members if not header.orientation]
    stacks: list[list[Header]] = []
    for header in members:
        if header.orientation:
            stack = next((s for s in stacks if s[0].is_beside(header)), [])
            stacks += [] if stack else [stack]
            stack.append(header)
    if len(stacks) > 1:
        note("split, as its slices lie in several planes, or differ in size or spacing")
    return sources + [source for stack in stacks for source in _order(stack, note)]


def _group(headers: Sequence[Header], key: Callable[..., str]) -> dict[str, list[Header]]:
    groups: dict[str, list[Header]] = {}
    for header in headers:
        groups.setdefault(key(header), []).append(header)
    return groups


def _order(stack: list[Header], note: Callable[[str], None]) -> list[Source]:
    """Put parallel slices in order; keep time points and the like apart."""
    try:
        _, order, steps = dicom.order_slices(
            stack[0].orientation, np.array([h.position for h in stack])
        )
    except BrokenCase as error:
        return [_stack(stack, str(error))]
    stack = [stack[i] for i in order]
    if len(steps) and steps.min() < 1e-3:
        places = 1 + int((steps >= 1e-3).sum())
        for i, name in enumerate(REPEATS):
            groups = _group(stack, lambda header, i=i: header.repeats[i])
            if len(groups) > 1 and places > 1 and {len(g) for g in groups.values()} == {places}:
                note(f"split into {len(groups)} volumes by {name}, as slices share positions")
                return [source for group in groups.values() for source in _order(group, note)]
        return [_stack(stack, dicom.ONE_PLACE)]
    if dicom.is_uneven(steps):
        note("its slices lie unevenly: is one missing?")
    return [_stack(stack)]


def _stack(members: Sequence[Header], problem: str = "") -> Source:
    sources = [header.source for header in members]
    files, burnt_in = tuple(s.files[0] for s in sources), any(s.burnt_in for s in sources)
    return replace(sources[0], files=files, problem=problem, burnt_in=burnt_in)


def separate(source: Source) -> list[Source]:
    """Return the files of a DICOM series as images of their own."""
    return [replace(source, files=(file,), problem="") for file in source.files]


def read_pixels(root: str | os.PathLike[str], source: Source, *, plane: str = "native") -> Pixels:
    """Read a picture or a volume, or raise BrokenCase for whatever is wrong with it.

    `plane` is which way volumes are sliced; ``native`` as they were acquired or stored. All, also
    single slices, are turned so that they show as on a light box (axial: front up, the patient's
    right on the left).
    """
    if source.problem:
        raise BrokenCase(source.problem)
    paths = [Path(root) / file for file in source.files]
    if source.kind == "picture":
        return _read_picture(paths[0])
    return turn(dicom.read_dicom(paths) if source.kind == "dicom" else _read_itk(paths[0]), plane)


def read_mask(masks: Path, source: Source, pixels: Pixels, *, plane: str = "native") -> Array:
    """Read the mask of a volume as ``(slices, H, W) bool``, on the volume's own grid.

    The folder `masks` holds it under the volume's own relative name (for a DICOM series, its
    folder's) and any of the suffixes of volumes.
    """
    path = Path(source.files[0])
    stem = path.parent if len(source.files) > 1 else path.parent / _cut_suffix(path.name)
    beside = (masks / stem.parent).glob("*")
    files = [
        f for f in beside if f.name.lower().endswith(VOLUMES) and _cut_suffix(f.name) == stem.name
    ]
    if len(files) != 1:
        raise BrokenCase(f"{len(files)} masks {stem.as_posix()}.* of {VOLUMES}; 1 is needed")
    mask = turn(_read_itk(files[0]), plane)
    same = mask.values.shape == pixels.values.shape and len(mask.frame) == len(pixels.frame)
    near = min(pixels.steps[:2]) / 4  # of a pixel: less than any whole step
    if not same or not np.allclose(_find_ends(mask), _find_ends(pixels), rtol=0, atol=near):
        raise BrokenCase("its mask has another grid: another size, spacing or place")
    return mask.values > 0


def _find_ends(pixels: Pixels) -> Array:
    """Return the first pixel's place, and the way from there to the end of each axis, in mm."""
    n = 3 if len(pixels.frame) == 12 else 2
    reach = np.array(pixels.steps[:n]) * (np.array(pixels.values.shape[2::-1])[:n] - 1)
    return np.array([*pixels.frame[:n], *(np.reshape(pixels.frame[n:], (n, n)) * reach).ravel()])


def _cut_suffix(name: str) -> str:
    """Return a file's name without its suffix, .nii.gz as one."""
    return re.sub(r"\.nii\.gz$|\.[^.]*$", "", name, flags=re.IGNORECASE)


def _read_itk(path: Path) -> Pixels:
    image = read_volume(path)
    values, flat = sitk.GetArrayFromImage(image), image.GetDimension() == 2
    dicom.check_finite(values)
    return Pixels(
        values[None] if flat else values,
        image.GetSpacing() + (1.0,) * flat,
        stated="no spacing" not in image.GetMetaDataKeys(),
        frame=(*image.GetOrigin(), *image.GetDirection()),
    )


def _read_picture(path: Path) -> Pixels:
    try:
        image, inverted = open_picture(path)
    except ImageError as error:
        if "not a readable image" in str(error):  # the reason may hold the header's words
            raise BrokenCase("not an image that can be read (truncated?)") from None
        raise BrokenCase(f"it {error}") from None
    if image.mode == "RGBA":
        raise BrokenCase(f"it {TRANSPARENT}")
    return Pixels(np.asarray(image)[None], inverted=inverted)
