"""Read DICOM images: each frame with its own place, rescale and window, put in order.

pydicom and its decoders unpack the pixels. What they accept though it is cut is refused here. No
text of a header leaves this module, not even in an error, but for the patient's ID.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from medbudget.data.items import BrokenCase
from medbudget.data.pixels import Array, Numbers, Pixels, Window
from medbudget.data.streams import check_streams, silence
from medbudget.pictures import lengthen_jpeg

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
# millimetres of a pixel: in the patient, at the detector, on the film
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
ONE_PLACE = (
    "several images of a series lie at one position (time points, b-values, copies?), and no tag "
    "tells them apart: put them into series of their own"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Let no warning or error of pydicom show what is in a header; a decorator, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BrokenCase:
            raise
        except Exception:
            raise BrokenCase(
                "not a DICOM image that can be read: damaged, shorter than its header claims, or "
                "compressed in a way that has no decoder here (decompress it first, as by dcmdjpeg)"
            ) from None


def read_dataset(path: Path, *, pixels: bool = True) -> Dataset:
    """Read a DICOM file, with or without preamble; to be called inside of `quiet`."""
    data = pydicom.dcmread(path, stop_before_pixels=not pixels, force=True)
    if "Rows" not in data and "SOPClassUID" not in data:
        raise BrokenCase("not a DICOM image that can be read: truncated, or another file")
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
        numbers = tuple(map(float, np.atleast_1d(value)))
        if not all(map(math.isfinite, numbers)) or (count and numbers and len(numbers) != count):
            raise ValueError
    except Exception:
        raise BrokenCase(f"its header has no {count or ''} numbers as {name}") from None
    return numbers or None


def get_number(data: Dataset, name: str, default: float = 0) -> float:
    """Return a number of a header, or `default` where there is none."""
    return (get_numbers(data, name) or (default,))[0]


def decode(data: Dataset) -> Array:
    """Return stored values: ``(frames, H, W)`` gray or ``(frames, H, W, 3) uint8``."""
    allocated = int(get_number(data, "BitsAllocated"))
    stored = int(get_number(data, "BitsStored", allocated))
    high = int(get_number(data, "HighBit", stored - 1))
    if allocated not in (1, 8, 16, 32, 64) or not 0 <= stored - 1 <= high < allocated:
        raise BrokenCase(f"its pixels have {stored} of {allocated} bits, the highest at {high}")
    syntax, model = data.file_meta.TransferSyntaxUID, get_text(data, "PhotometricInterpretation")
    if syntax.is_encapsulated:
        n = max(1, int(get_number(data, "NumberOfFrames", 1)))
        table = data.get("ExtendedOffsetTable") and (
            data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths
        )  # fmt: skip
        frames = [*generate_frames(data.PixelData, number_of_frames=n, extended_offsets=table)]
        if len(frames) != n:
            raise BrokenCase(f"truncated: it holds {len(frames)} of {n} frames")
        if syntax != RLE:
            check_streams(frames, data.Rows, data.Columns)
    plugin = DECODERS.get(syntax, "pylibjpeg" if syntax.is_encapsulated else "")
    warnings.filterwarnings("error", ".*non-conformant padding")  # bytes of an RLE segment are lost
    options: Any = {"allow_excess_frames": False, "correct_unused_bits": False}
    values, meta = get_decoder(syntax).as_array(data, decoding_plugin=plugin, **options)
    if plugin in ("pillow", "gdcm"):  # JPEG, whose decoders invent what was cut off
        data.pop("ExtendedOffsetTable", None)
        data.PixelData = encapsulate([lengthen_jpeg(frame) for frame in frames])
        with silence():
            longer, _ = get_decoder(syntax).as_array(data, decoding_plugin=plugin, **options)
        if not np.array_equal(values, longer):
            raise BrokenCase("its pixels are damaged: a compressed frame was cut")
    if model == "PALETTE COLOR":
        values = apply_color_lut(values, data)
        values = (values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8)
        meta["photometric_interpretation"] = "RGB"
    if not model.startswith("MONOCHROME"):
        if meta["photometric_interpretation"] != "RGB" or values.dtype != np.uint8:
            raise BrokenCase(
                "its colour model, or its 16 bits a colour: export it as RGB of 8 bits"
            )
        return values.reshape(-1, data.Rows, data.Columns, 3)
    values = values.reshape(-1, data.Rows, data.Columns)
    if values.dtype.kind == "f":
        check_finite(values)
    elif allocated > stored and not syntax.startswith(JPEG_2000):
        if plugin not in ("", "pydicom"):  # other decoders put the bits in their place
            high = stored - 1
        values = (values << (allocated - 1 - high)) >> (allocated - stored)
    return values


def check_finite(values: Array) -> None:
    """Refuse infinity and what is no number."""
    if not np.isfinite(values).all():
        raise BrokenCase("it has values that are infinite or not a number")


def find_padding(stored: Array, data: Dataset) -> Array:
    """Return where stored values are padding (PS3.3 C.7.5.1.1.2)."""
    kind, half = stored.dtype.kind, 2.0 ** (8 * stored.itemsize - 1)
    prefix = "" if kind != "f" else "Float" if stored.itemsize == 4 else "DoubleFloat"
    first = get_numbers(data, f"{prefix}PixelPaddingValue", 1)
    if first is None:
        return np.zeros(stored.shape, bool)
    last = get_numbers(data, f"{prefix}PixelPaddingRangeLimit", 1) or first
    # integers may be written without the sign that pixels have, or with one that they do not have
    start, shift = {"i": (half, -2 * half), "u": (-half, 2 * half)}.get(kind, (0, 0))
    low, high = sorted(v + shift if start <= v < start + half else v for v in (*first, *last))
    return (stored >= low) & (stored <= high)


def rescale(stored: Array, transform: Dataset) -> Array:
    """Apply a modality LUT, or slope and intercept (PS3.3 C.11.1)."""
    if transform.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, transform))
    slope = get_number(transform, "RescaleSlope", 1)
    intercept = get_number(transform, "RescaleIntercept", 0)
    if slope == 0:
        raise BrokenCase("its rescale slope is 0")
    if (slope, intercept) == (1, 0):
        return stored
    if slope == 1 and intercept.is_integer() and stored.itemsize < 4:
        return stored.astype(np.int32) + np.int32(intercept)
    kind = np.result_type(stored.dtype, np.float32).type
    return stored * kind(slope) + kind(intercept)


def read_window(voi: Dataset) -> Window | None:
    """Return the VOI LUT or the first window of a header (PS3.3 C.11.2.1)."""
    try:
        if voi.get("VOILUTSequence"):
            return _read_table(voi.VOILUTSequence[0])
        centres, widths = get_numbers(voi, "WindowCenter"), get_numbers(voi, "WindowWidth")
    except Exception:
        return Window(0, 0, problem="its window or VOI LUT is damaged")
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


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame or slice."""

    values: Array
    padding: Array
    window: Window | None
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None


@quiet()
def read_dicom(paths: Sequence[Path]) -> Pixels:
    """Read files of one series, or one file of one or more frames, as they are stored."""
    frames = []
    for path in paths:
        data = read_dataset(path)
        frames += _read_frames(data)
    first = frames[0]
    frame, step, order, uncut = _place(frames)
    frames = [frames[i] for i in order]
    padding = np.stack([f.padding for f in frames])
    windows = tuple(f.window for f in frames)
    high, wide = first.spacing or get_numbers(data, "PixelAspectRatio", 2) or (1.0, 1.0)
    if min(high, wide) <= 0:
        raise BrokenCase("its pixel spacing or aspect ratio is not above 0")
    detector = "PixelSpacing" not in data and "ImagerPixelSpacing" in data
    return Pixels(
        np.stack([f.values for f in frames]),
        (wide, high, step),
        stated=first.spacing is not None,
        windows=windows if any(windows) else (),
        padding=padding if padding.any() else None,
        inverted=get_text(data, "PhotometricInterpretation") == "MONOCHROME1",
        note="spacing at the detector" if detector else "",
        frame=frame,
        uncut=uncut,
    )


def _place(frames: Sequence[Frame]) -> tuple[Numbers, float, list[int], str]:
    """Return origin and direction, distance and order of slices, and why no other plane is cut."""
    first, n = frames[0], len(frames)
    planes = [f.orientation for f in frames if f.orientation and (f.position or n == 1)]
    if len(planes) < n:
        return (), 1.0, list(range(n)), "it has no position and orientation"
    if not np.allclose(planes, planes[:1], atol=1e-3):
        raise BrokenCase("its frames lie in several planes; export each as a file of its own")
    if not np.allclose([f.spacing or (0, 0) for f in frames], first.spacing or 0, rtol=1e-3):
        raise BrokenCase("its frames have several pixel spacings")
    places = np.array([f.position or (0.0, 0.0, 0.0) for f in frames])
    axes, order, steps = order_slices(planes[0], places)
    places = places[order]
    if n > 1 and steps.min() < 1e-3:
        raise BrokenCase(ONE_PLACE)
    step = float(np.median(steps)) if n > 1 else 1.0
    drift = (places - places[0]) @ axes[:, :2]
    uncut = "" if first.spacing else "it states no pixel spacing"
    if is_uneven(steps):
        uncut = f"its slices lie {steps.min():g} to {steps.max():g} mm apart (is one missing?)"
    elif np.linalg.norm(drift, axis=1).max() > 0.1 * step:
        uncut = "its slices are shifted (gantry tilt)"
    return (*map(float, places[0]), *map(float, axes.ravel())), step, order, uncut


def is_uneven(steps: Array) -> bool:
    """Does a distance of slices differ by a tenth from the median one?"""
    middle = np.median(steps) if len(steps) else 0
    return bool((np.abs(steps - middle) > 0.1 * middle).any())


def order_slices(orientation: Numbers, positions: Array) -> tuple[Array, list[int], Array]:
    """Return the axes of parallel slices, their order along the third, and the steps there."""
    axes = measure_axes(orientation)
    along = positions @ axes[:, 2]
    order = np.argsort(along, kind="stable")
    return axes, order.tolist(), np.diff(along[order])


def measure_axes(orientation: Numbers) -> Array:
    """Return the directions of columns, rows and slices as the columns of a matrix."""
    right, down = np.reshape(orientation, (2, 3))
    axes = np.stack([right, down, np.cross(right, down)], axis=1)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=0.01):
        raise BrokenCase("its orientation is no pair of directions at right angles")
    return axes


def _read_frames(data: Dataset) -> list[Frame]:
    """Read all frames of a file, each with what its functional groups say of it."""
    stored = decode(data)
    n = len(stored)
    shared = data.get("SharedFunctionalGroupsSequence") or []
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    if per_frame and len(per_frame) != n:
        raise BrokenCase(f"its header describes {len(per_frame)} frames, of {n}")

    def group(k: int, name: str) -> Dataset:
        for owner in (*per_frame[k : k + 1], *shared[:1]):
            if owner.get(name):
                return owner[name].value[0]
        return data

    frames = []
    for k, values in enumerate(stored):
        padding, window = np.zeros(values.shape[:2], bool), None
        if stored.ndim == 3:
            padding = find_padding(values, data)
            values = rescale(values, group(k, "PixelValueTransformationSequence"))
            window = read_window(group(k, "FrameVOILUTSequence"))
            bits = int(get_number(data, "BitsStored", 8))
            if window is None and bits < 8 and values.dtype == np.uint8:
                window = Window(0, 2**bits - 1)
        place, plane = group(k, "PlanePositionSequence"), group(k, "PlaneOrientationSequence")
        position = get_numbers(place, "ImagePositionPatient", 3)
        position = None if n > 1 and place is data else position
        orientation = get_numbers(plane, "ImageOrientationPatient", 6)
        measures = group(k, "PixelMeasuresSequence")
        spacing = next(filter(None, (get_numbers(measures, s, 2) for s in SPACINGS)), None)
        frames.append(Frame(values, padding, window, position, orientation, spacing))
    return frames
