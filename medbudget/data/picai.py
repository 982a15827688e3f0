"""PI-CAI: prostate MRI from the public layout to one axial slice a case, with its masks.

Sources: Saha et al. 2024 and the repository DIAGNijmegen/picai_labels (the data); de Wilde et al.
2024, Section 3.3. ``geometry="paper"`` makes what the released prostate words were trained on.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medbudget.data import resample
from medbudget.data.items import SIZES
from medbudget.data.prepare import BrokenCase, Item, Made, Report, check_settings, prepare_items
from medbudget.data.splits import SPLITS, choose_cases
from medbudget.data.tables import read_table
from medbudget.files import check_apart
from medbudget.images import from_pil, hash_pixels
from medbudget.settings import Settings

SEQUENCES = ("t2w", "adc", "hbv")
LABELS = ("negative", "positive")
GLAND = "anatomical_delineations/whole_gland/AI/Bosma22b"
HUMAN = "csPCa_lesion_delineations/human_expert/resampled"
POOCH = "csPCa_lesion_delineations/human_expert/Pooch25"  # since July 2025, of those without HUMAN
MACHINE = "csPCa_lesion_delineations/AI/Bosma22a"
LESIONS = {HUMAN: 2, POOCH: 1, MACHINE: 1}  # lowest value of a significant lesion; best first
MARKSHEET = "clinical_information/marksheet.csv"
COLUMNS = ("patient_id", "study_id", "case_csPCa")


@dataclass(frozen=True)
class View(Settings):
    """How a study becomes an image; see `load_case`."""

    CHOICES = {"geometry": ("physical", "paper"), "window": ("gland", "percentile", "volume")}
    LIMITS = {"size": SIZES}

    size: int = 512
    geometry: str = "physical"
    window: str = "gland"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.geometry == "paper":
            object.__setattr__(self, "window", "volume")


@dataclass(frozen=True)
class Study:
    """A row of the marksheet."""

    case_id: str  # PATIENT_STUDY
    patient: str
    label: str  # one of LABELS


@dataclass(frozen=True, eq=False)
class Case:
    """One PI-CAI study as an image."""

    image: torch.Tensor  # (3, size, size) uint8: T2W, ADC and high-b DWI
    tumour: torch.Tensor  # (size, size) bool, in the image's geometry; empty in a negative case
    gland: torch.Tensor  # (size, size) bool
    label: int  # 1 for clinically significant cancer (ISUP 2 and more), from the marksheet
    slice_index: int  # of the 30 slices of the grid
    spacing: tuple[float, float]  # mm of a pixel of the image: row, column
    window: str  # which intensities of each sequence became 0 and 255
    sources: tuple[str, ...]  # files, relative to the folders of images and of labels
    pixels: str  # hash of T2W's voxels


def read_marksheet(labels: str | os.PathLike[str]) -> dict[str, Study]:
    """Read PI-CAI's marksheet: case to `Study`."""
    file = Path(labels) / MARKSHEET
    if not file.is_file():
        raise FileNotFoundError(
            f"no {MARKSHEET} in {labels}; name a copy of github.com/DIAGNijmegen/picai_labels"
        )
    studies: dict[str, Study] = {}
    for number, row in enumerate(read_table(file), 2):
        patient, study, cancer = (row.get(name, "") for name in COLUMNS)
        case = f"{patient}_{study}"
        if not patient or not study or cancer not in ("YES", "NO") or case in studies:
            raise ValueError(
                f"{file}: row {number} has {patient!r}, {study!r}, {cancer!r}; needed are "
                "patient_id and study_id, each study once, and case_csPCa YES or NO"
            )
        studies[case] = Study(case, patient, LABELS[cancer == "YES"])
    return studies


def find_images(images: Path) -> dict[str, Path]:
    """Return case -> T2W file, whatever folds lie in or between."""
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder: {images}")
    files: dict[str, Path] = {}
    for file in sorted(images.rglob("*_t2w.mha")):
        case = file.name.removesuffix("_t2w.mha")
        if case in files:
            raise ValueError(f"case {case} is there twice: {files[case]} and {file}; keep one")
        files[case] = file
    return files


def _find_t2w(images: str | os.PathLike[str], case_id: str) -> Path:
    file = find_images(Path(images)).get(case_id)
    if file is None:
        raise BrokenCase(f"no {case_id}_t2w.mha in {images}")
    return file


def find_lesions(labels: Path, study: Study) -> tuple[str, ...]:
    """Return the masks that may show a positive's tumour: all experts', or else the machine's."""
    if study.label == LABELS[0]:
        return ()
    files = [f"{folder}/{study.case_id}.nii.gz" for folder in LESIONS]
    experts = tuple(file for file in files[:-1] if (labels / file).is_file())
    return experts or (files[-1],)


def load_case(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    case_id: str,
    *,
    size: int = 512,
    geometry: str = "physical",
    window: str = "gland",
) -> Case:
    """Load one study as a 2-D image with its masks.

    The slice is the median slice of the gland for a negative case, and the one with the largest
    tumour area for a positive one. The tumour is an expert's (``human_expert/resampled``, else
    ``human_expert/Pooch25``), and a machine's (``AI/Bosma22a``) only where there is no expert's.

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
        so that T2W is not blurred). ``paper`` does as the released script: each sequence is
        resampled from its own corner and cropped around its own centre.
    window : {"gland", "percentile", "volume"}
        Intensities that become 0..255. ``percentile``: the 0.5 to 99.9 percentiles of the grid's
        central half (75 x 75 mm, all slices). ``gland``: the same, but in DWI, where a tumour would
        set its own window, white is four times the median of the gland (without what is twice as
        bright). ``volume``: minimum to maximum of the whole volume, the only one of
        ``geometry="paper"``, which uses it whatever is given here.
    """
    view = View(size, geometry, window)
    t2w, studies = _find_t2w(images, case_id), read_marksheet(labels)
    if case_id not in studies:
        raise ValueError(f"case {case_id} is not in the marksheet of {labels}")
    lesions = find_lesions(Path(labels), studies[case_id])
    return _load(t2w, studies[case_id], lesions, Path(images), Path(labels), view)


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
    geometry: str = "physical",
    window: str = "gland",
    workers: int = 1,
) -> Report:
    """Turn PI-CAI into image sets: positive and negative, split by patient.

    Parameters
    ----------
    images, labels, size, geometry, window
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
    """
    view = View(size, geometry, window)
    check_settings(size=size, seed=seed, workers=workers, per_class=per_class, reference=reference)
    images, labels = Path(images), Path(labels)
    check_apart(out, images, labels)
    studies, files = read_marksheet(labels), find_images(images)
    usable = {case: study for case, study in studies.items() if case in files}
    if not usable:
        raise ValueError(
            f"{len(files)} T2W volumes in {images}, {len(studies)} studies in the marksheet, none "
            "in common; images must be named <patient>_<study>_t2w.mha"
        )

    def item(case: str, split: str, note: str) -> Item:
        study, lesions = usable[case], find_lesions(labels, usable[case])
        if any(file.startswith(MACHINE) for file in lesions):
            note = "; ".join(filter(None, (note, "lesion mask by a machine")))
        job = (files[case].relative_to(images).as_posix(), study, lesions)
        return Item(case, study.label, split, study.patient, job, note, " ".join(lesions))

    items, spares, more = choose_cases(
        {case: study.patient for case, study in usable.items()},
        {case: study.label for case, study in usable.items()},
        {split: dict.fromkeys(LABELS, per_class) for split in SPLITS},
        item, seed=seed, allow_fewer=allow_fewer, reference=reference, healthy=LABELS[0],
        disjoint=disjoint,
    )  # fmt: skip
    chosen = {one.name for group in (items, *spares.values()) for one in group}
    concerned = {
        "studies are not used, as their patient has another one": usable.keys() - chosen,
        "studies of the marksheet have no images here": studies.keys() - files.keys(),
        "T2W volumes are not in the marksheet": files.keys() - studies.keys(),
        "positive cases have no lesion mask by an expert, only a machine's (Bosma22a): see the "
        "manifest's notes; picai_labels of July 2025 and later has experts' for all": {
            one.name for one in items if "machine" in one.note
        },
    }
    notes = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in concerned.items()
        if names
    ]
    settings = {
        "dataset": "picai", "seed": seed, "per_class": per_class, "reference": reference,
        "disjoint": disjoint, **asdict(view), "grid": resample.describe_grid(),
    }  # fmt: skip
    make = partial(_make, images=images, labels=labels, view=view)
    return prepare_items(
        items, make, out, settings=settings, spares=spares, notes=[*notes, *more], workers=workers
    )


def measure_shift(images: str | os.PathLike[str], case_id: str) -> dict[str, tuple[float, ...]]:
    """Tell how far ``geometry="paper"`` shifts "adc" and "hbv" against T2W, from the headers alone.

    In millimetres along T2W's slices, rows and columns: what the paper's crop shows in its centre,
    relative to what T2W's crop shows there.
    """
    t2w = _find_t2w(images, case_id)
    volumes = [resample.read_sequence(t2w, case_id, name) for name in SEQUENCES]
    middle = (np.array(resample.GRID) - 1) / 2 * np.array(resample.SPACING)
    first, *others = (np.array(resample.shift(*resample.target_grid(v), middle)) for v in volumes)
    axes = np.reshape(volumes[0].GetDirection(), (3, 3))
    return {
        name: tuple(float(v) for v in (axes.T @ (centre - first))[::-1])
        for name, centre in zip(SEQUENCES[1:], others)
    }


def _make(item: Item, *, images: Path, labels: Path, view: View) -> Made:
    """Make the image of an `Item` whose job is (T2W file, study, lesion masks)."""
    t2w, study, lesions = item.job
    case = _load(images / t2w, study, lesions, images, labels, view)
    _, high, wide = resample.GRID
    return Made(
        case.image,
        case.sources,
        window=case.window,
        slice_index=case.slice_index,
        spacing=case.spacing,
        crop=f"{high} x {wide} px of {resample.SPACING[1]} mm, {view.geometry}",
        masks={"tumour": case.tumour, "gland": case.gland},
        pixels=case.pixels,
    )


def _load(
    t2w: Path, study: Study, lesions: tuple[str, ...], images: Path, labels: Path, view: View
) -> Case:
    volumes = {name: resample.read_sequence(t2w, study.case_id, name) for name in SEQUENCES}
    for name, volume in volumes.items():
        values = resample.to_array(volume)
        if values.min() == values.max():
            raise BrokenCase(f"sequence {name} has the one value {values.min():g}")
    voxels = resample.to_array(volumes["t2w"])
    if int(np.abs(np.reshape(volumes["t2w"].GetDirection(), (3, 3))[:, 2]).argmax()) != 2:
        raise BrokenCase("T2W is not an axial volume")
    gland = f"{GLAND}/{study.case_id}.nii.gz"
    masks = {"gland": resample.read_mask(labels / gland, 1, volumes["t2w"])}
    files = [t2w.with_name(f"{study.case_id}_{name}.mha") for name in SEQUENCES]
    sources = [*(file.relative_to(images).as_posix() for file in files), gland]
    for lesion in lesions:  # an expert's may show harmless lesions only
        try:
            least = LESIONS[os.path.dirname(lesion)]
            masks["tumour"] = resample.read_mask(labels / lesion, least, volumes["t2w"])
            sources.append(lesion)
            break
        except resample.EmptyMask:
            if lesion == lesions[-1]:
                raise
    if view.geometry == "physical":
        planes, shapes, index, ranges = resample.cut_physical(volumes, masks, view.window)
    else:
        planes, shapes, index, ranges = resample.cut_paper(volumes, masks)
    edges = (view.size, view.size)
    picture = Image.fromarray(np.stack([planes[name] for name in SEQUENCES], axis=-1))
    outlines = {
        name: torch.from_numpy(
            np.array(Image.fromarray(shape).resize(edges, Image.Resampling.NEAREST), dtype=bool)
        )
        for name, shape in shapes.items()
    }
    said = ", ".join(f"{name} {low:g}..{high:g}" for name, (low, high) in ranges.items())
    _, row, column = (s * n / view.size for s, n in zip(resample.SPACING, resample.GRID))
    return Case(
        image=from_pil(picture.resize(edges, Image.Resampling.LANCZOS)),
        tumour=outlines.get("tumour", torch.zeros_like(outlines["gland"])),
        gland=outlines["gland"],
        label=LABELS.index(study.label),
        slice_index=index,
        spacing=(row, column),
        window=f"{view.window}: {said}",
        sources=tuple(sources),
        pixels=hash_pixels(voxels),
    )
