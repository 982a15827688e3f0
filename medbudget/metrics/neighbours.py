"""Memorisation: is a synthetic image nearer to a training image than held-out real images are?

Distances are those of the image, its mirror image and, in pixels, its small shifts. Pixels are
reduced first, so that noise averages out. In network features only near-exact copies are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import norm, rankdata, tiecorrect

from medbudget.images import check_images, hash_images
from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.metrics.features import compute_features
from medbudget.metrics.frechet import Z95, Array
from medbudget.metrics.image_sets import check_shapes
from medbudget.metrics.kernel import squared_distances
from medbudget.metrics.scores import Score

Index = npt.NDArray[np.intp]
SIZE, SHIFT = 32, 2  # pixels of the images that are compared, and of the largest shift


def _unit(windows: torch.Tensor) -> torch.Tensor:
    """Flatten, subtract each image's mean, scale to norm 1 (constant images to 0)."""
    flat = windows.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-6)


def pixel_neighbours(images: torch.Tensor, train: torch.Tensor) -> tuple[Array, Index]:
    """Return the nearest training image by normalised correlation, over flips and small shifts.

    Both sets, ``(N, 3, H, W) uint8``, are reduced to 32 pixels by area pooling, which removes grain.
    The centre of every training image is correlated with the windows of the other image, and of its
    mirror image, at all shifts of up to 2 of these pixels (6 % of the width) by half a pixel.

    Returns 1 - correlation, ``(N,)``: 0 for a copy (of any brightness and contrast), 1 for no
    likeness; and which training image is nearest.
    """
    inner = SIZE - 2 * SHIFT
    small_train = F.adaptive_avg_pool2d(train.float(), SIZE)
    targets = _unit(small_train[..., SHIFT : SHIFT + inner, SHIFT : SHIFT + inner])
    best = torch.full((len(images),), -2.0)
    index = torch.zeros(len(images), dtype=torch.long)
    fine = F.adaptive_avg_pool2d(images.float(), 2 * SIZE)  # so that shifts go by half a pixel
    for view in (fine, fine.flip(-1)):
        for row in range(4 * SHIFT + 1):
            for column in range(4 * SHIFT + 1):
                window = view[..., row : row + 2 * inner, column : column + 2 * inner]
                value, where = (_unit(F.avg_pool2d(window, 2)) @ targets.T).max(1)
                better = value > best
                best[better], index[better] = value[better], where[better]
    return (1 - best).double().clamp(min=0).numpy(), index.numpy()


def feature_neighbours(
    images: torch.Tensor, train: torch.Tensor, extractor: str | Extractor, **options: Any
) -> tuple[Array, Index]:
    """Return the nearest training image by distance of features, over mirror images.

    As `pixel_neighbours`, with Euclidean distances; the `options` are those of `compute_features`.
    """
    targets, *own = (
        compute_features(one, extractor, **options).astype(np.float64)
        for one in (train, images, images.flip(-1))
    )
    table = np.min([squared_distances(features, targets) for features in own], axis=0)
    index = table.argmin(1)
    return np.sqrt(table[np.arange(len(table)), index]), index


@dataclass(frozen=True)
class Memorisation:
    """Nearest training neighbours of synthetic images, calibrated on held-out real ones."""

    space: str  # "pixels" or an extractor's title
    distance: Array  # (N,) of every synthetic image to its nearest training image
    index: Index  # (N,) which one that is
    heldout_distance: Array  # (H,) of the held-out real images
    p_value: Array  # (N,) (1 + held-out images at least as near) / (1 + H)
    level: float  # images with a p-value at or below it are flagged
    note: str = ""
    extractor: Extractor | None = field(default=None, repr=False)

    @property
    def flagged(self) -> npt.NDArray[np.bool_]:
        """Return which synthetic images are nearer to training than the level allows."""
        return self.p_value <= self.level

    @property
    def share(self) -> float:
        """Share of flagged images; without any copying, about `level`."""
        return float(self.flagged.mean())

    @property
    def c_t(self) -> float:
        """z of a rank test that synthetic images are nearer to training than held-out ones.

        As C_T of Meehan et al. (2020) with a single cell: well below 0, copying; well above 0,
        synthetic images lie further from the training images than real ones do.
        """
        n, m = len(self.distance), len(self.heldout_distance)
        rank = rankdata(np.concatenate([self.distance, self.heldout_distance]))
        u = rank[:n].sum() - n * (n + 1) / 2
        sd = np.sqrt(tiecorrect(rank) * n * m * (n + m + 1) / 12)
        return float((u - n * m / 2) / sd) if sd > 0 else 0.0

    def worst(self, k: int = 8) -> list[tuple[int, int]]:
        """Return the `k` pairs (synthetic, training) to look at, most suspicious first."""
        return [(int(i), int(self.index[i])) for i in np.argsort(self.distance)[:k]]

    def scores(self) -> list[Score]:
        """Return the share of flagged images (Wilson interval) and C_T as scores."""
        n, h, z = len(self.distance), len(self.heldout_distance), self.c_t
        about: dict[str, Any] = {"n": n, "extractor": self.space, "resize": "area pooling"}
        notes = [f"calibrated on {h} held-out real images", self.note]
        if self.extractor:
            about |= {"extractor_hash": self.extractor.hash, "resize": self.extractor.resize_rule}
            notes.insert(1, "noise can hide a copy here: rely on the pixels")
        if h < 99:  # too few for the 1 % level
            about["remark"] = f"rests on only {h} held-out image{'s' * (h > 1)}"
        note = "; ".join(filter(None, notes))
        level = f"at the {self.level:.2g} level; {note}"
        rank = f"z; below 0: nearer to training; p = {norm.cdf(z):.2g} for copying; {note}"
        limits = wilson(int(self.flagged.sum()), n)
        return [
            Score(f"Copied share ({self.space})", self.share, limits, note=level, **about),
            Score(f"C_T ({self.space})", z, None, note=rank, **about),
        ]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion.

    Examples
    --------
    >>> [round(limit, 3) for limit in wilson(36, 50)]  # the paper's reader
    [0.583, 0.825]
    """
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (
        float(centre - half) if successes > 0 else 0.0,
        float(centre + half) if successes < n else 1.0,
    )


def memorisation(
    synthetic: torch.Tensor,
    train: torch.Tensor,
    heldout: torch.Tensor,
    *,
    space: str | Extractor = "pixels",
    level: float = 0.01,
    **options: Any,
) -> Memorisation:
    """Compare synthetic images with the training images, calibrated on held-out real images.

    All are ``(N, 3, H, W) uint8``. `heldout` are real images, best of other patients, that were not
    trained on; those that are in `train` byte for byte are left out and counted in the note. The
    `space` is "pixels", an extractor or its name: normalised correlation (flips and small shifts;
    blind to noise), or feature distance (flips only; a little noise hides a copy). Images are
    flagged that are nearer to training than the share `level` of the held-out images; with fewer
    than 1 / level - 1 of these it is raised to what they can show. The `options` are those of
    `compute_features`.
    """
    sets = {"synthetic": synthetic, "training": train, "held-out": heldout}
    check_shapes({name: check_images(images, name=name) for name, images in sets.items()})
    trained = set(hash_images(train))
    fresh = [i for i, digest in enumerate(hash_images(heldout)) if digest not in trained]
    if not fresh:
        raise ValueError("every held-out image is also a training image: add others")
    notes = []
    if left_out := len(heldout) - len(fresh):
        notes.append(f"{left_out} real images that are training images left out")
    if 1 / (len(fresh) + 1) > level:
        notes.append(f"level raised from {level:g}: only {len(fresh)} held-out images")
        level = 1 / (len(fresh) + 1)
    extractor = None
    if space != "pixels":
        extractor = load_extractor(space) if isinstance(space, str) else space
    (distance, index), (far, _) = (
        feature_neighbours(images, train, extractor, **options)
        if extractor
        else pixel_neighbours(images, train)
        for images in (synthetic, heldout[fresh])
    )
    p = (1 + np.searchsorted(np.sort(far), distance, side="right")) / (1 + len(far))
    title = extractor.title if extractor else "pixels"
    return Memorisation(title, distance, index, far, p, level, "; ".join(notes), extractor)
