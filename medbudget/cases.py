"""Cases of two classes, with the patients that they come from, and splits that do not leak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from medbudget.data.pcam import LABELS, OFFICIAL, find_split, iterate_patches, load_slides
from medbudget.data.prepare import find_patients
from medbudget.images import (
    ImageError,
    check_images,
    find_images,
    hash_pixels,
    is_prepared,
    load_images,
)
from medbudget.progress import tqdm

LEAK = "a test on them is worth nothing; split by patient: `medbudget prepare folder`"
HEALTHY = ("healthy", "negative", "normal", "no_finding", "control")  # never the positive class
Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Cases:
    """Images of two classes."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64: 0 and 1; 1 is the class that a score speaks for
    names: tuple[str, ...] = ()  # N names for records, such as files; empty where there are none
    classes: tuple[str, str] = ("negative", "positive")  # what 0 and 1 mean
    patients: tuple[str, ...] = ()  # N patients, where a manifest names them
    keys: tuple[str, ...] = ()  # N hashes of the images as they were before a resize

    def __post_init__(self) -> None:
        check_images(self.images)
        for name in ("labels", "names", "patients", "keys"):
            n = len(getattr(self, name))
            if n != len(self.images) and (n or name == "labels"):
                raise ValueError(f"{n} {name} for {len(self.images)} images")
        values = sorted(set(self.labels.tolist()))
        if values != [0, 1]:
            raise ValueError(f"labels of two classes, 0 and 1, are needed; found {values[:5]}")

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, negative: torch.Tensor, positive: torch.Tensor, **options: Any) -> Cases:
        """Return the cases of two sets of images."""
        labels = torch.tensor([0] * len(negative) + [1] * len(positive))
        return cls(torch.cat([negative, positive]), labels, **options)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Return a hash of each image's pixels."""
        return self.keys or tuple(map(hash_pixels, self.images))

    def name(self, i: int) -> str:
        """Return what image `i` is called in a message."""
        return self.names[i] if self.names else f"image {i}"

    def transform(self, change: Transform) -> Cases:
        """Return the cases with other images, still known by the hashes of these."""
        return replace(self, images=change(self.images), keys=self.hashes)

    def __add__(self, other: Cases) -> Cases:
        both: dict[str, Any] = {
            name: mine + theirs if mine and theirs else ()
            for name in ("names", "patients", "keys")
            for mine, theirs in [(getattr(self, name), getattr(other, name))]
        }
        images = torch.cat([self.images, other.images])
        return replace(self, images=images, labels=torch.cat([self.labels, other.labels]), **both)


def load_cases(
    source: str | os.PathLike[str],
    *,
    positive: str | None = None,
    size: int | None = None,
    change: Transform | None = None,
) -> Cases:
    """Load a folder with one folder of images for each of two classes, or PatchCamelyon's patches.

    Parameters
    ----------
    source : path
        A folder, or an official file such as ``camelyonpatch_level_2_split_test_x.h5``, beside which
        the labels lie.
    positive : str, optional
        The class that scores speak for; default: the second by name, but none that is called
        healthy, negative, normal, no_finding or control.
    size : int, optional
        See `load_images`. Without it, all images must have one size, and patches keep their 96 px.
    change : callable, optional
        What becomes of the images, such as a resize; their hashes are those from before.
    """
    if (official := find_split(source)) is not None:
        return _load_patches(*official, positive=positive, size=size, change=change)
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    names = sorted(path.name for path in root.glob("[!.]*/"))
    if is_prepared(root):
        raise ValueError(f"{root} was made by `medbudget prepare`; name a split in it: {names}")
    if len(names) != 2:
        raise ValueError(
            f"{root} has {len(names)} class folders ({', '.join(names[:5]) or 'none'}); two are "
            "needed, one for each class"
        )
    classes = order_classes(names, positive, root)
    files = [find_images(root / name) for name in classes]
    sets = [load_images(one, size=size) for one in files]
    if sets[0].shape[1:] != sets[1].shape[1:]:
        raise ImageError(
            f"{classes[0]} has images of {tuple(sets[0].shape[2:])}, {classes[1]} of "
            f"{tuple(sets[1].shape[2:])} (H, W): a classifier could learn the size; bring "
            "all to one with size=… (--size)"
        )
    both = [*files[0], *files[1]]
    labelled = tuple(f"{file.parent.name}/{file.name}" for file in both)
    patients = find_patients(root, both)
    cases = Cases.of(*sets, names=labelled, classes=classes, patients=patients)
    return cases if change is None else cases.transform(change)


def order_classes(names: Sequence[str], positive: str | None, root: Path) -> tuple[str, str]:
    """Return the negative and the positive class."""
    first, second = sorted(names)
    if positive is not None and positive not in names:
        raise ValueError(f"no class {positive!r} in {root}; there are {first}, {second}")
    healthy = [name.lower().replace(" ", "_") in HEALTHY for name in (first, second)]
    swap = positive == first if positive else healthy == [False, True]
    return (second, first) if swap else (first, second)


def _load_patches(
    folder: Path, split: str, *, positive: str | None, size: int | None, change: Transform | None
) -> Cases:
    classes = order_classes(LABELS, positive, folder)
    parts, labels, keys = [], [], []
    batches = iterate_patches(folder, split, size=size or 96)
    for images, truth in tqdm(batches, desc=f"reading {split}", total=OFFICIAL[split] // 64):
        keys += [hash_pixels(image) for image in images]
        parts.append(images if change is None else change(images))
        labels.append(truth.long() if classes[1] == LABELS[1] else 1 - truth.long())
    every = torch.cat(labels)
    return Cases(
        torch.cat(parts),
        every,
        names=tuple(f"{split}_{i:06d}" for i in range(len(every))),
        classes=classes,
        patients=tuple(load_slides(folder, split)),
        keys=tuple(keys),
    )


def check_splits(splits: Mapping[str, Cases]) -> None:
    """Raise ValueError if splits do not fit together.

    They have other classes or sizes, an image in two splits or in two classes, or a patient in two
    splits; the message names them.
    """
    (first, one), *rest = splits.items()
    for name, other in rest:
        for what, mine, theirs in (
            ("class folders", one.classes, other.classes),
            ("sizes", tuple(one.images.shape[2:]), tuple(other.images.shape[2:])),
        ):
            if mine != theirs:
                raise ValueError(
                    f"the {what} differ: {first} has {mine}, {name} has {theirs}; give them the "
                    "same names, and one size=… (--size)"
                )
    check_twins(
        (split, cases.classes[label], cases.name(i), key)
        for split, cases in splits.items()
        for i, (label, key) in enumerate(zip(cases.labels.tolist(), cases.hashes))
    )
    owners: dict[str, tuple[str, str]] = {}
    leaks: dict[str, str] = {}
    for split, cases in splits.items():
        for i, patient in enumerate(cases.patients):
            where, twin = owners.setdefault(patient, (split, cases.name(i)))
            if where != split:
                said = f"{split}: {cases.name(i)} is of one patient with {where}: {twin}"
                leaks.setdefault(patient, said)
    if leaks:
        raise ValueError(
            f"{len(leaks)} patients are in two splits ({_list(leaks.values())}): {LEAK}"
        )


def check_drawn(cases: Cases, name: str) -> None:
    """Raise if an image shows one value only, as drawings that ended in NaN do.

    `name` is what the cases are called in the message, such as "synthetic".
    """
    flat = cases.images.flatten(1)
    empty = torch.nonzero(flat.amin(1) == flat.amax(1)).flatten().tolist()
    if empty:
        raise ValueError(
            f"{len(empty)} {name} images show one value only ({_list(map(cases.name, empty))}): "
            "sampling that ended in NaN leaves such images; draw them again in float32 or bfloat16, "
            "or remove them"
        )


def check_twins(images: Iterable[tuple[str, str, str, str]]) -> None:
    """Refuse images that stand in two splits or in two classes, pixel for pixel, by name.

    `images` are split, class, name and `hash_pixels` of each.
    """
    first: dict[str, tuple[str, str, str]] = {}
    leaks, contradictions = [], []
    for split, label, name, key in images:
        other = first.setdefault(key, (split, label, name))
        if other[0] != split:
            leaks.append(f"{split}: {name} is {other[0]}: {other[2]}")
        elif other[1] != label:
            contradictions.append(f"{split}: {name} is {other[2]}")
    for pairs, where, why in (
        (leaks, "splits", LEAK),
        (contradictions, "classes", "no class can be right for both; keep each in one"),
    ):
        if pairs:
            raise ValueError(
                f"{len(pairs)} images are in two {where}, pixel for pixel ({_list(pairs)}): {why}"
            )


def _list(names: Iterable[str]) -> str:
    """Return the first three of some names, and how many more there are."""
    shown = [*names]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")
