"""CheXpert: chest X-rays with exactly one finding, AP, one image a patient.

Sources: Irvin et al. 2019 (the data); de Wilde et al. 2024, Section 3.3 (the selection).
"""

from __future__ import annotations

import os
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medbudget.data.prepare import BrokenCase, Item, Made, Report, check_settings, prepare_items
from medbudget.data.splits import SPLITS, choose_cases
from medbudget.data.tables import Listing, find_separator
from medbudget.files import check_apart
from medbudget.images import fit_square, from_pil, hash_pixels
from medbudget.pictures import ImageError, open_picture

OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
TRAINED = ("No Finding", "Cardiomegaly", "Pleural Effusion", "Pneumonia")
CLASSIFIED = ("No Finding", "Cardiomegaly")  # the only ones in validation and test, as in the paper
FOLDERS = {label: label.lower().replace(" ", "_") for label in TRAINED}
UNCERTAIN = ("exclude", "ignore")


def select_clean(table: Any, *, uncertain: str = "exclude") -> Any:
    """Keep AP views with exactly one positive observation, of CheXpert's label table.

    Parameters
    ----------
    table : pandas.DataFrame
        ``train.csv``: Path, AP/PA and the 14 observations (1 positive, 0 negative, -1 uncertain,
        empty not mentioned).
    uncertain : {"exclude", "ignore"}
        ``exclude`` drops images with any uncertain observation; ``ignore`` counts uncertain as not
        positive.

    Returns
    -------
    pandas.DataFrame
        Columns path, patient and label; one row for each image, several of a patient. Its
        ``attrs["unusable"]`` counts rows of unknown values, without a patient, or of two labels.
    """
    if uncertain not in UNCERTAIN:
        raise ValueError(f"unknown rule {uncertain!r}; allowed are {', '.join(UNCERTAIN)}")
    table = table.rename(columns=lambda name: str(name).strip())
    missing = [c for c in ("Path", "AP/PA", *OBSERVATIONS) if c not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing}; name CheXpert's train.csv")
    findings = table[list(OBSERVATIONS)].apply(_to_numbers)
    known = (findings.isna() | findings.isin([-1, 0, 1])).all(axis=1)
    path = table["Path"].astype(str).str.strip().str.replace("\\", "/")
    patient = path.str.extract(r"(?i)(?:^|/)(patient\d+)/", expand=False).str.lower()
    usable = known & patient.notna()
    if len(table) and not usable.any():
        raise ValueError(
            f"no row of the table can be used, such as {path.iloc[0]!r}: expected are paths like "
            "patient00001/study1/view1_frontal.jpg, and observations of 1, 0, -1 or nothing"
        )
    view = table["AP/PA"].astype(str).str.strip().str.upper()
    clean = usable & (view == "AP") & ((findings == 1).sum(axis=1) == 1)
    if uncertain == "exclude":
        clean &= ~(findings == -1).any(axis=1)
    out = path[clean].to_frame("path").assign(patient=patient[clean])
    out["label"] = (findings[clean] == 1).idxmax(axis=1) if clean.any() else ""
    out = out.drop_duplicates()
    several = out.duplicated("path", keep=False)
    out.attrs["unusable"] = int((~usable).sum() + several.sum())
    return out[~several].reset_index(drop=True)


def _to_numbers(column: Any) -> Any:
    """Return a column of findings as numbers; what is no number becomes infinite."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        return column
    text = column.astype(str).str.strip().where(column.notna(), "")
    return pd.to_numeric(text, errors="coerce").mask(lambda n: n.isna() & (text != ""), np.inf)


def _read_labels(file: Path) -> Any:
    import pandas as pd

    try:
        separator = find_separator(file)  # Excel writes 1,0 where columns end in semicolons
        return pd.read_csv(file, sep=separator, decimal="," if separator == ";" else ".")
    except Exception as error:  # pandas has a type for each kind of damage
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}); download it again"
        ) from None


def count_patients(selected: Any) -> dict[str, int]:
    """Return label -> number of patients with at least one such image, of `select_clean`."""
    counts = selected.groupby("label")["patient"].nunique()
    return dict(counts.reindex(OBSERVATIONS, fill_value=0).to_dict())


def find_label_table() -> Any | None:
    """Return CheXpert's label table, 223,414 rows, if torchxrayvision, which carries it, is there."""
    import pandas as pd

    package = find_spec("torchxrayvision")  # does not import it
    file = Path((package and package.origin) or "").parent / "data" / "chexpert_train.csv.gz"
    return pd.read_csv(file) if file.is_file() else None


def prepare_chexpert(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 512,
    seed: int = 0,
    per_class: int = 100,
    allow_fewer: bool = False,
    uncertain: str = "exclude",
    reference: int = 0,
    disjoint: bool = True,
    workers: int = 1,
) -> Report:
    """Turn CheXpert into image sets of single findings, split by patient.

    Training gets `per_class` patients each of No Finding, Cardiomegaly, Pleural Effusion and
    Pneumonia; validation and test of No Finding and Cardiomegaly, as in the paper. Every image is
    cropped to its non-zero part, its longest edge resized to `size`, and padded with zeros.

    Parameters
    ----------
    root : path
        The folder with ``train.csv`` (``CheXpert-v1.0`` or ``CheXpert-v1.0-small``).
    out, seed, per_class, allow_fewer, disjoint, workers
        See `medbudget.data.picai.prepare_picai`.
    uncertain : {"exclude", "ignore"}
        See `select_clean`.
    reference : int
        Also write that many patients with No Finding to ``reference``.
    """
    check_settings(size=size, seed=seed, workers=workers, per_class=per_class, reference=reference)
    root = Path(root)
    if not (root / "train.csv").is_file():
        raise FileNotFoundError(f"no train.csv in {root}; name the folder CheXpert-v1.0-small")
    check_apart(out, root)
    selected = select_clean(_read_labels(root / "train.csv"), uncertain=uncertain)
    unusable = selected.attrs["unusable"]
    selected = selected[selected["label"].isin(TRAINED)]
    patients = dict(zip(selected["path"], selected["patient"]))
    labels = {path: FOLDERS[label] for path, label in zip(selected["path"], selected["label"])}
    sizes = {
        split: {FOLDERS[label]: per_class for label in chosen}
        for split, chosen in zip(SPLITS, (TRAINED, CLASSIFIED, CLASSIFIED))
    }

    def item(path: str, split: str, note: str) -> Item:
        return Item(patients[path], labels[path], split, patients[path], path, note)

    items, spares, notes = choose_cases(
        patients, labels, sizes, item, seed=seed, allow_fewer=allow_fewer, reference=reference,
        healthy=FOLDERS[TRAINED[0]], disjoint=disjoint,
    )  # fmt: skip
    left_out = f"rows of the table left out ({unusable}): unknown values, no patient, or two labels"
    notes = [left_out] * bool(unusable) + notes
    settings = {
        "dataset": "chexpert", "size": size, "seed": seed, "per_class": per_class,
        "uncertain": uncertain, "reference": reference, "disjoint": disjoint,
    }  # fmt: skip
    make = partial(_make, root=root, size=size)
    return prepare_items(
        items, make, out, settings=settings, spares=spares, notes=notes, workers=workers
    )


def crop_borders(image: Image.Image) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Cut away rows and columns at the edges that are all zero; also return (x0, y0, x1, y1)."""
    box = image.getbbox()
    if box is None:
        raise BrokenCase("the image is black")
    return image.crop(box), box


def _find_image(root: Path, listed: str) -> Path:
    """Find an image below `root`, whatever folders the table has in front of ``patient…``."""
    parts, listing = listed.split("/"), Listing(root)
    patient = next(i for i, part in enumerate(parts) if re.fullmatch(r"(?i)patient\d+", part))
    for i in range(patient + 1):
        path, reason = listing.find("/".join(parts[i:]))
        if path and (root / path).is_file():
            return root / path
    raise BrokenCase(f"missing image: {listed} ({reason or 'it is a folder'})")


def _make(item: Item, *, root: Path, size: int) -> Made:
    file = _find_image(root, item.job)
    try:
        image, _ = open_picture(file)
    except ImageError as error:
        raise BrokenCase(f"{item.job} {error}") from None
    if image.mode not in ("L", "RGB"):
        raise BrokenCase(f"{item.job} is no 8-bit gray image, as CheXpert's are")
    image = image.convert("L")
    pixels = hash_pixels(image)
    cropped, box = crop_borders(image)
    scale = max(cropped.size) / size
    return Made(
        from_pil(fit_square(cropped.convert("RGB"), size)),
        (item.job,),
        window="as stored (8 bit)",
        crop=f"x {box[0]}..{box[2]}, y {box[1]}..{box[3]} of {image.width} x {image.height} px; "
        f"1 px is {np.format_float_positional(scale, precision=4)} px of the source",
        note="" if cropped.width == cropped.height else "padded to a square",
        pixels=pixels,
    )
