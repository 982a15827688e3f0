"""The one image type of the library: ``torch.uint8``, shape ``(N, 3, H, W)``, RGB."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medbudget.files import PathLike, Record, atomic_path, check_output, check_writable, read_json
from medbudget.pictures import SUFFIXES, TRANSPARENT, ImageError, describe_passed_over, open_picture

SHEET = "contact_sheet.png"
OWN = ("seed", "image", "image_hash", "mask_hash")  # differ from image to image of one run


def check_images(images: torch.Tensor, *, name: str = "images") -> torch.Tensor:
    """Return `images` if it is ``(N, 3, H, W) uint8`` with N >= 1, else raise TypeError, ValueError."""
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        raise TypeError(
            f"{name} must be a torch.uint8 tensor (N, 3, H, W), got "
            f"{getattr(images, 'dtype', type(images))}; load files with medbudget.load_images, or "
            "scale floats to 0..255 and call .byte()"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} must have shape (N, 3, H, W), at least one image, got {tuple(images.shape)}; "
            "repeat a gray channel three times, and add a first axis to a single image"
        )
    return images


def check_square(images: torch.Tensor) -> torch.Tensor:
    """Return `images` if they pass `check_images` and are square."""
    if check_images(images).shape[2] != images.shape[3]:
        raise ValueError(
            f"images must be square, got {tuple(images.shape[2:])} (H, W); load them with size=…, "
            "which pads with black"
        )
    return images


def load_image(path: PathLike, *, size: int | None = None) -> torch.Tensor:
    """Load one 8-bit image file as ``(3, H, W) uint8``; gray becomes three equal channels.

    With a `size`, the longest edge gets so many pixels (Lanczos, antialiased), and the rest is
    padded with black to a square. More than 8 bits a channel and transparency are refused.
    """
    image = _open_rgb(path)
    return from_pil(image if size is None else fit_square(image, size))


def _open_rgb(path: PathLike) -> Image.Image:
    try:
        image, _ = open_picture(path)
    except ImageError as error:
        raise ImageError(f"{path} {error}") from None
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ImageError(
            f"{path} has {32 if image.mode in ('I', 'F') else 16}-bit pixels; only 8-bit images "
            "are allowed: choose an intensity window with `medbudget prepare folder`"
        )
    if image.mode == "RGBA":
        raise ImageError(f"{path} {TRANSPARENT}")
    return image.convert("RGB")


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


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn one ``(3, H, W) uint8`` image into a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_png(image: torch.Tensor) -> bytes:
    """Turn one ``(3, H, W) uint8`` image into the bytes of a PNG file, without any metadata."""
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()


def to_url(png: bytes) -> str:
    """Turn a PNG file into a data URL, for a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def find_images(folder: PathLike) -> list[Path]:
    """Return the image files directly in `folder`, sorted by name, without a contact sheet of ours.

    Of a folder that ``medbudget prepare`` made, these are the training images, where they are of
    one class. A warning counts the files that are passed over.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if folder.is_file():
        return [folder]
    if is_prepared(folder):
        folder = _choose_class(folder)
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    files = [p for p in entries if p.is_file()]
    images = [p for p in files if p.suffix.lower() in SUFFIXES]
    others = describe_passed_over(p for p in files if p not in images)
    images = [p for p in images if p.name != SHEET or read_record(p) is None]
    if not images:
        inner = ", ".join(p.name for p in entries if p.is_dir()) or "none"
        raise ImageError(
            f"no images in {folder} itself (folders in it: {inner}; other files: "
            f"{others or 'none'}); allowed are {', '.join(SUFFIXES)}; DICOM files and volumes become "
            "images with `medbudget prepare folder`"
        )
    if others:
        warnings.warn(f"passed over in {folder}: {others}", stacklevel=2)
    return images


def is_prepared(folder: PathLike) -> bool:
    """Tell whether ``medbudget prepare`` made this folder."""
    return {"medbudget", "dataset", "selection"} <= read_json(Path(folder) / "settings.json").keys()


def _choose_class(folder: Path) -> Path:
    """Return the folder of training images of a prepared folder that has one class."""
    cells = [
        path.relative_to(folder).as_posix()
        for split in ("train", "val", "test", "reference")
        for path in sorted((folder / split).glob("*/"))
    ]
    training = [cell for cell in cells if cell.startswith("train/")]
    if len(training) != 1:
        raise ImageError(
            f"{folder} was prepared with {len(training)} classes; name the folder of one: "
            + ", ".join(cells)
        )
    if len(cells) > 1:
        others = ", ".join(cell for cell in cells if cell not in training)
        warnings.warn(
            f"{folder} is a prepared folder: {training[0]} is taken; name another folder for "
            f"{others}",
            stacklevel=3,
        )
    return folder / training[0]


def load_images(source: PathLike | Sequence[PathLike], *, size: int | None = None) -> torch.Tensor:
    """Load a folder or a list of files as ``(N, 3, H, W) uint8``, RGB, sorted or as listed.

    A folder is read by `find_images`, not those below it. With a `size`, images become squares by
    `load_image`'s rule; without it, all must have one size. Warnings count copies of an image, and
    say where images are enlarged twofold or more.
    """
    if isinstance(source, str | os.PathLike):
        files = find_images(source)
    else:
        files = [Path(p) for p in source]
    if not files:
        raise ImageError("no image files given")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    images, edges, broken = [], [], []
    for file in files:
        try:
            image = _open_rgb(file)
        except ImageError as error:
            broken.append(str(error))
            continue
        edges.append(max(image.size))
        images.append(from_pil(image if size is None else fit_square(image, size)))
    if broken:
        shown = "\n".join(broken[:5])
        raise ImageError(f"{len(broken)} of {len(files)} images cannot be used:\n{shown}")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise ImageError(
            f"the images have {len(shapes)} different sizes, e.g. {sorted(shapes)[:3]} (H, W); "
            "pass size=… to resize and pad them all"
        )
    if size is not None and 2 * min(edges) <= size:
        warnings.warn(
            f"images with a longest edge of {min(edges)} pixels are enlarged to {size}: if the "
            "originals are larger, prepare them at that size (medbudget prepare --size)",
            stacklevel=2,
        )
    first: dict[str, Path] = {}
    pairs = [
        f"{file.name} is {twin.name}"
        for file, image in zip(files, images)
        if (twin := first.setdefault(hash_pixels(image), file)) != file
    ]
    if pairs:
        warnings.warn(
            f"images with the pixels of another one: {len(pairs)} ({pairs[0]}), and all are used: "
            "remove the copies if each image is to count once",
            stacklevel=2,
        )
    return torch.stack(images)


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """Average images down to squares of `size` pixels, as a camera bins; ``(N, 3, H, W) uint8``."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="area").round().byte()


def hash_pixels(image: Any) -> str:
    """Hash shape and pixels of an image, a tensor or an array: equal for equal pixels."""
    values = np.ascontiguousarray(image)
    return hashlib.sha256(f"{values.shape} {values.dtype} ".encode() + values.tobytes()).hexdigest()


def hash_images(images: Iterable[torch.Tensor]) -> list[str]:
    """Return 12 hex digits for each image, equal for equal pixels."""
    return [hash_pixels(image)[:12] for image in images]


def save_images(
    images: torch.Tensor,
    folder: PathLike,
    *,
    names: Iterable[str] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
) -> list[Path]:
    """Write ``(N, 3, H, W) uint8`` images as PNG files, each atomically, and return the paths.

    `names` are without suffix; by default ``00000``, ``00001``, … `records`, one for each image
    (JSON values: prompt, seed, base hash, …), go into the files; see `read_record`.

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
    for stem in stems:
        if not stem or Path(stem).name != stem or "\\" in stem or "\0" in stem:
            raise ValueError(f"name {stem!r} is no plain file name; images stay in {folder}")
    paths = [folder / f"{stem}.png" for stem in stems]
    for i, (image, path) in enumerate(zip(images, paths, strict=True)):
        text = PngInfo()
        if records is not None:
            text.add_text("medbudget", json.dumps(records[i]))
        with atomic_path(path) as temporary:
            to_pil(image).save(temporary, format="PNG", pnginfo=text)
    return paths


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `save_images` recorded in a file, None where there is nothing of ours."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = json.loads(image.info["medbudget"])
    except Exception:  # a damaged file can raise anything
        return None
    return found if isinstance(found, dict) else None


def check_folder(
    folder: PathLike, records: Mapping[str, Record], *, overwrite: bool = False
) -> list[bool]:
    """Tell which images of a folder are there as this call would make them, by `check_output`.

    `records` maps file names to what this call notes; without any, the folder is only tried.
    Synthetic images that another run left and this one would not replace are refused, even with
    `overwrite`: both would be scored as one set. So are images that nothing of ours made.
    """
    folder = Path(folder)
    if not records:
        check_writable(folder / "0.png", make=False)
    done = [
        check_output(folder / x, r, read_record, overwrite=overwrite) for x, r in records.items()
    ]
    runs = [_describe_run(record) for record in records.values()]
    sources = {record.get("image", "") for record in records.values()}
    for path in sorted(folder.glob("[!.]*.*")) if records else ():
        if path.name == SHEET or path.suffix.lower() not in SUFFIXES:
            continue
        stored = {} if path.name in records else read_record(path)
        if stored is None or "prepared" in stored:  # by `medbudget prepare`
            raise FileExistsError(
                f"{path} is none of the images that this call draws, and would be taken for one: "
                "choose another folder"
            )
        if not stored.get("synthetic"):
            continue
        if _describe_run(stored) not in runs or stored.get("image") in sources:
            raise FileExistsError(
                f"{path} is of another run and would lie among the new images: choose another "
                "folder, or remove it"
            )
    return done


def _describe_run(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OWN}


def make_grid(images: torch.Tensor, *, columns: int = 8, gap: int = 2) -> torch.Tensor:
    """Lay images out in reading order on white: ``(N, 3, H, W) -> (3, rows*(H+gap)-gap, …)``."""
    from torchvision.utils import make_grid as layout

    check_images(images)
    grid = layout(images, nrow=min(columns, len(images)), padding=gap, pad_value=255)
    return grid[:, gap : grid.shape[1] - gap, gap : grid.shape[2] - gap] if gap else grid
