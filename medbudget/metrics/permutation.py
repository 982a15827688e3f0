"""Is one generator nearer to the data than another, or is the difference chance?"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medbudget.metrics.frechet import (
    Array,
    Features,
    check_pair,
    map_threads,
    root_trace,
)
from medbudget.metrics.kernel import polynomial_kernel


@dataclass(frozen=True)
class PermutationTest:
    """Outcome of `permutation_test`.

    Attributes
    ----------
    difference : float
        Distance of A to the reference minus that of B; negative if A is nearer.
    p_value : float
        Two-sided, (1 + permutations at least as far from 0) / (1 + all).
    statistic : str
        "frechet" or "kernel".
    paired : bool
    null : numpy.ndarray
        ``(repeats,)`` differences under exchanged labels.
    """

    difference: float
    p_value: float
    statistic: str
    paired: bool
    null: Array = field(repr=False)

    def __str__(self) -> str:
        return (
            f"difference of {self.statistic} distances {self.difference:.4g}, p = "
            f"{self.p_value:.3g} ({len(self.null)} {'paired ' if self.paired else ''}permutations)"
        )


def permutation_test(
    gen_a: Features,
    gen_b: Features,
    reference: Features,
    *,
    paired: bool = False,
    statistic: str = "frechet",
    repeats: int = 1000,
    seed: int = 0,
    workers: int | None = None,
) -> PermutationTest:
    """Test whether two generators are equally far from the same reference.

    If both generators make images of one distribution, their images can be exchanged. The
    observed difference of distances is compared with that after exchanging them at random.

    Parameters
    ----------
    gen_a, gen_b, reference : array_like
        Features ``(n_a, d)``, ``(n_b, d)``, ``(n_r, d)`` of one extractor.
    paired : bool
        Row i of both was made from the same seed: exchange within pairs only.
    statistic : {"frechet", "kernel"}
    repeats, seed, workers
        Permutations, random seed, threads (default: all cores); the result does not depend on
        `workers`.

    Raises
    ------
    ValueError
        Shapes that do not fit, unequal n with `paired`, an unknown statistic.
    """
    if statistic not in ("frechet", "kernel"):
        raise ValueError(f"statistic={statistic!r} is unknown; allowed are 'frechet', 'kernel'")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    a, ref = check_pair(gen_a, reference)
    b, _ = check_pair(gen_b, reference)
    na, nb = len(a), len(b)
    if paired and na != nb:
        raise ValueError(
            f"paired=True needs as many images from both generators, got {na} and {nb}; "
            "generate them from the same seeds, or use paired=False"
        )
    seeds = np.random.SeedSequence(seed).spawn(repeats)
    pool = np.concatenate([a, b])
    difference = _frechet_terms(pool, ref) if statistic == "frechet" else _kernel_terms(pool, ref)

    def shuffled(i: int) -> float:
        rng = np.random.default_rng(seeds[i])
        in_a = np.zeros(na + nb, bool)
        if paired:
            swap = rng.random(na) < 0.5
            in_a[:na], in_a[na:] = ~swap, swap
        else:
            in_a[rng.permutation(na + nb)[:na]] = True
        return difference.distance(in_a) - difference.distance(~in_a)

    first = np.arange(na + nb) < na
    of_a, of_b = difference.distance(first), difference.distance(~first)
    observed = of_a - of_b
    null = np.array(map_threads(shuffled, range(repeats), workers))
    # differences that are equal but for rounding count as equal
    slack = 1e-7 * max(abs(of_a), abs(of_b))
    p = (1 + int((np.abs(null) >= abs(observed) - slack).sum())) / (1 + repeats)
    return PermutationTest(observed, p, statistic, paired, null)


class _frechet_terms:
    """FD(group, R) but for a constant, from one Gram matrix of all images with the reference."""

    def __init__(self, pool: Array, ref: Array) -> None:
        centred = ref - ref.mean(0)
        factor = centred
        if len(ref) > ref.shape[1]:
            factor = np.linalg.qr(centred, mode="r")
        self.pool = pool - ref.mean(0)
        self.squares = (self.pool**2).sum(1)
        self.cross = self.pool @ factor.T / np.sqrt(len(ref) - 1)
        # for groups smaller than the reference's rank, M M^T is a block of this
        self.gram = self.cross @ self.cross.T

    def distance(self, group: np.ndarray) -> float:
        index = np.flatnonzero(group)
        n = len(index)
        mean = self.pool[index].mean(0)
        m2 = float(mean @ mean)
        trace = (self.squares[index].sum() - n * m2) / (n - 1)
        if n <= self.cross.shape[1]:
            block = self.gram[np.ix_(index, index)]
            row = block.mean(0)
            block -= row + row[:, None] - row.mean()
            block /= n - 1
            root = float(np.sqrt(np.linalg.eigvalsh(block).clip(min=0)).sum())
        else:
            m = self.cross[index]
            root = root_trace((m - m.mean(0)) / np.sqrt(n - 1))
        return float(m2 + trace - 2 * root)  # without R's own trace


class _kernel_terms:
    """MMD^2(group, R) but for a constant, unbiased, from one kernel matrix."""

    def __init__(self, pool: Array, ref: Array) -> None:
        self.own = polynomial_kernel(pool, pool)
        np.fill_diagonal(self.own, 0)
        self.cross = polynomial_kernel(pool, ref).mean(1)

    def distance(self, group: np.ndarray) -> float:
        w = group.astype(float)
        n = w.sum()
        return float(w @ self.own @ w / (n * (n - 1)) - 2 * (w @ self.cross) / n)
