"""AUC: hand-computed values, scikit-learn, intervals against repeated sampling."""

import numpy as np
import pytest

from medbudget.metrics import (
    auc,
    bootstrap_auc,
    delong,
    delong_difference,
    membership_inference,
)


def cases(n, seed, gap=1.0):
    rng = np.random.default_rng(seed)
    return np.repeat([1, 0], n), np.concatenate([rng.normal(gap, 1, n), rng.normal(0, 1, n)])


def test_auc_and_delong_by_hand():
    # positives 3, 1; negatives 2, 0: 3 of 4 pairs. v10 = (1, .5), v01 = (.5, 1)
    labels, scores = [1, 1, 0, 0], [3, 1, 2, 0]
    assert auc(labels, scores) == 0.75
    assert delong(labels, scores).se == pytest.approx(np.sqrt(0.125 / 2 + 0.125 / 2))
    assert auc([1, 1, 0, 0], [1, 1, 1, 1]) == 0.5  # ties count one half


def test_auc_agrees_with_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    runs = np.stack([scores, rng.random(200)])
    want = np.mean([roc_auc_score(labels, r) for r in runs])
    assert auc(labels, runs) == pytest.approx(want, rel=1e-12)


def test_standard_errors_match_repeated_sampling():
    draws = [cases(50, i) for i in range(400)]
    sd = np.std([auc(*d) for d in draws])
    assert np.mean([delong(*d).se for d in draws[:50]]) == pytest.approx(sd, rel=0.15)
    boot = np.mean([bootstrap_auc(*d, repeats=200).se for d in draws[:10]])
    assert boot == pytest.approx(sd, rel=0.2)


def test_paired_difference_is_narrower_and_agrees_with_the_bootstrap():
    labels, a = cases(100, 0)
    b = a + np.random.default_rng(1).normal(0, 0.3, 200)
    paired = delong_difference(labels, a, b)
    assert paired.value == pytest.approx(auc(labels, a) - auc(labels, b))
    assert paired.se < 0.5 * delong(labels, a).se
    assert bootstrap_auc(labels, a, b, repeats=500).se == pytest.approx(paired.se, rel=0.2)
    assert delong_difference(labels, a, a).p_value == 1
    worse = delong_difference(labels, a, -a)
    assert worse.value > 0 and worse.p_value < 1e-6


def test_two_level_bootstrap_adds_the_spread_between_runs():
    labels, base = cases(60, 0)
    rng = np.random.default_rng(1)
    same = np.stack([base] * 5)
    different = base + np.where(labels == 1, 1.0, 0.0) * rng.normal(0, 1.0, (5, 1))
    one = bootstrap_auc(labels, base, repeats=400)
    assert bootstrap_auc(labels, same, repeats=400).se == pytest.approx(one.se, rel=0.2)
    assert bootstrap_auc(labels, different, repeats=400).se > 1.3 * one.se


def test_bootstrap_is_seeded():
    labels, scores = cases(20, 0)
    first = bootstrap_auc(labels, scores, repeats=50, seed=3)
    assert first == bootstrap_auc(labels, scores, repeats=50, seed=3)
    assert first.interval != bootstrap_auc(labels, scores, repeats=50, seed=4).interval


def test_membership_of_a_model_that_remembers_and_one_that_does_not():
    rng = np.random.default_rng(0)
    forgets = membership_inference(rng.normal(1, 1, 200), rng.normal(1, 1, 200))
    assert forgets.interval[0] < 0.5 < forgets.interval[1]
    remembers = membership_inference(rng.normal(0, 1, (200, 4)), rng.normal(1, 1, (200, 4)))
    assert remembers.interval[0] > 0.8  # lower loss: member
    assert remembers.n == (200, 200)


@pytest.mark.parametrize(
    "labels, scores, message",
    [
        ([1, 0], [1.0, 2.0], "1 positive and 1 negative"),
        ([1, 1, 0, 0], [1.0, 2.0], "labels must be"),
        ([1, 2, 0, 0], [1.0, 2.0, 3.0, 4.0], "0 or 1"),
        ([1, 1, 0, 0], [1.0, np.nan, 3.0, 4.0], "NaN"),
    ],
)
def test_errors(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        auc(labels, scores)
