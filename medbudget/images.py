"""The one image type of the library: ``torch.uint8``, shape ``(N, 3, H, W)``, RGB."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medbudget.files import atomic_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# Pillow goes by content, not by name, and hands PostScript to another program: never let it
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")


class ImageError(ValueError):
    """An image file or tensor that cannot be used; the message says why and what to do."""


def check_images(images: torch.Tensor, *, name: str = "images") -> torch.Tensor:
    """Return `images` unchanged if it is ``(N, 3, H, W) uint8`` with N >= 1, else raise.

    Raises
    ------
    TypeError
        Not a ``torch.uint8`` tensor.
    ValueError
        Another shape, or no image at all.
    """
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        found = f"{images.dtype} tensor" if isinstance(images, torch.Tensor) else type(images)
        raise TypeError(
            f"{name} must be a torch.uint8 tensor (N, 3, H, W), got {found}; "
            "load files with medbudget.load_images, or scale floats to 0..255 and call .byte()"
        )
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 1:
        raise ValueError(
            f"{name} must have shape (N, 3, H, W), got {tuple(images.shape)}; "
            "repeat a gray channel three times, and add a first axis to a single image"
        )
    if len(images) == 0:
        raise ValueError(f"{name} is empty: at least one image is needed")
    return images


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files directly in `folder`, sorted by name."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if folder.is_file():
        return [folder]
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    files = [p for p in entries if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not files:
        inner = [p.name for p in entries if p.is_dir()]
        hint = f"; it has the folders {inner[:5]}: name one of them" if inner else ""
        raise ImageError(
            f"no images in {folder} ({len(entries)} other entries); "
            f"allowed are {', '.join(SUFFIXES)}{hint}"
        )
    return files


def load_image(path: str | os.PathLike[str], *, size: int | None = None) -> torch.Tensor:
    """Load one 8-bit image file as ``(3, H, W) uint8``; gray becomes three equal channels.

    Parameters
    ----------
    size : int, optional
        Pixels of the longest edge after an antialiased (Lanczos) resize; the rest is padded with
        black to a square. ``None`` keeps the file's own size.

    Raises
    ------
    ImageError
        Unreadable files, more than 8 bits a channel, or real transparency: each would need a
        decision (intensity window, background) that must not be taken silently.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            opened.load()
            image: Image.Image = opened
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has too many pixels to be safe to load; crop it first") from None
    except Exception as error:  # a damaged file can raise anything
        reason = error if isinstance(error, OSError) else type(error).__name__
        raise ImageError(
            f"{path} is not a readable image ({reason}); allowed are {', '.join(FORMATS)}; remove "
            "or replace it"
        ) from None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ImageError(
            f"{path} has {'32' if image.mode in ('I', 'F') else '16'}-bit pixels; only 8-bit images "
            "are allowed: choose an intensity window with `medbudget prepare folder`"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ImageError(
                f"{path} has transparent pixels; flatten it onto the background that you want"
            )
    elif image.mode not in ("1", "L", "P", "RGB"):
        raise ImageError(f"{path} has colour mode {image.mode}; allowed are gray, RGB and palette")
    image = image.convert("RGB")
    return from_pil(image if size is None else fit_square(image, size))


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the longest edge to `size` pixels (Lanczos, antialiased), pad with black to a square."""
    if image.size == (size, size):
        return image
    scale = size / max(image.size)
    wide, high = (max(1, round(edge * scale)) for edge in image.size)
    resized = image.resize((wide, high), Image.Resampling.LANCZOS)
    square = Image.new(image.mode, (size, size))
    square.paste(resized, ((size - wide) // 2, (size - high) // 2))
    return square


def from_pil(image: Image.Image) -> torch.Tensor:
    """Turn an RGB PIL image into ``(3, H, W) uint8``."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def load_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, size: int | None = None
) -> torch.Tensor:
    """Load a folder or a list of files, in order of their names or as listed.

    Parameters
    ----------
    source : path or sequence of paths
        A folder (its image files, not those in folders below), one file, or several files.
    size : int, optional
        See `load_image`. Without it, all files must have the same size.

    Returns
    -------
    torch.Tensor
        ``(N, 3, H, W) uint8``, RGB.

    Raises
    ------
    FileNotFoundError
        No such folder or file.
    ImageError
        No images, or images that `load_image` refuses (all are listed), or different sizes.
    """
    if isinstance(source, str | os.PathLike):
        files = find_images(source)
    else:
        files = [Path(p) for p in source]
        if not files:
            raise ImageError("no image files given")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    images, broken = [], []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no such file: {file}")
        try:
            images.append(load_image(file, size=size))
        except ImageError as error:
            broken.append(str(error))
    if broken:
        more = f"\n… and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ImageError(
            f"{len(broken)} of {len(files)} images cannot be used:\n" + "\n".join(broken[:5]) + more
        )
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise ImageError(
            f"the images have {len(shapes)} different sizes, e.g. {sorted(shapes)[:3]} (H, W); "
            "pass size=… to resize and pad them all"
        )
    return torch.stack(images)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn one ``(3, H, W) uint8`` image into a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def save_images(
    images: torch.Tensor,
    folder: str | os.PathLike[str],
    *,
    names: Iterable[str] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
) -> list[Path]:
    """Write ``(N, 3, H, W) uint8`` images as PNG files, each atomically, and return the paths.

    `names` are file names without suffix; by default ``00000``, ``00001``, … `records`, one for
    each image (JSON values: prompt, seed, base hash, …), go into the files; see `read_record`.

    Examples
    --------
    >>> import tempfile
    >>> images = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = save_images(images, folder)
    ...     print([file.name for file in files], torch.equal(load_images(folder), images))
    ['00000.png', '00001.png'] True
    """
    check_images(images)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"{i:05d}" for i in range(len(images))] if names is None else list(names)
    if len(stems) != len(images):
        raise ValueError(f"{len(stems)} names for {len(images)} images")
    for stem in stems:
        if not stem or Path(stem).name != stem or "\\" in stem or "\0" in stem:
            raise ValueError(f"name {stem!r} is no plain file name; images stay in {folder}")
    paths = []
    for i, (image, stem) in enumerate(zip(images, stems)):
        path = folder / f"{stem}.png"
        text = None
        if records is not None:
            text = PngInfo()
            text.add_text("medbudget", json.dumps(records[i]))
        with atomic_path(path) as temporary:
            to_pil(image).save(temporary, format="PNG", pnginfo=text)
        paths.append(path)
    return paths


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `save_images` recorded in a file, None where there is nothing of ours."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = json.loads(image.info["medbudget"])
    except Exception:  # a damaged file can raise anything
        return None
    return found if isinstance(found, dict) else None


def make_grid(images: torch.Tensor, *, columns: int = 8, gap: int = 2) -> torch.Tensor:
    """Lay images out in reading order on white: ``(N, 3, H, W) -> (3, rows*(H+gap)-gap, …)``."""
    from torchvision.utils import make_grid as layout

    check_images(images)
    grid = layout(images, nrow=min(columns, len(images)), padding=gap, pad_value=255)
    return grid[:, gap : grid.shape[1] - gap, gap : grid.shape[2] - gap] if gap else grid
