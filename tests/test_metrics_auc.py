"""AUC: hand-computed values, scikit-learn, intervals against repeated sampling."""

import numpy as np
import pytest

from medbudget.metrics import (
    bootstrap_auc,
    calibration,
    compute_auc,
    delong,
    delong_difference,
    detectable_difference,
    hanley_mcneil,
)


def cases(n, seed, gap=1.0):
    rng = np.random.default_rng(seed)
    return np.repeat([1, 0], n), np.concatenate([rng.normal(gap, 1, n), rng.normal(0, 1, n)])


def test_auc_agrees_with_scikit_learn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200)
    runs = np.stack([scores, rng.random(200)])
    want = np.mean([roc_auc_score(labels, r) for r in runs])
    assert compute_auc(labels, runs) == pytest.approx(want, rel=1e-12)


def test_standard_errors_match_repeated_sampling():
    draws = [cases(50, i) for i in range(400)]
    sd = np.std([compute_auc(*d) for d in draws])
    assert np.mean([delong(*d).se for d in draws[:50]]) == pytest.approx(sd, rel=0.15)
    boot = np.mean([bootstrap_auc(*d, repeats=200).se for d in draws[:10]])
    assert boot == pytest.approx(sd, rel=0.2)


def slow_delong(positive_scores, negative_scores):
    """DeLong et al. 1988 as written: the kernel psi over all pairs, covariances of its means."""
    psi = [
        [[1.0 if x > y else 0.5 if x == y else 0.0 for y in n] for x in p]
        for p, n in zip(positive_scores, negative_scores)
    ]
    v10 = [[sum(row) / len(row) for row in one] for one in psi]
    v01 = [[sum(column) / len(column) for column in zip(*one)] for one in psi]
    s = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])
    areas = [sum(v) / len(v) for v in v10]
    return areas[0] - areas[1], np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])


def test_delongs_paired_test_equals_its_slow_exact_computation_with_ties():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [30, 45])
    a = np.round(rng.normal(np.repeat([1.0, 0.0], [30, 45]), 1), 1)
    b = np.round(a + rng.normal(0, 0.7, 75), 1)
    found = delong_difference(labels, a, b)
    value, se = slow_delong([a[:30], b[:30]], [a[30:], b[30:]])
    assert found.value == pytest.approx(value) and found.se == pytest.approx(se)
    assert bootstrap_auc(labels, a, b, repeats=500).se == pytest.approx(se, rel=0.2)
    assert delong_difference(labels, a, a).p_value == 1
    worse = delong_difference(labels, a, -a)
    assert worse.value > 0 and worse.p_value < 0.02


def test_p_values_of_the_two_level_bootstrap_hold_their_level_and_find_what_is_there():
    def study(seed, gain):
        rng = np.random.default_rng(seed)
        labels = np.repeat([1, 0], 40)
        case = rng.normal(labels.astype(float), 1)  # what is easy is so in every run
        noise = rng.normal(0, 0.5, (2, 4, 80))
        return labels, case + noise[0] + gain * labels, case + noise[1]

    p = [bootstrap_auc(*study(seed, 0.0), repeats=100).p_value for seed in range(50)]
    assert np.mean(np.array(p) < 0.05) < 0.15 and 0.3 < np.mean(p) < 0.7
    labels, better, plain = study(0, 1.5)
    found = bootstrap_auc(labels, better, plain, repeats=400, seed=3)
    assert found.p_value == 2 / 400 and found.interval[0] > 0
    assert found == bootstrap_auc(labels, better, plain, repeats=400, seed=3)
    assert found.interval != bootstrap_auc(labels, better, plain, repeats=400, seed=4).interval
    assert bootstrap_auc(labels, plain, better, repeats=50).value == -found.value


def test_the_papers_test_set_cannot_show_the_papers_gain():
    # .78 with 100 and 100: q1 = .78 / 1.22, q2 = 2 * .6084 / 1.78
    variance = (0.78 * 0.22 + 99 * (0.78 / 1.22 - 0.6084) + 99 * (1.2168 / 1.78 - 0.6084)) / 1e4
    se = hanley_mcneil(0.78, 100, 100)
    assert se == pytest.approx(variance**0.5)
    assert detectable_difference(se) == pytest.approx((1.959964 + 0.841621) * se, rel=1e-6)


def test_calibration_by_hand():
    # bins of width .5: (.2, .4) with 1 of 2 positive, (.9, .7) with 2 of 2
    found = calibration([0, 1, 1, 1, 0, 0], [0.2, 0.4, 0.9, 0.7, 0.1, 0.1], bins=2)
    assert found.count == (4, 2)
    assert found.predicted == pytest.approx((0.2, 0.8)) and found.observed == (0.25, 1.0)
    assert found.error == pytest.approx((4 * 0.05 + 2 * 0.2) / 6)
    perfect = calibration([0, 0, 1, 1], [[0.0, 0.0, 1.0, 1.0]] * 3)
    assert perfect.error == 0 and perfect.count == (6, 6)
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibration([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.5])


def test_two_level_bootstrap_adds_the_spread_between_runs():
    labels, base = cases(60, 0)
    rng = np.random.default_rng(1)
    different = base + np.where(labels == 1, 1.0, 0.0) * rng.normal(0, 1.0, (5, 1))
    one = bootstrap_auc(labels, base, repeats=400)
    assert bootstrap_auc(labels, np.stack([base] * 5), repeats=400).se == pytest.approx(
        one.se, rel=0.2
    )
    assert bootstrap_auc(labels, different, repeats=400).se > 1.3 * one.se


def test_patients_are_resampled_whole():
    labels, scores = cases(30, 0)
    other = cases(30, 1)[1]
    alone = bootstrap_auc(labels, scores, other, repeats=200)
    # four images of each patient, all alike, tell as much as one of them
    four = [np.tile(values, 4) for values in (labels, scores, other)]
    cases_only = bootstrap_auc(*four, repeats=200)
    by_patient = bootstrap_auc(*four, repeats=200, patients=list(range(60)) * 4)
    assert by_patient.interval == alone.interval and by_patient.p_value == alone.p_value
    assert cases_only.se < 0.6 * by_patient.se, "a half, were they independent cases"
    assert "patients" in by_patient.method and "patients" not in cases_only.method


def test_a_patient_may_have_cases_of_both_classes():
    # each patient's diseased side is above the healthy one, and the patients differ far more
    level = np.random.default_rng(0).normal(0, 100, 20)
    labels, scores = np.tile([0, 1], 20), np.repeat(level, 2) + np.tile([0, 1], 20)
    patients = np.repeat(np.arange(20), 2).tolist()
    together = bootstrap_auc(labels, scores, repeats=500, patients=patients)
    apart = bootstrap_auc(labels, scores, repeats=500)
    assert together.se < 0.5 * apart.se, "the sides of a patient come and go together"
    with pytest.raises(ValueError, match="a class has 1 patient"):
        bootstrap_auc([0, 0, 1, 1], [1, 2, 3, 4], patients=["a", "b", "c", "c"])


@pytest.mark.parametrize(
    "labels, scores, message",
    [
        ([1, 0], [1.0, 2.0], "1 positive and 1 negative"),
        ([1, 1, 0, 0], [1.0, 2.0], "labels must be"),
        ([1, 2, 0, 0], [1.0, 2.0, 3.0, 4.0], "0 or 1"),
        ([1, 1, 0, 0], [1.0, np.nan, 3.0, 4.0], "NaN"),
        ([1, 1, 0, 0], [[1.0, 2.0, 3.0, 4.0]] * 2, "labels must be"),
    ],
)
def test_errors(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        delong(labels, scores)
