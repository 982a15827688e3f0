"""Kernel distance, precision and recall, permutation tests: references and directions."""

import numpy as np
import pytest

from medbudget.metrics import (
    frechet_distance,
    kernel_distance,
    permutation_test,
    precision_recall,
)


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


def test_kernel_distance_agrees_with_torchmetrics():
    import torch

    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(50, 20, 0), normal(50, 20, 1, shift=0.3)
    want = kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert kernel_distance(x, y).value == pytest.approx(float(want), rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kernel_distance_is_unbiased_with_an_honest_error(shift):
    estimates = [
        kernel_distance(normal(40, 10, 2 * i), normal(30, 10, 2 * i + 1, shift=shift))
        for i in range(200)
    ]
    values = np.array([e.value for e in estimates])
    errors = np.array([e.se for e in estimates])
    far = kernel_distance(normal(1500, 10, 10_001), normal(1500, 10, 10_002, shift=shift)).value
    assert abs(values.mean() - far) < 4 * values.std() / np.sqrt(200)
    # near zero the first-order part is clipped at 0, so the error is a little too wide there
    assert 0.9 < np.sqrt((errors**2).mean()) / values.std() < 1.3


def test_precision_and_recall_by_hand():
    # k = 1 on a line. Real 0, 1, 10, 11: radius 1 each. Synthetic 0.5, 0.6: radius 0.1 each.
    real, synthetic = [[0.0], [1.0], [10.0], [11.0]], [[0.5], [0.6]]
    assert precision_recall(real, synthetic, k=1) == (1.0, 0.0)
    assert precision_recall(real, [[0.5], [5.0]], k=1) == (0.5, 0.5)  # radius 4.5 covers 0 and 1
    assert precision_recall(np.ones((5, 3)), np.ones((4, 3))) == (1.0, 1.0)
    with pytest.raises(ValueError, match="k must be from 1 to 1"):
        precision_recall(real, synthetic, k=2)


def test_mode_collapse_loses_recall_and_noise_loses_precision():
    real = normal(300, 8, 0)
    precision, recall = precision_recall(real, real[:3].repeat(100, 0) + normal(300, 8, 1, 0.05))
    assert precision > 0.95 and recall < 0.1
    precision, recall = precision_recall(real, normal(300, 8, 1, scale=3))
    assert precision < 0.2 and recall > 0.9


# ---------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("n_ref, d", [(30, 50), (80, 10)])
@pytest.mark.parametrize("na, nb", [(20, 33), (60, 60)])
def test_permutation_statistic_is_the_difference_of_distances(n_ref, d, na, nb):
    a, b, r = normal(na, d, 0), normal(nb, d, 1, scale=1.3), normal(n_ref, d, 2)
    frechet = permutation_test(a, b, r, repeats=2)
    want = frechet_distance(a, r) - frechet_distance(b, r)
    assert frechet.difference == pytest.approx(want, rel=1e-6, abs=1e-6)
    kernel = permutation_test(a, b, r, repeats=2, statistic="kernel")
    want = kernel_distance(a, r).value - kernel_distance(b, r).value
    assert kernel.difference == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("statistic", ["frechet", "kernel"])
@pytest.mark.parametrize("paired", [False, True])
def test_p_values_are_uniform_under_the_null(statistic, paired):
    p = [
        permutation_test(
            normal(15, 5, 3 * i), normal(15, 5, 3 * i + 1), normal(20, 5, 3 * i + 2),
            statistic=statistic, paired=paired, repeats=39, seed=i,
        ).p_value
        for i in range(60)
    ]  # fmt: skip
    assert np.mean(p) == pytest.approx(0.51, abs=0.12)
    assert np.mean(np.array(p) <= 0.05) < 0.15


def test_a_worse_generator_is_found_and_the_sign_says_which():
    ref, good, bad = normal(60, 20, 0), normal(60, 20, 1), normal(60, 20, 2, shift=0.5)
    result = permutation_test(good, bad, ref, repeats=199)
    assert result.p_value == 1 / 200 and result.difference < 0
    assert permutation_test(bad, good, ref, repeats=199).difference > 0
    assert "p = 0.005 (199 permutations)" in str(result)


def test_pairs_see_a_difference_that_shared_seeds_would_drown():
    shared = normal(60, 5, 0, scale=3)
    a, b = shared + normal(60, 5, 1, scale=0.1), shared + normal(60, 5, 2, scale=0.1) + 0.3
    ref = normal(60, 5, 3, scale=3, shift=-1)
    paired = permutation_test(a, b, ref, paired=True, repeats=199)
    unpaired = permutation_test(a, b, ref, repeats=199)
    assert paired.p_value < 0.02 < unpaired.p_value


def test_equal_generators_do_not_differ():
    a, r = normal(20, 8, 0), normal(20, 8, 2)
    same = permutation_test(a, a, r, paired=True, repeats=20)
    assert same.difference == pytest.approx(0, abs=1e-5) and same.p_value == 1


def test_permutation_errors():
    a, r = normal(20, 8, 0), normal(20, 8, 1)
    with pytest.raises(ValueError, match="got 20 and 19"):
        permutation_test(a, a[:19], r, paired=True)
    with pytest.raises(ValueError, match="allowed are 'frechet', 'kernel'"):
        permutation_test(a, a, r, statistic="fid")
    with pytest.raises(ValueError, match="same extractor"):
        permutation_test(a, a[:, :4], r)


def test_patients_widen_the_kernel_distance():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((40, 3)) + 1, rng.standard_normal((400, 3))
    twice, who = np.repeat(x, 2, axis=0), np.repeat([f"p{i}" for i in range(40)], 2)
    known, blind = kernel_distance(twice, y, groups=(who, None)), kernel_distance(twice, y)
    assert known.value == blind.value and 1.2 < known.se / blind.se < 1.6
