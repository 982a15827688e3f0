"""What repeated trainings scored, what was gained, and what that shows, in numbers and in words."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from medbudget.metrics.auc import bootstrap_auc, calibration, compute_auc, detectable_difference
from medbudget.metrics.frechet import Estimate
from medbudget.metrics.scores import Score


def score_runs(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    repeats: int = 2000,
    patients: Sequence[Hashable] | None = None,
) -> list[Score]:
    """Return the mean AUC of repeated runs with its interval, their spread, and calibration.

    Labels are ``(n,)`` of 0 and 1, scores ``(runs, n)``: probabilities of class 1. The interval is
    that of `bootstrap_auc`.
    """
    truth, values = np.asarray(labels), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    n = (int((truth == 0).sum()), int((truth == 1).sum()))
    found = bootstrap_auc(truth, values, repeats=repeats, patients=patients)
    what = "cases" if patients is None else f"{len(set(patients))} patients"
    note = f"mean of {len(values)} runs; two-level bootstrap over {what} and runs"
    rows = [Score("AUC", found.value, found.interval, n, note=note)]
    if len(values) > 1:
        sd = float(np.std([compute_auc(truth, one) for one in values], ddof=1))
        rows.append(Score("sd of runs", sd, None, n, note="training noise on one test set"))
    error = calibration(truth, values).error
    return [*rows, Score("ECE", error, None, n, note="calibration error, 10 bins, all runs")]


def score_gain(gain: Estimate, n: tuple[int, int]) -> list[Score]:
    """Return a gain of `bootstrap_auc` as a score, and the gain that could have been detected."""
    least = detectable_difference(gain.se)
    return [
        Score("gain", gain.value, gain.interval, n, note=f"p = {gain.p_value:.3g}; same cases"),
        Score("detectable", least, None, n, note="a true gain found with power 80 % at 5 %"),
    ]


def judge_gain(gain: Estimate) -> str:
    """Say in words whether a gain is shown, and if not, which one could have been found.

    Examples
    --------
    >>> judge_gain(Estimate(0.051, 0.0457, (-0.042, 0.137), "bootstrap", 0.29))
    'no gain shown (+0.051, interval -0.042 to +0.137, p = 0.29); 0.128 could have been found'
    """
    low, high = gain.interval
    numbers = f"{gain.value:+.3f}, interval {low:+.3f} to {high:+.3f}, p = {gain.p_value:.2g}"
    if low > 0:
        return f"a gain is shown ({numbers})"
    if high < 0:
        return f"a loss is shown ({numbers}): better without these synthetic images"
    least = detectable_difference(gain.se)
    return f"no gain shown ({numbers}); {least:.3f} could have been found"
