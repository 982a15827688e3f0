"""Read volumes of NIfTI, MetaImage and NRRD files: what a file does not hold whole is refused.

ITK accepts damaged streams, and NIfTI files that are cut, and fills what is missing. So streams are
unpacked here, where their check sums have to fit, and ITK gets a temporary file without
compression; uncompressed files have no check sum, so that only their length can be checked. No text
of a header gets into an error.
"""

from __future__ import annotations

import bz2
import math
import os
import re
import struct
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medbudget.data.items import BrokenCase
from medbudget.data.pixels import find_most

if TYPE_CHECKING:
    import SimpleITK as sitk

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
PACKINGS = {"gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2", "raw": ""}

# fields by the size of the header: type and place
NIFTI: dict[int, dict[str, tuple[str, int]]] = {
    348: {"dim": ("8h", 40), "type": ("2h", 70), "start": ("f", 108), "scale": ("2f", 112),
          "steps": ("8f", 76), "units": ("B", 123), "codes": ("2h", 252)},
    540: {"dim": ("8q", 16), "type": ("2h", 12), "start": ("q", 168), "scale": ("2d", 176),
          "steps": ("8d", 104), "units": ("i", 500), "codes": ("2i", 344)},
}  # fmt: skip


def read_volume(path: str | os.PathLike[str]) -> sitk.Image:
    """Read a NIfTI, MetaImage or NRRD file whose pixels are all there, or raise BrokenCase.

    The image is 2-D or 3-D, of one value a pixel or of 8-bit RGB; NIfTI's slope and intercept are
    applied. A 2-D NIfTI slice becomes a 3-D image, so that it keeps its direction. The metadata
    have the key "no spacing" where the header states none.
    """
    path = Path(path)
    unpack = _unpack_nifti if path.suffix.lower() in (".nii", ".gz") else _unpack_text_header
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, stated = unpack(path, Path(folder) / "volume")
            image = _open(file).Execute()
    except BrokenCase:
        raise
    except (ValueError, RuntimeError, OverflowError, zlib.error, struct.error) as error:
        if "orthonormal" in str(error):
            raise BrokenCase("its axes are not at right angles: resample it first") from None
        raise BrokenCase("cannot be read: it is truncated or damaged, or no image") from None
    kind, components = image.GetPixelIDTypeAsString(), image.GetNumberOfComponentsPerPixel()
    if "complex" in kind or (components > 1 and (components != 3 or "8-bit unsigned" not in kind)):
        raise BrokenCase(
            f"it has {components} values a pixel of {kind}; allowed are 1, or 8-bit RGB"
        )
    while image.GetDimension() > 3:
        image = image[(*[slice(None)] * (image.GetDimension() - 1), 0)]
    if not stated:
        image.SetMetaData("no spacing", "")
    return image


def _open(file: Path) -> sitk.ImageFileReader:
    """Read a header through ITK, which knows suffixes in lower case alone."""
    import SimpleITK as sitk

    reader, suffix = sitk.ImageFileReader(), file.suffix.lower()
    formats = {".nii": "NiftiImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
    reader.SetImageIO(formats.get(suffix, "NrrdImageIO"))
    reader.SetFileName(os.fspath(file))
    reader.ReadImageInformation()
    return reader


def _check_claim(size: tuple[int, ...], need: int, held: int, packed: bool) -> None:
    """Refuse sizes that are none, of a fourth dimension, or more than a file can hold."""
    if not math.prod(size):
        raise BrokenCase(f"it has no pixels: its size is {size}")
    if math.prod(size[3:]) > 1:
        raise BrokenCase(f"a {len(size)}-D volume of size {size}: export the one that you want")
    if need > find_most(held, packed):
        raise BrokenCase(
            f"it claims {need:,} bytes of pixels, of size {size}, in a file of {held:,}: "
            "truncated, or made to use up the memory"
        )


def _unpack_text_header(path: Path, target: Path) -> tuple[Path, bool]:
    """Return a MetaImage ("name = value") or NRRD file ("name: value") without compression, and
    whether it states a spacing; refuse headers that harm ITK."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    meta = path.suffix.lower() in (".mha", ".mhd")
    fields: dict[str, list[str]] = {}
    for name, value in re.findall(rb"^[ \t]*([\w ]+?)[ \t]*[=:]=?[ \t]*([^\r\n]*)", head, re.M):
        key = name.decode("ascii", "replace").lower()
        fields.setdefault(key, []).append(os.fsdecode(value.strip()))

    def first(key: str, default: str) -> str:
        return fields.get(key, [default])[0].lower()

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
    if not others and end is None:
        raise BrokenCase("its header has no end within 1 MiB: damaged, or not what its name says")
    encoding = first("encoding", "raw")
    if encoding not in PACKINGS or first("binarydata", "true")[:1] not in ("t", "1"):
        raise BrokenCase("its pixels are stored as text; save it as binary data, raw or gzip")
    if meta and first("compresseddata", "false")[:1] in ("t", "1"):  # as its own library reads it
        encoding = "gzip"
    packed, data = PACKINGS[encoding], others[0] if others else path
    reader = _open(path)
    size, count = reader.GetSize(), math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    _check_claim(size, count, data.stat().st_size, bool(packed))
    spacings = {"elementspacing", "elementsize", "spacings", "space directions"}
    if not packed:
        return path, bool(spacings & fields.keys())
    start = int(first("headersize", "0")) or (0 if others or end is None else end.end())
    skip = int(first("byte skip", first("byteskip", "0")))
    content = unpack(data.read_bytes()[start:], packed, 8 * count + max(skip, 0) + 2**20)
    kinds = rb"CompressedData|CompressedDataSize|HeaderSize|ElementDataFile|encoding|data ?file"
    line = re.compile(rb"^[ \t]*(" + kinds + rb")[ \t]*[=:][^\n]*\n", re.M | re.I)
    lines = line.sub(b"", head[: end.end() if end else None])
    last = b"ElementDataFile = LOCAL\n" if meta else b"encoding: raw\n\n"
    target = target.with_suffix(".mha" if meta else ".nrrd")
    with open(target, "wb") as plain_file:
        plain_file.writelines((lines.rstrip(b"\r\n"), b"\n", last, content))
    return target, bool(spacings & fields.keys())


def _unpack_nifti(path: Path, target: Path) -> tuple[Path, bool]:
    """Return a NIfTI file of three dimensions without compression, and whether it states a spacing."""
    data = path.read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    head = zlib.decompressobj(47).decompress(data, 4096) if packed else data[:4096]
    order = "<" if head[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    (size,) = struct.unpack(f"{order}i", head[:4])
    if size not in NIFTI or len(head) < size or b"n+" not in (head[4:6], head[344:346]):
        raise BrokenCase("cannot be read: it is truncated, or no NIfTI volume")
    (n, *dim), kind, (start,), scale, steps, (units,), codes = (
        struct.unpack_from(order + code, head, place) for code, place in NIFTI[size].values()
    )
    if not 1 <= n <= 7 or min(dim[:n]) < 0:
        raise BrokenCase("its header has no number of dimensions from 1 to 7")
    if not all(step >= 0 for step in steps[1 : min(n, 3) + 1]):
        raise BrokenCase("its header has a spacing below 0")
    if not math.isfinite(start) or (start != 0 and start < size):
        raise BrokenCase("its header has no place where the pixels start")
    if not math.isfinite(scale[0]) or scale[0] == 0 or kind[0] == 128:  # none, or RGB
        scale = (1, 0)
    if not math.isfinite(scale[1]):
        raise BrokenCase("its scl_inter is not a number")
    start = int(start) or size + 4
    need = start + math.prod(dim[:n]) * kind[1] // 8
    _check_claim(tuple(dim[:n]), need, len(data), packed)
    content = bytearray(unpack(data, "zlib", need + 2**20) if packed else data)
    if len(content) < need:
        raise BrokenCase(f"truncated: it holds {len(content):,} bytes of {need:,}")
    shape = (3, *dim[: min(n, 3)], *[1] * (7 - min(n, 3)))
    for name, value in (("dim", shape), ("start", (start,)), ("scale", scale)):
        code, place = NIFTI[size][name]
        struct.pack_into(order + code, content, place, *value)
    target = target.with_suffix(".nii")
    target.write_bytes(content)
    return target, bool(units & 7 or any(codes))


def unpack(data: bytes, packing: str, most: int) -> bytes:
    """Unpack a whole zlib, gzip or bzip2 stream of at most so many bytes, whose check sum fits."""
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
