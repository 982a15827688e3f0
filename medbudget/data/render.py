"""Turn one slice of a medical image into 8 bits: choose it, apply a window, make it square."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from medbudget.data.channels import read_channels
from medbudget.data.pixels import Array, Pixels, Window
from medbudget.data.prepare import BrokenCase, Item, Made
from medbudget.data.volumes import read_mask, read_pixels
from medbudget.files import hash_file
from medbudget.images import fit_square, from_pil

PERCENTILES = (0.5, 99.5)


def render_item(
    item: Item, *, root: Path, masks: Path | None, plane: str, window: str, size: int
) -> Made:
    """Make the image of an `Item` whose job is (source, rule by which to choose the slice)."""
    source, rule = item.job
    try:
        pixels = read_pixels(root, source, plane=plane)
        index = rule if isinstance(rule, int) else len(pixels.values) // 2
        if rule == "mask" and masks is not None:
            area = read_mask(masks, source, pixels, plane=plane).sum(axis=(1, 2))
            if not area.any():
                raise BrokenCase("its mask is empty")
            index = int(area.argmax())
        layers = [pixels, *read_channels(root, source, pixels)]
        drawn = [apply_window(layer, index, window) for layer in layers]
    except BrokenCase as error:  # the report names the file: it is shown to the reader, not written
        raise BrokenCase(f"{source.files[0]}: {error}") from None
    values, said = drawn[0]
    if source.others:
        values = np.stack([plane for plane, _ in drawn], axis=-1)
        said = "; ".join(f"{name} {text}" for name, (_, text) in zip("RGB", drawn))
    height, width = values.shape[:2]
    column, row, _ = pixels.steps
    scale = size / max(height * row, width * column)
    shape = (max(1, round(width * column * scale)), max(1, round(height * row * scale)))
    image = Image.fromarray(values).convert("RGB").resize(shape, Image.Resampling.LANCZOS)
    volume = len(pixels.values) > 1
    return Made(
        from_pil(fit_square(image, size)),
        tuple(f"sha256:{hash_file(root / one.files[0])}" for one in (source, *source.others)),
        window=said + (f", {pixels.note}" if pixels.note else ""),
        slice_index=index if volume else None,
        spacing=(1 / scale, 1 / scale) if pixels.stated else None,
        crop=f"all {height} x {width} px" + (f" of {len(pixels.values)} slices" if volume else ""),
        note="" if image.size == (size, size) else "padded to a square",
        pixels=hash_values(pixels.values[index : index + 1]),
    )


def hash_values(values: Array) -> str:
    """Hash pixels ``(slices, H, W[, 3])``: equal for equal numbers of whatever type."""
    if values.ndim == 4 and (values == values[..., :1]).all():
        values = values[..., 0]
    digest = hashlib.sha256(str(values.shape).encode())
    for plane in values:
        digest.update((plane.astype(np.float64) + 0.0).tobytes())
    return digest.hexdigest()


def parse_window(window: str) -> tuple[float, float]:
    """Return the lowest and highest intensity of ``LOW,HIGH``."""
    try:
        low, high = (float(v) for v in window.split(","))
    except ValueError:
        low = high = float("nan")
    if not low < high:
        raise ValueError(f"unknown window {window!r}; allowed are auto, tags, percentile, LOW,HIGH")
    return low, high


def apply_window(pixels: Pixels, index: int, window: str) -> tuple[Array, str]:
    """Return one slice as ``(H, W[, 3]) uint8``, and how that came about."""
    values = pixels.values[index]
    if values.ndim == 3:
        return values, "as stored (colour)"
    seen = pixels.values if pixels.padding is None else pixels.values[~pixels.padding]
    if not seen.size:
        raise BrokenCase("all of it is padding")
    asked = pixels.windows[index] if pixels.windows else None
    if window == "auto":
        window = "tags" if asked else "stored" if values.dtype == np.uint8 else "percentile"
    if window == "stored":
        chosen = Window(0, 255)
    elif window == "percentile":
        low, high = (float(v) for v in np.percentile(seen, PERCENTILES))
        chosen = Window(low, high)
    elif window != "tags":
        chosen, window = Window(*parse_window(window)), "fixed"
    elif asked is None:
        raise BrokenCase("it has no window tags; use --window percentile or LOW,HIGH")
    else:
        chosen = asked
    said = "as stored (8 bit)" if window == "stored" else f"{window}: {chosen}"
    if window in ("tags", "fixed") and not (chosen.sigmoid or chosen.problem):
        low, high = seen.min(), seen.max()
        if low < high and (high <= chosen.low or low >= chosen.high):
            raise BrokenCase(
                f"its window {chosen} lies beside all of its values, {low:g} to {high:g}; use "
                "--window percentile"
            )
    scaled = chosen.apply(values)
    if pixels.inverted:
        scaled, said = 1 - scaled, f"{said}, inverted"
    if pixels.padding is not None:
        scaled, said = np.where(pixels.padding[index], 0, scaled), f"{said}, padding black"
    return np.rint(scaled * 255).astype(np.uint8), said
