"""Read volumes of NIfTI, MetaImage and NRRD files: what a file does not hold whole is refused.

ITK accepts damaged streams, and NIfTI files that are cut, and fills what is missing. So streams are
unpacked here, where their check sums have to fit, before ITK reads them; uncompressed files have no
check sum, so that only their length can be checked. No text of a header gets into an error.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from medbudget.data.items import BrokenCase

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
MAX_RATIO = 1100  # deflate makes zeros 1032 times smaller


def read_volume(path: str | os.PathLike[str]) -> sitk.Image:
    """Read a NIfTI, MetaImage or NRRD file whose pixels are all there, or raise BrokenCase.

    The image is 2-D or 3-D, of one value a pixel or of 8-bit RGB; NIfTI's slope and intercept are
    applied. A 2-D NIfTI slice becomes a 3-D image, so that it keeps its direction. The metadata
    have the key "no spacing" where the header states none.
    """
    path = Path(path)
    read = _read_nifti if path.suffix.lower() in (".nii", ".gz") else _read_text_header
    try:
        image, stated = read(path)
    except BrokenCase:
        raise
    except Exception as error:  # a damaged file can raise anything
        if "orthonormal" in str(error):
            raise BrokenCase("its axes are not at right angles: resample it first") from None
        raise BrokenCase("cannot be read: it is truncated or damaged, or no image") from None
    kind, components = image.GetPixelIDTypeAsString(), image.GetNumberOfComponentsPerPixel()
    if "complex" in kind or (components > 1 and (components != 3 or "8-bit unsigned" not in kind)):
        raise BrokenCase(f"it has {components} x {kind} a pixel; allowed are 1, or 8-bit RGB")
    if math.prod(image.GetSize()[3:]) > 1:
        n, size = image.GetDimension(), image.GetSize()
        raise BrokenCase(f"a {n}-D volume of size {size}: export the one that you want")
    while image.GetDimension() > 3:
        image = image[..., 0]
    if not stated:
        image.SetMetaData("no spacing", "")
    return image


def _open(file: Path) -> sitk.ImageFileReader:
    """Read a header through ITK, which knows suffixes in lower case alone."""
    formats = {".nii": "NiftiImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
    reader = sitk.ImageFileReader()
    reader.SetImageIO(formats.get(file.suffix.lower(), "NrrdImageIO"))
    reader.SetFileName(os.fspath(file))
    reader.ReadImageInformation()
    return reader


def _read_text_header(path: Path) -> tuple[sitk.Image, bool]:
    """Read a MetaImage ("name = value") or NRRD file ("name: value"), and whether it states a
    spacing; refuse headers that harm ITK."""
    with open(path, "rb") as opened:
        head = opened.read(1 << 20)
    end = re.search(rb"^ElementDataFile[^\n]*\n|\r?\n\r?\n", head, re.M | re.I)
    head = head[: end.end()] if end else head
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
        raise BrokenCase("its data are in another file, which must lie beside it: save both as one")
    true = ("t", "1")  # as ITK's own library reads it
    encoding = "gzip" if first("compresseddata", "f").startswith(true) else first("encoding", "raw")
    if encoding not in ("raw", "gzip", "gz") or not first("binarydata", "t").startswith(true):
        raise BrokenCase("its pixels are stored as text or bzip2; save them as raw or gzip")
    file, reader, packed = others[0] if others else path, _open(path), encoding != "raw"
    if not 0 < math.prod(reader.GetSize()) <= file.stat().st_size * (MAX_RATIO if packed else 1):
        raise BrokenCase(f"truncated: it claims pixels that are not there: {reader.GetSize()}")
    image = reader.Execute()
    if packed:
        data = file.read_bytes()[0 if others else len(head) :]
        need, stream = sitk.GetArrayViewFromImage(image).nbytes, zlib.decompressobj(47)
        fits = int(first("compresseddatasize", str(len(data)))) == len(data)
        if len(stream.decompress(data, need + 2**20)) < need or not stream.eof or not fits:
            raise BrokenCase("truncated: its compressed pixels are not those that it claims")
    spacings = {"elementspacing", "elementsize", "spacings", "space directions"}
    return image, bool(spacings & fields.keys())


def _read_nifti(path: Path) -> tuple[sitk.Image, bool]:
    """Read a NIfTI-1 file, and whether it states a spacing."""
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        head = file.read(352)
        order = {b"\x5c\x01\0\0": "<", b"\0\0\x01\x5c": ">"}.get(head[:4])
        if order is None or head[344:346] != b"n+":
            raise BrokenCase("cannot be read: it is truncated, or no NIfTI-1 volume in one file")

        def get(kinds: str, place: int) -> tuple[Any, ...]:
            return struct.unpack_from(order + kinds, head, place)

        (n, *dim), (bits,), (_, *steps, start, slope) = get("8h", 40), get("h", 72), get("10f", 76)
        dim = dim[:n]
        flat = not all(step >= 0 for step in steps[: min(n, 3)])
        if not 1 <= n <= 7 or min(dim) < 1 or flat or not start >= 348:
            raise BrokenCase("its header has no sizes or spacings, or no place of its pixels")
        need = int(start) + math.prod(dim) * bits // 8
        held = path.stat().st_size * (MAX_RATIO if packed else 1)
        content = bytearray(head + file.read(min(need, held) - 352 + 2**20))
        if len(content) < need or (packed and file.read(1)):  # the check sum is read at the end
            raise BrokenCase("truncated: it does not hold the pixels that its header claims")
    if n < 3:  # ITK forgets the direction of a slice
        struct.pack_into(f"{order}8h", content, 40, 3, *dim, *[1] * (7 - n))
    if not abs(slope) > 0:  # 0 means none (nifti1.h), and so does NaN
        struct.pack_into(f"{order}2f", content, 112, 1, 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "volume.nii"
        copy.write_bytes(content)
        image = _open(copy).Execute()
    return image, bool(head[123] & 7 or any(get("2h", 252)))
