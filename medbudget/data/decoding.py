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
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medbudget.data.itk import MAX_BYTES, MAX_RATIO, SMALL, unpack
from medbudget.data.prepare import BrokenCase
from medbudget.pictures import lengthen_jpeg

if TYPE_CHECKING:
    from pydicom import Dataset

Array = NDArray[Any]
Numbers = tuple[float, ...]
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
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True, eq=False)
class Window:
    """How intensities become 0..1 (PS3.3 C.11.2)."""

    low: float
    high: float
    sigmoid: bool = False
    table: Array | None = None  # of a VOI LUT: 0..1 for low, low + 1 ... high
    problem: str = ""  # why it cannot be applied

    def apply(self, values: Array) -> Array:
        """Map intensities to 0..1."""
        if self.problem:
            raise BrokenCase(f"{self.problem}; use --window percentile")
        values = values.astype(np.float64)
        if self.table is not None:
            index = np.clip(np.rint(values - self.low), 0, len(self.table) - 1)
            return self.table[index.astype(np.intp)]
        if not self.high > self.low:
            raise BrokenCase(f"its pixels have the one value {self.low:g}")
        scaled = (values - self.low) / (self.high - self.low)
        if self.sigmoid:
            return 1 / (1 + np.exp(np.clip(2 - 4 * scaled, -700, 700)))
        return np.clip(scaled, 0, 1)

    def __str__(self) -> str:
        kind = " (sigmoid)" if self.sigmoid else " (LUT)" if self.table is not None else ""
        return f"{self.low:g}..{self.high:g}{kind}"


def quiet(function: F) -> F:
    """Decorate a function so that nothing of a header is shown: neither by a warning of pydicom nor
    by the error that it raises when it reads a damaged value, at whatever place."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(*arguments, **options)
            except BrokenCase:
                raise
            except Exception:
                raise BrokenCase("not a DICOM image that can be read: it is damaged") from None

    return run  # type: ignore[return-value]


def read_dataset(path: Path, *, pixels: bool = True) -> Dataset:
    """Read a DICOM file, with or without preamble.

    Raises
    ------
    BrokenCase
        It is no DICOM file, or damaged.
    """
    import pydicom

    try:
        with (
            open(path, "rb") as file,
            # a mapped file never reads more than it has, whatever length an element claims
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            stream: Any = content
            if content[128:132] == b"DICM" and DEFLATED.encode() in content[:2000]:
                meta = pydicom.filereader.read_file_meta_info(os.fspath(path))
                start = 144 + int(meta.FileMetaInformationGroupLength)
                if meta.TransferSyntaxUID == DEFLATED:  # else it would be unpacked without limit
                    unpack(
                        content[start:], "deflate", min(MAX_BYTES, SMALL + MAX_RATIO * len(content))
                    )
            data = pydicom.dcmread(stream, stop_before_pixels=not pixels, force=True)
            if "TransferSyntaxUID" not in data.file_meta:
                implicit, little = data.original_encoding
                kind = "" if implicit else ".1" if little else ".2"
                data.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"1.2.840.10008.1.2{kind}")
            if (
                "SOPClassUID" not in data
                and "Rows" not in data
                and "SOPClassUID" not in data.file_meta
            ):
                raise ValueError
    except BrokenCase:
        raise
    except Exception:  # a damaged file can raise anything, and with the header's words
        raise BrokenCase("not a DICOM image that can be read (truncated, or no pixels)") from None
    return data


def get_text(data: Dataset, name: str) -> str:
    """Return a text of a header, stripped; "" where there is none."""
    try:
        value = data.get(name)
        text = "" if value is None else str(value)
    except Exception:
        raise BrokenCase("its header has text in no known encoding") from None
    return text.encode("utf-8", "replace").decode().strip("\0 ")


def get_numbers(data: Dataset, name: str, count: int | None = None) -> Numbers | None:
    """Return the numbers of a header's element, None where there are none."""
    said = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    try:
        value = data.get(name)
        if value is None or value == "":
            return None
        numbers = tuple(map(float, [value] if np.ndim(value) == 0 else value))
    except Exception:
        raise BrokenCase(f"its header has no number as {said}") from None
    if not all(map(math.isfinite, numbers)) or (count and numbers and len(numbers) != count):
        raise BrokenCase(f"its header has no {count or ''} numbers as {said}")
    return numbers or None


def get_number(data: Dataset, name: str, default: float | None = None) -> float:
    """Return a number of a header, or `default` where there is none."""
    numbers = get_numbers(data, name)
    if numbers is None and default is None:
        raise BrokenCase("not a DICOM image that can be read: it has no pixels, or no size")
    return numbers[0] if numbers else float(default or 0)


def measure(data: Dataset, held: int) -> tuple[int, int, int, bool]:
    """Return frames, rows, columns and whether they are compressed; refuse what cannot be there.

    Parameters
    ----------
    held : int
        Bytes that there are for the pixels.
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
    most = min(MAX_BYTES, SMALL + MAX_RATIO * held) if packed else min(MAX_BYTES, held)
    if min(rows, columns) < 1 or n > held or claim > most:
        raise BrokenCase(
            f"it claims {claim:,} bytes of pixels, of {n} x {rows} x {columns}, in {held:,}: "
            "truncated, or made to use up the memory"
        )
    return n, rows, columns, packed


def decode(data: Dataset) -> tuple[Array, bool]:
    """Return stored values, ``(frames, H, W)`` gray or ``(frames, H, W, 3) uint8``, and whether
    they are gray."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.pixels.processing import apply_color_lut

    held = sum(len(data[name].value or b"") for name in PIXELS if name in data)
    if not held:
        raise BrokenCase("not a DICOM image that can be read: it has no pixels")
    n, rows, columns, packed = measure(data, held)
    syntax, model = data.file_meta.TransferSyntaxUID, get_text(data, "PhotometricInterpretation")
    packed = packed and syntax != DEFLATED
    frames = _read_frames(data, n, rows, columns) if packed else []
    if syntax == "1.2.840.10008.1.2.4.51" and get_number(data, "BitsStored") > 8:
        raise BrokenCase("JPEG of 12 bits has no decoder here; decompress it first (dcmdjpeg)")
    options: Any = {"allow_excess_frames": False, "correct_unused_bits": False}
    plugin = DECODERS.get(syntax, "pylibjpeg" if packed else "")
    try:
        warnings.filterwarnings("error", ".*non-conformant padding")  # bytes of RLE are missing
        values, meta = get_decoder(syntax).as_array(data, decoding_plugin=plugin, **options)
        if plugin in ("pillow", "gdcm"):  # JPEG, whose decoders invent what is missing
            data.pop("ExtendedOffsetTable", None)
            data.PixelData = encapsulate([lengthen_jpeg(frame) for frame in frames])
            longer, _ = get_decoder(syntax).as_array(data, decoding_plugin=plugin, **options)
            if not np.array_equal(values, longer):
                raise ValueError
        if model == "PALETTE COLOR":
            values = apply_color_lut(values, data)
            values = (values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8)
            meta["photometric_interpretation"] = "RGB"
    except NotImplementedError:
        raise BrokenCase("its transfer syntax has no decoder here; decompress it first") from None
    except Exception:  # decoders raise anything
        raise BrokenCase("not a DICOM image that can be read: its pixels are damaged") from None
    if model in GRAY:
        values = values.reshape(n, rows, columns)
        if values.dtype.kind == "f":
            if not np.isfinite(values).all():
                raise BrokenCase("it has values that are infinite or not a number")
            return values, True
        allocated, stored = (
            int(get_number(data, f"Bits{name}")) for name in ("Allocated", "Stored")
        )
        if allocated > stored and not str(syntax).startswith(JPEG_2000):
            high = (
                int(get_number(data, "HighBit", stored - 1))
                if plugin in ("", "pydicom")
                else stored - 1
            )
            values = (values << (allocated - 1 - high)) >> (allocated - stored)
        return values, True
    if meta["photometric_interpretation"] != "RGB":
        raise BrokenCase("its colour model is not one of MONOCHROME1 and 2, RGB, YBR and palette")
    if values.dtype != np.uint8:
        raise BrokenCase("it has 16 bits a colour; export it with 8")
    return values.reshape(n, rows, columns, 3), False


def _read_frames(data: Dataset, n: int, rows: int, columns: int) -> list[bytes]:
    """Return the compressed frames; refuse those that are missing, have no end or another size."""
    from pydicom.encaps import generate_frames

    syntax = str(data.file_meta.TransferSyntaxUID)
    table = None
    if data.get("ExtendedOffsetTable"):
        table = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
    try:
        frames = list(generate_frames(data.PixelData, number_of_frames=n, extended_offsets=table))
    except Exception:
        raise BrokenCase(f"truncated: its {n} compressed frames are not all there") from None
    if len(frames) != n:
        raise BrokenCase(f"it holds {len(frames)} compressed frames where it claims {n}")
    for frame in frames if syntax != RLE else []:
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
    start = stream.find(b"\xff\x4f\xff\x51")
    if start >= 0 and stream[:2] != b"\xff\xd8":  # JPEG 2000, in a JP2 file or bare
        wide, high, left, top = (
            int.from_bytes(stream[start + 8 + 4 * i : start + 12 + 4 * i], "big") for i in range(4)
        )
        return high - top, wide - left
    place = 2
    while stream[:2] == b"\xff\xd8" and place + 9 < len(stream):
        kind = stream[place + 1]
        if kind in (0xF7, *range(0xC0, 0xD0)) and kind not in (0xC4, 0xC8, 0xCC):
            high, wide = (int.from_bytes(stream[place + i : place + i + 2], "big") for i in (5, 7))
            return high, wide
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return None


def find_padding(stored: Array, data: Dataset) -> Array | None:
    """Return where stored values are padding (PS3.3 C.7.5.1.1.2)."""
    kind, bits = stored.dtype.kind, 8 * stored.itemsize
    prefix = ("Float" if bits == 32 else "DoubleFloat") if kind == "f" else ""
    first = get_numbers(data, f"{prefix}PixelPaddingValue", 1)
    if first is None:
        return None
    last = get_numbers(data, f"{prefix}PixelPaddingRangeLimit", 1) or first
    # integers may be written without the sign that pixels have, or with one that they do not have
    least, turn = {"i": (2 ** (bits - 1), -(2**bits)), "u": (-(2 ** (bits - 1)), 2**bits)}.get(
        kind, (0, 0)
    )
    low, high = sorted(
        v + turn if least <= v < least + 2 ** (bits - 1) else v for v in (*first, *last)
    )
    padding = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def rescale(stored: Array, transform: Dataset) -> Array:
    """Apply a modality LUT, or slope and intercept (PS3.3 C.11.1)."""
    from pydicom.pixels.processing import apply_modality_lut

    if transform.get("ModalityLUTSequence"):
        try:
            return np.asarray(apply_modality_lut(stored, transform))
        except Exception:
            raise BrokenCase("its modality LUT is damaged") from None
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
    if voi.get("VOILUTSequence"):
        try:
            lut = voi.VOILUTSequence[0]
            n, first, bits = (int(v) for v in lut.LUTDescriptor)
            n = n or 2**16
            data = lut.LUTData
            if isinstance(data, bytes):
                data = np.frombuffer(data, np.uint8 if bits == 8 and len(data) <= n + 1 else "<u2")
            table = np.asarray(data, np.float64)[:n]
            if bits == 16:  # written for the words that hold the entries, whatever these use
                bits = max(8, int(table.max()).bit_length())
            if len(table) == n and 8 <= bits <= 16 and table.max() < 2**bits:
                return Window(first, first + n - 1, table=table / (2**bits - 1))
        except Exception:
            return Window(0, 0, problem="its VOI LUT is damaged")
        return Window(0, 0, problem="its VOI LUT is damaged")
    try:
        centres, widths = get_numbers(voi, "WindowCenter"), get_numbers(voi, "WindowWidth")
    except BrokenCase as error:
        return Window(0, 0, problem=str(error))
    if centres is None or widths is None:
        return None
    centre, width = centres[0], widths[0]
    function = get_text(voi, "VOILUTFunction") or "LINEAR"
    if function == "LINEAR" and width >= 1:
        half = max((width - 1) / 2, 1e-6)  # a width of 1 is a threshold
        return Window(centre - 0.5 - half, centre - 0.5 + half)
    if function in ("LINEAR_EXACT", "SIGMOID") and width > 0:
        return Window(centre - width / 2, centre + width / 2, sigmoid=function == "SIGMOID")
    said = function if function in FUNCTIONS else "unknown"
    return Window(0, 0, problem=f"window function {said} of width {width:g}")
