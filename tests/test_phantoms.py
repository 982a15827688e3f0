"""Phantoms: what depends on which argument, what an image shows, and the statistics of real images."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from medbudget.data.phantoms import KINDS, SPLITS, _seed_words, make_phantoms
from medbudget.data.phantoms.drawing import enlarge, shrink
from medbudget.data.phantoms.sketch import outline
from medbudget.metrics.auc import compute_auc
from pretraining.look import compare, load_real, split_panels

CLASSES = [(kind, label) for kind, labels in KINDS.items() for label in labels]


@cache
def draw(kind, label, n=40):
    return make_phantoms(kind, label, n)


def measure_contrast(image, mask):
    """Return the mean of each channel in the mask, above that of a ring around it."""
    ring = binary_dilation(mask, iterations=3) & ~binary_dilation(mask, iterations=1)
    return image[:, mask].mean(1) - image[:, ring].mean(1)


def test_shrink_averages_blocks():
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert shrink(image, 2).tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_enlarging_keeps_a_plane():
    x = np.arange(8.0)
    large = enlarge(x[None] + 2 * x[:, None], 4)
    at = (np.arange(32) + 0.5) / 4 - 0.5
    inner = slice(2, 30)  # beyond the outer centres nothing is known
    assert np.allclose(large[inner, inner], (at[None] + 2 * at[:, None])[inner, inner])


def test_outline_has_its_half_axes():
    points = np.array(outline(0.5, 0.4, 0.2, 0.1))
    assert np.allclose(points.max(0), (0.7, 0.5)) and np.allclose(points.min(0), (0.3, 0.3))


@pytest.mark.parametrize(("kind", "label"), CLASSES)
def test_image_i_depends_on_seed_and_index_alone(new_phantoms, kind, label):
    five, two = make_phantoms(kind, label, 5, seed=3), make_phantoms(kind, label, 2, seed=3)
    assert torch.equal(five.images[:2], two.images)
    assert five.images.shape == (5, 3, 64, 64) and five.images.dtype == torch.uint8
    assert five.masks.shape == (5, 64, 64) and five.masks.dtype == torch.bool
    assert not torch.equal(make_phantoms(kind, label, 2, seed=4).images, two.images)
    healthy = label in ("healthy", "normal")
    assert five.masks.flatten(1).any(1).tolist() == [not healthy] * 5


def test_no_image_stands_in_two_splits():
    seen = set()
    for split in SPLITS:
        for seed in range(3):
            images = make_phantoms("chest", "healthy", 10, size=32, seed=seed, split=split).images
            seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 90


def test_every_image_has_its_own_random_numbers():
    names = {
        _seed_words(kind, (label,), split, seed, index)
        for kind, label in CLASSES
        for split in SPLITS
        for seed in (0, 1, 2**32, 2**64 - 1)
        for index in range(3)
    }
    assert len(names) == len(CLASSES) * 3 * 4 * 3
    assert {len(words) for words in names} == {6}  # a fixed length: numpy pads with zeros
    assert max(max(words) for words in names) < 2**32  # one word each: none can run into the next


@pytest.mark.parametrize("kind, ill", [(kind, labels[-1]) for kind, labels in KINDS.items()])
def test_a_patient_is_the_same_at_any_size(new_phantoms, kind, ill):
    small = make_phantoms(kind, ill, 2, size=64, seed=5).images.float()
    large = make_phantoms(kind, ill, 2, size=128, seed=5).images.float()
    for one, halved in zip(small, torch.nn.functional.avg_pool2d(large, 2)):
        assert np.corrcoef(one.flatten(), halved.flatten())[0, 1] > 0.97


@pytest.fixture(scope="module")
def prostates():
    """Images ``(2 n, 3, 64, 64)``, healthy first, whether there is a tumour, and its masks ``(n, …)``."""
    sets = [make_phantoms("prostate", label, 60) for label in ("healthy", "tumour")]
    images = torch.cat([one.images for one in sets]).numpy().astype(float)
    return images, np.repeat([0, 1], 60), sets[1].masks.numpy()


def test_tumour_is_dark_on_t2w_and_adc_and_bright_on_dwi(prostates):
    images, ill, masks = prostates
    pairs = zip(images[ill == 1][:20], masks)
    t2w, adc, dwi = np.transpose([measure_contrast(image, mask) for image, mask in pairs])
    assert (dwi > 0).mean() >= 0.9 and dwi.mean() > 25
    assert adc.mean() < -10 and t2w.mean() < -8
    assert dwi.min() < 0.6 * dwi.mean()  # some are hard to see


def test_no_single_pixel_and_no_mean_colour_tells_a_tumour(prostates):
    images, ill, _ = prostates
    regression = LogisticRegression(max_iter=999)
    gland = images[:, :, 14:50, 11:53]  # and what surrounds it
    for part in (images, gland):
        means = part.mean((2, 3)) / 255
        guess = cross_val_predict(regression, means, ill, cv=5, method="decision_function")
        assert compute_auc(ill, guess) < 0.7
    t2w, adc, dwi = gland.swapaxes(0, 1)
    for values in (-t2w, -adc, dwi, dwi - adc):  # the darkest, the brightest, the most restricted
        assert compute_auc(ill, values.max((1, 2))) < 0.8


def test_a_reader_who_knows_where_to_look_tells_a_tumour(prostates):
    images, ill, masks = prostates
    # in the healthy the same places
    contrast = [measure_contrast(image, mask) for image, mask in zip(images, [*masks, *masks])]
    assert compute_auc(ill, np.array(contrast) @ [-0.5, -1, 1]) > 0.95
    area = masks.sum((1, 2))
    assert np.quantile(area, 0.9) > 4 * np.quantile(area, 0.1)


def test_cardiomegaly_widens_the_bright_heart():
    def width(label):
        rows = draw("chest", label).images[:, 0, 38:44].float().mean((0, 1))
        return int((rows > 140).sum())

    assert width("cardiomegaly") >= width("healthy") + 4


@pytest.mark.parametrize("label", ["pleural_effusion", "pneumonia"])
def test_effusion_brightens_a_lung_base_and_pneumonia_the_lung(label):
    healthy, ill = draw("chest", "healthy").images[:, 0].float().mean(0), draw("chest", label)
    inside = torch.stack([i[0].float()[m].mean() for i, m in zip(ill.images, ill.masks)])
    same_place = torch.stack([healthy[m].mean() for m in ill.masks])
    # exposures differ between patients
    assert (inside > same_place).float().mean() > 0.8 and inside.mean() > same_place.mean() + 8


def test_metastasis_has_fewer_dark_nuclei():
    normal, ill = (
        (draw("histology", label, 20).images.float().mean(1) < 110).float().mean()
        for label in KINDS["histology"]
    )
    assert normal > 1.5 * ill


def test_combined_diseases_keep_both_masks_and_names():
    both = make_phantoms("chest", ("pneumonia", "cardiomegaly"), 3)
    assert both.labels == ("pneumonia+cardiomegaly",) * 3
    alone = draw("chest", "cardiomegaly").masks[:3]
    assert both.masks.float().mean() > alone.float().mean()


def test_wrong_arguments_are_refused():
    for arguments, problem in (
        (("knee", "healthy", 1), "prostate, chest, histology"),
        (("chest", "tumour", 1), "cardiomegaly"),
        (("chest", ("healthy", "pneumonia"), 1), "cannot be combined"),
        (("prostate", ("tumour", "tumour"), 1), "twice"),
        (("chest", (), 1), "none"),
        (("chest", "healthy", 0), "n >= 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            make_phantoms(*arguments)
    with pytest.raises(ValueError, match="size <= 512"):
        make_phantoms("chest", "healthy", 1, size=1024)


@pytest.mark.realdata
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["prostate", "chest"])
def test_spectrum_and_gray_levels_are_those_of_real_images(real_data, kind, size):
    drawn = make_phantoms(kind, "healthy", 40, size=size).images.numpy().astype(float)
    phantoms = split_panels(kind, drawn)
    for name, real in load_real(kind, real_data, size).items():
        ratio, levels = compare(phantoms[name], real)
        # radius 1 of the one real prostate is the balance of its centre and its border
        ratio = np.abs(ratio[1 if kind == "prostate" else 0 :])
        assert (ratio < np.log10(2)).mean() > 0.9 and ratio.max() < np.log10(2.2)
        assert np.abs(levels[:-1]).max() <= 15  # at 5 to 90 %
        assert abs(levels[-1]) <= 20  # few pixels of DWI: fat that folds over, in the one patient
