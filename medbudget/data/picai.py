"""PI-CAI: prostate MRI from the public layout to one axial slice a case, with its masks.

Sources: Saha et al. 2024 (the data); de Wilde et al. 2024, Section 3.1 and the released 2-D
conversion (``geometry="paper"``), whose order of operations is reimplemented here, not copied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medbudget.data.prepare import (
    BrokenCase,
    Item,
    Made,
    Report,
    check_settings,
    prepare_items,
    read_table,
)
from medbudget.data.splits import (
    SPLITS,
    choose_one_per_patient,
    choose_reference,
    split_patients,
)
from medbudget.data.volumes import read_volume
from medbudget.images import from_pil

if TYPE_CHECKING:
    import SimpleITK as sitk

Array = NDArray[Any]

SEQUENCES = ("t2w", "adc", "hbv")
LABELS = ("negative", "positive")
SPACING = (3.0, 0.5, 0.5)  # mm: slice, row, column
GRID = (30, 300, 300)  # voxels: slices, rows, columns
PERCENTILES = (0.5, 99.9)  # the upper one is high, as a tumour is small and bright in DWI
CENTRE = (30, 150, 150)  # voxels that set the window: farther out, the coil outshines the prostate
GEOMETRIES = ("physical", "paper")
WINDOWS = ("percentile", "volume")
MARGIN = 12  # voxels around what is resampled; a cubic B-spline has forgotten the rest by then

HUMAN = "csPCa_lesion_delineations/human_expert/resampled"
MACHINE = "csPCa_lesion_delineations/AI/Bosma22a"
GLAND = "anatomical_delineations/whole_gland/AI/Bosma22b"
MARKSHEET = "clinical_information/marksheet.csv"


@dataclass(frozen=True, eq=False)
class Case:
    """One PI-CAI study as an image.

    Attributes
    ----------
    image : torch.Tensor
        ``(3, size, size) uint8``: T2W, ADC and high-b DWI as R, G and B, or T2W three times.
    tumour, gland : torch.Tensor
        ``(size, size) bool``, in the image's geometry. A negative case has no tumour.
    label : int
        1 for clinically significant cancer (ISUP 2 and more), from the marksheet.
    slice_index : int
        Slice of the 30-slice grid, from the first.
    case_id, patient : str
    spacing : tuple of float
        Millimetres of a pixel of the image: row, column.
    geometry, window : str
        As asked for.
    ranges : dict of str to tuple of float
        Sequence to the intensities that became 0 and 255.
    sources : tuple of str
        Files used, relative to the folders of images and of labels.
    """

    image: torch.Tensor
    tumour: torch.Tensor
    gland: torch.Tensor
    label: int
    slice_index: int
    case_id: str
    patient: str
    spacing: tuple[float, float]
    geometry: str
    window: str
    ranges: dict[str, tuple[float, float]]
    sources: tuple[str, ...]


def load_case(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    case_id: str,
    *,
    size: int = 512,
    geometry: str = "physical",
    window: str = "percentile",
    sequences: str = "all",
) -> Case:
    """Load one study as a 2-D image with its masks.

    The slice is the median slice of the gland for a negative case, and the one with the largest
    tumour area for a positive one.

    Parameters
    ----------
    images : path
        Folder with ``<patient>/<patient>_<study>_{t2w,adc,hbv}.mha``, at any depth.
    labels : path
        A copy of the picai_labels repository.
    case_id : str
        ``<patient>_<study>``.
    size : int
        Pixels an edge of the image.
    geometry : {"physical", "paper"}
        ``physical`` puts all sequences and masks onto one grid in patient space: 3 x 0.5 x 0.5 mm,
        30 x 300 x 300 voxels, in T2W's direction and around its centre (to the nearest T2W voxel,
        so that T2W is not blurred by half a slice). ``paper`` does as the released script: each
        sequence is resampled from its own corner, scaled by its minimum and maximum, and cropped
        around its own centre.
    window : {"percentile", "volume"}
        Intensities that become 0..255: the 0.5 to 99.9 percentiles of the grid's central half
        (75 x 75 mm, all slices), or minimum to maximum of the whole volume, as the paper.
        ``geometry="paper"`` has only the latter and uses it whatever is given here.
    sequences : {"all", "t2w"}
        T2W, ADC and DWI as R, G and B, or T2W alone as gray.

    Raises
    ------
    ValueError
        An unknown option, or a case that is not in the marksheet.
    BrokenCase
        A missing or unreadable file, an empty mask, a mask of another grid, slices out of order, a
        sequence of one value.
    """
    _check_options(size, geometry, window, sequences)
    t2w = _find_images(Path(images)).get(case_id)
    if t2w is None:
        raise BrokenCase(f"no {case_id}_t2w.mha in {images}")
    studies = read_marksheet(labels)
    if case_id not in studies:
        raise ValueError(f"case {case_id} is not in the marksheet of {labels}")
    return _load(
        t2w, Path(labels), studies[case_id], Path(images), size, geometry, window, sequences
    )


def prepare_picai(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 512,
    seed: int = 0,
    per_class: int = 100,
    allow_fewer: bool = False,
    reference: int = 0,
    disjoint: bool = True,
    sequences: str = "all",
    geometry: str = "physical",
    window: str = "percentile",
    workers: int = 1,
) -> Report:
    """Turn PI-CAI into image sets: positive and negative, split by patient.

    Parameters
    ----------
    images, labels, size, sequences, geometry, window
        See `load_case`.
    out : path
        Gets ``{train,val,test}/{negative,positive}/*.png``, ``masks/{tumour,gland}/…``,
        ``manifest.csv``, ``settings.json`` and ``contact_sheet.png``.
    per_class : int
        Patients of each class in each split; paper: 100.
    allow_fewer : bool
        Share out what there is where that is fewer.
    reference : int
        Also write that many negatives to ``reference/negative``, one for each patient.
    disjoint : bool
        Let the reference set hold only patients of no split, even if these are fewer.
    workers : int
        Processes.

    Raises
    ------
    ValueError
        Options that do not exist, no case at all, too few patients.
    FileNotFoundError
        No such folder, or no marksheet.
    """
    _check_options(size, geometry, window, sequences)
    check_settings(size=size, seed=seed, workers=workers, per_class=per_class, reference=reference)
    images, labels = Path(images), Path(labels)
    studies = read_marksheet(labels)
    files = _find_images(images)
    known = {case: study for case, study in studies.items() if case in files}
    if not known:
        raise ValueError(
            f"{len(files)} T2W volumes in {images}, {len(studies)} studies in the marksheet, none "
            "in common; images must be named <patient>_<study>_t2w.mha"
        )
    chosen = choose_one_per_patient(
        {case: study.patient for case, study in known.items()},
        {case: study.label for case, study in known.items()},
        seed=seed,
    )
    of_patient = {patient: known[case].label for patient, case in chosen.items()}
    sizes = {split: dict.fromkeys(LABELS, per_class) for split in SPLITS}
    splits, left = split_patients(of_patient, sizes, seed=seed, allow_fewer=allow_fewer)

    def item(patient: str, split: str, also: str = "") -> Item:
        case = chosen[patient]
        job = (files[case].relative_to(images).as_posix(), known[case])
        note = f"also in {also}" if also else ""
        return Item(case, known[case].label, split, patient, job, note)

    items = [item(patient, split) for patient, split in splits.items()]
    notes = _describe_selection(files, studies, known, chosen)
    if reference:
        mine = {p: s for p, s in splits.items() if of_patient[p] == LABELS[0]}
        extra, said = choose_reference(mine, left[LABELS[0]], reference, disjoint=disjoint)
        items += [item(patient, "reference", also) for patient, also in extra.items()]
        left[LABELS[0]] = [p for p in left[LABELS[0]] if p not in extra]
        notes += said
    make = partial(
        _make,
        images=images,
        labels=labels,
        size=size,
        geometry=geometry,
        window=window,
        sequences=sequences,
    )
    settings = {
        "dataset": "picai",
        "size": size,
        "seed": seed,
        "per_class": per_class,
        "reference": reference,
        "disjoint": disjoint,
        "sequences": sequences,
        "geometry": geometry,
        "window": "volume" if geometry == "paper" else window,
        "grid": {
            "spacing_mm": SPACING,
            "voxels": GRID,
            "percentiles": PERCENTILES,
            "centre": CENTRE,
        },
    }
    spares = {label: [item(patient, "") for patient in queue] for label, queue in left.items()}
    return prepare_items(
        items, make, out, settings=settings, spares=spares, notes=notes, workers=workers
    )


@dataclass(frozen=True)
class Study:
    """A row of the marksheet: case, patient, and "negative" or "positive"."""

    case_id: str
    patient: str
    label: str


def read_marksheet(labels: str | os.PathLike[str]) -> dict[str, Study]:
    """Read PI-CAI's marksheet: case to `Study`.

    Raises
    ------
    FileNotFoundError
        No marksheet in `labels`.
    ValueError
        Columns or values that a marksheet does not have.
    """
    file = Path(labels) / MARKSHEET
    if not file.is_file():
        raise FileNotFoundError(
            f"no {MARKSHEET} in {labels}; name a copy of github.com/DIAGNijmegen/picai_labels"
        )
    rows = read_table(file)
    needed = {"patient_id", "study_id", "case_csPCa"}
    if not rows or not needed <= set(rows[0]):
        raise ValueError(f"{file} needs the columns {', '.join(sorted(needed))}")
    studies = {}
    for row in rows:
        if row["case_csPCa"] not in ("YES", "NO"):
            raise ValueError(f"{file}: case_csPCa is {row['case_csPCa']!r}; allowed are YES and NO")
        case = f"{row['patient_id']}_{row['study_id']}"
        studies[case] = Study(case, row["patient_id"], LABELS[row["case_csPCa"] == "YES"])
    return studies


def _check_options(size: int, geometry: str, window: str, sequences: str) -> None:
    check_settings(size=size, seed=0)
    for name, value, allowed in (
        ("geometry", geometry, GEOMETRIES),
        ("window", window, WINDOWS),
        ("sequences", sequences, ("all", "t2w")),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; allowed are {', '.join(allowed)}")


def _find_images(images: Path) -> dict[str, Path]:
    """Return case -> T2W file, whatever folds lie in or between."""
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder: {images}")
    found: dict[str, Path] = {}
    for file in sorted(images.rglob("*_t2w.mha")):
        found.setdefault(file.name.removesuffix("_t2w.mha"), file)
    return found


def _describe_selection(
    files: dict[str, Path],
    studies: dict[str, Study],
    known: dict[str, Study],
    chosen: dict[str, str],
) -> list[str]:
    notes = []
    unused = sorted(set(known) - set(chosen.values()))
    if unused:
        notes.append(
            f"{len(unused)} studies are not used, as their patient has another one: "
            + ", ".join(unused[:5])
            + (" …" if len(unused) > 5 else "")
        )
    for count, text in (
        (len(set(studies) - set(files)), "studies of the marksheet have no images here"),
        (len(set(files) - set(studies)), "T2W volumes are not in the marksheet"),
    ):
        if count:
            notes.append(f"{count} {text}")
    return notes


def _make(item: Item, *, images: Path, labels: Path, **options: Any) -> Made:
    """Make the image of an `Item` whose job is (T2W file, study)."""
    t2w, study = item.job
    case = _load(images / t2w, labels, study, images, **options)
    ranges = ", ".join(f"{name} {low:g}..{high:g}" for name, (low, high) in case.ranges.items())
    return Made(
        case.image,
        case.sources,
        window=f"{case.window}: {ranges}",
        slice_index=case.slice_index,
        spacing=case.spacing,
        crop=" x ".join(map(str, GRID[1:])) + f" px of {SPACING[1]} mm, {case.geometry}",
        masks={"tumour": case.tumour, "gland": case.gland},
    )


def _load(
    t2w: Path,
    labels: Path,
    study: Study,
    root: Path,
    size: int,
    geometry: str,
    window: str,
    sequences: str,
) -> Case:
    wanted = SEQUENCES if sequences == "all" else SEQUENCES[:1]
    files = {name: t2w.with_name(f"{study.case_id}_{name}.mha") for name in wanted}
    volumes = {name: _read(file, f"sequence {name}") for name, file in files.items()}
    for name, volume in volumes.items():
        values = _array(volume)
        if values.min() == values.max():
            raise BrokenCase(f"sequence {name} has the one value {values.min():g}")
    if not _is_axial(volumes["t2w"]):
        raise BrokenCase("T2W is not an axial volume")
    _check_order(_array(volumes["t2w"]))
    gland_file = labels / GLAND / f"{study.case_id}.nii.gz"
    masks = {"gland": _read_mask(gland_file, 1, volumes["t2w"])}
    sources = [file.relative_to(root).as_posix() for file in files.values()]
    sources.append(gland_file.relative_to(labels).as_posix())
    if study.label == "positive":
        tumour_file, least = labels / HUMAN / gland_file.name, 2
        if not tumour_file.is_file():
            tumour_file, least = labels / MACHINE / gland_file.name, 1
        masks["tumour"] = _read_mask(tumour_file, least, volumes["t2w"])
        sources.append(tumour_file.relative_to(labels).as_posix())
    cut = _cut_physical if geometry == "physical" else _cut_paper
    planes, shapes, index, ranges = cut(volumes, masks, window)
    picture = np.stack([planes[name] for name in wanted], axis=-1)
    if len(wanted) == 1:
        picture = picture.repeat(3, axis=-1)
    image = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
    outlines = {
        name: Image.fromarray(shape).resize((size, size), Image.Resampling.NEAREST)
        for name, shape in shapes.items()
    }
    gland = torch.from_numpy(np.array(outlines["gland"], dtype=bool))
    tumour = (
        torch.from_numpy(np.array(outlines["tumour"], dtype=bool))
        if "tumour" in outlines
        else torch.zeros_like(gland)
    )
    return Case(
        image=from_pil(image),
        tumour=tumour,
        gland=gland,
        label=LABELS.index(study.label),
        slice_index=index,
        case_id=study.case_id,
        patient=study.patient,
        spacing=(SPACING[1] * GRID[1] / size, SPACING[2] * GRID[2] / size),
        geometry=geometry,
        window="volume" if geometry == "paper" else window,
        ranges=ranges,
        sources=tuple(sources),
    )


def _read(file: Path, what: str) -> sitk.Image:
    """Read a scalar 3-D volume, or say what is wrong with the file."""
    if not file.is_file():
        raise BrokenCase(f"missing {what}: no {file.name}")
    try:
        image = read_volume(file)
    except BrokenCase as error:
        raise BrokenCase(f"{file.name}: {error}") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise BrokenCase(f"{file.name} is not a gray 3-D volume: its size is {image.GetSize()}")
    return image


def _array(image: sitk.Image) -> Array:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(image)  # a copy: a view dies with a temporary image


def _is_axial(image: sitk.Image) -> bool:
    """Is the third axis of the volume, nearest, that of the patient's length?"""
    direction = np.reshape(image.GetDirection(), (3, 3))
    return int(np.abs(direction[:, 2]).argmax()) == 2


def _check_order(volume: Array) -> None:
    """Raise if slices are not in order: each slice should resemble one of its neighbours most."""
    step = [max(1, edge // 32) for edge in volume.shape[1:]]
    slices = volume[:, :: step[0], :: step[1]].reshape(len(volume), -1).astype(np.float32)
    gaps = np.stack([np.abs(slices - one).mean(axis=1) for one in slices])
    np.fill_diagonal(gaps, np.inf)
    judged = np.flatnonzero(gaps.min(axis=1) > 0)  # blank slices resemble all blank slices
    beside = np.abs(gaps[judged].argmin(axis=1) - judged) == 1
    if len(judged) >= 4 and beside.mean() < 0.25:
        raise BrokenCase(
            f"T2W's slices are not in order: only {beside.sum()} of {len(beside)} resemble a "
            "neighbour most; convert the series again, sorted by position"
        )


def _read_mask(file: Path, least: int, t2w: sitk.Image) -> sitk.Image:
    """Read a mask as 0 and 1, and check that it belongs to this T2W."""
    import SimpleITK as sitk

    image = _read(file, f"mask ({file.parent.parent.name}/{file.parent.name})")
    corners = [np.sort(_corners(one), axis=0) for one in (image, t2w)]  # whichever way it is stored
    apart = float(np.abs(corners[0] - corners[1]).max())
    if apart > 2 * max(*image.GetSpacing(), *t2w.GetSpacing()):
        raise BrokenCase(
            f"mask {file.parent.name}/{file.name} of size {image.GetSize()} lies {apart:.0f} mm off "
            f"T2W of size {t2w.GetSize()}: it belongs to another volume"
        )
    mask = sitk.Cast(image >= least, sitk.sitkUInt8)
    if not _array(mask).any():
        raise BrokenCase(f"mask {file.parent.name}/{file.name} is empty (no value >= {least})")
    return mask


def _corners(image: sitk.Image) -> list[tuple[float, ...]]:
    """Return the physical places of the two opposite outer corners of a volume."""
    size = image.GetSize()
    return [
        image.TransformContinuousIndexToPhysicalPoint([-0.5] * len(size)),
        image.TransformContinuousIndexToPhysicalPoint([edge - 0.5 for edge in size]),
    ]


def _choose_slice(masks: dict[str, Array]) -> int:
    """Median slice of the gland, or the slice with the largest tumour area."""
    name = "tumour" if "tumour" in masks else "gland"
    area = masks[name].reshape(len(masks[name]), -1).sum(axis=1)
    if not area.any():
        raise BrokenCase(f"the {name} lies outside the crop of {GRID} voxels")
    return int(area.argmax()) if name == "tumour" else int(np.median(np.flatnonzero(area)))


def _quantise(values: Array, low: float, high: float, name: str) -> Array:
    if not high > low:
        raise BrokenCase(f"sequence {name} has the one value {low:g} around the gland")
    scaled = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255
    return np.rint(scaled).astype(np.uint8)


Cut = tuple[dict[str, Array], dict[str, Array], int, dict[str, tuple[float, float]]]


def _cut_physical(volumes: dict[str, sitk.Image], masks: dict[str, sitk.Image], window: str) -> Cut:
    """Cut one slice of one grid in patient space out of all volumes."""
    import SimpleITK as sitk

    # LPS: rows run to the back, columns to the left, however the file was stored
    origin, direction = target_grid(sitk.DICOMOrient(volumes["t2w"], "LPS"))
    whole = (GRID, origin, direction)
    inset = (np.array(GRID) - np.array(CENTRE)) / 2 * np.array(SPACING)
    centre = (CENTRE, _shift(origin, direction, inset), direction)
    stacks = {
        name: _resample(mask, *whole, sitk.sitkNearestNeighbor) for name, mask in masks.items()
    }
    index = _choose_slice(stacks)
    place = _shift(origin, direction, (index * SPACING[0], 0, 0))
    planes, ranges = {}, {}
    for name, volume in volumes.items():
        if window == "volume":
            values = _array(volume)
            low, high = float(values.min()), float(values.max())
        else:
            values = _array(_crop_to(volume, *centre, margin=0))
            low, high = (float(v) for v in np.percentile(values, PERCENTILES))
        near = _crop_to(volume, (1, *GRID[1:]), place, direction, margin=MARGIN)
        near = sitk.Cast(near, sitk.sitkFloat32)
        plane = _resample(near, (1, *GRID[1:]), place, direction, sitk.sitkBSpline)[0]
        planes[name] = _quantise(plane, low, high, name)
        ranges[name] = (low, high)
    return planes, {name: stack[index] for name, stack in stacks.items()}, index, ranges


def measure_shift(images: str | os.PathLike[str], case_id: str) -> dict[str, tuple[float, ...]]:
    """Tell how far ``geometry="paper"`` shifts each sequence against T2W, from the headers alone.

    Parameters
    ----------
    images : path
    case_id : str
        See `load_case`.

    Returns
    -------
    dict of str to tuple of float
        "adc" and "hbv" to millimetres along T2W's slices, rows and columns: what the paper's crop
        shows in its centre, relative to what T2W's crop shows there.

    Raises
    ------
    BrokenCase
        A missing or unreadable file.
    """
    t2w = _find_images(Path(images)).get(case_id)
    if t2w is None:
        raise BrokenCase(f"no {case_id}_t2w.mha in {images}")
    middle = (np.array(GRID) - 1) / 2 * np.array(SPACING)
    places = {}
    for name in SEQUENCES:
        volume = _read(t2w.with_name(f"{case_id}_{name}.mha"), f"sequence {name}")
        places[name] = np.array(_shift(*target_grid(volume), middle))
        if name == "t2w":
            axes = np.reshape(volume.GetDirection(), (3, 3))
    return {
        name: tuple(float(v) for v in (axes.T @ (places[name] - places["t2w"]))[::-1])
        for name in SEQUENCES[1:]
    }


def target_grid(t2w: sitk.Image) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return origin and direction (row-major) of the target grid of a T2W volume.

    The grid continues T2W's own first voxel in steps of the target spacing, and is centred on T2W
    to within half a step.
    """
    spacing = np.array(SPACING[::-1])
    steps = np.round(np.array(t2w.GetSize()) * np.array(t2w.GetSpacing()) / spacing).astype(int)
    starts = [_start(int(n), wanted) for n, wanted in zip(steps, GRID[::-1])]
    direction = np.reshape(t2w.GetDirection(), (3, 3))
    origin = np.array(t2w.GetOrigin()) + direction @ (np.array(starts) * spacing)
    return tuple(map(float, origin)), t2w.GetDirection()


def _shift(
    origin: Sequence[float], direction: Sequence[float], millimetres: Sequence[float] | Array
) -> tuple[float, ...]:
    """Move a place along slice, row and column."""
    step = np.reshape(direction, (3, 3)) @ np.asarray(millimetres)[::-1]
    return tuple(map(float, np.asarray(origin) + step))


def _start(length: int, wanted: int) -> int:
    """First index of a centred crop; negative where it has to be padded instead."""
    return (length - wanted) // 2 if length >= wanted else -((wanted - length) // 2)


def _resample(
    image: sitk.Image,
    shape: Sequence[int],
    origin: Sequence[float],
    direction: Sequence[float],
    interpolator: int,
) -> Array:
    """Resample onto a grid of the target spacing; 0 outside. One thread: cases run in parallel."""
    import SimpleITK as sitk

    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in reversed(shape)])
    resampler.SetOutputSpacing(SPACING[::-1])
    resampler.SetOutputOrigin(origin)
    resampler.SetOutputDirection(direction)
    resampler.SetInterpolator(interpolator)
    resampler.SetNumberOfThreads(1)
    return sitk.GetArrayFromImage(resampler.Execute(image))


def _crop_to(
    image: sitk.Image,
    shape: Sequence[int],
    origin: Sequence[float],
    direction: Sequence[float],
    *,
    margin: int,
) -> sitk.Image:
    """Return the part of a volume under a grid: what else would be read is read for nothing."""
    axes = np.reshape(direction, (3, 3)) * np.array(SPACING[::-1])
    far = np.array(shape[::-1]) - 1
    corners = np.array(np.meshgrid(*[[0, n] for n in far])).reshape(3, -1)
    points = np.asarray(origin)[:, None] + axes @ corners
    indices = np.array(
        [image.TransformPhysicalPointToContinuousIndex(p) for p in points.T.tolist()]
    )
    size = np.array(image.GetSize())
    low = np.clip(np.floor(indices.min(axis=0)) - margin, 0, size - 1).astype(int)
    high = np.clip(np.ceil(indices.max(axis=0)) + margin, 0, size - 1).astype(int)
    if (indices.max(axis=0) < -0.5).any() or (indices.min(axis=0) > size - 0.5).any():
        raise BrokenCase("a sequence lies outside T2W's field of view")
    return image[tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))]


def _cut_paper(volumes: dict[str, sitk.Image], masks: dict[str, sitk.Image], window: str) -> Cut:
    """Do as the released script: every volume on its own, scaled before it is cropped."""
    import SimpleITK as sitk

    stacks = {
        name: _crop_centre(_respace(m, sitk.sitkNearestNeighbor)) for name, m in masks.items()
    }
    index = _choose_slice(stacks)
    planes, ranges = {}, {}
    for name, volume in volumes.items():
        values = _respace(volume, sitk.sitkBSpline)
        low, high = float(values.min()), float(values.max())
        scaled = (values - values.min()) / (values.max() - values.min())
        planes[name] = (_crop_centre(scaled)[index] * 255).astype(np.uint8)  # the script truncates
        ranges[name] = (low, high)
    return planes, {name: stack[index] for name, stack in stacks.items()}, index, ranges


def _respace(image: sitk.Image, interpolator: int) -> Array:
    """Resample a whole volume to the target spacing, from its own first voxel."""
    extent = np.array(image.GetSize()) * np.array(image.GetSpacing())
    shape = np.round(extent / np.array(SPACING[::-1])).astype(int)[::-1]
    return _resample(image, shape.tolist(), image.GetOrigin(), image.GetDirection(), interpolator)


def _crop_centre(values: Array) -> Array:
    """Crop or zero-pad to the target size around the array's centre."""
    out = np.zeros(GRID, values.dtype)
    source, target = [], []
    for length, wanted in zip(values.shape, GRID):
        start = _start(length, wanted)
        source.append(slice(max(start, 0), max(start, 0) + min(length, wanted)))
        target.append(slice(max(-start, 0), max(-start, 0) + min(length, wanted)))
    out[tuple(target)] = values[tuple(source)]
    return out
