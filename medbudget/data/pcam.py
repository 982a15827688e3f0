"""PatchCamelyon: the official HDF5 files, read where and when they are needed.

Sources: Veeling et al. 2018 (the data); de Wilde et al. 2024, Section 3.3 (the selection). The
official splits are by slide. Validation and test are used in full, straight from the files.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medbudget.data.prepare import Item, Made, Report, check_settings, prepare_items
from medbudget.data.splits import shuffle
from medbudget.data.tables import read_table
from medbudget.files import atomic_path, check_apart
from medbudget.images import from_pil, hash_pixels
from medbudget.progress import tqdm

SPLITS = {"train": "train", "val": "valid", "test": "test"}
LABELS = ("normal", "metastasis")
EDGE = 96
MAX_UNPACKED = 8 * 2**30  # the largest official file has 6.8 GiB
MAX_CHUNK = 64 * 2**20
SPACING_MM = 0.000972  # 10x of CAMELYON16: 0.972 um a pixel
OFFICIAL = {"train": 2**18, "val": 2**15, "test": 2**15}  # patches
MD5 = {  # of the official .h5.gz; the project's own page has valid and test swapped (its issue 4)
    "train_x": "1571f514728f59376b705fc836ff4b63",
    "train_y": "35c2d7259d906cfc8143347bb8e05be7",
    "valid_x": "d5b63470df7cfa627aeec8b9dc0c066e",
    "valid_y": "2b85f58b927af9964a4c15b8f7e8f179",
    "test_x": "d8c2d60d490dbd479f8199bdfa0cf6ec",
    "test_y": "60a7035772fbdb7f34eb86d4420cf66a",
}


def find_split(path: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """Return folder and split of an official patch file, ``…_test_x.h5``, or None for other paths."""
    name = re.fullmatch(r"camelyonpatch_level_2_split_(\w+)_[xy]\.h5(\.gz)?", Path(path).name)
    return next(((Path(path).parent, k) for k, v in SPLITS.items() if name and v == name[1]), None)


def _name(split: str, what: str) -> str:
    """Return the name of an official file, such as ``x.h5`` or ``meta.csv`` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed are {', '.join(SPLITS)}")
    return f"camelyonpatch_level_2_split_{SPLITS[split]}_{what}"


def open_pcam(folder: str | os.PathLike[str], split: str, part: str) -> Any:
    """Open the patches ("x") or labels ("y") of a split: an `h5py.File`, closed by the caller.

    A file that lies there only as ``.h5.gz`` is first unpacked beside it, once, and its MD5 sum is
    compared with the official one.
    """
    file = Path(folder) / _name(split, f"{part}.h5")
    packed = file.with_name(f"{file.name}.gz")
    if not file.is_file():
        if not packed.is_file():
            raise FileNotFoundError(f"no {file.name} or {packed.name} in {folder}")
        _unpack(packed, file, split, part)
    return _open(file, part)


def _open(file: Path, part: str, shown: Path | None = None) -> Any:
    """Open a file and check that it holds what is expected; nothing of its data is read."""
    import h5py

    try:
        opened = h5py.File(file, "r")
    except OSError as error:
        raise OSError(f"{shown or file} cannot be read ({error}); download it again") from None
    shape: tuple[int, ...] = (EDGE, EDGE, 3)
    try:
        own = isinstance(opened.get(part, getlink=True), h5py.HardLink)
        data: Any = opened[part] if own else None
        shape = shape if part == "x" else (1,) * (data.ndim - 1)
        fits = (
            not (data.external or data.is_virtual)
            and data.dtype.kind in "iu"
            and data.shape[1:] == shape
            and len(data) <= 2**22
            and math.prod(data.chunks or (1,)) * data.dtype.itemsize <= MAX_CHUNK
        )
    except Exception:  # a link, a group, or one of the many ways in which HDF5 can be damaged
        fits = False
    if fits:
        return opened
    opened.close()
    raise OSError(
        f"{shown or file} is damaged, or not of PatchCamelyon: it has no data set {part!r} of its "
        f"own with N rows of whole numbers, shape {shape}, N up to {2**22:,}; download it again"
    )


def _read_rows(data: Any, rows: Any) -> Any:
    try:
        return data[rows]
    except (OSError, RuntimeError, MemoryError) as error:
        raise OSError(
            f"{data.file.filename} is damaged ({type(error).__name__}); download it again"
        ) from None


def _unpack(packed: Path, file: Path, split: str, part: str) -> None:
    """Unpack as a stream; the file appears when it is complete."""
    name = f"{SPLITS[split]}_{part}"
    with open(packed, "rb") as source:
        md5 = hashlib.file_digest(source, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    owner = next((key for key, value in MD5.items() if value == md5), "")
    if owner not in ("", name):
        raise OSError(
            f"{packed} is the official {owner} by its MD5 sum: give it that name, and download {name}"
        )
    try:
        bar = tqdm(desc=f"unpacking {packed.name}", unit="B", unit_scale=True)
        with bar, atomic_path(file) as temporary:
            with gzip.open(packed) as source, open(temporary, "wb") as target:
                while block := source.read(1 << 22):
                    target.write(block)
                    bar.update(len(block))
                    if target.tell() > MAX_UNPACKED:
                        raise EOFError(f"it unpacks to more than {MAX_UNPACKED / 2**30:g} GiB")
            with _open(temporary, part, packed) as opened:
                official = len(opened[part]) == OFFICIAL[split]
            if official and not owner:
                raise EOFError(f"its MD5 sum is {md5}, the official one is {MD5[name]}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{packed} is damaged ({error}); download it again") from None


def load_labels(folder: str | os.PathLike[str], split: str) -> torch.Tensor:
    """Return the labels of a split: ``(N,) uint8``, 1 for metastasis in the central 32 x 32 px."""
    return torch.from_numpy(_read_table(Path(folder), split)[0])


def load_slides(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Return the slide of each patch of a split, or nothing where its ``…_meta.csv`` is not there."""
    return _read_table(Path(folder), split)[1]


def load_patches(
    folder: str | os.PathLike[str], split: str, indices: Sequence[int], *, size: int = 512
) -> torch.Tensor:
    """Read some patches: ``(len(indices), 3, size, size) uint8``, in the order of `indices`.

    Nothing else of the file is read. Patches of 96 px are resized with a Lanczos filter.
    """
    order, back = np.unique(np.asarray(indices, np.int64), return_inverse=True)  # h5py: rising
    with open_pcam(folder, split, "x") as file:
        data = file["x"]
        if data.dtype != np.uint8:
            raise ValueError(f"patches of {split} are {data.dtype}; expected uint8")
        if order[0] < 0 or order[-1] >= len(data):
            raise IndexError(f"{split} has {len(data)} patches; asked for {order[-1]}")
        patches = [Image.fromarray(patch) for patch in _read_rows(data, order)[back]]
    return torch.stack(
        [from_pil(patch.resize((size, size), Image.Resampling.LANCZOS)) for patch in patches]
    )


def iterate_patches(
    folder: str | os.PathLike[str], split: str, *, batch: int = 64, size: int = 512
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a whole split in order as ``(n, 3, size, size) uint8`` and ``(n,) uint8`` batches."""
    open_pcam(folder, split, "x").close()  # unpacked before the labels are compared with it
    labels = load_labels(folder, split)
    for part in torch.arange(len(labels)).split(batch):
        yield load_patches(folder, split, part.tolist(), size=size), labels[part]


def prepare_pcam(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 512,
    seed: int = 0,
    per_class: int = 100,
    allow_fewer: bool = False,
    reference: int = 0,
    workers: int = 1,
) -> Report:
    """Write random training patches of both classes; validation and test stay in their files.

    Parameters
    ----------
    folder : path
        With ``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`` or ``.h5.gz``; the slide of
        a patch is noted as its patient if the ``…_meta.csv`` of its split is there too.
    out, size, seed, per_class, allow_fewer, workers
        See `medbudget.data.picai.prepare_picai`; paper: 100 of each class.
    reference : int
        Also write that many patches of each class of the official validation split to
        ``reference``, for distances; patches and slides of the training split are left out.
    """
    check_settings(size=size, seed=seed, workers=workers, per_class=per_class, reference=reference)
    folder = Path(folder)
    check_apart(out, folder)
    notes = ["validation and test are read from the HDF5 files, which medbudget classify takes"]
    taken: dict[str, Item] = {}
    items: list[Item] = []
    for split, source, n in (("train", "train", per_class), ("reference", "val", reference)):
        if n:
            items += _choose_patches(folder, split, source, n, seed, allow_fewer, taken, notes)
    settings = {
        "dataset": "pcam", "size": size, "seed": seed, "per_class": per_class,
        "reference": reference,
    }  # fmt: skip
    make = partial(_make, folder=folder, size=size)
    return prepare_items(items, make, out, settings=settings, notes=notes, workers=workers)


def _choose_patches(
    folder: Path, split: str, source: str, n: int, seed: int, allow_fewer: bool,
    taken: dict[str, Item], notes: list[str],
) -> list[Item]:  # fmt: skip
    """Choose n random patches of each class of an official split, for a split of ours.

    `taken` holds the patches chosen so far by the hash of their pixels, and gets these too.
    """
    open_pcam(folder, source, "x").close()  # unpack here, once, before there are workers
    labels, slides = _read_table(folder, source)
    if not slides:
        notes.append(f"slides are unknown without {_name(source, 'meta.csv')}")
    used = {item.patient for item in taken.values()}
    items: list[Item] = []
    left_out = 0
    for value, label in enumerate(LABELS):
        queue = [int(i) for i in shuffle(map(str, np.flatnonzero(labels == value)), seed=seed)]
        before = len(items)
        for i in queue:
            if len(items) == before + n:
                break
            name = f"{source}_{i:06d}"
            item = Item(name, label, split, slides[i] if slides else name, (source, i))
            twin = taken.setdefault(hash_pixels(load_patches(folder, source, [i], size=EDGE)), item)
            if twin.label != label:
                raise ValueError(
                    f"{twin.name} ({twin.label}) and {name} ({label}) are the same pixels in "
                    "two classes; download the files again, or choose another --seed"
                )
            if twin.split != split or item.patient in used:
                left_out += 1
            else:
                items.append(item)
        if len(items) < before + n and not allow_fewer:
            raise ValueError(
                f"too few patches in the official {source} split: {label}: {n} wanted for {split}, "
                f"there are {len(items) - before}; ask for fewer, or take what there is "
                "(--allow-fewer)"
            )
    if left_out:
        notes.append(
            f"{left_out} patches of the official {source} split left out: the training patches "
            "have the same pixels or slides"
        )
    return items


def _read_table(folder: Path, split: str) -> tuple[Any, list[str]]:
    """Return the labels of a split and the slides of its meta table; patches must agree with both."""
    with open_pcam(folder, split, "y") as opened:
        labels = _read_rows(opened["y"], ...).reshape(-1)
    patches = folder / _name(split, "x.h5")
    if patches.is_file():
        with _open(patches, "x") as opened:
            n = len(opened["x"])
        if n != len(labels):
            raise OSError(
                f"{patches} has {n} patches, there are {len(labels)} labels: are they of "
                "different splits? Download both again"
            )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels of {split} are {np.unique(labels)[:5]}; allowed are 0 and 1")
    labels = labels.astype(np.uint8)
    file = folder / _name(split, "meta.csv")
    if not file.is_file():
        return labels, []
    rows = read_table(file)
    slides = [row.get("wsi", "") for row in rows]
    if len(slides) != len(labels) or not all(slides):
        raise ValueError(
            f"{file} has {len(slides)} rows; {len(labels)} patches need one each, with column wsi"
        )
    truth = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
    stated = [row.get("center_tumor_patch", "").lower() for row in rows]
    wrong = [i for i, text in enumerate(stated) if text and truth.get(text) != labels[i]]
    if wrong:
        raise ValueError(
            f"{file} and the labels of {split} disagree about {len(wrong)} of {len(rows)} patches, "
            f"first about patch {wrong[0]}: download both again"
        )
    return labels, slides


def _make(item: Item, *, folder: Path, size: int) -> Made:
    split, index = item.job
    (image,) = load_patches(folder, split, [index], size=size)
    return Made(
        image,
        (f"{_name(split, 'x.h5')}[{index}]",),
        window="as stored (8 bit)",
        spacing=(SPACING_MM * EDGE / size,) * 2,
        crop=f"all {EDGE} x {EDGE} px",
    )
