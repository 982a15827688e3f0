"""The public datasets' layouts filled with phantoms, so that chapters and tests run offline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import binary_erosion

from medbudget.data.chexpert import OBSERVATIONS
from medbudget.data.phantoms import make_phantoms
from medbudget.data.picai import GLAND, HUMAN, MACHINE, MARKSHEET
from medbudget.images import to_pil

PHANTOM_MM = 150.0  # an edge: the 100 mm of a phantom, enlarged to fill the crop of PI-CAI
BORDER = 20  # pixels of padding around the field of view of a PI-CAI phantom


def write_picai(
    folder: str | os.PathLike[str],
    *,
    n: int = 12,
    pixels: int = 128,
    slices: int = 15,
    offset_mm: float = 0.75,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write prostate phantoms of `n` patients as PI-CAI, and return the folders of images and labels.

    Every second patient is positive, with a tumour that is brighter on DWI than other phantoms';
    every third positive has a machine's lesion mask only; the first patient has two studies. T2W has
    `slices` of `pixels` (150 mm) an edge and a border. ADC and high-b DWI have coarser grids, whose
    centres lie `offset_mm` off T2W's in x and y, as they do in the real case that this was modelled on.
    """
    import SimpleITK as sitk

    images, labels = Path(folder) / "images", Path(folder) / "labels"
    rows = []
    for patient, visit in [(i, 0) for i in range(n)] + [(0, 1)]:
        positive = patient % 2 == 1
        name, study = str(10000 + patient), str(1000000 + 10 * patient + visit)
        t2w, adc, dwi, gland, tumour = _grow(patient + 1000 * visit, positive, pixels, slices, seed)
        coarse = sitk.Image([(pixels + 2 * BORDER) // 2] * 2 + [slices], sitk.sitkFloat32)
        spacing = t2w.GetSpacing()
        coarse.SetSpacing((2 * spacing[0], 2 * spacing[1], spacing[2]))
        first = 0.5 + offset_mm / spacing[0]  # in T2W's voxels
        coarse.SetOrigin(t2w.TransformContinuousIndexToPhysicalPoint((first, first, 0)))
        coarse.SetDirection(t2w.GetDirection())
        for key, volume in (("t2w", t2w), ("adc", adc), ("hbv", dwi)):
            if key != "t2w":
                volume = sitk.Resample(volume, coarse, sitk.Transform(), sitk.sitkLinear)
            whole = sitk.Cast(sitk.Clamp(volume, sitk.sitkFloat32, 0, 65535), sitk.sitkUInt16)
            _write_volume(whole, images / name / f"{name}_{study}_{key}.mha")
        masks = {GLAND: gland}
        if positive and patient % 6 == 5:
            masks[MACHINE] = tumour
        else:
            masks[HUMAN] = tumour * 2 if positive else tumour
        for where, mask in masks.items():
            _write_volume(mask, labels / where / f"{name}_{study}.nii.gz")
        rows.append((name, study, "YES" if positive else "NO"))
    _write_csv(labels / MARKSHEET, ("patient_id", "study_id", "case_csPCa"), rows)
    return images, labels


def _write_volume(volume: Any, file: Path) -> None:
    import SimpleITK as sitk

    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, os.fspath(file), True)


def _grow(index: int, positive: bool, pixels: int, slices: int, seed: int) -> Any:
    """Make volumes of a phantom, whose slice narrows towards both ends: three scans, two masks."""
    import SimpleITK as sitk

    label = "tumour" if positive else "healthy"
    phantom = make_phantoms("prostate", label, 1, size=pixels, seed=seed * 10000 + index)
    middle = slices // 2
    x, y = np.meshgrid(*[np.linspace(-1, 1, pixels)] * 2)
    oval = Image.fromarray(((x / 0.48) ** 2 + (y / 0.37) ** 2 < 1).astype(np.uint8))
    channels = phantom.images[0].numpy().copy()
    channels[2][phantom.masks[0].numpy()] = 230  # a bright tumour: what windows are about
    planes = [*(Image.fromarray(c) for c in channels), oval]
    planes.append(Image.fromarray(phantom.masks[0].numpy().astype(np.uint8)))
    stacks = np.zeros((5, slices, pixels + 2 * BORDER, pixels + 2 * BORDER), np.float32)
    gains = (6.0, 12.0, 2.0, 1.0, 1.0)
    across = slice(BORDER, BORDER + pixels)
    for k in range(slices):
        # a negative case shows the middle slice, a positive one the next: both are drawn alike
        far = k - middle if k < middle else max(k - middle - 1, 0)
        zoom = 1 - 0.4 * (far / middle) ** 2
        shift = round(far * BORDER / slices)  # apex and base differ, so there is an order
        edge = max(8, 2 * round(pixels * zoom / 2))
        low = (pixels - edge) // 2
        absent = {3: abs(k - middle) > slices // 3, 4: abs(k - middle - 1) > 2}  # gland, tumour
        for c, plane in enumerate(planes):
            if absent.get(c):
                continue
            filter_ = Image.Resampling.BILINEAR if c < 3 else Image.Resampling.NEAREST
            small = np.asarray(plane.resize((edge, edge), filter_), np.float32) * gains[c]
            if c == 4 and k != middle + 1:  # the tumour is largest in one slice
                small = binary_erosion(small, iterations=abs(k - middle - 1)).astype(np.float32)
            full = stacks[c, k, BORDER + shift : BORDER + shift + pixels, across]
            full[low : low + edge, low : low + edge] = small
    out, spacing = [], PHANTOM_MM / pixels
    tilt = np.deg2rad(6)  # the planes of real studies are tilted about this much
    cos, sin = np.cos(tilt), np.sin(tilt)
    for c, stack in enumerate(stacks):
        image = sitk.GetImageFromArray(stack if c < 3 else stack.astype(np.uint8))
        image.SetSpacing((spacing, spacing, 3.0))
        image.SetOrigin((-120.0, -70.0, -30.0))
        image.SetDirection((1, 0, 0, 0, cos, sin, 0, -sin, cos))
        out.append(image)
    return out


CHEST_LABELS = {
    "No Finding": "healthy",
    "Cardiomegaly": "cardiomegaly",
    "Pleural Effusion": "pleural_effusion",
    "Pneumonia": "pneumonia",
}


def write_chexpert(
    folder: str | os.PathLike[str], counts: Mapping[str, int] | int = 6, *, pixels: int = 96,
    seed: int = 0,
) -> Path:  # fmt: skip
    """Write chest phantoms as CheXpert-v1.0-small: ``train.csv`` and JPEG files with black borders.

    Beside `counts` patients of each label it has what a selection has to leave out: for each label
    one patient with an uncertain second finding, one with two findings, one PA and one lateral view,
    and a second clean image of the first patient. Returns the folder of ``train.csv``.
    """
    root = Path(folder) / "CheXpert-v1.0-small"
    rows: list[tuple[Any, ...]] = []
    number = 0

    def add(place: str, image: Any, i: int, side: str, findings: Mapping[str, float]) -> None:
        view = "Frontal" if side else "Lateral"
        path = f"train/{place}/view1_{view.lower()}.jpg"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        border = (24, 8) if i % 2 else (8, 16)  # wider on the sides of every second one
        gray = to_pil(image).convert("L").point(lambda value: max(value, 4))
        ImageOps.expand(gray, border).save(root / path, quality=95)
        values = [findings.get(name, "") for name in OBSERVATIONS]
        rows.append((f"CheXpert-v1.0-small/{path}", "Unknown", 60, view, side, *values))

    for label, kind in CHEST_LABELS.items():
        n = counts if isinstance(counts, int) else counts.get(label, 0)
        images = make_phantoms("chest", kind, n + 5, size=pixels, seed=seed).images
        plan: list[tuple[str, Mapping[str, float]]] = [("AP", {})] * n
        plan += [("AP", {"Fracture": -1.0}), ("AP", {"Fracture": 1.0}), ("PA", {}), ("", {})]
        first = number + 1
        for i, (side, extra) in enumerate(plan):
            number += 1
            add(f"patient{number:05d}/study1", images[i], i, side, {label: 1.0, **extra})
        if n:
            add(f"patient{first:05d}/study2", images[-1], 1, "AP", {label: 1.0})
    head = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
    _write_csv(root / "train.csv", head, rows)
    return root


def write_pcam(
    folder: str | os.PathLike[str], counts: Mapping[str, int] | None = None, *, seed: int = 0
) -> Path:
    """Write histology phantoms as PatchCamelyon: six HDF5 files with the official layout.

    Patches alternate between normal and metastasis.
    """
    import h5py

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (counts or {"train": 24, "valid": 8, "test": 8}).items():
        part = {"train": "train", "valid": "val", "test": "test"}[split]
        both = [
            make_phantoms("histology", label, (n + 1) // 2, size=96, seed=seed, split=part).images
            for label in ("normal", "metastasis")
        ]
        x = np.stack([both[i % 2][i // 2].permute(1, 2, 0).numpy() for i in range(n)])
        y = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1, 1, 1)
        for name, values in (("x", x), ("y", y)):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{name}.h5", "w") as file:
                file.create_dataset(name, data=values, chunks=(min(8, n), *values.shape[1:]))
    return folder


def write_dicom(
    file: str | os.PathLike[str],
    pixels: Any,
    tags: Mapping[str, str] | None = None,
    *,
    compressor: str | None = None,
) -> Path:
    """Write an array as one DICOM file: ``(H, W) uint8|uint16|int16``, or ``(H, W, 3) uint8``.

    Its values are those after rescale slope and intercept. `tags` maps ``"gggg|eeee"`` to a value;
    `compressor` is ``JPEG`` (lossless), ``JPEG2000`` or ``JPEGLS``.
    """
    import SimpleITK as sitk

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(pixels), isVector=np.ndim(pixels) == 3)
    for tag, value in (tags or {}).items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    if compressor:
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
    writer.SetFileName(os.fspath(file))
    writer.Execute(image)
    return file


def _write_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    import pandas as pd

    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=[*head]).to_csv(file, index=False, lineterminator="\n")
