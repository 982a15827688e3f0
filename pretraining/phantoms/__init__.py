"""Phantoms that are drawn as they would be acquired: at four times the size, then averaged.

They are to replace `medbudget.data.phantoms` together with the next embedded base, since every
recorded result and shipped word belongs to the phantoms that are there now. Everything is drawn from
textbook anatomy; nothing was fitted to a base or copied from an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from medbudget.data import phantoms as today
from pretraining.phantoms.chest import draw_chest
from pretraining.phantoms.drawing import shrink
from pretraining.phantoms.histology import draw_histology
from pretraining.phantoms.prostate import draw_prostate


def make_phantoms(
    kind: str,
    label: str | Sequence[str],
    n: int,
    *,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
) -> today.Phantoms:
    """Draw `n` phantoms of one kind and label; arguments as `medbudget.make_phantoms`.

    Examples
    --------
    >>> phantoms = make_phantoms("histology", "metastasis", 2)
    >>> tuple(phantoms.images.shape), tuple(phantoms.masks.shape)
    ((2, 3, 64, 64), (2, 64, 64))
    """
    labels = today._check_labels(kind, label)
    draw = {"prostate": draw_prostate, "chest": draw_chest, "histology": draw_histology}[kind]
    images = np.empty((n, 3, size, size), np.uint8)
    masks = np.empty((n, size, size), np.bool_)
    for index in range(n):
        rng = np.random.default_rng(today._seed_words(kind, labels, split, seed, index))
        image, mask = draw(rng, size, labels)
        images[index] = np.rint(255 * np.clip(image, 0, 1))
        cover = shrink(mask.astype(np.float32))
        masks[index] = cover > min(0.5, 0.9 * cover.max())  # a lesion below a pixel keeps one
    return today.Phantoms(
        torch.from_numpy(images), torch.from_numpy(masks), ("+".join(labels),) * n
    )
