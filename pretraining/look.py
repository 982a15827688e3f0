"""Compare phantoms with real images: sheets to look at, spectra and gray levels.

``python -m pretraining.look --real FOLDER --out FOLDER`` writes one sheet for each kind and size, and
prints how far spectrum and percentiles are from the real ones.
"""

from __future__ import annotations

import argparse
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
SEQUENCES = ("T2W", "ADC", "DWI")
CASE = "10795_1000811"  # the one real prostate


def load_chests(folder: Path, size: int, n: int = 60) -> Array:
    """Load real chest radiographs without a finding, ``(n, size, size)``."""
    files = sorted((folder / "chest_xray" / "normal").iterdir())
    chosen = files[:: max(1, len(files) // n)][:n]
    shape = (size, size)
    return np.stack(
        [
            np.asarray(Image.open(f).convert("L").resize(shape, Image.Resampling.LANCZOS), float)
            for f in chosen
        ]
    )


def load_prostates(folder: Path, size: int) -> Array:
    """Load the real prostate's slices through the gland, ``(slices, 3, size, size)``.

    Cropped and windowed as phantoms are.
    """
    root, wide = folder / "picai", round(WIDER * size)
    case = picai.load_case(root / "images", root / "labels", CASE, size=wide)
    slices = []
    for index in range(case.slice_index - 3, case.slice_index + 4):
        with mock.patch.object(resample, "_choose_slice", lambda _, index=index: index):
            slices.append(picai.load_case(root / "images", root / "labels", CASE, size=wide).image)
    middle = crop_middle(np.stack([image.numpy() for image in slices]).astype(float), size)
    return np.clip(middle * np.array(WINDOW)[:, None, None], 0, 255)


def measure_spectrum(images: Array) -> Array:
    """Return the mean power of square images ``(n, s, s)`` at radii 1 to s / 2 - 1 of frequency."""
    size = images.shape[-1]
    window = np.outer(np.hanning(size), np.hanning(size))
    centred = (images - images.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0).ravel()
    line = np.fft.fftfreq(size) * size
    radius = np.rint(np.hypot(line[:, None], line[None])).astype(int).ravel()
    mean = np.bincount(radius, power) / np.bincount(radius)
    return mean[1 : size // 2] / size**4


def compare(drawn: Array, real: Array) -> tuple[Array, Array]:
    """Return log10 of the ratio of power at each radius, and the differences of percentiles."""
    ratio = np.log10(measure_spectrum(drawn) / measure_spectrum(real))
    levels = np.percentile(drawn, PERCENTILES) - np.percentile(real, PERCENTILES)
    return ratio, levels


def tile(rows: list[tuple[str, list[Array]]], edge: int) -> Image.Image:
    """Join titled rows of gray or RGB images, each shown with `edge` pixels."""
    wide = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (wide * (edge + 4), len(rows) * (edge + 18)), "white")
    for r, (title, images) in enumerate(rows):
        ImageDraw.Draw(sheet).text((2, r * (edge + 18) + 2), title, fill="black")
        for c, image in enumerate(images):
            one = Image.fromarray(np.asarray(image, np.uint8)).resize(
                (edge, edge), Image.Resampling.NEAREST
            )
            sheet.paste(one, (c * (edge + 4), r * (edge + 18) + 16))
    return sheet


def draw_sheets(kind: str, size: int, folder: Path | None, n: int = 6) -> Image.Image:
    """Draw phantoms of each class, and real images where there are some."""
    rows: list[tuple[str, list[Array]]] = []
    edge = max(size, 256)
    for label in KINDS[kind]:
        images = make_phantoms(kind, label, n, size=size, split="test").images.numpy()
        title = f"phantoms: {kind} {label}, {size} px"
        if kind == "prostate":
            rows += [(f"{title}, {s}", list(images[:, c])) for c, s in enumerate(SEQUENCES)]
        elif kind == "chest":
            rows.append((title, list(images[:, 0])))
        else:
            rows.append((title, list(images.transpose(0, 2, 3, 1))))
    if folder and kind == "prostate":
        real = load_prostates(folder, size)
        rows += [(f"real: one patient, {s}", list(real[:n, c])) for c, s in enumerate(SEQUENCES)]
    elif folder and kind == "chest":
        real = load_chests(folder, size)
        rows += [("real: no finding", list(real[i * n : i * n + n])) for i in range(2)]
    return tile(rows, edge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, help="folder with chest_xray/ and picai/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--cases", type=int, default=24)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        for size in args.sizes:
            draw_sheets(kind, size, args.real).save(args.out / f"{kind}_{size}.png")
            if args.real and kind != "histology":
                drawn = make_phantoms(kind, "healthy", args.cases, size=size).images.numpy()
                load = load_chests if kind == "chest" else load_prostates
                real = load(args.real, size)
                for c, name in enumerate(SEQUENCES if kind == "prostate" else ("gray",)):
                    one = real[:, c] if real.ndim == 4 else real
                    ratio, levels = compare(drawn[:, c].astype(float), one)
                    print(f"{kind} {size} {name}: levels {np.round(levels, 0)}, log10 power ratio")
                    print(
                        "  ",
                        np.round(ratio[: 128 if size > 64 else None], 2)[:: max(1, size // 64)],
                    )


if __name__ == "__main__":
    main()
