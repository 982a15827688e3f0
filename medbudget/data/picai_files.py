"""What PI-CAI looks like on disk: volumes in folders of patients, masks and marksheet apart.

Source: Saha et al. 2024, and the repository DIAGNijmegen/picai_labels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medbudget.data.prepare import BrokenCase
from medbudget.data.tables import read_table

SEQUENCES = ("t2w", "adc", "hbv")
LABELS = ("negative", "positive")
GLAND = "anatomical_delineations/whole_gland/AI/Bosma22b"
HUMAN = "csPCa_lesion_delineations/human_expert/resampled"
POOCH = "csPCa_lesion_delineations/human_expert/Pooch25"  # since July 2025, of those without HUMAN
MACHINE = "csPCa_lesion_delineations/AI/Bosma22a"
LESIONS = {HUMAN: 2, POOCH: 1, MACHINE: 1}  # lowest value of a significant lesion; best first
MARKSHEET = "clinical_information/marksheet.csv"


@dataclass(frozen=True)
class Study:
    """A row of the marksheet."""

    case_id: str  # PATIENT_STUDY
    patient: str
    label: str  # one of LABELS


def read_marksheet(labels: str | os.PathLike[str]) -> dict[str, Study]:
    """Read PI-CAI's marksheet: case to `Study`."""
    file = Path(labels) / MARKSHEET
    if not file.is_file():
        raise FileNotFoundError(
            f"no {MARKSHEET} in {labels}; name a copy of github.com/DIAGNijmegen/picai_labels"
        )
    rows = read_table(file)
    needed = ("patient_id", "study_id", "case_csPCa")
    if not rows or not set(needed) <= rows[0].keys():
        raise ValueError(f"{file} needs the columns {', '.join(needed)}")
    studies: dict[str, Study] = {}
    for number, row in enumerate(rows, 2):
        patient, study, cancer = (row[name] for name in needed)
        if not patient or not study:
            raise ValueError(f"{file}: row {number} has no patient_id or no study_id")
        if cancer not in ("YES", "NO"):
            raise ValueError(
                f"{file}: row {number}: case_csPCa is {cancer!r}; allowed are YES and NO"
            )
        case = f"{patient}_{study}"
        if case in studies:
            raise ValueError(f"{file}: row {number} names case {case} again; keep one of its rows")
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


def find_t2w(images: Path, case_id: str) -> Path:
    file = find_images(images).get(case_id)
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
