"""Read volumes of NIfTI, MetaImage and NRRD files: what a file does not hold whole is refused.

SimpleITK reads headers only. Pixels are unpacked here, because ITK accepts cut files and damaged
streams and fills what is missing. gzip, zlib and bzip2 streams carry a check sum, which has to fit;
uncompressed files carry none, so that only their length can be checked. No text of a header gets
into an error.
"""

from __future__ import annotations

import bz2
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medbudget.data.prepare import BrokenCase

if TYPE_CHECKING:
    import SimpleITK as sitk

Array = NDArray[Any]

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
MAX_BYTES = 4 * 2**30  # of one volume in memory
MAX_RATIO = 1100  # deflate makes zeros 1032 times smaller
SMALL = 64 * 2**20  # a blank image packs better still: so much is never refused

# how a volume has to be turned so that its slices are seen as on a light box
TURNS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
PLANE_OF = {letter: plane for plane, code in zip(TURNS, ("SI", "AP", "LR")) for letter in code}

NIFTI_1 = {"dim": ("8h", 40), "type": ("h", 70), "start": ("f", 108), "scale": ("2f", 112),
           "units": ("B", 123), "codes": ("2h", 252)}  # fmt: skip
NIFTI_2 = {"dim": ("8q", 16), "type": ("h", 12), "start": ("q", 168), "scale": ("2d", 176),
           "units": ("i", 500), "codes": ("2i", 344)}  # fmt: skip
NIFTI_SIZES = {348: NIFTI_1, 540: NIFTI_2}


@dataclass(frozen=True)
class Layout:
    """Where a file keeps its pixels, as its header says."""

    header: Path | bytes  # what SimpleITK reads the geometry from
    data: Path  # file with the pixels
    start: int  # of the pixels, or of the packed stream, in bytes; -1: they end the file
    skip: int = 0  # bytes to pass over in the unpacked stream; -1: pixels end the stream
    packed: str = ""  # "", "zlib" (or gzip), "bzip2"
    order: str = "<"  # byte order
    scale: tuple[float, float] = (1.0, 0.0)  # slope and intercept
    stated: bool = True  # the header states a pixel spacing


def read_volume(path: str | os.PathLike[str]) -> sitk.Image:
    """Read a NIfTI, MetaImage or NRRD file whose pixels are all there.

    Returns
    -------
    SimpleITK.Image
        2-D or 3-D, of one value a pixel or of 8-bit RGB; NIfTI's slope and intercept are applied.
        A 2-D NIfTI slice becomes a 3-D image, so that it keeps its direction.

    Raises
    ------
    BrokenCase
        It is cut, damaged, of more than three dimensions, or made to use up the memory.
    """
    return read_stated(Path(path))[0]


def read_stated(path: Path) -> tuple[sitk.Image, bool]:
    """Read a volume as `read_volume` does, and tell whether its header states a spacing."""
    import SimpleITK as sitk

    layout = read_layout(path)
    reader = _read_header(layout)
    dtype, components, need = _measure(reader, layout)
    values = _read_pixels(layout, dtype, need).reshape(
        (*reader.GetSize()[::-1], *((components,) if components > 1 else ()))
    )
    slope, intercept = layout.scale
    if (slope, intercept) != (1, 0):
        values = values * np.result_type(dtype, np.float32).type(slope) + intercept
    image = sitk.GetImageFromArray(values, isVector=components > 1)
    try:
        image.SetSpacing(reader.GetSpacing())
        image.SetOrigin(reader.GetOrigin())
        image.SetDirection(reader.GetDirection())
    except RuntimeError:
        raise BrokenCase("its header has a spacing of 0 or less, or axes that coincide") from None
    while image.GetDimension() > 3:
        image = image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
    return image, layout.stated


def read_size(path: Path) -> tuple[int, ...]:
    """Return the size of a volume (columns, rows, slices) without reading its pixels."""
    layout = read_layout(path)
    reader = _read_header(layout)
    _measure(reader, layout)
    return tuple(reader.GetSize()[:3])


@dataclass(frozen=True)
class Turn:
    """How a volume is turned so that its slices are seen as on a light box."""

    axes: tuple[int, ...]  # which axis (x, y, z) as stored becomes x, y and z
    flips: tuple[bool, ...]  # which of the new axes are reversed

    def apply(self, values: Array) -> Array:
        """Turn an array ``(z, y, x[, colours])``, without a copy."""
        values = values.transpose(*(2 - axis for axis in self.axes[::-1]), *range(3, values.ndim))
        return values[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips[::-1])]

    def move(
        self, origin: Sequence[float], direction: Sequence[float], reach: Sequence[float]
    ) -> tuple[float, ...]:
        """Return origin and direction (row-major) after turning; `reach` in mm along x, y, z."""
        columns = np.reshape(direction, (3, 3))[:, self.axes]
        shift = columns @ (np.array(self.flips) * np.array(reach)[list(self.axes)])
        turned = columns * np.where(self.flips, -1, 1)
        return (*map(float, np.array(origin) + shift), *map(float, turned.ravel()))


def find_turn(direction: Sequence[float], plane: str, slices: int) -> Turn:
    """Find how to turn a volume so that its third axis runs through `plane`."""
    import SimpleITK as sitk

    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction)
    stored = PLANE_OF[code[2]]
    if plane not in ("native", stored) and slices == 1:
        raise BrokenCase(f"it is one {stored} slice, which cannot be cut in the {plane} plane")
    target = TURNS[stored if plane == "native" else plane]
    pairs = [next(pair for pair in ("LR", "PA", "SI") if letter in pair) for letter in target]
    axes = tuple(next(i for i in range(3) if code[i] in pair) for pair in pairs)
    return Turn(axes, tuple(code[axis] != letter for axis, letter in zip(axes, target)))


def read_layout(path: Path) -> Layout:
    """Read where the pixels of a volume are, and refuse headers that harm ITK."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    suffix = path.suffix.lower()
    if suffix in (".nii", ".gz"):
        return _read_nifti(path, head)
    meta = suffix in (".mha", ".mhd")
    fields = _read_fields(head)
    for value in fields.get("ndims", []) + fields.get("dimension", []):
        if value not in ("2", "3", "4", "5"):
            raise BrokenCase("its header has no number of dimensions from 2 to 5")
    names = [
        name
        for key in ("elementdatafile", "data file", "datafile")
        for name in fields.get(key, [])
        if name.upper() != "LOCAL"
    ]
    for name in names:
        other = path.parent / name
        if not name or Path(name).name != name or other.is_symlink() or not other.is_file():
            raise BrokenCase(
                "its data are in another file, which must lie beside it under a plain name; put "
                "it there, or save header and data as one .mha or .nrrd"
            )
    if len(names) > 1:
        raise BrokenCase("its header names several files for its data; save it as one file")

    def first(key: str, default: str) -> str:
        return fields.get(key, [default])[0].lower()

    def is_true(value: str) -> bool:
        return value[:1] in ("t", "1")  # as MetaImage's own library reads it

    end = re.search(rb"^ElementDataFile[^\n]*\n" if meta else rb"\r?\n\r?\n", head, re.M | re.I)
    if not names and end is None:
        raise BrokenCase("its header has no end within 1 MiB: damaged, or not what its name says")
    data = path.parent / names[0] if names else path
    start = 0 if names else end.end() if end else 0
    try:
        if meta:
            if not is_true(first("binarydata", "true")):
                raise BrokenCase("its pixels are stored as text; save it with binary data")
            size = int(first("headersize", "0"))
            big = first("elementbyteordermsb", first("binarydatabyteordermsb", "false"))
            return Layout(
                path, data, size if size else start, 0,
                "zlib" if is_true(first("compresseddata", "false")) else "",
                ">" if is_true(big) else "<",
                stated="elementspacing" in fields or "elementsize" in fields,
            )  # fmt: skip
        encoding = first("encoding", "raw")
        packings = {"raw": "", "gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2"}
        kinds = first("kinds", "").split()
        if encoding not in packings:
            raise BrokenCase("its pixels are stored as text; save it as raw or gzip")
        if first("line skip", first("lineskip", "0")) != "0":
            raise BrokenCase("its header skips lines of its data file; save it without")
        if kinds and any("color" in kind or "vector" in kind for kind in kinds[1:]):
            raise BrokenCase("its colours are not the fastest axis; save it with colours first")
        return Layout(
            path, data, start, int(first("byte skip", first("byteskip", "0"))), packings[encoding],
            ">" if first("endian", "little") == "big" else "<",
            stated="spacings" in fields or "space directions" in fields,
        )  # fmt: skip
    except ValueError as error:
        if isinstance(error, BrokenCase):
            raise
        raise BrokenCase("its header has text where a number belongs") from None


def _read_fields(head: bytes) -> dict[str, list[str]]:
    """Return the lines "name = value" (MetaImage) or "name: value" (NRRD), names in lower case."""
    fields: dict[str, list[str]] = {}
    for name, value in re.findall(rb"^[ \t]*([\w ]+?)[ \t]*[=:]=?[ \t]*([^\r\n]*)", head, re.M):
        fields.setdefault(name.decode("ascii", "replace").lower(), []).append(
            os.fsdecode(value.strip())
        )
    return fields


def _read_nifti(path: Path, head: bytes) -> Layout:
    """Read a NIfTI header of either version and byte order."""
    packed = head[:2] == b"\x1f\x8b"
    if packed:
        try:
            head = zlib.decompressobj(47).decompress(head, 4096)
        except zlib.error:
            raise BrokenCase("cannot be read: its compressed stream is damaged") from None
    order = "<" if head[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    size = struct.unpack(f"{order}i", head[:4])[0] if len(head) > 4 else 0
    if size not in NIFTI_SIZES or len(head) < size or b"n+" not in (head[4:6], head[344:346]):
        raise BrokenCase("cannot be read: it is truncated, or no NIfTI volume")
    places = NIFTI_SIZES[size]

    def field(name: str) -> tuple[Any, ...]:
        code, place = places[name]
        return struct.unpack_from(order + code, head, place)

    n, *dim = field("dim")
    if not 1 <= n <= 7 or min(dim[:n]) < 0:
        raise BrokenCase("its header has no number of dimensions from 1 to 7")
    if math.prod(dim[3:n]) > 1:
        raise BrokenCase(f"a {n}-D volume of size {tuple(dim[:n])}: export the one that you want")
    (start,), (slope, intercept) = field("start"), field("scale")
    if not math.isfinite(start) or (start != 0 and start < size):
        raise BrokenCase("its header has no place where the pixels start")
    scaled = math.isfinite(slope) and slope != 0 and field("type")[0] != 128  # 128: RGB
    if scaled and not math.isfinite(intercept):
        raise BrokenCase("its scl_inter is not a number")
    # ITK gets a header of three dimensions, without data and without slope
    plain = bytearray(head[:size].ljust(size + 4, b"\0"))
    three = (*dim[: min(n, 3)], *[1] * (3 - n), 1, 1, 1, 1)
    for name, value in (("dim", (3, *three)), ("start", (size + 4,)), ("scale", (1, 0))):
        code, place = places[name]
        struct.pack_into(order + code, plain, place, *value)
    return Layout(
        bytes(plain), path, 0, int(start) or size + 4, "zlib" if packed else "", order,
        (slope, intercept) if scaled else (1.0, 0.0),
        bool(field("units")[0] & 7 or any(field("codes"))),
    )  # fmt: skip


def _read_header(layout: Layout) -> sitk.ImageFileReader:
    """Read the header through ITK."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    try:
        if isinstance(layout.header, Path):
            kind = "MetaImageIO" if layout.header.suffix.lower()[:2] == ".m" else "NrrdImageIO"
            reader.SetImageIO(kind)  # by themselves, they know suffixes in lower case alone
            reader.SetFileName(os.fspath(layout.header))
            reader.ReadImageInformation()
            return reader
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "header.nii"
            file.write_bytes(layout.header)
            reader.SetFileName(os.fspath(file))
            reader.ReadImageInformation()
            return reader
    except (RuntimeError, OverflowError) as error:
        if "orthonormal" in str(error):
            raise BrokenCase("its axes are not at right angles: resample it first") from None
        raise BrokenCase("cannot be read: it is truncated, or no image") from None


def _measure(reader: sitk.ImageFileReader, layout: Layout) -> tuple[np.dtype[Any], int, int]:
    """Return the pixels' type, values a pixel and bytes in all; refuse what cannot be read."""
    import SimpleITK as sitk

    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    match = re.search(r"(\d+)-bit (signed|unsigned|float)", kind)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if match is None or "complex" in kind:
        raise BrokenCase("its values are complex, or of no number type that can be read")
    letter = {"signed": "i", "unsigned": "u", "float": "f"}[match[2]]
    dtype = np.dtype(f"{layout.order}{letter}{int(match[1]) // 8}")
    if not math.prod(size):
        raise BrokenCase(f"it has no pixels: its size is {size}")
    if len(size) > 3 and math.prod(size[3:]) > 1:
        raise BrokenCase(f"a {len(size)}-D volume of size {size}: export the one that you want")
    need, held = math.prod(size) * components * dtype.itemsize, layout.data.stat().st_size
    if need > min(MAX_BYTES, SMALL + MAX_RATIO * held if layout.packed else held):
        raise BrokenCase(
            f"it claims {need:,} bytes of pixels, of size {size}, in a file of {held:,}: "
            "truncated, or made to use up the memory"
        )
    if components > 1 and (components != 3 or dtype != np.uint8):
        raise BrokenCase(f"{components} values of {dtype} a pixel; allowed are 1, or 8-bit RGB")
    return dtype, components, need


def _read_pixels(layout: Layout, dtype: np.dtype[Any], need: int) -> Array:
    """Return the pixels as a flat array in this machine's byte order."""
    data = layout.data.read_bytes()
    if layout.start == -1:
        data = data[-need:]
    elif layout.start:
        data = data[layout.start :]
    if layout.packed:
        data = unpack(data, layout.packed, need + max(layout.skip, 0) + 2**20)
    start = len(data) - need if layout.skip == -1 else layout.skip
    if start < 0 or len(data) - start < need:
        raise BrokenCase(
            f"truncated: it holds {max(len(data) - max(start, 0), 0):,} bytes of pixels where its "
            f"header claims {need:,}"
        )
    values = np.frombuffer(data, dtype, need // dtype.itemsize, start)
    return values.astype(dtype.newbyteorder("="), copy=False)


def unpack(data: bytes, packing: str, most: int) -> bytes:
    """Unpack a whole zlib, gzip, raw deflate or bzip2 stream of at most so many bytes.

    Raises
    ------
    BrokenCase
        It is cut, its check sum does not fit, or it holds more.
    """
    out, rest = [], data
    while rest:
        stream: Any = (
            bz2.BZ2Decompressor()
            if packing == "bzip2"
            else zlib.decompressobj(-15 if packing == "deflate" else 47)
        )
        try:
            out.append(stream.decompress(rest, most + 1))
        except (zlib.error, OSError, ValueError):
            raise BrokenCase("cannot be read: its compressed stream is damaged") from None
        most -= len(out[-1])
        if most < 0:
            raise BrokenCase("its compressed stream holds more than its header promises")
        if not stream.eof:
            raise BrokenCase("truncated: its compressed stream has no end")
        rest = stream.unused_data if stream.unused_data[:2] == b"\x1f\x8b" else b""
    return out[0] if len(out) == 1 else b"".join(out)
