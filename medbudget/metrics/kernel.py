"""Kernel distance (KID) and improved precision and recall."""

from __future__ import annotations

import numpy as np

from medbudget.metrics.frechet import (
    Z95,
    Array,
    Estimate,
    Features,
    Groups,
    check_pair,
    variance_by_group,
)


def polynomial_kernel(x: Array, y: Array) -> Array:
    """KID's kernel, (x.y / d + 1)^3 (Binkowski et al. 2018): ``(n, m)``."""
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def kernel_distance(
    x: Features, y: Features, *, groups: tuple[Groups, Groups] = (None, None)
) -> Estimate:
    r"""Return the kernel distance: unbiased squared MMD with its standard error.

    All pairs at once, no random subsets. Unbiased: its expectation does not depend on n, and it
    may be negative for equal distributions. The standard error is that of a two-sample U-statistic,
    first and second order, so it holds near zero too. `groups` as in `frechet_interval`.
    """
    x, y = check_pair(x, y)
    n, m = len(x), len(y)
    kxx, kyy, kxy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    np.fill_diagonal(kxx, 0)
    np.fill_diagonal(kyy, 0)
    mean_xx, mean_yy = kxx.sum() / (n * (n - 1)), kyy.sum() / (m * (m - 1))
    mean_xy = kxy.mean()
    value = float(mean_xx + mean_yy - 2 * mean_xy)

    # Hoeffding: row means carry the first order, what is left of the kernel the second.
    rx, ry = kxx.sum(1) / (n - 1), kyy.sum(1) / (m - 1)
    cx, cy = kxy.mean(1), kxy.mean(0)
    off = ~np.eye(n, dtype=bool)
    sxx = float(((kxx - rx[:, None] - rx + mean_xx)[off] ** 2).mean())
    off = ~np.eye(m, dtype=bool)
    syy = float(((kyy - ry[:, None] - ry + mean_yy)[off] ** 2).mean())
    sxy = float(((kxy - cx[:, None] - cy + mean_xy) ** 2).mean())
    hx = variance_by_group(rx - cx, groups[0]) - sxx / (n - 1) - sxy / m
    hy = variance_by_group(ry - cy, groups[1]) - syy / (m - 1) - sxy / n
    variance = max(0.0, 4 * hx / n + 4 * hy / m)
    variance += 2 * sxx / (n * (n - 1)) + 2 * syy / (m * (m - 1)) + 4 * sxy / (n * m)
    se = float(np.sqrt(variance))
    return Estimate(value, se, (value - Z95 * se, value + Z95 * se), "U-statistic")


def squared_distances(x: Array, y: Array) -> Array:
    """Return squared Euclidean distances ``(n, m)``, at least 0."""
    out = x @ y.T
    out *= -2
    out += (x**2).sum(1)[:, None]
    out += (y**2).sum(1)
    return out.clip(min=0, out=out)


def _share_inside(points: Array, support: Array, k: int) -> float:
    """Share of `points` within the k-th-neighbour ball of any `support` point."""
    own = squared_distances(support, support)
    # a point is its own 0-th neighbour
    radius = np.partition(own, k, axis=1)[:, k]
    # rounding of |x|^2 - 2 x.y + |y|^2 must not push an identical point out of a ball of radius 0
    slack = 1e-12 * float((support**2).sum(1).max())
    inside = squared_distances(points, support) <= radius + slack
    return float(inside.any(axis=1).mean())


def precision_recall(real: Features, synthetic: Features, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019).

    Precision: share of synthetic images inside the real set's k-nearest-neighbour balls (are they
    plausible?). Recall: share of real images inside the synthetic set's (is everything there?).
    Mode collapse keeps precision and loses recall; noise around the data does the reverse. Both
    rise with n: compare at the same n.
    """
    x, y = check_pair(real, synthetic)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(f"k must be from 1 to {min(len(x), len(y)) - 1} (n - 1), got {k}")
    return _share_inside(y, x, k), _share_inside(x, y, k)
