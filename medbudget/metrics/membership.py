"""Membership inference: do losses betray which images a model was trained on?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medbudget.metrics.auc import bootstrap_auc, delong
from medbudget.metrics.frechet import Groups
from medbudget.metrics.scores import FEW, Score


def membership_inference(
    member_losses: npt.ArrayLike,
    other_losses: npt.ArrayLike,
    *,
    groups: tuple[Groups, Groups] = (None, None),
    name: str = "loss",
) -> Score:
    """Return how well a model's loss tells its training cases from others: an AUC with interval.

    The attack of Yeom et al. (2018): a case with a low loss is called a member. At 0.5 it learns
    nothing. Losses are ``(n,)``, or ``(n, draws)`` over several draws of noise and time, of which the mean is
    taken; use the same draws for both. `groups` are the patient of every member and of every other
    image: the interval is then over patients. `name` says what the losses are.

    Examples
    --------
    >>> membership_inference([0.1, 0.2, 0.4], [0.3, 0.5, 0.6]).value  # 8 of 9 pairs
    0.8888888888888888
    """
    both = (np.asarray(losses, dtype=np.float64) for losses in (member_losses, other_losses))
    sets = [losses if losses.ndim == 1 else losses.mean(1) for losses in both]
    labels, scores = np.repeat([1, 0], [len(s) for s in sets]), -np.concatenate(sets)
    if groups[0] is None and groups[1] is None:
        estimate = delong(labels, scores)
    else:  # an image without a patient is its own
        known = (g if g is not None else range(len(s)) for g, s in zip(groups, sets))
        patients = [(type(who), who) for group in known for who in group]
        estimate = bootstrap_auc(labels, scores, patients=patients)
    return Score(
        name=f"Membership AUC ({name})",
        value=estimate.value,
        interval=estimate.interval,
        n=(len(sets[0]), len(sets[1])),
        note=f"members vs others; 0.5: the loss tells nothing; {estimate.method} interval",
        remark=f"only {few} images" if (few := min(map(len, sets))) < FEW else "",
    )


def judge_membership(scores: list[Score]) -> str:
    """Say in words whether one of the attacks of `medbudget.membership.membership_test` succeeds."""
    sharp = [s for s in scores if s.interval and s.interval[0] > 0.5]
    if sharp:
        best = max(sharp, key=lambda score: score.value)
        rough = f" (rough: only {best.smallest} images)" * (best.smallest < FEW)
        return f"the word gives its training images away: {best.name} is {best.value:.2f}{rough}"
    return "this attack cannot tell members from others; a stronger one may"
