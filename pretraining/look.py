"""Compare phantoms with real images: sheets to look at, spectra and gray levels.

``python -m pretraining.look --real FOLDER --out FOLDER`` writes one sheet for each kind and size, and
prints by how much spectrum and percentiles differ from the real ones.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medbudget.data import picai, resample
from medbudget.data.phantoms import KINDS, make_phantoms
from medbudget.data.phantoms.prostate import WIDER, WINDOW, crop_middle

Array = NDArray[np.floating]
PERCENTILES = (5, 10, 25, 50, 75, 90, 95)
CASE = "10795_1000811"  # the one real prostate


def split_panels(kind: str, images: Array) -> dict[str, Array]:
    """Return images ``(n, 3, s, s)`` as they are looked at, by name of the panel.

    Gray ones, a panel for each sequence of the prostate, are ``(n, s, s)``; histology is RGB,
    ``(n, s, s, 3)``.
    """
    if kind == "prostate":
        return dict(zip(("T2W", "ADC", "DWI"), images.swapaxes(0, 1)))
    return {"gray": images[:, 0]} if kind == "chest" else {"RGB": images.transpose(0, 2, 3, 1)}


def load_real(kind: str, folder: Path | None, size: int) -> dict[str, Array]:
    """Load real images as `split_panels` gives phantoms; there are none of histology.

    Chest radiographs are without a finding; of the prostate there are seven slices of one patient,
    cropped and windowed as phantoms are.
    """
    if folder is None or kind == "histology":
        return {}
    load = load_chests if kind == "chest" else load_prostates
    return split_panels(kind, load(folder, size))


def load_chests(folder: Path, size: int, n: int = 60) -> Array:
    """Load about `n` real chest radiographs without a finding, ``(n, 1, size, size)``."""
    files = sorted((folder / "chest_xray" / "normal").iterdir())
    chosen = files[:: max(1, len(files) // n)][:n]
    rule = Image.Resampling.LANCZOS
    images = [Image.open(file).convert("L").resize((size, size), rule) for file in chosen]
    return np.stack([np.asarray(image, float) for image in images])[:, None]


def load_prostates(folder: Path, size: int) -> Array:
    """Load the real prostate's slices through the gland, ``(7, 3, size, size)``."""
    root, wide = folder / "picai", round(WIDER * size)
    load = partial(picai.load_case, root / "images", root / "labels", CASE, size=wide)
    middle = load().slice_index
    slices = []
    for index in range(middle - 3, middle + 4):
        with mock.patch.object(resample, "_choose_slice", lambda _, index=index: index):
            slices.append(load().image.numpy().astype(float))
    return np.clip(crop_middle(np.stack(slices), size) * np.array(WINDOW)[:, None, None], 0, 255)


def measure_spectrum(images: Array) -> Array:
    """Return the mean power of images ``(n, s, s)`` at 1 to s / 2 - 1 periods an edge."""
    size = images.shape[-1]
    window = np.outer(np.hanning(size), np.hanning(size))
    centred = (images - images.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0).ravel()
    line = np.fft.fftfreq(size) * size
    radius = np.rint(np.hypot(line[:, None], line[None])).astype(int).ravel()
    mean = np.bincount(radius, power) / np.bincount(radius)
    return mean[1 : size // 2] / size**4


def compare(drawn: Array, real: Array) -> tuple[Array, Array]:
    """Return log10 of the ratio of power at each radius, and the differences of `PERCENTILES`.

    Images are ``(n, s, s)``, gray levels 0 to 255; the ratios are ``(s / 2 - 1)``.
    """
    ratio = np.log10(measure_spectrum(drawn) / measure_spectrum(real))
    levels = np.percentile(drawn, PERCENTILES) - np.percentile(real, PERCENTILES)
    return ratio, levels


def tile(rows: list[tuple[str, Array]], edge: int) -> Image.Image:
    """Join titled rows of gray or RGB images, each shown with `edge` pixels."""
    wide = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (wide * (edge + 4), len(rows) * (edge + 18)), "white")
    for r, (title, images) in enumerate(rows):
        top = r * (edge + 18)
        ImageDraw.Draw(sheet).text((2, top + 2), title, fill="black")
        for c, image in enumerate(images.astype(np.uint8)):
            panel = Image.fromarray(image).resize((edge, edge), Image.Resampling.NEAREST)
            sheet.paste(panel, (c * (edge + 4), top + 16))
    return sheet


def draw_sheet(kind: str, size: int, real: dict[str, Array], n: int = 6) -> Image.Image:
    """Draw phantoms of each class, and real images where there are some."""
    rows = []
    for label in KINDS[kind]:
        images = make_phantoms(kind, label, n, size=size, split="test").images.numpy()
        for name, panel in split_panels(kind, images).items():
            rows.append((f"phantoms: {kind} {label}, {size} px, {name}", panel))
    for name, panel in real.items():
        rows.append((f"real: {kind}, {size} px, {name}", panel[:n]))
    return tile(rows, max(size, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, help="folder with chest_xray/ and picai/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--cases", type=int, default=24)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, size in product(args.kinds, args.sizes):
        real = load_real(kind, args.real, size)
        draw_sheet(kind, size, real).save(args.out / f"{kind}_{size}.png")
        if real:
            drawn = make_phantoms(kind, "healthy", args.cases, size=size).images.numpy()
            phantoms = split_panels(kind, drawn.astype(float))
        for name in real:
            ratio, levels = compare(phantoms[name], real[name])
            print(f"{kind} {size} {name}: levels {np.round(levels)}, log10 power ratio")
            print("  ", np.round(ratio[: 128 if size > 64 else None : max(1, size // 64)], 2))


if __name__ == "__main__":
    main()
