"""Decode the pixels of a DICOM file: stored values, rescale, modality LUT, padding and window.

pydicom and its decoders unpack the pixels. What they accept though it is cut or contradicts itself
is refused here: pixels that are too few, frames that are missing, streams without an end. No text
of a header leaves this module, not even in an error, but for the patient's ID.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from medbudget.data.items import BrokenCase
from medbudget.data.pixels import MAX_BYTES, Array, Numbers, Window, find_most
from medbudget.pictures import lengthen_jpeg, list_jpeg_markers

if TYPE_CHECKING:
    from pydicom import Dataset

F = TypeVar("F", bound=Callable[..., Any])

DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
# one decoder for each transfer syntax: pydicom would go on to a laxer one where a strict one fails
DECODERS = {
    RLE: "pydicom",
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
}
JPEG_2000 = ("1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")  # and HTJ2K, as prefixes
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GRAY = ("MONOCHROME1", "MONOCHROME2")
DAMAGED = "not a DICOM image that can be read: "


def quiet(function: F) -> F:
    """Decorate a function so that no warning or error of pydicom shows what is in a header."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(*arguments, **options)
            except BrokenCase:
                raise
            except Exception:
                raise BrokenCase(f"{DAMAGED}it is truncated or damaged") from None

    return run  # type: ignore[return-value]


def read_dataset(path: Path, *, pixels: bool = True) -> Dataset:
    """Read a DICOM file, with or without preamble; to be called inside of `quiet`."""
    import pydicom

    with (
        open(path, "rb") as file,
        # a mapped file never reads more than it has, whatever length an element claims
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if DEFLATED.encode() in content[:2000] and find_most(len(content), True) == MAX_BYTES:
            raise BrokenCase("it is deflated, and too large for the memory; decompress it first")
        data = pydicom.dcmread(content, stop_before_pixels=not pixels, force=True)  # type: ignore[arg-type]
    if "Rows" not in data and "SOPClassUID" not in data:
        raise BrokenCase(f"{DAMAGED}it is truncated, or another file")
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        kind = "" if implicit else ".1" if little else ".2"
        data.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"1.2.840.10008.1.2{kind}")
    return data


def get_text(data: Dataset, name: str) -> str:
    """Return a text of a header, stripped; "" where there is none."""
    value = data.get(name)
    text = "" if value is None else str(value)
    return text.encode("utf-8", "replace").decode().strip("\0 ")


def get_numbers(data: Dataset, name: str, count: int | None = None) -> Numbers | None:
    """Return the numbers of a header's element, None where there are none."""
    try:
        value = data.get(name)
        if value is None or value == "":
            return None
        numbers = tuple(map(float, [value] if np.ndim(value) == 0 else value))
        if not all(map(math.isfinite, numbers)) or (count and numbers and len(numbers) != count):
            raise ValueError
    except Exception:
        said = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
        raise BrokenCase(f"its header has no {count or ''} numbers as {said}") from None
    return numbers or None


def get_number(data: Dataset, name: str, default: float | None = None) -> float:
    """Return a number of a header, or `default` where there is none."""
    numbers = get_numbers(data, name)
    if numbers is None and default is None:
        raise BrokenCase(f"{DAMAGED}it has no pixels, or no size")
    return numbers[0] if numbers else float(default or 0)


def measure(data: Dataset, held: int) -> tuple[int, int, int, bool]:
    """Return frames, rows, columns and whether they are compressed; refuse what cannot be there.

    `held` are the bytes that there are for the pixels.
    """
    rows, columns, samples, allocated, n = (
        int(get_number(data, name, default))
        for name, default in (("Rows", None), ("Columns", None), ("SamplesPerPixel", 1),
                              ("BitsAllocated", None), ("NumberOfFrames", 1))
    )  # fmt: skip
    n = max(n, 1)
    stored = int(get_number(data, "BitsStored", allocated))
    high = int(get_number(data, "HighBit", stored - 1))
    if allocated not in (1, 8, 16, 32, 64) or not 0 <= stored - 1 <= high < allocated:
        raise BrokenCase(
            f"its pixels have {stored} of {allocated} bits, the highest at {high}; allowed are 1, "
            "8, 16, 32 or 64 bits that hold them all"
        )
    syntax = data.file_meta.TransferSyntaxUID
    packed = syntax == DEFLATED or (syntax.is_transfer_syntax and syntax.is_compressed)
    claim = math.ceil(rows * columns * samples * n * allocated / 8)
    if get_text(data, "PhotometricInterpretation") == "YBR_FULL_422":
        claim = claim * 2 // 3
    if min(rows, columns) < 1 or n > held or claim > find_most(held, packed):
        raise BrokenCase(
            f"it claims {claim:,} bytes of pixels, of {n} x {rows} x {columns}, in {held:,}: "
            "truncated, or made to use up the memory"
        )
    return n, rows, columns, packed and syntax != DEFLATED


def decode(data: Dataset) -> Array:
    """Return stored values: ``(frames, H, W)`` gray or ``(frames, H, W, 3) uint8``."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.pixels.processing import apply_color_lut

    n, rows, columns, packed = measure(
        data, sum(len(data[name].value or b"") for name in PIXELS if name in data)
    )
    syntax, model = data.file_meta.TransferSyntaxUID, get_text(data, "PhotometricInterpretation")
    frames = _read_streams(data, n, rows, columns) if packed else []
    if syntax == "1.2.840.10008.1.2.4.51" and get_number(data, "BitsStored") > 8:
        raise BrokenCase("JPEG of 12 bits has no decoder here; decompress it first (dcmdjpeg)")
    options: Any = {"allow_excess_frames": False, "correct_unused_bits": False}
    options["decoding_plugin"] = plugin = DECODERS.get(syntax, "pylibjpeg" if packed else "")
    warnings.filterwarnings("error", ".*non-conformant padding")  # bytes of an RLE segment are lost
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise BrokenCase("its transfer syntax has no decoder here; decompress it first") from None
    try:
        values, meta = decoder.as_array(data, **options)
        if plugin in ("pillow", "gdcm"):  # JPEG, whose decoders invent what is missing
            data.pop("ExtendedOffsetTable", None)
            data.PixelData = encapsulate([lengthen_jpeg(frame) for frame in frames])
            with _silence():
                longer, _ = decoder.as_array(data, **options)
            if not np.array_equal(values, longer):
                raise ValueError
        if model == "PALETTE COLOR":
            values = apply_color_lut(values, data)
            values = (values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8)
            meta["photometric_interpretation"] = "RGB"
    except Exception:  # decoders raise anything
        raise BrokenCase(f"{DAMAGED}its pixels are damaged") from None
    if model not in GRAY:
        if meta["photometric_interpretation"] != "RGB":
            raise BrokenCase("its colour model is none of MONOCHROME1 and 2, RGB, YBR and palette")
        if values.dtype != np.uint8:
            raise BrokenCase("it has 16 bits a colour; export it with 8")
        return values.reshape(n, rows, columns, 3)
    values = values.reshape(n, rows, columns)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise BrokenCase("it has values that are infinite or not a number")
        return values
    allocated, stored = (int(get_number(data, f"Bits{name}")) for name in ("Allocated", "Stored"))
    if allocated > stored and not str(syntax).startswith(JPEG_2000):
        native = plugin in ("", "pydicom")
        high = int(get_number(data, "HighBit", stored - 1)) if native else stored - 1
        values = (values << (allocated - 1 - high)) >> (allocated - stored)
    return values


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what GDCM prints, past Python, when it passes over data behind an image."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _read_streams(data: Dataset, n: int, rows: int, columns: int) -> list[bytes]:
    """Return the compressed frames; refuse those that are missing, have no end or another size."""
    from pydicom.encaps import generate_frames

    table = None
    if data.get("ExtendedOffsetTable"):
        table = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
    try:
        frames = list(generate_frames(data.PixelData, number_of_frames=n, extended_offsets=table))
    except Exception:
        raise BrokenCase(f"truncated: its {n} compressed frames are not all there") from None
    if len(frames) != n:
        raise BrokenCase(f"it holds {len(frames)} compressed frames where it claims {n}")
    for frame in frames if data.file_meta.TransferSyntaxUID != RLE else []:
        if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise BrokenCase("truncated: a compressed frame has no end")
        size = _read_stream_size(frame)
        if size != (rows, columns):
            raise BrokenCase(
                f"a compressed frame is of size {size}, the header of {(rows, columns)}"
            )
    return frames


def _read_stream_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states."""

    def read(start: int, width: int) -> int:
        return int.from_bytes(stream[start : start + width], "big")

    if stream[:2] == b"\xff\xd8":
        for kind, place in list_jpeg_markers(stream).items():
            if kind in (0xF7, *range(0xC0, 0xD0)) and kind not in (0xC4, 0xC8, 0xCC):
                return read(place + 5, 2), read(place + 7, 2)
        return None
    start = stream.find(b"\xff\x4f\xff\x51") + 8  # JPEG 2000, in a JP2 file or bare
    return read(start + 4, 4) - read(start + 12, 4), read(start, 4) - read(start + 8, 4)


def find_padding(stored: Array, data: Dataset) -> Array | None:
    """Return where stored values are padding (PS3.3 C.7.5.1.1.2)."""
    kind, bits = stored.dtype.kind, 8 * stored.itemsize
    prefix = "" if kind != "f" else "Float" if bits == 32 else "DoubleFloat"
    first = get_numbers(data, f"{prefix}PixelPaddingValue", 1)
    if first is None:
        return None
    last = get_numbers(data, f"{prefix}PixelPaddingRangeLimit", 1) or first
    half = 2.0 ** (bits - 1)
    # integers may be written without the sign that pixels have, or with one that they do not have
    start, shift = {"i": (half, -2 * half), "u": (-half, 2 * half)}.get(kind, (0, 0))
    low, high = sorted(v + shift if start <= v < start + half else v for v in (*first, *last))
    padding = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def rescale(stored: Array, transform: Dataset) -> Array:
    """Apply a modality LUT, or slope and intercept (PS3.3 C.11.1)."""
    from pydicom.pixels.processing import apply_modality_lut

    if transform.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, transform))
    slope = get_number(transform, "RescaleSlope", 1)
    intercept = get_number(transform, "RescaleIntercept", 0)
    if slope == 0:
        raise BrokenCase("its rescale slope is 0")
    if (slope, intercept) == (1, 0):
        return stored
    if (
        slope == 1
        and intercept == int(intercept)
        and stored.itemsize < 4
        and abs(intercept) < 2**30
    ):
        return stored.astype(np.int32) + np.int32(intercept)
    kind = np.result_type(stored.dtype, np.float32).type
    return stored * kind(slope) + kind(intercept)


def read_window(voi: Dataset) -> Window | None:
    """Return the VOI LUT or the first window of a header (PS3.3 C.11.2.1)."""
    try:
        if voi.get("VOILUTSequence"):
            return _read_table(voi.VOILUTSequence[0])
        centres, widths = get_numbers(voi, "WindowCenter"), get_numbers(voi, "WindowWidth")
    except Exception as error:
        said = str(error) if isinstance(error, BrokenCase) else "its VOI LUT is damaged"
        return Window(0, 0, problem=said)
    if centres is None or widths is None:
        return None
    centre, width = centres[0], widths[0]
    function = get_text(voi, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR" and width >= 1:
        half = max((width - 1) / 2, 1e-6)  # a width of 1 is a threshold
        return Window(centre - 0.5 - half, centre - 0.5 + half)
    if function in ("LINEAR_EXACT", "SIGMOID") and width > 0:
        return Window(centre - width / 2, centre + width / 2, sigmoid=function == "SIGMOID")
    return Window(0, 0, problem=f"its window has an unknown function, or the width {width:g}")


def _read_table(lut: Dataset) -> Window:
    """Read a VOI LUT."""
    n, first, bits = (int(value) for value in lut.LUTDescriptor)
    n, data = n or 2**16, lut.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if bits == 8 and len(data) <= n + 1 else "<u2")
    table = np.asarray(data, np.float64)[:n]
    if bits == 16:  # written for the words that hold the entries, whatever these use
        bits = max(8, int(table.max()).bit_length())
    if len(table) < n or not 8 <= bits <= 16 or table.max() >= 2**bits:
        raise ValueError
    return Window(first, first + n - 1, table=table / (2**bits - 1))
