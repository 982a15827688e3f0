"""Phantoms: procedural look-alikes of the paper's three kinds of images, with lesion masks.

They are drawn at four times the size and averaged, with the voxels, windows and noise of an
acquisition. A phantom is the same "patient" at any size. The anatomy is that of textbooks: nothing
was fitted to a base, and the embedded base was pretrained without phantoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.chest import draw_chest
from medbudget.data.phantoms.drawing import shrink
from medbudget.data.phantoms.histology import draw_histology
from medbudget.data.phantoms.prostate import draw_prostate
from medbudget.images import check_images

KINDS: dict[str, tuple[str, ...]] = {
    "prostate": ("healthy", "tumour"),
    "chest": ("healthy", "cardiomegaly", "pleural_effusion", "pneumonia"),
    "histology": ("normal", "metastasis"),
}
RESTRICTED = 10.0  # gray levels by which DWI exceeds ADC where `find_tumours` sees a tumour
SPLITS = ("train", "val", "test")
MIN_SIZE, MAX_SIZE = 32, 512


@dataclass(frozen=True, eq=False)
class Phantoms:
    """Phantom images with their lesions and labels.

    Prostate images have T2W, ADC and DWI as R, G and B, chest images three equal channels. The mask
    is the tumour, the abnormal region of the chest or the metastasis.
    """

    images: torch.Tensor  # (n, 3, size, size) uint8
    masks: torch.Tensor  # (n, size, size) bool; all False where there is no lesion
    labels: tuple[str, ...]  # n; combined ones are joined by "+"


def make_phantoms(
    kind: str,
    label: str | Sequence[str],
    n: int,
    *,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
) -> Phantoms:
    """Draw `n` phantoms of one kind and label.

    Image i depends on kind, label, seed, split and i alone: the first k of n equal the k of a
    shorter call, and no image of one split or label shares its random numbers with another.

    Parameters
    ----------
    kind : {"prostate", "chest", "histology"}
    label : str or sequence of str
        Prostate ``healthy|tumour``; chest ``healthy|cardiomegaly|pleural_effusion|pneumonia``, of
        which several diseases may be combined; histology ``normal|metastasis``.
    n : int
        How many, at least 1.
    size : int
        Pixels an edge, 32 to 512; the anatomy is meant to be seen at 64 and more.
    seed : int
        0 to 2**64 - 1.
    split : {"train", "val", "test"}

    Raises
    ------
    ValueError
        An unknown kind, label or split, labels that exclude each other, or a number out of range.

    Examples
    --------
    >>> phantoms = make_phantoms("prostate", "tumour", 3)
    >>> tuple(phantoms.images.shape), tuple(phantoms.masks.shape)
    ((3, 3, 64, 64), (3, 64, 64))
    >>> phantoms.masks.any(2).any(1).tolist()  # each has a tumour
    [True, True, True]
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of phantom {kind!r}; allowed are {', '.join(KINDS)}")
    labels = _check_labels(kind, label)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed are {', '.join(SPLITS)}")
    if n < 1 or not MIN_SIZE <= size <= MAX_SIZE or not 0 <= seed < 2**64:
        raise ValueError(
            f"n >= 1, {MIN_SIZE} <= size <= {MAX_SIZE} and 0 <= seed < 2**64 are needed, "
            f"got n={n}, size={size}, seed={seed}"
        )
    draw = {"prostate": draw_prostate, "chest": draw_chest, "histology": draw_histology}[kind]
    images = np.empty((n, 3, size, size), np.uint8)
    masks = np.empty((n, size, size), np.bool_)
    for index in range(n):
        rng = np.random.default_rng(_seed_words(kind, labels, split, seed, index))
        image, mask = draw(rng, size, labels)
        images[index] = np.rint(np.clip(image, 0, 1) * 255)
        cover = shrink(mask.astype(np.float32))
        masks[index] = cover > min(
            0.5, 0.9 * cover.max()
        )  # a lesion smaller than a pixel keeps one
    return Phantoms(torch.from_numpy(images), torch.from_numpy(masks), ("+".join(labels),) * n)


def find_tumours(images: torch.Tensor) -> torch.Tensor:
    """Return where prostate phantoms show a tumour, ``(N, H, W) bool``: a rule, not the truth.

    It marks restricted diffusion in and around the gland: DWI (blue) brighter than ADC (green) after
    a blur of 1/64 of the width. It misses about a quarter of the tumours, those of low contrast, and
    marks more than 0.15 % of the image in one of eight healthy prostates.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``, T2W, ADC and DWI.
    """
    check_images(images)
    excess = images[:, 2].float() - images[:, 1].float()
    height, width = excess.shape[1:]
    smooth = gaussian_filter(excess.cpu().numpy(), (0, width / 64, width / 64))
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return torch.from_numpy((smooth > RESTRICTED) & ((x / 0.6) ** 2 + ((y - 0.03) / 0.45) ** 2 < 1))


def _check_labels(kind: str, label: str | Sequence[str]) -> tuple[str, ...]:
    """Return the labels as a tuple, or raise."""
    allowed = KINDS[kind]
    labels = (label,) if isinstance(label, str) else tuple(label)
    unknown = [one for one in labels if one not in allowed]
    if unknown or not labels:
        refused = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"unknown label {refused} for {kind}; allowed are {', '.join(allowed)}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"a label is named twice in {labels}")
    if len(labels) > 1 and (kind != "chest" or allowed[0] in labels):
        raise ValueError(f"{' + '.join(labels)} cannot be combined; only chest diseases can")
    return labels


def _seed_words(
    kind: str, labels: tuple[str, ...], split: str, seed: int, index: int
) -> tuple[int, ...]:
    """Name one image by six 32-bit words: a fixed number, so that no two names run together."""
    label_bits = sum(1 << KINDS[kind].index(one) for one in labels)
    names = SPLITS.index(split) + 1, list(KINDS).index(kind) + 1
    return (*names, label_bits, seed & 0xFFFFFFFF, seed >> 32, index)
