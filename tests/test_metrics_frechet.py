"""Frechet distance: hand-computed values, references, awkward inputs, the interval."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from medbudget.metrics import bootstrap_distances, frechet_distance, frechet_interval


def by_sqrtm(x, y):
    """The textbook way (pytorch-fid's), on full-rank covariances."""
    c1, c2 = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    gap = x.mean(0) - y.mean(0)
    return gap @ gap + np.trace(c1) + np.trace(c2) - 2 * np.trace(sqrtm(c1 @ c2)).real


@pytest.mark.parametrize("n, m, d", [(60, 50, 5), (40, 200, 30), (200, 40, 30)])
def test_agrees_with_sqrtm(n, m, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    y = rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 0.3
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-6)


def test_rank_deficient_sets_have_the_known_distance():
    # y is x scaled by 2 in a subspace: the distance is the trace of the covariance of x
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 100))
    x -= x.mean(0)
    want = np.trace(np.cov(x, rowvar=False))
    assert frechet_distance(x, 2 * x) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(x, x[::-1]) < 1e-10
    estimate = frechet_interval(np.full((5, 3), 2.0), np.full((9, 3), 4.0))  # the means alone
    assert estimate.value == pytest.approx(12) and estimate.se == 0


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "n, m >= 2"),
        (np.zeros(5), np.zeros((5, 1)), "shape"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "same extractor; got .5, 3. and .5, 4."),
        (np.array([[1.0], [np.nan]]), np.zeros((2, 1)), "NaN or infinite"),
        (np.zeros((2, 1)), np.array([[1.0], [np.inf]]), "NaN or infinite"),
    ],
)
def test_errors(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_interval(x, y)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(0, 2**16))
def test_symmetric_non_negative_and_blind_to_rotation(n, m, d, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 1
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    value = frechet_distance(x, y)
    assert value >= 0
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert frechet_interval(x, y).value == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n, d", [(40, 80), (80, 20)])
def test_influence_is_the_derivative_in_a_weight(n, d):
    # psi_i is the derivative of the distance when image i gets more weight: repeat every image k
    # times and one image once more, and the distance moves by psi_i / (n k).
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d)) * 1.5 + 0.3
    k = 40
    base = frechet_distance(np.repeat(x, k, 0), np.repeat(y, k, 0))

    big, other = np.repeat(x, k, 0), np.repeat(y, k, 0)
    numeric = np.array(
        [(frechet_distance([*big, row], other) - base) * (n * k + 1) for row in x[:10]]
    )
    # the same rows' psi, from the formula in the docstring
    xc, gap = x - x.mean(0), x.mean(0) - y.mean(0)
    u, s, _ = np.linalg.svd(xc @ (y - y.mean(0)).T / (n - 1), full_matrices=False)
    psi = 2 * xc @ gap + (xc**2).sum(1) - n * (u**2 @ s)
    np.testing.assert_allclose(
        numeric - numeric.mean(), psi[:10] - psi[:10].mean(), rtol=0.1, atol=0.05 * psi.std()
    )


@pytest.mark.parametrize("n, d, low, high", [(400, 8, 0.85, 1.15), (60, 30, 0.9, 1.5)])
def test_standard_error_against_repeated_sampling(n, d, low, high):
    # exact to first order when n is well above d; near n = 2 d it errs on the wide side
    rng = np.random.default_rng(5)
    draws = [(rng.normal(size=(n, d)), rng.normal(size=(n, d)) * 1.3 + 0.2) for _ in range(200)]
    se = np.mean([frechet_interval(x, y).se for x, y in draws[:40]])
    assert low < se / np.std([frechet_distance(x, y) for x, y in draws]) < high


@pytest.mark.parametrize("n, d", [(20, 40), (60, 8)])
def test_bootstrap_equals_distances_of_resampled_rows(n, d):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n + 5, d)) + 0.5
    got = bootstrap_distances(x, y, repeats=5, seed=3)
    for value, seed in zip(got, np.random.SeedSequence(3).spawn(5)):
        draw = np.random.default_rng(seed)
        want = frechet_distance(x[draw.integers(n, size=n)], y[draw.integers(n + 5, size=n + 5)])
        assert value == pytest.approx(want, rel=1e-6)


def test_centred_bootstrap_agrees_with_influence_and_the_percentile_does_not():
    rng = np.random.default_rng(7)
    scales = np.arange(1, 121) ** -0.5  # slow spectrum, d / n = 2
    x, y = rng.normal(size=(60, 120)) * scales, rng.normal(size=(60, 120)) * scales
    influence = frechet_interval(x, y)
    centred = frechet_interval(x, y, method="bootstrap", repeats=200)
    # 300 new pairs of such sets have a standard deviation of 0.089
    assert 0.089 * 0.9 < influence.se < centred.se < 0.089 * 2.5
    with pytest.warns(UserWarning, match="biased upward"):
        paper = frechet_interval(x, y, method="paper", repeats=200)
    assert paper.value == centred.value == pytest.approx(influence.value)
    assert paper.interval[0] > paper.value  # it does not contain its own estimate
    assert centred.interval[0] < centred.value < centred.interval[1]
    with pytest.raises(ValueError, match="influence, bootstrap, paper"):
        frechet_interval(x, y, method="percentile")


def test_equal_images_of_one_patient_count_once():
    # both methods widen the interval of doubled images by the root of 2, within noise
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((400, 3)) + 1
    twice, who = np.repeat(x, 2, axis=0), np.repeat([f"p{i}" for i in range(40)], 2)
    for method in ("influence", "bootstrap"):
        options = {"method": method, "repeats": 300}
        blind = frechet_interval(twice, y, **options).se
        known = frechet_interval(twice, y, groups=(who, None), **options).se
        assert 1.2 < known / blind < 1.6
    own = [str(i) for i in range(40)]
    alone = frechet_interval(x, y, groups=(own, None)).se
    assert alone == pytest.approx(frechet_interval(x, y).se)


def test_images_of_one_patient_have_no_interval():
    from medbudget.metrics.frechet import variance_by_group

    with pytest.raises(ValueError, match="are of one patient: a score's interval needs"):
        variance_by_group(np.array([1.0, 2.0]), ["P1", "P1"])
