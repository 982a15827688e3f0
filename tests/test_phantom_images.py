"""Phantoms: drawn fine and averaged, with the statistics of real images."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from medbudget.data.phantoms import make_phantoms
from medbudget.data.phantoms.drawing import enlarge, oval, shrink
from medbudget.metrics.auc import compute_auc
from pretraining.look import compare, load_chests, load_prostates

CLASSES = [
    ("prostate", "healthy", "tumour"),
    ("chest", "healthy", "pneumonia"),
    ("histology", "normal", "metastasis"),
]


def test_shrink_averages_blocks():
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert shrink(image, 2).tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_enlarging_keeps_a_plane():
    x = np.arange(8.0)
    large = enlarge(x[None] + 2 * x[:, None], 4)
    at = (np.arange(32) + 0.5) / 4 - 0.5
    inner = slice(2, 30)  # beyond the outer centres nothing is known
    assert np.allclose(large[inner, inner], (at[None] + 2 * at[:, None])[inner, inner])


def test_oval_has_its_half_axes():
    points = np.array(oval(0.5, 0.4, 0.2, 0.1))
    assert np.allclose(points.max(0), (0.7, 0.5)) and np.allclose(points.min(0), (0.3, 0.3))


@pytest.mark.parametrize("kind, healthy, ill", CLASSES)
def test_same_seed_same_patient_at_any_size(kind, healthy, ill):
    first = make_phantoms(kind, ill, 2, size=64, seed=5)
    again = make_phantoms(kind, ill, 1, size=64, seed=5)
    assert first.images[0].equal(again.images[0])
    assert not first.images[0].equal(first.images[1])
    assert first.masks.any(2).any(1).all()
    assert not make_phantoms(kind, healthy, 1, size=64).masks.any()
    large = make_phantoms(kind, ill, 2, size=128, seed=5)
    halved = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    for small, half in zip(first.images.float(), halved):
        assert np.corrcoef(small.flatten(), half.flatten())[0, 1] > 0.97


@pytest.fixture(scope="module")
def prostates():
    """Images ``(2 n, 3, 64, 64)``, healthy first, whether there is a tumour, and its masks."""
    sets = [make_phantoms("prostate", label, 60, size=64) for label in ("healthy", "tumour")]
    images = torch.cat([one.images for one in sets]).numpy().astype(float)
    return images, np.repeat([0, 1], 60), sets[1].masks.numpy()


def test_no_single_pixel_and_no_mean_colour_tells_a_tumour(prostates):
    images, ill, _ = prostates
    regression = LogisticRegression(max_iter=999)
    for part in (images, images[:, :, 14:50, 11:53]):  # the whole, and the gland's surroundings
        means = part.mean((2, 3)) / 255
        guess = cross_val_predict(regression, means, ill, cv=5, method="decision_function")
        assert compute_auc(ill, guess) < 0.7
    t2w, adc, dwi = images[:, :, 14:50, 11:53].transpose(1, 0, 2, 3)
    for values in (-t2w, -adc, dwi, dwi - adc):  # the darkest, the brightest, the most restricted
        assert compute_auc(ill, values.max((1, 2))) < 0.8


def test_a_reader_who_knows_where_to_look_tells_a_tumour(prostates):
    images, ill, masks = prostates
    contrast = []
    for image, mask in zip(images, [*masks, *masks]):  # in the healthy the same place
        ring = binary_dilation(mask, iterations=3) & ~binary_dilation(mask, iterations=1)
        t2w, adc, dwi = image[:, mask].mean(1) - image[:, ring].mean(1)
        contrast.append(dwi - adc - 0.5 * t2w)
    assert compute_auc(ill, np.array(contrast)) > 0.95
    area = masks.sum((1, 2))
    assert np.quantile(area, 0.9) > 4 * np.quantile(area, 0.1)


@pytest.mark.realdata
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["prostate", "chest"])
def test_spectrum_and_gray_levels_are_those_of_real_images(real_data, kind, size):
    drawn = make_phantoms(kind, "healthy", 40, size=size).images.numpy().astype(float)
    if kind == "chest":
        pairs = [(drawn[:, 0], load_chests(real_data, size))]
    else:
        real = load_prostates(real_data, size)
        pairs = [(drawn[:, c], real[:, c]) for c in range(3)]
    for ours, theirs in pairs:
        ratio, levels = compare(ours, theirs)
        # radius 1 of the one real prostate is the balance of its centre and its border
        ratio = np.abs(ratio[1 if kind == "prostate" else 0 :])
        assert (ratio < np.log10(2)).mean() > 0.9 and ratio.max() < np.log10(2.2)
        assert np.abs(levels[:-1]).max() <= 15  # at 5 to 90 %
        assert abs(levels[-1]) <= 20  # few pixels of DWI: fat that folds over, in the one patient
