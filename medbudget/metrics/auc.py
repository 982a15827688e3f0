"""Area under the ROC curve with intervals: DeLong, and a two-level stratified bootstrap."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from medbudget.metrics.frechet import Z95, Array, Estimate
from medbudget.settings import check_number

Cases = npt.NDArray[np.bool_]


def _check(
    labels: npt.ArrayLike, scores: npt.ArrayLike, *, runs: bool = True
) -> tuple[Cases, Array]:
    label, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if label.ndim != 1 or score.ndim > 1 + runs or score.shape[-1:] != label.shape:
        raise ValueError(
            f"labels must be (n,) and scores (n,){' or (runs, n)' * runs}, got {label.shape} and "
            f"{score.shape}"
        )
    if not (np.isin(label, [0, 1]).all() and np.isfinite(score).all()):
        raise ValueError("labels must be 0 or 1, and scores neither NaN nor infinite")
    positive = label.astype(bool)
    if positive.sum() < 2 or (~positive).sum() < 2:
        raise ValueError(
            f"{int(positive.sum())} positive and {int((~positive).sum())} negative cases: "
            "at least 2 of each are needed"
        )
    return positive, score


def _placements(positive: Cases, score: Array) -> tuple[Array, Array]:
    """Share of negatives below each positive, and of positives above each negative (ties 1/2)."""
    pos, neg = score[positive], score[~positive]
    ranks = rankdata(score)
    v10 = (ranks[positive] - rankdata(pos)) / len(neg)
    v01 = 1 - (ranks[~positive] - rankdata(neg)) / len(pos)
    return v10, v01


def compute_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the area under the ROC curve; of ``(runs, n)`` scores, the mean over runs.

    Ties count one half (Mann-Whitney).

    Examples
    --------
    >>> compute_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])  # three of four pairs in order
    0.75
    """
    positive, score = _check(labels, scores)
    return float(np.mean([_placements(positive, s)[0].mean() for s in np.atleast_2d(score)]))


def _delong_se(v10: Array, v01: Array) -> float:
    return float(np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)))


def delong(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Estimate:
    """Return the AUC of ``(n,)`` scores with DeLong's standard error and 95 % interval.

    At an AUC of exactly 0 or 1 the standard error is 0, which only says that the method has failed.

    Examples
    --------
    >>> found = delong([0, 0, 0, 1, 1, 1], [0.1, 0.4, 0.2, 0.35, 0.8, 0.9])
    >>> round(found.value, 3), round(found.se, 3)
    (0.889, 0.157)
    """
    v10, v01 = _placements(*_check(labels, scores, runs=False))
    value, se = float(v10.mean()), _delong_se(v10, v01)
    return Estimate(value, se, (max(0.0, value - Z95 * se), min(1.0, value + Z95 * se)), "DeLong")


def delong_difference(
    labels: npt.ArrayLike, scores_a: npt.ArrayLike, scores_b: npt.ArrayLike
) -> Estimate:
    """Return AUC(a) - AUC(b) on the same cases, with DeLong's paired test."""
    (a10, a01), (b10, b01) = (
        _placements(*_check(labels, scores, runs=False)) for scores in (scores_a, scores_b)
    )
    value, se = float(a10.mean() - b10.mean()), _delong_se(a10 - b10, a01 - b01)
    p = float(2 * norm.sf(abs(value) / se)) if se > 0 else float(value == 0)
    return Estimate(value, se, (value - Z95 * se, value + Z95 * se), "DeLong", p)


def bootstrap_auc(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    other: npt.ArrayLike | None = None,
    *,
    repeats: int = 2000,
    seed: int = 0,
    patients: Sequence[Hashable] | None = None,
) -> Estimate:
    """Return the AUC, or a difference of AUCs, with a stratified percentile bootstrap.

    Two levels: cases are resampled within each class and, with ``(runs, n)`` scores, training
    runs too; the AUC is the mean over runs. With `other`, cases are drawn jointly for both
    (paired), runs independently. With `patients`, whose case each is, patients are resampled with
    all their cases: those of either class and those with cases of both among themselves.

    The p-value of a difference is twice the share of draws on the other side of 0, at least
    2 / repeats.
    """
    positive, first = _check(labels, scores)
    check_number("repeats", repeats, 2)
    sets = [first] if other is None else [first, _check(labels, other)[1]]
    rng = np.random.default_rng(seed)
    strata, of_case = _strata(positive, patients)
    # bins of equal scores, per set and run, so that a resampled AUC is two counts and a cumsum
    bins = [[np.unique(s, return_inverse=True)[1] for s in np.atleast_2d(one)] for one in sets]

    def weighted_auc(index: npt.NDArray[np.intp], w_pos: Array, w_neg: Array) -> float:
        size = int(index.max()) + 1
        pos = np.bincount(index[positive], w_pos, size)
        neg = np.bincount(index[~positive], w_neg, size)
        return float(pos @ (np.cumsum(neg) - neg / 2)) / float(w_pos.sum() * w_neg.sum())

    draws = np.empty(repeats)
    for i in range(repeats):
        weights = np.empty(sum(map(len, strata)))
        for members in strata:
            n = len(members)
            weights[members] = np.bincount(rng.integers(n, size=n), minlength=n)
        w_pos, w_neg = weights[of_case[positive]], weights[of_case[~positive]]
        values = [0.0, 0.0]
        for place, runs in enumerate(bins):
            count = np.bincount(rng.integers(len(runs), size=len(runs)), minlength=len(runs))
            areas = (c * weighted_auc(runs[r], w_pos, w_neg) for r, c in enumerate(count) if c)
            values[place] = sum(areas) / len(runs)
        draws[i] = values[0] - values[1]
    value, p = compute_auc(labels, scores), float("nan")
    if other is not None:
        value -= compute_auc(labels, other)
        beyond = min((draws <= 0).sum(), (draws >= 0).sum())
        p = min(1.0, 2 * max(1, int(beyond)) / repeats)
    low, high = np.quantile(draws, [0.025, 0.975])
    method = "stratified bootstrap" + (" of patients" if patients is not None else "")
    return Estimate(value, float(draws.std(ddof=1)), (float(low), float(high)), method, p)


def _strata(
    positive: Cases, patients: Sequence[Hashable] | None
) -> tuple[list[npt.NDArray[np.intp]], npt.NDArray[np.intp]]:
    """Return the patients of each stratum (positive, negative, both) and the patient of each case."""
    patients = range(len(positive)) if patients is None else patients
    numbers = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    of_case = np.array([numbers[patient] for patient in patients])
    pos, neg = (
        np.bincount(of_case[side], minlength=len(numbers)) > 0 for side in (positive, ~positive)
    )
    if (few := min(int(pos.sum()), int(neg.sum()))) < 2:
        raise ValueError(f"a class has {few} patient: at least 2 are needed for an interval")
    strata = [np.flatnonzero(one) for one in (pos & ~neg, neg & ~pos, pos & neg)]
    return [one for one in strata if len(one)], of_case


def hanley_mcneil(value: float, n_positive: int, n_negative: int) -> float:
    """Return the standard error of an AUC from its value and the numbers of cases alone.

    Hanley and McNeil 1982, for exponential score distributions.

    Examples
    --------
    >>> round(hanley_mcneil(0.780, 100, 100), 3)  # the paper's prostates, real images alone
    0.033
    """
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = (
        value * (1 - value)
        + (n_positive - 1) * (q1 - value**2)
        + (n_negative - 1) * (q2 - value**2)
    ) / (n_positive * n_negative)
    return float(np.sqrt(variance))


def detectable_difference(se: float) -> float:
    """Return the smallest true difference that a two-sided test at 5 % finds four times in five.

    `se` is the standard error of the difference, e.g. of `bootstrap_auc` with `other`. It falls with
    the root of the number of cases.

    Examples
    --------
    >>> round(detectable_difference(0.01), 3)  # 2.8 standard errors
    0.028
    """
    return float((norm.ppf(0.975) + norm.ppf(0.8)) * se)


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from frequencies, by bins that have cases."""

    error: float  # expected calibration error: mean over cases of abs(predicted - observed)
    predicted: tuple[float, ...]  # mean probability in each bin
    observed: tuple[float, ...]  # share of positives in it
    count: tuple[int, ...]  # its cases


def calibration(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, bins: int = 10
) -> Calibration:
    """Compare probabilities with what happened, in bins of equal width (Guo et al. 2017).

    Probabilities of class 1 are ``(n,)`` or ``(runs, n)``; all runs go into the same bins.
    """
    positive, score = _check(labels, probabilities)
    if score.min() < 0 or score.max() > 1:
        raise ValueError("probabilities must be from 0 to 1")
    flat, truth = score.ravel(), np.broadcast_to(positive, score.shape).ravel()
    place = np.minimum((flat * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    predicted = np.bincount(place, flat, bins)[used] / count[used]
    observed = np.bincount(place, truth, bins)[used] / count[used]
    error = float((count[used] * np.abs(predicted - observed)).sum() / len(flat))
    return Calibration(error, *(tuple(one.tolist()) for one in (predicted, observed, count[used])))
