"""Disease scores: they tell phantoms apart, and refuse what they know nothing of."""

import pytest
import torch

from medbudget import load_images, make_phantoms, sample
from medbudget.data.phantoms import KINDS
from medbudget.metrics import compute_auc, disease_axis, disease_score
from medbudget.metrics.disease import FILE, load_regressions, whole_features
from medbudget.tiny import load_trained

DISEASES = [(kind, label) for kind, labels in KINDS.items() for label in labels[1:]]


@pytest.mark.parametrize(("kind", "label"), DISEASES)
def test_tells_held_out_diseased_from_healthy(kind, label):
    """Seeds that the fit never saw; higher must mean more diseased. Some phantoms are hard."""
    healthy, diseased = (
        disease_score(make_phantoms(kind, one, 16, seed=77, split="val").images, kind, label)
        for one in (KINDS[kind][0], label)
    )
    assert compute_auc([0] * 16 + [1] * 16, [*healthy, *diseased]) > 0.7
    assert healthy.mean() < 0 < diseased.mean()


def test_the_file_is_small_and_tells_how_it_was_made():
    assert FILE.stat().st_size < 600_000
    measured = load_regressions()[1]["measured"]
    assert set(measured) == {f"{kind}_{label}" for kind, label in DISEASES}
    assert all(0.75 < one["auc"] <= 1 for one in measured.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_features_are_those_of_todays_phantoms(kind):
    stored = load_regressions()[0][f"phantoms_{kind}"]
    assert stored.shape == (24 * len(KINDS[kind]), 1280)
    today = whole_features(make_phantoms(kind, KINDS[kind][0], 2, seed=555).images)
    torch.testing.assert_close(stored[:2].double(), torch.from_numpy(today), atol=0.003, rtol=0)


def test_other_sizes_score_alike():
    small = make_phantoms("prostate", "tumour", 4, seed=3).images
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        disease_score(small, "prostate"), disease_score(large, "prostate"), rtol=0.02, atol=0.02
    )


def test_axis_means_and_intervals():
    healthy = make_phantoms("histology", "normal", 6, seed=4).images
    ill = make_phantoms("histology", "metastasis", 6, seed=4).images
    axis = disease_axis({0.0: healthy, 1.0: ill}, "histology")
    values = disease_score(ill, "histology")
    mean, half = values.mean(), 2.5706 * values.std(ddof=1) / 6**0.5  # t(5) at 97.5 %
    assert axis[1.0].value == pytest.approx(mean) and axis[1.0].n == 6
    assert axis[1.0].interval == pytest.approx((mean - half, mean + half), rel=1e-3)
    assert axis[0.0].interval[1] < axis[1.0].interval[0]
    with pytest.raises(ValueError, match="at least 2"):
        disease_axis({0.0: healthy[:1]}, "histology")


@pytest.mark.parametrize(
    ("kind", "label", "problem"),
    [
        ("brain", None, "allowed are chest, histology, prostate"),
        ("chest", None, "cardiomegaly"),
        ("chest", "healthy", "'healthy' is no disease of chest"),
        ("prostate", None, "square"),
    ],
)
def test_wrong_input(kind, label, problem):
    with pytest.raises(ValueError, match=problem):
        disease_score(torch.zeros(1, 3, 64, 32, dtype=torch.uint8), kind, label)


def test_drawings_of_tiny_get_a_score_and_images_that_are_no_phantoms_none(tiny, noise):
    word = load_trained("chest", "pneumonia", tiny)
    images = sample(tiny, "<pneumonia>", embeddings=[word], n=2, steps=8)
    assert disease_score(images, "chest", "pneumonia").shape == (2,)
    for other in (make_phantoms("histology", "normal", 4).images, noise(4)):
        with pytest.raises(ValueError, match="no phantoms of the chest"):
            disease_score(other, "chest", "pneumonia")


@pytest.mark.parametrize("level", [0, 128, 255])
def test_images_without_contrast_get_no_score(level):
    """Black images are no further from phantoms than a poor drawing."""
    images = make_phantoms("histology", "normal", 2).images
    images[1] = level
    with pytest.raises(ValueError, match="1 of 2 images have one gray level throughout"):
        disease_score(images, "histology")


def test_gray_prostates_get_no_score():
    images = make_phantoms("prostate", "tumour", 2).images
    with pytest.raises(ValueError, match="2 of 2 prostates have the same ADC and DWI"):
        disease_score(images[:, :1].expand(-1, 3, -1, -1), "prostate")


@pytest.mark.realdata
def test_real_x_rays_get_no_disease_score_of_phantoms(real_data):
    files = sorted((real_data / "chest_xray" / "pneumonia").iterdir())[:12]
    with pytest.raises(ValueError, match="no phantoms of the chest"):
        disease_score(load_images(files, size=224), "chest", "pneumonia")
