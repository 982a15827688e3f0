"""Read one image file: the door through which all pictures come, with what Pillow hides said."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".tif", ".tiff", ".bmp", ".dib", ".webp", ".gif", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
HEIF = (".heic", ".heif", ".hif")
# Pillow goes by content, not by name, and hands PostScript to another program: never let it
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF")

# what may lie beside images without being one
DOCUMENTS = (
    ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".html", ".log", ".ini",
    ".db", ".xlsx", ".xls", ".ods", ".py", ".lock", ".pt", ".bin", ".safetensors", ".ckpt",
)  # fmt: skip
NAMES = ("README", "LICENSE", "LICENCE")
TRANSPARENT = "has transparent pixels; flatten it onto the background that you want"


class ImageError(ValueError):
    """An image file or tensor that cannot be used; the message says why and what to do."""


@lru_cache(maxsize=1)
def list_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats read here; HEIF where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def open_picture(path: str | os.PathLike[str]) -> tuple[Image.Image, bool]:
    """Read an image file whole and upright.

    The image is of mode ``L`` or ``RGB``, of ``RGBA`` where pixels are transparent, or of ``I;16``,
    ``I`` or ``F`` for gray of more than 8 bits, of which the second value tells if low values are
    white. What is unreadable, has several pages, more than 8 bits a colour or another colour model
    raises ImageError; its message begins with a verb, so that the caller can name the file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in HEIF and "HEIF" not in list_formats():
        raise ImageError(
            "is a HEIC image, which needs a plugin: pip install pillow-heif, or export it as PNG"
        )
    try:
        with Image.open(path, formats=list_formats()) as opened:
            if opened.format == "PNG":
                opened.verify()  # check sums, which loading passes over; no loading after it
        with Image.open(path, formats=list_formats()) as opened:
            pages = getattr(opened, "n_frames", 1)
            depth, white_is_zero = _read_depth(opened)
            if opened.format == "TIFF":
                _check_strips(opened)
            opened.load()
            if opened.format in ("JPEG", "MPO"):  # its decoder draws gray where pixels are missing
                with Image.open(io.BytesIO(lengthen_jpeg(Path(path).read_bytes()))) as longer:
                    if longer.tobytes() != opened.tobytes():
                        raise OSError("its compressed data end too early")
            image: Image.Image = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError:
        raise ImageError("has too many pixels to be safe to load; crop it first") from None
    except ImageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ImageError(
            f"is not a readable image ({error or type(error).__name__}); allowed are "
            f"{', '.join(list_formats())}; remove or replace it"
        ) from None
    if pages > 1:
        raise ImageError(f"has {pages} pages or frames; export the one that you want")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        if opened.format == "JPEG2000":  # Pillow scales to 16 bits
            image = Image.fromarray(np.asarray(image).astype(np.uint16) >> max(0, 16 - depth))
        return image, white_is_zero
    if depth > 8:
        raise ImageError(
            f"has {depth} bits a colour; export it with 8, with the window that you want"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        opaque = image.getchannel("A").getextrema() == (255, 255)
        return (image.convert("RGB") if opaque else image), False
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "YCbCr"):
        raise ImageError(
            f"has colour mode {image.mode}; allowed are gray, RGB, RGBA and palette: export it as "
            "one of these"
        )
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), False


def _check_strips(image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF file of too few strips or tiles, of which Pillow draws the missing ones black."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if 322 in tags:  # TileWidth, TileLength, TileOffsets
        count = math.prod(-(-side // tags[tag]) for side, tag in zip(image.size, (322, 323)))
    else:  # RowsPerStrip
        count = -(-image.height // min(tags.get(278, image.height), image.height))
    planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1  # SamplesPerPixel, planar
    offsets = tags.get(324 if 322 in tags else 273, ())
    if len(offsets) != count * planes:
        raise ImageError(
            f"has {len(offsets)} of {count * planes} strips of its {image.width} x {image.height} "
            "pixels: it is damaged; export it again"
        )


def list_jpeg_markers(stream: bytes) -> dict[int, int]:
    """Return where the markers of a JPEG stream are, by kind, up to the one before its pixels."""
    markers: dict[int, int] = {}
    place = 2
    while stream[place : place + 1] == b"\xff" and not markers.keys() & {0xDA, 0xD9}:
        markers[stream[place + 1]] = place
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return markers


def lengthen_jpeg(stream: bytes) -> bytes:
    """Put data before the end mark of a JPEG stream.

    A whole stream is decoded as before, as all of its pixels are known by then. In one that was
    cut, a decoder takes them for what is missing, so that its pixels change. A progressive stream
    of which whole scans are missing raises OSError.
    """
    markers = list_jpeg_markers(stream)
    start = max(markers.values(), default=0)
    end = stream.find(b"\xff\xd9", start)  # data hold none; what lies before may be a thumbnail
    if end < 0:
        return stream
    more = noise = bytes(range(0, 255, 2))
    if place := markers.get(0xC2):  # progressive: each coefficient has to come to its last bit
        known = set()
        for scan in re.finditer(b"\xff\xda", stream[start:end]):
            n = stream[start + scan.start() + 4]
            header = stream[start + scan.start() + 5 :][: 2 * n + 3]
            if header[-1] & 15 == 0:
                ends = range(header[-3], header[-2] + 1)
                known |= {(component, k) for component in header[: 2 * n : 2] for k in ends}
        if len(known) < 64 * stream[place + 9]:
            raise OSError("its compressed data end too early")
    last = max(start, stream.rfind(b"\xff\xda", start, end))
    restarts = len(re.findall(rb"\xff[\xd0-\xd7]", stream[last:end]))
    if 0xC3 not in markers:  # GDCM, which reads lossless streams, takes no more restarts
        more += b"\xff%c" % (0xD0 + restarts % 8) + noise
    return stream[:end] + more + stream[end:]


def _read_depth(image: ImageFile.ImageFile) -> tuple[int, bool]:
    """Return the bits of a channel, as the file states them, and whether deep gray is inverted.

    Pillow reduces colours of more than 8 bits in silence.
    """
    head = b""
    if image.format in ("JPEG2000", "AVIF") and image.fp is not None:
        place = image.fp.tell()
        image.fp.seek(0)
        head = image.fp.read(1 << 16)
        image.fp.seek(place)
    if image.format == "JPEG2000":
        start = head.find(b"\xff\x4f\xff\x51")  # Annex A.5.1: the size marker opens the stream
        count = int.from_bytes(head[start + 40 : start + 42], "big")
        sizes = head[start + 42 : start + 42 + 3 * count : 3]
        if start < 0 or not sizes:
            raise ImageError("is not a readable image (no size in its stream)")
        if any(size & 128 for size in sizes):
            raise ImageError("has signed pixels; export it with unsigned ones")
        return max(sizes) + 1, False
    if image.format == "AVIF":
        start = head.find(b"av1C")
        flags = head[start + 6] if 0 <= start < len(head) - 6 else 0
        return (12 if flags & 32 else 10) if flags & 64 else 8, False
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8)), False
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(258, (1,)))
        if bits <= 8 and 2 in np.atleast_1d(tags.get(339, 1)):
            raise ImageError("has signed 8-bit pixels; export it with unsigned ones")
        return bits, tags.get(262) == 0  # WhiteIsZero; Pillow inverts up to 8 bits
    return 16 if any(";16" in str(tile[3]) for tile in image.tile) else 8, False


def describe_passed_over(paths: Iterable[Path]) -> str:
    """Count files by ending, such as ``3 .dcm (a.dcm …)``; documents are not counted."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        if path.suffix.lower() not in DOCUMENTS and path.stem.upper() not in NAMES:
            groups.setdefault(path.suffix.lower(), []).append(path.name)
    return ", ".join(
        f"{len(names)} {suffix or 'without ending'} ({names[0]}{' …' if len(names) > 1 else ''})"
        for suffix, names in sorted(groups.items())
    )
