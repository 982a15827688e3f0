"""Read one medical image, in whatever format: pixels, what they mean, where slices lie.

DICOM goes through SimpleITK (GDCM), which honours rescale slope and intercept and unpacks all
common transfer syntaxes. No text of a file's header leaves this module, but for the patient's ID.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from medbudget.data.prepare import BrokenCase

if TYPE_CHECKING:
    import SimpleITK as sitk

Array = NDArray[Any]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima", ".dicom")
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


def _read_tags(path: Path) -> dict[str, str]:
    """Return the tags that matter, stripped; absent ones as ""."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.SetImageIO("GDCMImageIO")
    reader.LoadPrivateTagsOff()
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise BrokenCase("not a DICOM image that can be read (truncated, or no pixels)") from None
    return {
        name: reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""
        for name, tag in TAGS.items()
    }


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
            places = [_along_normal(tags) for _, tags in members]
            if len({round(place, 3) for place in places}) < len(places):
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
    position = np.array([float(v) for v in tags["position"].split("\\")])
    axes = np.array([float(v) for v in (tags["orientation"] or "1\\0\\0\\0\\1\\0").split("\\")])
    return float(position @ np.cross(axes[:3], axes[3:]))


def count_slices(root: str | os.PathLike[str], source: Source, *, plane: str = "native") -> int:
    """Return how many slices `read_pixels` would give, without reading pixels."""
    import SimpleITK as sitk

    if source.kind == "picture":
        return 1
    if source.kind == "dicom" and len(source.files) > 1 and plane == "native":
        return len(source.files)
    if plane != "native":
        return len(read_pixels(root, source, plane=plane).values)
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(Path(root) / source.files[0]))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise BrokenCase("cannot be read: it is truncated, or no image") from None
    size = reader.GetSize()
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
        with Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            raw = str(opened.tile[0][3]) if opened.tile else ""
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BrokenCase("not an image that can be read (truncated?)") from None
    if frames > 1:
        raise BrokenCase(f"it has {frames} pages or frames; export the one that you want")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Pixels(np.asarray(image)[None])
    if ";16" in raw and image.mode in ("RGB", "RGBA"):
        raise BrokenCase("it has 16 bits a colour; export it with 8, with the window that you want")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        flat = Image.new("RGBA", image.size, (0, 0, 0, 255))
        flat.alpha_composite(image.convert("RGBA"))
        opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
        return Pixels(np.asarray(flat.convert("RGB"))[None], note="" if opaque else "on black")
    if image.mode in ("1", "L"):
        return Pixels(np.asarray(image.convert("L"))[None])
    if image.mode in ("P", "RGB"):
        return Pixels(np.asarray(image.convert("RGB"))[None])
    raise BrokenCase(f"colour mode {image.mode}; allowed are gray, RGB, RGBA and palette")


def _read_volume(paths: Sequence[Path], dicom: bool, plane: str) -> Pixels:
    import SimpleITK as sitk

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
    except RuntimeError:
        raise BrokenCase("cannot be read: it is truncated, or no image") from None
    tags = _read_tags(paths[0]) if dicom else dict.fromkeys(TAGS, "")
    if image.GetDimension() > 3 and image.GetSize()[3] > 1:
        raise BrokenCase(f"a 4-D volume of size {image.GetSize()}: export the one that you want")
    if image.GetDimension() > 3:
        image = image[:, :, :, 0]
    if image.GetDimension() == 3 and image.GetSize()[2] > 1:
        image = _turn(image, plane)
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
        top = -1 if tags["signed"] == "1" else 2 ** int(tags["bits"]) - 1
        slope, intercept = float(tags["slope"] or 1), float(tags["intercept"] or 0)
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
        centre = float(tags["centre"].split("\\")[0])
        width = float(tags["width"].split("\\")[0])
    except ValueError:
        raise BrokenCase(
            f"window tags {tags['centre']!r}, {tags['width']!r} are no numbers; use --window percentile"
        ) from None
    function = tags["function"] or "LINEAR"
    if function == "LINEAR" and width >= 1:
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if function == "LINEAR_EXACT" and width > 0:
        return centre - width / 2, centre + width / 2
    raise BrokenCase(f"window function {function} of width {width:g}; use --window percentile")
