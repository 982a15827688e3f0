"""Find medical images in a folder and read them, in whatever format: the one door for all.

DICOM goes through `dicom`, NIfTI, MetaImage and NRRD through `itk`, PNG and its like through Pillow.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from medbudget.data import dicom
from medbudget.data.items import BrokenCase
from medbudget.data.itk import VOLUMES, read_volume
from medbudget.data.pixels import TURNS, Array, Pixels, Window, turn
from medbudget.data.series import Header, Source, join_series, read_header, separate
from medbudget.pictures import SUFFIXES as PICTURES
from medbudget.pictures import TRANSPARENT, ImageError, describe_passed_over, open_picture

__all__ = [
    "PLANES", "VOLUMES", "Array", "Pixels", "Source", "Window", "find_sources", "read_mask",
    "read_pixels", "read_volume", "separate",
]  # fmt: skip

DICOM = (".dcm", ".ima", ".dicom")
PLANES = ("native", *TURNS)


def find_sources(
    root: str | os.PathLike[str], *, under: str = "", notes: list[str] | None = None
) -> list[Source]:
    """List images and volumes in `root` and below, DICOM files joined to series.

    Slices of one series are one volume where they lie in one plane, have one size and spacing, and
    in one folder of the first level, which stands for a class. Hidden files are passed over.
    `notes` gets a sentence on what was passed over, left out, split, or has gaps.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    sources: list[Source] = []
    headers: list[Header] = []
    passed: list[Path] = []
    objects: Counter[str] = Counter()
    for path in sorted((root / under).rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        file, name = relative.as_posix(), path.name.lower()
        if name.endswith((*VOLUMES, *PICTURES)):
            sources.append(Source((file,), "volume" if name.endswith(VOLUMES) else "picture"))
        elif (certain := _is_dicom(path)) is None:
            passed.append(path)
        else:
            try:
                header = read_header(path, file)
            except BrokenCase as error:
                if certain:
                    sources.append(Source((file,), "dicom", problem=str(error)))
                else:
                    passed.append(path)
                continue
            if isinstance(header, str):
                objects[header] += 1
            else:
                headers.append(header)
    said: dict[str, list[str]] = {}
    sources += join_series(root, headers, said)
    if notes is not None:
        others = [describe_passed_over(passed), *(f"{n} {kind}" for kind, n in objects.items())]
        if any(others):
            notes.append(f"passed over, as no images: {', '.join(filter(None, others))}")
        notes += [
            f"{len(files)} series: {text}; such as {files[0]}" for text, files in said.items()
        ]
    return sorted(sources, key=lambda source: source.files)


def _is_dicom(path: Path) -> bool | None:
    """Is it DICOM by its suffix or mark (True), perhaps by how it begins (False), or not (None)?"""
    with open(path, "rb") as file:
        head = file.read(132)
    if path.name.lower().endswith(DICOM) or head[128:] == b"DICM":
        return True
    # the first element of a file without preamble: a group of 2 or 8, and a short value
    group, length = int.from_bytes(head[:2], "little"), int.from_bytes(head[4:8], "little")
    likely = group in (2, 8) and head[3:4] == b"\0" and (length < 128 or head[4:6].isalpha())
    return False if likely else None


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
    folder = masks / stem.parent
    files = [
        file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.name.lower().endswith(VOLUMES) and _cut_suffix(file.name) == stem.name
    ]
    if len(files) != 1:
        raise BrokenCase(
            f"{len(files)} masks {stem.as_posix()}.* in the folder of masks; 1 is needed, as "
            f"{', '.join(VOLUMES)}"
        )
    mask = turn(_read_itk(files[0]), plane)
    near = min(pixels.spacing or (4e-3,)) / 4  # of a pixel: less than any whole step
    if (
        mask.values.shape != pixels.values.shape
        or len(mask.frame) != len(pixels.frame)
        or not np.allclose(_find_ends(mask), _find_ends(pixels), rtol=0, atol=near)
    ):
        raise BrokenCase(
            f"its mask has another grid: {mask.values.shape} and {pixels.values.shape}, or another "
            "place"
        )
    return mask.values > 0


def _cut_suffix(name: str) -> str:
    """Return a file's name without its suffix, .nii.gz as one."""
    stem = Path(name).stem
    return Path(stem).stem if name.lower().endswith(".nii.gz") else stem


def _find_ends(pixels: Pixels) -> Array:
    """Return the first pixel's place, and the way from there to the end of each axis, in mm."""
    n = len(pixels.steps)
    reach = np.array(pixels.steps) * (np.array(pixels.values.shape[2::-1])[:n] - 1)
    axes = np.reshape(pixels.frame[n:], (n, n)) * reach
    return np.array([*pixels.frame[:n], *axes.ravel()])


def _read_itk(path: Path) -> Pixels:
    import SimpleITK as sitk

    image = read_volume(path)
    values, steps = sitk.GetArrayFromImage(image), image.GetSpacing()
    if not np.isfinite(values).all():
        raise BrokenCase("it has values that are infinite or not a number")
    return Pixels(
        values[None] if image.GetDimension() == 2 else values,
        spacing=None if "no spacing" in image.GetMetaDataKeys() else (steps[1], steps[0]),
        frame=(*image.GetOrigin(), *image.GetDirection()),
        steps=steps,
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
