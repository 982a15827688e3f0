"""`evaluate`: two sets of images in, a table of scores out, each beside its floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.metrics.features import compute_features
from medbudget.metrics.frechet import Features, Groups, frechet_interval
from medbudget.metrics.image_sets import Source, choose_images, find_leaks, load_sets, pair
from medbudget.metrics.kernel import kernel_distance, precision_recall
from medbudget.metrics.neighbours import memorisation, wilson
from medbudget.metrics.permutation import permutation_test
from medbudget.metrics.scores import FEW, FLOOR, HALVED, Score
from medbudget.settings import check_number
from medbudget.weights import OFFLINE

NO_GROUPS: tuple[Groups, Groups] = (None, None)
CAVEATS = {"bootstrap": "bootstrap interval", "paper": "percentile bootstrap, biased upward"}


def _score(
    name: str, value: float, interval: tuple[float, float] | None, sets: tuple[np.ndarray, np.ndarray],
    extractor: Extractor, normalize: str, *notes: str,
) -> Score:  # fmt: skip
    n, m = map(len, sets)
    return Score(
        name=name,
        value=value,
        interval=interval,
        n=n if n == m else (n, m),
        extractor=extractor.title,
        extractor_hash=extractor.hash,
        resize=extractor.resize_rule,
        normalisation=normalize,
        note="; ".join(note for note in (*notes, extractor.note) if note),
        remark=f"only {min(n, m)} images" if min(n, m) < FEW else "",
    )


def frechet_score(
    x: Features,
    y: Features,
    extractor: Extractor,
    *,
    name: str = "",
    normalize: str = "none",
    interval: str = "influence",
    groups: tuple[Groups, Groups] = NO_GROUPS,
    note: str = "",
) -> Score:
    """Return the Frechet distance of two ``(n, d)`` sets of one extractor's features as a score.

    `interval` and `groups` (patients) are those of `frechet_interval`; `normalize` is what was
    done before the features were computed.
    """
    estimate = frechet_interval(x, y, method=interval, groups=groups)
    blind = "normalised images: blind to darkness and contrast" if normalize == "paper" else ""
    return _score(
        name or extractor.distance_name, estimate.value, estimate.interval,
        (np.asarray(x), np.asarray(y)), extractor, normalize,
        note, CAVEATS.get(interval, ""), blind,
    )  # fmt: skip


def _kernel_scores(
    x: np.ndarray, y: np.ndarray, extractor: Extractor, normalize: str, groups: tuple[Groups, Groups]
) -> list[Score]:  # fmt: skip
    """Return the kernel distance, precision and recall of two sets of features."""
    about = ((x, y), extractor, normalize)
    kernel = kernel_distance(x, y, groups=groups)
    title = "KID" if extractor.name == "inception" else f"Kernel distance ({extractor.title})"
    unbiased = "unbiased: does not depend on n"
    scores = [_score(title, kernel.value, kernel.interval, *about, unbiased)]
    k = min(3, len(x) - 1, len(y) - 1)
    values = precision_recall(x, y, k=k)
    note = f"k = {k}; Wilson interval for the other set as it is"
    for name, value, own, group in zip(("Precision", "Recall"), values, (y, x), groups[::-1]):
        # images of one patient are not independent
        n = len(own) if group is None else len(set(group))
        scores.append(_score(name, value, wilson(value * n, n), *about, note))
    return scores


def evaluate(
    real: Source,
    synthetic: Source,
    *,
    features: str | Extractor | Sequence[str | Extractor] = OFFLINE,
    train: Source | None = None,
    permutation: Source | None = None,
    paired: bool = False,
    size: int | None = None,
    normalize: str = "none",
    interval: str = "influence",
    floor: bool = True,
    repeats: int = 1000,
    seed: int = 0,
    device: str | torch.device | None = None,
    **options: Any,
) -> list[Score]:
    """Score synthetic images against real ones.

    For every extractor: Frechet distance, its real-versus-real floor, and (but for layout) kernel
    distance, precision and recall, then permutation and memorisation. A score against training
    images, or of few images, says so in its remark.

    Images are ``(N, 3, H, W) uint8`` or folders, which are brought to one `size` (longest edge;
    default: that of `synthetic`), padded to squares; N may differ. In a folder that
    `medbudget prepare` made, intervals are over patients, and the floor's two sets share none.

    Parameters
    ----------
    features : str, Extractor or a sequence of them
        See `load_extractor`; the layout distance of 8x8 thumbnails is always added.
    train : torch.Tensor or path, optional
        The images that the generator was trained on: adds the memorisation scores, in pixels and
        in the first extractor's features, calibrated on the `real` images that are not in `train`.
    permutation : torch.Tensor or path, optional
        Another generator's images: adds permutation tests, with `repeats` permutations.
    paired : bool
        `synthetic` and `permutation` were made from the same seeds: folders are paired by recorded
        seed or by number in the file's name, tensors by order.
    normalize, interval : str
        See `normalize_images` and the methods of `frechet_interval`.
    floor : bool
        Put beside every Frechet distance that of two disjoint real sets of the same n, what a
        perfect generator would score. Where there are fewer than 2 n real images, n is lowered to
        half of them for both. ``False`` uses all images and gives no floor.
    **options
        For `compute_features`: batch_size, cache, progress.

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
    check_number("seed", seed, 0)
    names = [features] if isinstance(features, str | Extractor) else list(features)
    if not any((f if isinstance(f, str) else f.name) == "layout" for f in names):
        names.append("layout")
    extractors = [load_extractor(f, device=device) if isinstance(f, str) else f for f in names]
    sets = load_sets(
        {"real": real, "synthetic": synthetic, "train": train, "permutation": permutation},
        size=size,
    )
    given, made, other = sets["real"], sets["synthetic"], sets.get("permutation")
    need = 4 if floor else 2
    if len(given) < need or len(made) < 2:
        raise ValueError(
            f"{len(given)} real and {len(made)} synthetic images are too few: at least {need} "
            f"and 2 are needed{' for a score with its floor' if floor else ''}"
        )
    first, second, chosen = choose_images(given, made, floor, np.random.default_rng(seed))
    groups = given.groups(first), made.groups(chosen)
    notes = [f"{len(set(g))} patients in {len(g)} images" for g in groups if g is not None]
    rows, columns = np.arange(len(made)), np.arange(len(other) if other else 0)
    if other is not None and paired:
        rows, columns, by = pair(made, other)
        notes.append(f"paired by {by}")
    elif other is not None and len(made) != len(other):
        draw, same = np.random.default_rng(seed), min(len(made), len(other))
        rows, columns = (np.sort(draw.permutation(len(p))[:same]) for p in (made, other))
    scores: list[Score] = []
    for extractor in extractors:
        how: dict[str, Any] = {"extractor": extractor, "normalize": normalize}
        x, y = (compute_features(s.images, **how, **options) for s in (given, made))
        about = how | {"interval": interval, "groups": groups, "note": "; ".join(notes)}
        distance = frechet_score(x[first], y[chosen], **about)
        if floor and len(first) < len(made):
            distance = distance.remarked(f"{HALVED} {len(given)} real images", last=True)
        scores.append(distance)
        if floor:
            about["name"] = extractor.distance_name + FLOOR
            about["groups"] = groups[0], given.groups(second)
            about["note"] = "the floor: two disjoint real sets"
            scores.append(frechet_score(x[first], x[second], **about))
        if extractor.name != "layout":
            scores += _kernel_scores(x[first], y[chosen], extractor, normalize, groups)
        if other is not None:
            z = compute_features(other.images, **how, **options)
            test: dict[str, Any] = {"paired": paired, "repeats": repeats, "seed": seed}
            scores += _compare(x, y[rows], z[columns], extractor, normalize, **test)
    if leaks := find_leaks(given, made, first, sets.get("train")):
        scores = [s if s.name.endswith(FLOOR) else s.remarked(leaks) for s in scores]
    if "train" in sets:
        parts = made.images, sets["train"].images, given.images
        networks = [e for e in extractors if e.name != "layout"]
        spaces: list[str | Extractor] = ["pixels", *networks[:1]]
        for space in spaces:
            scores += memorisation(*parts, space=space, **options).scores()
    return scores


def _compare(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, extractor: Extractor, normalize: str,
    *, paired: bool, **options: Any,
) -> list[Score]:  # fmt: skip
    """Test whether two generators' features y and z are equally far from real ones x."""
    kinds = {"frechet": extractor.distance_name}
    if extractor.name != "layout":
        kinds["kernel"] = f"Kernel distance ({extractor.title})"
    scores = []
    for statistic, kind in kinds.items():
        test = permutation_test(y, z, x, paired=paired, statistic=statistic, **options)
        p = f"p = {test.p_value:.3g}"
        score = _score(
            f"{kind}, difference to the other set", test.difference, None, (x, y), extractor,
            normalize, f"{p} ({len(test.null)} {'paired ' if paired else ''}permutations)",
            "below 0: nearer to the real images than the other set",
        )  # fmt: skip
        scores.append(score.remarked(p))
    return scores
