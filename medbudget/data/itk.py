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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medbudget.data.items import BrokenCase
from medbudget.data.pixels import find_most

if TYPE_CHECKING:
    import SimpleITK as sitk

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
PACKINGS = {"raw": "", "gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2"}

NIFTI_1 = {"dim": ("8h", 40), "type": ("h", 70), "start": ("f", 108), "scale": ("2f", 112),
           "units": ("B", 123), "codes": ("2h", 252)}  # fmt: skip
NIFTI_2 = {"dim": ("8q", 16), "type": ("h", 12), "start": ("q", 168), "scale": ("2d", 176),
           "units": ("i", 500), "codes": ("2i", 344)}  # fmt: skip
NIFTI_SIZES = {348: NIFTI_1, 540: NIFTI_2}


@dataclass(frozen=True)
class Layout:
    """Where a file keeps its pixels, as its header says."""

    header: Path | bytes  # what SimpleITK reads the geometry from; bytes are those of NIfTI
    data: Path  # file with the pixels
    start: int  # of the pixels, or of the packed stream, in bytes
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

    layout = _read_layout(path)
    reader, dtype = _read_header(layout)
    components = reader.GetNumberOfComponents()
    need = math.prod(reader.GetSize()) * components * dtype.itemsize
    data = layout.data.read_bytes()[layout.start :]
    if layout.packed:
        data = unpack(data, layout.packed, need + max(layout.skip, 0) + 2**20)
    start = len(data) - need if layout.skip == -1 else layout.skip
    if start < 0 or len(data) - start < need:
        raise BrokenCase(
            f"truncated: it holds {max(len(data) - max(start, 0), 0):,} bytes of pixels where its "
            f"header claims {need:,}"
        )
    values = np.frombuffer(data, dtype, need // dtype.itemsize, start)
    values = values.astype(dtype.newbyteorder("="), copy=False).reshape(
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
    return tuple(_read_header(_read_layout(path))[0].GetSize()[:3])


def _read_layout(path: Path) -> Layout:
    """Read where the pixels of a volume are, and refuse headers that harm ITK."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    try:
        if path.suffix.lower() in (".nii", ".gz"):
            return _read_nifti(path, head)
        return _read_text_header(path, head)
    except (ValueError, zlib.error, struct.error) as error:
        if isinstance(error, BrokenCase):
            raise
        raise BrokenCase("cannot be read: its header is truncated or damaged") from None


def _read_text_header(path: Path, head: bytes) -> Layout:
    """Read a header of MetaImage ("name = value") or NRRD ("name: value")."""
    meta = path.suffix.lower() in (".mha", ".mhd")
    fields: dict[str, list[str]] = {}
    for name, value in re.findall(rb"^[ \t]*([\w ]+?)[ \t]*[=:]=?[ \t]*([^\r\n]*)", head, re.M):
        key = name.decode("ascii", "replace").lower()
        fields.setdefault(key, []).append(os.fsdecode(value.strip()))

    def first(*keys: str, default: str = "") -> str:
        return next((fields[key][0].lower() for key in keys if key in fields), default)

    def is_true(*keys: str, default: str = "false") -> bool:
        return first(*keys, default=default)[:1] in (
            "t",
            "1",
        )  # as MetaImage's own library reads it

    if {*fields.get("ndims", []), *fields.get("dimension", [])} - {"2", "3", "4", "5"}:
        raise BrokenCase("its header has no number of dimensions from 2 to 5")
    keys = ("elementdatafile", "data file", "datafile")
    names = [name for key in keys for name in fields.get(key, []) if name.upper() != "LOCAL"]
    others = [path.parent / name for name in names]
    plain = all(name and Path(name).name == name for name in names)
    if not plain or len(names) > 1 or any(p.is_symlink() or not p.is_file() for p in others):
        raise BrokenCase(
            "its data are in another file, which must be one and lie beside it under a plain name; "
            "put it there, or save header and data as one .mha or .nrrd"
        )
    end = re.search(rb"^ElementDataFile[^\n]*\n" if meta else rb"\r?\n\r?\n", head, re.M | re.I)
    if not names and end is None:
        raise BrokenCase("its header has no end within 1 MiB: damaged, or not what its name says")
    data, start = (others[0], 0) if others or end is None else (path, end.end())
    encoding = first("encoding", default="raw")
    if encoding not in PACKINGS or not is_true("binarydata", default="true"):
        raise BrokenCase("its pixels are stored as text; save it as binary data, raw or gzip")
    if meta:
        size = int(first("headersize", default="0"))
        return Layout(
            path, data, size if size > 0 else start, min(size, 0),
            "zlib" if is_true("compresseddata") else "",
            ">" if is_true("elementbyteordermsb", "binarydatabyteordermsb") else "<",
            stated="elementspacing" in fields or "elementsize" in fields,
        )  # fmt: skip
    if first("line skip", "lineskip", default="0") != "0":
        raise BrokenCase("its header skips lines of its data file; save it without")
    if any("color" in kind or "vector" in kind for kind in first("kinds").split()[1:]):
        raise BrokenCase("its colours are not the fastest axis; save it with colours first")
    return Layout(
        path, data, start, int(first("byte skip", "byteskip", default="0")), PACKINGS[encoding],
        ">" if first("endian") == "big" else "<",
        stated="spacings" in fields or "space directions" in fields,
    )  # fmt: skip


def _read_nifti(path: Path, head: bytes) -> Layout:
    """Read a NIfTI header of either version and byte order."""
    packed = head[:2] == b"\x1f\x8b"
    if packed:
        head = zlib.decompressobj(47).decompress(head, 4096)
    order = "<" if head[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    (size,) = struct.unpack(f"{order}i", head[:4])
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


def _read_header(layout: Layout) -> tuple[sitk.ImageFileReader, np.dtype[Any]]:
    """Read size and geometry through ITK, and the pixels' type; refuse what cannot be read."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(layout.header, bytes):
                file = Path(folder) / "header.nii"
                file.write_bytes(layout.header)
            else:
                file = layout.header  # ITK knows suffixes in lower case alone
                kind = "MetaImageIO" if file.suffix.lower() in (".mha", ".mhd") else "NrrdImageIO"
                reader.SetImageIO(kind)
            reader.SetFileName(os.fspath(file))
            reader.ReadImageInformation()
    except (RuntimeError, OverflowError) as error:
        if "orthonormal" in str(error):
            raise BrokenCase("its axes are not at right angles: resample it first") from None
        raise BrokenCase("cannot be read: it is truncated, or no image") from None
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    match = re.search(r"(\d+)-bit (signed|unsigned|float)", kind)
    if match is None or "complex" in kind:
        raise BrokenCase("its values are complex, or of no number type that can be read")
    letter = {"signed": "i", "unsigned": "u", "float": "f"}[match[2]]
    dtype = np.dtype(f"{layout.order}{letter}{int(match[1]) // 8}")
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if not math.prod(size):
        raise BrokenCase(f"it has no pixels: its size is {size}")
    if len(size) > 3 and math.prod(size[3:]) > 1:
        raise BrokenCase(f"a {len(size)}-D volume of size {size}: export the one that you want")
    need, held = math.prod(size) * components * dtype.itemsize, layout.data.stat().st_size
    if need > find_most(held, bool(layout.packed)):
        raise BrokenCase(
            f"it claims {need:,} bytes of pixels, of size {size}, in a file of {held:,}: "
            "truncated, or made to use up the memory"
        )
    if components > 1 and (components != 3 or dtype != np.uint8):
        raise BrokenCase(f"{components} values of {dtype} a pixel; allowed are 1, or 8-bit RGB")
    return reader, dtype


def unpack(data: bytes, packing: str, most: int) -> bytes:
    """Unpack a whole zlib, gzip or bzip2 stream of at most so many bytes.

    Raises
    ------
    BrokenCase
        It is cut, its check sum does not fit, or it holds more.
    """
    parts, rest = [], data
    while rest:
        stream: Any = bz2.BZ2Decompressor() if packing == "bzip2" else zlib.decompressobj(47)
        try:
            parts.append(stream.decompress(rest, most + 1))
        except (zlib.error, OSError, ValueError):
            raise BrokenCase("cannot be read: its compressed stream is damaged") from None
        most -= len(parts[-1])
        if most < 0:
            raise BrokenCase("its compressed stream holds more than its header promises")
        if not stream.eof:
            raise BrokenCase("truncated: its compressed stream has no end")
        rest = stream.unused_data if stream.unused_data[:2] == b"\x1f\x8b" else b""
    return parts[0] if len(parts) == 1 else b"".join(parts)
