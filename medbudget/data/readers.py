"""Read one medical image, in whatever format: pixels, what they mean, where slices lie.

DICOM goes through SimpleITK (GDCM), which honours rescale slope and intercept and unpacks all
common transfer syntaxes. No text of a file's header leaves this module, not even in an error, but
for the patient's ID. What a header claims is compared with the file before memory is taken for it.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medbudget.data.prepare import BrokenCase
from medbudget.pictures import SUFFIXES as PICTURES
from medbudget.pictures import ImageError, open_picture

if TYPE_CHECKING:
    import SimpleITK as sitk

Array = NDArray[Any]

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima", ".dicom")
MAX_BYTES = 4 * 2**30  # of one volume in memory
MAX_RATIO = 1100  # deflate makes zeros 1032 times smaller
SMALL = 64 * 2**20  # a blank image packs better still: so much is never refused
PLANES = ("native", "axial", "coronal", "sagittal")
# how a volume has to be turned so that its slices are seen as on a light box
TURNS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
THICK = {
    "S": "axial",
    "I": "axial",
    "A": "coronal",
    "P": "coronal",
    "L": "sagittal",
    "R": "sagittal",
}

TAGS = {
    "patient": "0010|0020",
    "series": "0020|000e",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "photometric": "0028|0004",
    "centre": "0028|1050",
    "width": "0028|1051",
    "function": "0028|1056",
    "burnt_in": "0028|0301",
    "rows": "0028|0010",
    "columns": "0028|0011",
    "bits": "0028|0101",
    "signed": "0028|0103",
    "intercept": "0028|1052",
    "slope": "0028|1053",
}


@dataclass(frozen=True)
class Source:
    """One image or volume on disk.

    Attributes
    ----------
    files : tuple of str
        Relative to the root; several for a DICOM series, in the order of the slices.
    kind : {"picture", "volume", "dicom"}
    patient : str
        From DICOM; "" elsewhere.
    problem : str
        Why it cannot be used, as far as that is known before reading it.
    burnt_in : bool
        DICOM says that there is text in the pixels.
    """

    files: tuple[str, ...]
    kind: str
    patient: str = ""
    problem: str = ""
    burnt_in: bool = False


@dataclass(frozen=True, eq=False)
class Pixels:
    """What was read.

    Attributes
    ----------
    values : numpy.ndarray
        ``(slices, H, W)`` gray, or ``(slices, H, W, 3) uint8`` RGB.
    spacing : tuple of float, optional
        Millimetres: row, column.
    window : tuple of float, optional
        Lowest and highest intensity that DICOM's tags ask for.
    inverted : bool
        White stands for the lowest value (MONOCHROME1).
    note : str
    frame : tuple of float
        Origin and direction of a volume, to compare it with a mask.
    """

    values: Array
    spacing: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    inverted: bool = False
    note: str = ""
    frame: tuple[float, ...] = ()


def find_sources(root: str | os.PathLike[str], *, under: str = "") -> list[Source]:
    """List images and volumes in `root` and below, DICOM files joined to series.

    Hidden files and files of other types are passed over.

    Raises
    ------
    FileNotFoundError
        No such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    found: list[Source] = []
    dicom: list[str] = []
    for path in sorted((root / under).rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        name = path.name.lower()
        if name.endswith(VOLUMES):
            found.append(Source((relative.as_posix(),), "volume"))
        elif name.endswith(PICTURES):
            found.append(Source((relative.as_posix(),), "picture"))
        elif name.endswith(DICOM) or _is_dicom(path):
            dicom.append(relative.as_posix())
    return sorted([*found, *_join_series(root, dicom)], key=lambda s: s.files)


def _is_dicom(path: Path) -> bool:
    """Has a file without a known suffix the mark of DICOM?"""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def open_volume(path: Path, *, dicom: bool = False) -> sitk.ImageFileReader:
    """Read the header of a DICOM file or a volume; refuse what claims more than the file can hold.

    Raises
    ------
    BrokenCase
    """
    import SimpleITK as sitk

    detached, packed = _inspect_text(path)
    held = path.stat().st_size + detached
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    if dicom:
        _check_lengths(path)
        reader.SetImageIO("GDCMImageIO")
        reader.LoadPrivateTagsOff()
    try:
        reader.ReadImageInformation()
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        size = reader.GetSize()
    except (RuntimeError, OverflowError):
        raise BrokenCase(
            "not a DICOM image that can be read (truncated, or no pixels)"
            if dicom
            else "cannot be read: it is truncated, or no image"
        ) from None
    bits = re.search(r"(\d+)-bit", kind)
    each = (int(bits[1]) // 8 if bits else 8) * (2 if "complex" in kind else 1)
    claim = math.prod(size) * each * reader.GetNumberOfComponents()
    if claim > min(MAX_BYTES, SMALL + MAX_RATIO * held if packed else held):
        raise BrokenCase(
            f"it claims {claim:,} bytes of pixels, of size {size}, in a file of {held:,}: "
            "truncated, or made to use up the memory"
        )
    if not math.prod(size):
        raise BrokenCase(f"it has no pixels: its size is {size}")
    if len(size) > 3 and math.prod(size[3:]) > 1:
        raise BrokenCase(f"a {len(size)}-D volume of size {size}: export the one that you want")
    return reader


LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


def _check_lengths(path: Path) -> None:
    """Refuse a DICOM element that claims to be longer than the file: GDCM would allocate it.

    Elements of sequences are walked through in a line. Big-endian, deflated and headless files are
    left to GDCM.
    """
    size = path.stat().st_size
    syntax = b""
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return
        while len(head := file.read(8)) == 8:
            group, kind = int.from_bytes(head[:2], "little"), head[4:6]
            if group > 2 and syntax in (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"):
                return
            sequence = head[:4] in (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
            explicit = not sequence and (group == 2 or syntax != b"1.2.840.10008.1.2")
            if explicit and kind in LONG:
                length = int.from_bytes(file.read(4), "little")
            elif explicit:
                length = int.from_bytes(head[6:], "little")
            else:
                length = int.from_bytes(head[4:], "little")
            if length == 0xFFFFFFFF:
                if head[:4] == b"\xe0\x7f\x10\x00":  # its pieces are no elements
                    while len(piece := file.read(8)) == 8 and piece[:4] == b"\xfe\xff\x00\xe0":
                        length = int.from_bytes(piece[4:], "little")
                        if length > size - file.tell():
                            break
                        file.seek(length, os.SEEK_CUR)
                    length = 0 if piece[:4] == b"\xfe\xff\xdd\xe0" else length
                elif kind == b"UN":  # its inside is of another encoding
                    return
                else:
                    continue
            if length > size - file.tell():
                raise BrokenCase(
                    "not a DICOM image that can be read: truncated, or an element claims to be "
                    "longer than the file"
                )
            if kind == b"SQ" or (sequence and length):
                continue
            value = file.read(length) if length < 100 else b""
            if length >= 100:
                file.seek(length, os.SEEK_CUR)
            if head[:4] == b"\x02\x00\x10\x00":
                syntax = value.strip(b"\0 ")


def _inspect_text(path: Path) -> tuple[int, bool]:
    """Return the size of the file that a MetaImage or NRRD header names for its data, or 0, and
    whether pixels may be compressed.

    The data have to lie beside the header: from elsewhere they could show whatever can be read
    here. Dimensions that would end the process in ITK are refused.
    """
    suffix = path.suffix.lower()
    meta = suffix in (".mha", ".mhd")
    if not meta and suffix not in (".nrrd", ".nhdr"):
        return 0, suffix != ".nii"
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    ends = b"\nElementDataFile" if meta else b"\n\n"
    if ends not in head.replace(b"\r", b"") and path.stat().st_size > len(head):
        raise BrokenCase("its header has no end within 1 MiB: damaged, or not what its name says")

    def values(name: bytes) -> list[bytes]:
        line = rb"^[ \t]*" + name + rb"[ \t]*[=:]=?[ \t]*([^\r\n]*)"
        return [value.strip() for value in re.findall(line, head, re.M | re.I)]

    for value in values(rb"(?:NDims|dimension)"):
        if value not in (b"2", b"3", b"4", b"5"):
            raise BrokenCase("its header has no number of dimensions from 2 to 5")
    total = 0
    for name in map(os.fsdecode, values(rb"(?:ElementDataFile|data ?file)")):
        if name.upper() in ("LOCAL", ""):
            continue
        other = path.parent / name
        if Path(name).name != name or other.is_symlink() or not other.is_file():
            raise BrokenCase(
                "its data are in another file, which must lie beside it under a plain name; put "
                "it there, or save header and data as one .mha or .nrrd"
            )
        total += other.stat().st_size
    plain = rb"CompressedData" if meta else rb"encoding"
    return total, any(v.lower() not in (b"false", b"raw") for v in values(plain))


def _read_tags(path: Path) -> dict[str, str]:
    """Return the tags that matter, stripped; absent ones as ""."""
    reader = open_volume(path, dicom=True)
    try:
        return {
            name: reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""
            for name, tag in TAGS.items()
        }
    except UnicodeDecodeError:
        raise BrokenCase("its header has text in no known encoding") from None


def _number(text: str, default: float, what: str) -> float:
    """Return a number of a header, whose text must not get into an error."""
    try:
        value = float(text or default)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BrokenCase(f"its header has no number as {what}")
    return value


def _join_series(root: Path, files: Sequence[str]) -> list[Source]:
    """Join DICOM files of one series to a volume where positions say that they are one."""
    series: dict[str, list[tuple[str, dict[str, str]]]] = {}
    out = []
    for file in files:
        try:
            tags = _read_tags(root / file)
        except BrokenCase as error:
            out.append(Source((file,), "dicom", problem=str(error)))
            continue
        series.setdefault(tags["series"] or file, []).append((file, tags))
    for members in series.values():
        patients = sorted({tags["patient"] for _, tags in members})
        burnt_in = any(tags["burnt_in"] == "YES" for _, tags in members)
        shapes = {(tags["rows"], tags["columns"], tags["orientation"]) for _, tags in members}
        stacked = len(members) > 1 and len(shapes) == 1 and all(t["position"] for _, t in members)
        problem = ""
        if len(patients) > 1:
            problem = f"one series holds {len(patients)} patients"
        elif stacked:
            try:
                places = [_along_normal(tags) for _, tags in members]
            except BrokenCase as error:
                problem, places = str(error), list(range(len(members)))
            if not problem and len({round(place, 3) for place in places}) < len(places):
                problem = (
                    "several images of a series lie at one position (time points, b-values?); "
                    "put them into series of their own"
                )
            members = [member for _, member in sorted(zip(places, members), key=lambda p: p[0])]
        if stacked or problem:
            names = tuple(name for name, _ in members)
            out.append(Source(names, "dicom", patients[0], problem, burnt_in))
        else:  # views of one examination, as in radiography
            out += [Source((name,), "dicom", patients[0], "", burnt_in) for name, _ in members]
    return out


def _along_normal(tags: dict[str, str]) -> float:
    """Return where a slice lies along the normal of its plane."""
    position = tags["position"].split("\\")
    axes = (tags["orientation"] or "1\\0\\0\\0\\1\\0").split("\\")
    if (len(position), len(axes)) != (3, 6):
        raise BrokenCase("its header has no whole position or orientation")
    place = np.array([_number(v, 0, "position") for v in position])
    rows = np.array([_number(v, 0, "orientation") for v in axes])
    return float(place @ np.cross(rows[:3], rows[3:]))


def count_slices(root: str | os.PathLike[str], source: Source, *, plane: str = "native") -> int:
    """Return how many slices `read_pixels` would give, without reading pixels."""
    if source.kind == "picture":
        return 1
    if source.kind == "dicom" and len(source.files) > 1 and plane == "native":
        return len(source.files)
    if plane != "native":
        return len(read_pixels(root, source, plane=plane).values)
    size = open_volume(Path(root) / source.files[0], dicom=source.kind == "dicom").GetSize()
    return int(size[2]) if len(size) > 2 else 1


def read_pixels(root: str | os.PathLike[str], source: Source, *, plane: str = "native") -> Pixels:
    """Read a picture or a volume.

    Parameters
    ----------
    plane : {"native", "axial", "coronal", "sagittal"}
        Which way volumes are sliced; ``native`` as they were acquired or stored. All are turned so
        that they show as on a light box (axial: front up, the patient's right on the left).

    Raises
    ------
    BrokenCase
        Whatever is wrong with it.
    """
    if source.problem:
        raise BrokenCase(source.problem)
    if plane not in PLANES:
        raise ValueError(f"unknown plane {plane!r}; allowed are {', '.join(PLANES)}")
    paths = [Path(root) / file for file in source.files]
    if source.kind == "picture":
        return _read_picture(paths[0])
    return _read_volume(paths, source.kind == "dicom", plane)


def _read_picture(path: Path) -> Pixels:
    try:
        image, inverted = open_picture(path)
    except ImageError as error:
        said = str(error)
        if "not a readable image" in said:  # the reason may hold the header's words
            raise BrokenCase("not an image that can be read (truncated?)") from None
        raise BrokenCase(f"it {said}") from None
    if image.mode == "RGBA":
        flat = Image.new("RGBA", image.size, (0, 0, 0, 255))
        flat.alpha_composite(image)
        return Pixels(np.asarray(flat.convert("RGB"))[None], note="on black")
    return Pixels(np.asarray(image)[None], inverted=inverted)


def _read_volume(paths: Sequence[Path], dicom: bool, plane: str) -> Pixels:
    import SimpleITK as sitk

    if dicom:
        tags = _read_tags(paths[0])
    else:
        open_volume(paths[0])
        tags = dict.fromkeys(TAGS, "")
    try:
        if len(paths) > 1:
            series = sitk.ImageSeriesReader()
            series.SetImageIO("GDCMImageIO")
            series.SetFileNames([os.fspath(path) for path in paths])
            image = series.Execute()
        elif dicom:
            image = sitk.ReadImage(os.fspath(paths[0]), imageIO="GDCMImageIO")
        else:
            image = sitk.ReadImage(os.fspath(paths[0]))
        while image.GetDimension() > 3:
            image = image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
        if image.GetDimension() == 3 and image.GetSize()[2] > 1:
            image = _turn(image, plane)
    except (RuntimeError, OverflowError):
        raise BrokenCase("cannot be read: it is truncated, or no image") from None
    values = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() == 2:
        values = values[None]
    if components > 1 and (components != 3 or values.dtype != np.uint8):
        raise BrokenCase(
            f"{components} values of {values.dtype} a pixel; allowed are 1, or 8-bit RGB"
        )
    if np.iscomplexobj(values) or not np.isfinite(values).all():
        raise BrokenCase("it has values that are complex, infinite or not a number")
    if tags["photometric"] == "MONOCHROME1" and _is_inverted_on_reading():
        # back to the values that the window tags speak of: white is made of low ones after windowing
        bits = min(_number(tags["bits"], 16, "bits stored"), 64)
        top = -1 if tags["signed"] == "1" else 2**bits - 1
        slope = _number(tags["slope"], 1, "rescale slope")
        intercept = _number(tags["intercept"], 0, "rescale intercept")
        values = top * slope + 2 * intercept - values.astype(np.float64)
    spacing = image.GetSpacing()
    return Pixels(
        values,
        spacing=(float(spacing[1]), float(spacing[0])),
        window=_window_of(tags),
        inverted=tags["photometric"] == "MONOCHROME1",
        frame=(*image.GetOrigin(), *image.GetDirection()),
    )


@lru_cache(maxsize=1)
def _is_inverted_on_reading() -> bool:
    """Does this SimpleITK invert MONOCHROME1? Versions differ, and the header does not tell."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "probe.dcm")
        sitk.WriteImage(sitk.Image([2, 2], sitk.sitkUInt8), file)
        content = Path(file).read_bytes()
        Path(file).write_bytes(content.replace(b"MONOCHROME2", b"MONOCHROME1"))
        return bool(sitk.GetArrayFromImage(sitk.ReadImage(file)).max() > 0)


def _turn(image: sitk.Image, plane: str) -> sitk.Image:
    """Turn a volume so that its third axis runs through `plane`, seen as on a light box."""
    import SimpleITK as sitk

    if plane == "native":
        code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
        plane = THICK[code[2]]
    return sitk.DICOMOrient(image, TURNS[plane])


def _window_of(tags: dict[str, str]) -> tuple[float, float] | None:
    """Return the first window of the tags as lowest and highest value (PS3.3 C.11.2.1.2)."""
    if not tags["centre"] or not tags["width"]:
        return None
    try:
        centre = _number(tags["centre"].split("\\")[0], math.nan, "window centre")
        width = _number(tags["width"].split("\\")[0], math.nan, "window width")
    except BrokenCase as error:
        raise BrokenCase(f"{error}; use --window percentile") from None
    function = tags["function"] or "LINEAR"
    if function == "LINEAR" and width >= 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if function == "LINEAR_EXACT" and width > 0:
        return centre - width / 2, centre + width / 2
    known = function if function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") else "unknown"
    raise BrokenCase(f"window function {known} of width {width:g}; use --window percentile")
