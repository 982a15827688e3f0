"""Sets of images to score: one rule of size for all of them, and what their files tell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medbudget.data.prepare import find_patients
from medbudget.images import (
    check_images,
    find_images,
    hash_images,
    is_prepared,
    load_images,
    read_record,
)
from medbudget.pictures import ImageError, open_picture
from medbudget.settings import check_counts

Source = torch.Tensor | str | os.PathLike[str]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with the files that they came from; tensors have no files."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    files: tuple[Path, ...] = ()
    name: str = ""  # the folder

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def hashes(self) -> list[str]:
        """Return a hash of each image's pixels."""
        return hash_images(self.images)

    @cached_property
    def patients(self) -> Sequence[str]:
        """Return each image's patient by the manifest of `medbudget prepare`, empty without one."""
        return find_patients(Path(self.name), self.files) if self.files else ()

    def groups(self, rows: Index | None = None) -> list[str] | None:
        """Return the patients of some images, None where each has its own or none is known."""
        chosen = range(len(self.patients)) if rows is None else rows
        patients = [self.patients[i] for i in chosen] if self.patients else []
        return patients if len(set(patients)) < len(patients) else None

    @cached_property
    def training_hashes(self) -> set[str]:
        """Return the hashes of the images that these images' words were trained on, as recorded."""
        records = (read_record(file) or {} for file in self.files)
        return set(" ".join(str(one.get("training_images", "")) for one in records).split())


def load_sets(
    sources: Mapping[str, Source | None], *, size: int | None = None
) -> dict[str, ImageSet]:
    """Load folders by one rule: longest edge to `size` pixels, padded with black to a square.

    `sources` map roles to ``(N, 3, H, W) uint8`` images, which stay as they are, to folders, or to
    ``None``, which is left out. Without a `size`, that of the "synthetic" images is taken. Sets that
    are not of one shape (width to height) would be distorted differently: ValueError.
    """
    given = {role: source for role, source in sources.items() if source is not None}
    files = {
        role: _find_files(role, source)
        for role, source in given.items()
        if isinstance(source, str | os.PathLike)
    }
    if size is None:
        size = longest_edge(files.get("synthetic", given.get("synthetic")))
    check_counts(size=size)
    sets = {
        role: ImageSet(load_images(files[role], size=size), tuple(files[role]), str(source))
        if isinstance(source, str | os.PathLike)
        else ImageSet(check_images(source, name=role), name=role)
        for role, source in given.items()
    }
    check_shapes({role: part.images for role, part in sets.items()})
    return sets


def _find_files(role: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Return a folder's images; of a prepared folder as a whole, only training images are meant."""
    if role != "train" and is_prepared(folder):
        cells = sorted(
            str(path.relative_to(folder)) for path in Path(folder).glob("*/*") if path.is_dir()
        )
        raise ImageError(
            f"{folder} was prepared with {', '.join(cells)}: name one of them for the {role} images"
        )
    return find_images(folder)


def check_shapes(sets: Mapping[str, torch.Tensor]) -> None:
    """Refuse sets of another shape (width to height): features would stretch them differently."""
    first, (*_, high, wide) = next((name, images.shape) for name, images in sets.items())
    for name, (*_, h, w) in ((name, images.shape) for name, images in sets.items()):
        if abs(h * wide - w * high) > max(h, w, high, wide):  # more than a pixel of rounding
            raise ValueError(
                f"{first} images are {high} x {wide} and {name} images {h} x {w} (H x W): of another "
                "shape; load both with load_images(…, size=…), which pads to squares"
            )


def longest_edge(source: Any) -> int:
    """Return the longest edge of a tensor's images, or of files that can be read."""
    if isinstance(source, torch.Tensor):
        return max(source.shape[2:])
    edges = [1]
    for file in source:
        with suppress(ImageError):  # reported when the images are loaded
            edges.append(max(open_picture(file)[0].size))
    return max(edges)


def _find_seed(file: Path) -> int | None:
    """Return the seed that a file records: ours, or that of A1111's "parameters"."""
    record = read_record(file) or {}
    if isinstance(record.get("seed"), int):
        image = record.get("image", 0)
        return int(record["seed"]) + (image if isinstance(image, int) else 0)
    with suppress(Exception), Image.open(file, formats=("PNG",)) as opened:
        return int(re.findall(r"\bSeed: (\d+)", str(opened.info["parameters"]))[0])
    return None


def pair(first: ImageSet, second: ImageSet) -> tuple[Index, Index, str]:
    """Pair the images of two folders by recorded seed, or by the number in the file's name.

    Returns both orders, and what they were paired by: "seed", "number", or "order" for tensors. Sets
    that do not hold exactly the same seeds or numbers, each once, raise ValueError.
    """
    sets, by, keys = (first, second), "order", [list(range(len(one))) for one in (first, second)]
    if first.files and second.files:
        by, found = "seed", [[_find_seed(file) for file in one.files] for one in sets]
        if not any(key is not None for part in found for key in part):
            numbers = [[re.findall(r"\d+", file.stem) for file in one.files] for one in sets]
            by, found = "number", [[int(n[-1]) if n else None for n in part] for part in numbers]
        keys = [[key for key in part if key is not None] for part in found]
    for one, part in zip(sets, keys):
        if not len(one) == len(part) == len(set(part)) or set(part) != set(keys[0]):
            raise ValueError(
                f"{first.name} and {second.name} cannot be paired by {by}: {one.name} has {len(one)} "
                f"images with {len(set(part))} different {by}s, and both must have the same, each "
                "once; draw both from the same seeds, or leave --paired out"
            )
    return np.argsort(keys[0]), np.argsort(keys[1]), by


def choose_images(
    real: ImageSet, synthetic: ImageSet, floor: bool, rng: np.random.Generator
) -> tuple[Index, Index, Index]:
    """Choose two disjoint sets of real images, by patient where known, and as many synthetic."""
    if not floor:
        return np.arange(len(real)), np.empty(0, dtype=int), np.arange(len(synthetic))
    order = rng.permutation(len(real))
    halves = [order[: len(real) // 2], order[len(real) // 2 :]]
    n = min(len(synthetic), len(real) // 2)
    if patients := real.groups():
        of = np.array(patients)
        halves = [np.empty(0, dtype=int)] * 2
        for patient in rng.permutation(np.unique(of)):
            small = int(len(halves[1]) < len(halves[0]))
            halves[small] = np.concatenate([halves[small], np.flatnonzero(of == patient)])
        n = min(n, *map(len, halves))
        if n < 2:
            raise ValueError(
                f"the real images are of {len(set(patients))} patients: too few for two disjoint "
                "sets; add patients, or do without the floor (--no-floor)"
            )
        halves = [rng.permutation(half) for half in halves]
        order = np.concatenate([halves[0][:n], halves[1][:n]])
    first, second = np.sort(order[:n]), np.sort(order[n : 2 * n])
    chosen = np.sort(rng.permutation(len(synthetic))[:n])
    if sorted(real.hashes) == sorted(synthetic.hashes):  # a set against itself: the same images
        place = {digest: i for i, digest in enumerate(synthetic.hashes)}
        chosen = np.array([place[real.hashes[i]] for i in first])
    return first, second, chosen


def find_leaks(real: ImageSet, synthetic: ImageSet, used: Index, train: ImageSet | None) -> str:
    """Say how many of the real images are training images, synthetic, or among the synthetic ones."""
    remarks = []
    if drawn := sum(bool((read_record(file) or {}).get("synthetic")) for file in real.files):
        remarks.append(f"{drawn} of the {len(real)} real images are synthetic by their own record")
    seen = set(train.hashes) if train else set()
    trained = [real.hashes[i] in seen for i in used]
    if synthetic.training_hashes:  # of images of the size that was drawn
        size, digests = longest_edge(synthetic.files), real.hashes
        if real.files and real.images.shape[3] != size:
            digests = hash_images(load_images(real.files, size=size))
        trained = [t or digests[i] in synthetic.training_hashes for i, t in zip(used, trained)]
    if any(trained):
        remarks.append(f"against training images ({sum(trained)} of {len(used)})")
    elif train and train.patients and real.patients:
        shared = {real.patients[i] for i in used} & set(train.patients)
        remarks += [f"against images of {len(shared)} training patients"] if shared else []
    own = set(real.hashes)
    if copies := sum(digest in own for digest in synthetic.hashes):
        remarks.append(f"{copies} of {len(synthetic)} synthetic images are among the real ones")
    return "; ".join(remarks)
