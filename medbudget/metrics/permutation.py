"""Is one generator nearer to the data than another, or is the difference chance?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from medbudget.metrics.frechet import Array, Features, check_pair, map_threads, root_trace
from medbudget.metrics.kernel import polynomial_kernel
from medbudget.settings import check_counts


@dataclass(frozen=True)
class PermutationTest:
    """Outcome of `permutation_test`."""

    difference: float  # distance of A to the reference minus that of B; negative if A is nearer
    p_value: float  # two-sided, (1 + permutations at least as far from 0) / (1 + all)
    statistic: str  # "frechet" or "kernel"
    paired: bool
    null: Array = field(repr=False)  # (repeats,) differences under exchanged labels

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
) -> PermutationTest:
    """Test whether two generators are equally far from the same reference.

    The observed difference of distances is compared with that after exchanging images at random.

    The three are features ``(n, d)`` of one extractor. With `paired`, row i of both generators was
    made from the same seed: they are exchanged within pairs only. The `statistic` is "frechet" or
    "kernel".
    """
    terms = {"frechet": _frechet_terms, "kernel": _kernel_terms}
    if statistic not in terms:
        raise ValueError(f"statistic={statistic!r} is unknown; allowed are 'frechet', 'kernel'")
    check_counts(repeats=repeats)
    a, ref = check_pair(gen_a, reference)
    b, _ = check_pair(gen_b, reference)
    na, nb = len(a), len(b)
    if paired and na != nb:
        raise ValueError(f"pairs need as many images from both generators, got {na} and {nb}")
    seeds = np.random.SeedSequence(seed).spawn(repeats)
    distance = terms[statistic](np.concatenate([a, b]), ref)

    def shuffled(i: int) -> float:
        rng = np.random.default_rng(seeds[i])
        in_a = np.zeros(na + nb, bool)
        if paired:
            swap = rng.random(na) < 0.5
            in_a[:na], in_a[na:] = ~swap, swap
        else:
            in_a[rng.permutation(na + nb)[:na]] = True
        return distance(in_a) - distance(~in_a)

    first = np.arange(na + nb) < na
    of_a, of_b = distance(first), distance(~first)
    observed = of_a - of_b
    null = map_threads(shuffled, repeats)
    # differences that are equal but for rounding count as equal
    slack = 1e-7 * max(abs(of_a), abs(of_b))
    p = (1 + int((np.abs(null) >= abs(observed) - slack).sum())) / (1 + repeats)
    return PermutationTest(observed, p, statistic, paired, null)


def _frechet_terms(pool: Array, ref: Array) -> Callable[[np.ndarray], float]:
    """Return FD(group of the pool, R) but for R's own trace, from one Gram matrix."""
    factor = ref - ref.mean(0)
    if len(ref) > ref.shape[1]:
        factor = np.linalg.qr(factor, mode="r")
    pool = pool - ref.mean(0)
    squares = (pool**2).sum(1)
    cross = pool @ factor.T / np.sqrt(len(ref) - 1)
    gram = cross @ cross.T  # for groups smaller than the reference's rank, M M^T is a block of it

    def distance(group: np.ndarray) -> float:
        index = np.flatnonzero(group)
        n = len(index)
        mean = pool[index].mean(0)
        m2 = float(mean @ mean)
        trace = (squares[index].sum() - n * m2) / (n - 1)
        if n <= cross.shape[1]:
            block = gram[np.ix_(index, index)]
            row = block.mean(0)
            block -= row + row[:, None] - row.mean()
            block /= n - 1
            root = float(np.sqrt(np.linalg.eigvalsh(block).clip(min=0)).sum())
        else:
            m = cross[index]
            root = root_trace((m - m.mean(0)) / np.sqrt(n - 1))
        return float(m2 + trace - 2 * root)

    return distance


def _kernel_terms(pool: Array, ref: Array) -> Callable[[np.ndarray], float]:
    """Return MMD^2(group of the pool, R), unbiased, but for a constant, from one kernel matrix."""
    own = polynomial_kernel(pool, pool)
    np.fill_diagonal(own, 0)
    cross = polynomial_kernel(pool, ref).mean(1)

    def distance(group: np.ndarray) -> float:
        w = group.astype(float)
        n = w.sum()
        return float(w @ own @ w / (n * (n - 1)) - 2 * (w @ cross) / n)

    return distance
