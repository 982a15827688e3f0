"""`evaluate`: two sets of images in, a table of scores out, each beside its floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medbudget.images import check_images
from medbudget.metrics.features import OFFLINE, Extractor, load_extractor
from medbudget.metrics.features import features as compute_features
from medbudget.metrics.frechet import Features, frechet_interval
from medbudget.metrics.kernel import kernel_distance, precision_recall
from medbudget.metrics.neighbours import memorisation, not_in, wilson
from medbudget.metrics.permutation import permutation_test
from medbudget.metrics.scores import Score


def _score(
    name: str,
    value: float,
    interval: tuple[float, float] | None,
    n: tuple[int, int],
    extractor: Extractor,
    normalize: str,
    *notes: str,
) -> Score:
    return Score(
        name=name,
        value=value,
        interval=interval,
        n=n[0] if n[0] == n[1] else n,
        extractor=extractor.title,
        extractor_hash=extractor.hash,
        resize=extractor.resize_rule,
        normalisation=normalize,
        note="; ".join(note for note in (*notes, extractor.note) if note),
    )


def frechet_score(
    x: Features,
    y: Features,
    extractor: Extractor,
    *,
    name: str = "",
    normalize: str = "none",
    interval: str = "influence",
    note: str = "",
) -> Score:
    """Return the Frechet distance of two ``(n, d)`` sets of one extractor's features as a score.

    `interval` is the method of `frechet_interval`; `normalize` is what was done before the
    features were computed.
    """
    estimate = frechet_interval(x, y, method=interval)
    method = {
        "influence": "",
        "bootstrap": "bootstrap interval",
        "paper": "percentile bootstrap, biased upward",
    }[interval]
    return _score(
        name or extractor.distance_name,
        estimate.value,
        estimate.interval,
        (len(np.asarray(x)), len(np.asarray(y))),
        extractor,
        normalize,
        note,
        method,
        "normalised images: blind to darkness and contrast" if normalize == "paper" else "",
    )


def _kernel_scores(
    x: Features, y: Features, extractor: Extractor, normalize: str, k: int = 3
) -> list[Score]:
    """Return the kernel distance, precision and recall of two sets of features."""
    n, m = len(np.asarray(x)), len(np.asarray(y))
    kernel = kernel_distance(x, y)
    scores = [
        _score(
            "KID" if extractor.name == "inception" else f"Kernel distance ({extractor.title})",
            kernel.value,
            kernel.interval,
            (n, m),
            extractor,
            normalize,
            "unbiased: does not depend on n",
        )
    ]
    k = min(k, n - 1, m - 1)
    precision, recall = precision_recall(x, y, k=k)
    for name, value, count in (("Precision", precision, m), ("Recall", recall, n)):
        scores.append(
            _score(
                name,
                value,
                wilson(round(value * count), count),
                (n, m),
                extractor,
                normalize,
                f"k = {k}; Wilson interval for the other set as it is",
            )
        )
    return scores


def evaluate(
    real: torch.Tensor,
    synthetic: torch.Tensor,
    *,
    features: str | Extractor | Sequence[str | Extractor] = OFFLINE,
    train: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    paired: bool = False,
    normalize: str = "none",
    interval: str = "influence",
    floor: bool = True,
    repeats: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    cache: bool = True,
    progress: bool = False,
) -> list[Score]:
    """Score synthetic images against real ones.

    Parameters
    ----------
    real, synthetic : torch.Tensor
        ``(N, 3, H, W) uint8``; the two may have different N and size.
    features : str, Extractor or a sequence of them
        The extractors (`load_extractor`); the layout distance of 8x8 thumbnails is always added.
    train : torch.Tensor, optional
        The images that the generator was trained on: adds the memorisation scores, in pixels and
        in the first extractor's features, calibrated on the `real` images that are not in `train`.
    permutation : torch.Tensor, optional
        Another generator's images: adds permutation tests of the difference of distances.
    paired : bool
        Images i of `synthetic` and `permutation` were made from the same seed.
    normalize : "none" or "paper"
        See `medbudget.metrics.normalize_images`.
    interval : "influence", "bootstrap" or "paper"
        See `frechet_interval`.
    floor : bool
        Put beside every Frechet distance that of two disjoint real sets of the same n, what a
        perfect generator would score. Where there are fewer than 2 n real images, n is lowered to
        half of them for both. ``False`` uses all images and gives no floor.
    repeats : int
        Permutations.
    seed : int
        Chooses the images where not all are used, and the permutations.

    Returns
    -------
    list of Score
        For every extractor: Frechet distance, its real-versus-real floor, and (but for layout)
        kernel distance, precision and recall, then permutation and memorisation.

    Raises
    ------
    ValueError
        Fewer than 4 real images with a floor (2 without), or fewer than 2 synthetic ones.

    Examples
    --------
    >>> from medbudget import make_phantoms
    >>> real = make_phantoms("prostate", "healthy", 8, split="test").images
    >>> fakes = make_phantoms("prostate", "tumour", 4).images
    >>> for score in evaluate(real, fakes)[:2]:
    ...     print(score.name, score.n)
    FD (EfficientNet-Lite0) 4
    FD (EfficientNet-Lite0), real vs real 4
    """
    given = {"real": real, "synthetic": synthetic, "train": train, "permutation": permutation}
    for name, images in given.items():
        if images is not None:
            check_images(images, name=name)
    names = [features] if isinstance(features, str | Extractor) else list(features)
    if not any((f if isinstance(f, str) else f.name) == "layout" for f in names):
        names.append("layout")
    need = 4 if floor else 2
    if len(real) < need or len(synthetic) < 2:
        raise ValueError(
            f"{len(real)} real and {len(synthetic)} synthetic images are too few: at least {need} "
            f"and 2 are needed{' for a score with its floor' if floor else ''}"
        )
    rng = np.random.default_rng(seed)
    notes = []
    second = np.empty(0, dtype=int)
    if floor:
        n = min(len(synthetic), len(real) // 2)
        order = rng.permutation(len(real))
        first, second = np.sort(order[:n]), np.sort(order[n : 2 * n])
        chosen = np.sort(rng.permutation(len(synthetic))[:n])
        if n < len(synthetic):
            notes.append(
                f"n lowered from {len(synthetic)} to {n}: {len(real)} real images give two "
                f"disjoint sets of {n}"
            )
    else:
        first, chosen = np.arange(len(real)), np.arange(len(synthetic))
    if train is not None and (seen := int((~not_in(real[first], train)).sum())):
        notes.append(f"{seen} of the {len(first)} real images are training images")
    note = "; ".join(notes)
    options: dict[str, Any] = {"batch_size": batch_size, "cache": cache, "progress": progress}

    extractors = [
        load_extractor(item, device=device) if isinstance(item, str) else item for item in names
    ]
    scores = []
    for extractor in extractors:

        def get(images: torch.Tensor, extractor: Extractor = extractor) -> np.ndarray:
            return compute_features(images, extractor, normalize=normalize, **options)

        x, y = get(real), get(synthetic)
        settings: dict[str, Any] = {"normalize": normalize, "interval": interval}
        scores.append(frechet_score(x[first], y[chosen], extractor, note=note, **settings))
        if floor:
            scores.append(
                frechet_score(
                    x[first],
                    x[second],
                    extractor,
                    name=f"{extractor.distance_name}, real vs real",
                    note="the floor: two disjoint real sets",
                    **settings,
                )
            )
        if extractor.name != "layout":
            scores += _kernel_scores(x[first], y[chosen], extractor, normalize)
        if permutation is not None:
            z = get(permutation)
            same = min(len(y), len(z))
            for statistic in ("frechet",) if extractor.name == "layout" else ("frechet", "kernel"):
                test = permutation_test(
                    y[:same], z[:same], x, paired=paired, statistic=statistic, repeats=repeats,
                    seed=seed,
                )  # fmt: skip
                kind = extractor.distance_name if statistic == "frechet" else (
                    f"Kernel distance ({extractor.title})"
                )  # fmt: skip
                scores.append(
                    _score(
                        f"{kind}, difference to the other set",
                        test.difference,
                        None,
                        (len(x), same),
                        extractor,
                        normalize,
                        f"p = {test.p_value:.3g} ({repeats} {'paired ' if paired else ''}"
                        "permutations); below 0: nearer to the real images than the other set",
                    )
                )
    if train is not None:
        spaces: list[str | Extractor] = ["pixels"]
        spaces += [e for e in extractors if e.name != "layout"][:1]
        for space in spaces:
            scores += memorisation(synthetic, train, real, space=space, **options).scores()
    return scores
