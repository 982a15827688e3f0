"""Join series of one DICOM study, such as T2W, ADC and high-b DWI, to the channels of one image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medbudget.data import dicom
from medbudget.data.dicom import get_number, get_numbers, get_text, quiet, read_dataset
from medbudget.data.pixels import Pixels
from medbudget.data.prepare import BrokenCase
from medbudget.data.volumes import Source, read_pixels

B_VALUE = re.compile(r"(?<![a-z])b(?:v(?:al(?:ue)?)?)?[-_= ]?(\d{1,4})(?!\d)")
COMPUTED = re.compile(r"bval|calc|hbv|high.?b")  # a map of a high b-value, where no number is told
HIGH = 500  # s/mm2: less is no high b-value


@dataclass(frozen=True)
class Series:
    """What its first header says of a source."""

    source: Source
    study: str
    place: str  # frame of reference, in which positions can be compared
    text: str  # descriptions and kind of image, in lower case
    axial: bool
    b_value: float  # s/mm2; -1 for none


def check_channels(channels: str) -> list[str]:
    """Return the three names of ``RED,GREEN,BLUE``."""
    names = [name.strip().lower() for name in channels.split(",")]
    if len(names) != 3 or not all(names) or len(set(names)) < 3:
        raise ValueError(f"channels {channels!r}: name three series, such as t2w,adc,hbv")
    return names


def join_channels(
    root: Path, sources: Sequence[Source], names: Sequence[str], notes: list[str]
) -> list[Source]:
    """Join three series of each study; a study that lacks one becomes a source with a problem."""
    studies: dict[str, list[Series]] = {}
    joined: list[Source] = []
    for source in sources:
        try:
            if source.kind == "dicom":
                series = _describe(root, source)
                studies.setdefault(series.study, []).append(series)
        except BrokenCase as error:
            joined.append(replace(source, problem=source.problem or str(error)))
    left_out = sum(source.kind != "dicom" for source in sources)
    for study in studies.values():
        try:
            first, *others = _choose(names, study)
        except BrokenCase as error:
            joined.append(replace(study[0].source, problem=str(error)))
            continue
        left_out += len(study) - 3
        flagged = any(one.burnt_in for one in (first, *others))
        joined.append(replace(first, others=tuple(others), burnt_in=flagged))
    if left_out:
        notes.append(f"{left_out} series and files are no channel and left out")
    return sorted(joined, key=lambda source: source.files)


@quiet()
def _describe(root: Path, source: Source) -> Series:
    data = read_dataset(root / source.files[0], pixels=False)
    words = ("SeriesDescription", "ProtocolName", "ImageType")
    text = " ".join(get_text(data, name) for name in words).lower()
    orientation = get_numbers(data, "ImageOrientationPatient", 6)
    b_value = get_number(data, "DiffusionBValue", -1)
    for told in (get_text(data, "SequenceName").lower(), text):
        if b_value < 0 and (numbers := B_VALUE.findall(told)):
            b_value = max(map(float, numbers))
    if b_value < 0 and COMPUTED.search(text):
        b_value = HIGH
    return Series(
        source,
        get_text(data, "StudyInstanceUID") or Path(source.files[0]).parent.as_posix(),
        get_text(data, "FrameOfReferenceUID"),
        text,
        orientation is not None and np.abs(dicom.measure_axes(orientation)[:, 2]).argmax() == 2,
        b_value,
    )


def _choose(names: Sequence[str], study: Sequence[Series]) -> list[Source]:
    """Return the series of a study that are its channels, or raise BrokenCase."""
    chosen = []
    for name in names:
        fits = _find(name, study)
        if len(fits) != 1:
            shown = ", ".join(one.source.files[0] for one in (fits or study)[:4])
            raise BrokenCase(
                f"channel {name}: {len(fits)} of the {len(study)} series of its study fit ({shown} "
                "…); name one by a part of its description, such as --channels t2_tra,adc,b1400"
            )
        if problem := fits[0].source.problem:
            raise BrokenCase(problem)
        chosen += fits
    if len({one.place for one in chosen} - {""}) > 1:
        raise BrokenCase("its channels have several frames of reference: no place is the same")
    return [one.source for one in chosen]


def _find(name: str, study: Sequence[Series]) -> list[Series]:
    """Return the series that fit a channel's name: ADC in the description; the highest b-value; T2
    in the description and axial; or the name in it."""
    if name == "adc":
        return [one for one in study if "adc" in one.text]
    rest = [one for one in study if "adc" not in one.text]
    if name == "hbv":
        highest = max((one.b_value for one in rest), default=-1)
        return [one for one in rest if one.b_value == highest >= HIGH]
    if name == "t2w":
        return [one for one in rest if "t2" in one.text and one.axial and one.b_value < 0]
    return [one for one in study if name in one.text]


def read_channels(root: Path, source: Source, first: Pixels) -> list[Pixels]:
    """Read the further channels of a joined source, resampled onto the grid of the first.

    Values between voxels are linear; outside of a channel's field of view is padding.
    """
    channels = []
    for other in source.others:
        pixels = read_pixels(root, other)
        for one in (first, pixels):
            if one.values.ndim != 3 or len(one.frame) != 12 or not one.stated:
                raise BrokenCase("a channel has colours, or no position and spacing in the patient")
        grid = first.to_volume(first.values)
        known = np.ones(pixels.values.shape) if pixels.padding is None else ~pixels.padding
        values, inside = (
            sitk.GetArrayFromImage(sitk.Resample(pixels.to_volume(array), grid, interpolator=how))
            for array, how in (
                (pixels.values, sitk.sitkLinear),
                (known.astype(np.uint8), sitk.sitkNearestNeighbor),
            )
        )
        if not inside.any():
            raise BrokenCase(f"{other.files[0]} lies outside the first channel's field of view")
        same = len({str(window) for window in pixels.windows}) == 1
        channels.append(
            Pixels(
                values,
                windows=pixels.windows[:1] * len(values) if same else (),
                padding=None if inside.all() else inside == 0,
                inverted=pixels.inverted,
            )
        )
    return channels
