"""What a reader study's answers say: preference, bias to a side, agreement, power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from krippendorff import alpha
from scipy.stats import binom, binomtest

from medbudget.metrics.scores import Score

LARGEST = 20_000  # pairs


@dataclass(frozen=True)
class Preference:
    """How often one of two was chosen: share, Wilson's 95 % interval, exact two-sided p."""

    chosen: int
    n: int
    share: float
    interval: tuple[float, float]
    p_value: float


def compute_preference(chosen: int, n: int) -> Preference:
    """Test `chosen` of `n` decisions against one half; in the paper 36 of 50.

    Examples
    --------
    >>> found = compute_preference(36, 50)
    >>> found.share, [round(limit, 3) for limit in found.interval], round(found.p_value, 4)
    (0.72, [0.583, 0.825], 0.0026)
    """
    test = binomtest(chosen, n, 0.5)
    low, high = test.proportion_ci(method="wilson")
    return Preference(chosen, n, chosen / n, (float(low), float(high)), float(test.pvalue))


def compute_power(n: int | npt.NDArray[np.int64], preference: float) -> npt.NDArray[np.float64]:
    """Return how probably the exact test of `n` decisions at 5 % finds a true `preference`."""
    low: Any = binom.ppf(0.025, n, 0.5)  # the most choices that are significantly few
    low = low - (binom.cdf(low, n, 0.5) > 0.025)
    return np.asarray(binom.cdf(low, n, preference) + binom.sf(n - low - 1, n, preference))


def required_pairs(preference: float) -> int:
    """Return how many decisions the exact test needs to find a true `preference` 4 times in 5.

    The power of an exact test goes up and down with n: this is the number from which on it does
    not fall below 0.8 again.

    Examples
    --------
    >>> required_pairs(0.72), required_pairs(0.60)
    (42, 210)
    """
    enough = compute_power(np.arange(LARGEST + 1), preference) >= 0.8
    n = int(np.flatnonzero(~enough)[-1]) + 1
    if n > LARGEST:
        raise ValueError(f"to show a preference of {preference:.1%} takes over {LARGEST} pairs")
    return n


def score_answers(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    items: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
) -> list[Score]:
    """Return the scores of each reader, and of all together where there are several.

    `answers` has each reader's answers that stand; `items` is the key: for each pair its sources
    ``left`` and ``right``, and which pair it ``repeats``; `labels` name the sources.
    """
    first = [k for k, item in enumerate(items) if item["repeats"] is None]
    picks = {  # the source chosen for each pair: "a", "b" or "none"
        name: [items[a["pair"]].get(a["choice"], "none") for a in given]
        for name, given in answers.items()
    }
    scores: list[Score] = []
    for name, given in answers.items():
        scores += _score_reader(name, given, picks[name], items, labels)
    if len(picks) < 2:
        return scores
    majority = []
    for k in first:
        votes = [own[k] for own in picks.values() if k < len(own)]
        lead = votes.count("a") - votes.count("b")
        majority.append("a" if lead > 0 else "b" if lead < 0 else "none")
    notes = [f"{len(picks)} readers; says nothing of others"]
    most = _score_preference(f"preference for {labels[0]}, majority", majority, "a", notes)
    once = [[own[k] for k in first if k < len(own)] for own in picks.values()]
    return [most, *scores, _score_agreement(once)]


def _score_reader(
    name: str, given: Any, own: list[str], items: Any, labels: Sequence[str]
) -> list[Score]:
    notes = ["one reader, who says nothing of others"]
    if len(given) < len(items):
        so_far = f"{len(given)} of {len(items)} pairs answered"
        notes.append(f"{so_far}: do not stop at a p-value you like")
    pairs = [(pick, items[k]["repeats"]) for k, pick in enumerate(own)]
    once = [pick for pick, repeats in pairs if repeats is None]
    twice = [(pick, own[repeats]) for pick, repeats in pairs if repeats is not None]
    sides = [a["choice"] for a in given]
    scores = [
        _score_preference(f"preference for {labels[0]}, {name}", once, "a", notes),
        _score_preference(f"choice of the left side, {name}", sides, "left", notes),
    ]
    if twice:
        same = compute_preference(sum(x == y for x, y in twice), len(twice))
        note = "the same pair with its sides swapped, no preference counted as an answer"
        title = f"same answer twice, {name}"
        scores.append(Score(title, same.share, same.interval, same.n, note=note))
    seconds = median(float(a["seconds"]) for a in given)
    scores.append(Score(f"seconds an answer, {name}", seconds, None, len(given), note="median"))
    return scores


def _score_preference(name: str, picks: list[str], choice: str, notes: list[str]) -> Score:
    """Test one choice against the other, without those who have no preference."""
    undecided = picks.count("none")
    left_out = [f"{undecided} of {len(picks)} without a preference left out"] if undecided else []
    n = len(picks) - undecided
    if n == 0:
        return Score(name, float("nan"), None, 0, note="; ".join([*left_out, *notes]))
    test = compute_preference(picks.count(choice), n)
    note = "; ".join([f"exact binomial p = {test.p_value:.2g}", *left_out, *notes])
    return Score(name, test.share, test.interval, n, note=note)


def _score_agreement(picks: Sequence[Sequence[str]]) -> Score:
    """Return Krippendorff's alpha between readers: 1 agreement, 0 chance."""
    codes = {"a": 0.0, "b": 1.0, "none": 2.0}
    table = np.full((len(picks), max(map(len, picks))), np.nan)  # (readers, pairs)
    for row, own in zip(table, picks):
        row[: len(own)] = [codes[pick] for pick in own]
    n = sorted(map(len, picks))[-2]  # pairs that two readers or more have answered
    name, note = "Krippendorff's alpha", "nominal: one source, the other, or no preference"
    if len(np.unique(table[:, :n][~np.isnan(table[:, :n])])) < 2:
        return Score(name, float("nan"), None, n, note=f"{note}; undefined, as all answers are one")
    value = float(alpha(reliability_data=table, level_of_measurement="nominal"))
    return Score(name, value, None, n, note=note)
