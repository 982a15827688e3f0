import pytest
import torch

from medbudget import make_phantoms
from medbudget.data.phantoms import KINDS
from medbudget.metrics import compute_auc, disease_axis, disease_score
from medbudget.metrics.disease import FILE, load_regressions

DISEASES = [(kind, label) for kind, labels in KINDS.items() for label in labels[1:]]


@pytest.mark.parametrize(("kind", "label"), DISEASES)
def test_tells_held_out_diseased_from_healthy(kind, label):
    """Seeds that the fit never saw; higher must mean more diseased."""
    sets = [
        make_phantoms(kind, one, 30, seed=77, split="val").images for one in (KINDS[kind][0], label)
    ]
    healthy, diseased = (disease_score(images, kind, label) for images in sets)
    assert healthy.shape == (30,)
    assert compute_auc([0] * 30 + [1] * 30, [*healthy, *diseased]) > 0.9
    assert healthy.mean() < 0 < diseased.mean()


def test_the_file_is_small_and_tells_how_it_was_made():
    assert FILE.stat().st_size < 40_000
    record = load_regressions()[1]
    assert set(record["measured"]) == {f"{kind}_{label}" for kind, label in DISEASES}
    assert all(0.9 < one["auc"] <= 1 for one in record["measured"].values())


def test_other_sizes_score_alike():
    small = make_phantoms("prostate", "tumour", 8, seed=3).images
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        disease_score(small, "prostate"), disease_score(large, "prostate"), rtol=0.02, atol=0.02
    )


def test_axis_means_and_intervals():
    healthy = make_phantoms("histology", "normal", 6, seed=4).images
    ill = make_phantoms("histology", "metastasis", 6, seed=4).images
    axis = disease_axis({0.0: healthy, 1.0: ill}, "histology")
    values = disease_score(ill, "histology")
    assert axis[1.0].value == pytest.approx(values.mean()) and axis[1.0].n == 6
    half = 2.5706 * values.std(ddof=1) / 6**0.5  # t(5) at 97.5 %
    assert axis[1.0].interval == pytest.approx(
        (values.mean() - half, values.mean() + half), rel=1e-3
    )
    assert axis[0.0].interval[1] < axis[1.0].interval[0]
    with pytest.raises(ValueError, match="at least 2"):
        disease_axis({0.0: healthy[:1]}, "histology")


@pytest.mark.parametrize(
    ("kind", "label", "problem"),
    [
        ("brain", None, "allowed are chest, histology, prostate"),
        ("chest", None, "cardiomegaly"),
        ("chest", "healthy", "'healthy' is no disease of chest"),
        ("prostate", "metastasis", "no disease of prostate"),
    ],
)
def test_wrong_input(kind, label, problem):
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=problem):
        disease_score(images, kind, label)
    with pytest.raises(ValueError, match="square"):
        disease_score(images[..., :32], "prostate")


def test_images_that_are_no_phantoms_get_no_score(noise):
    """Another kind and noise: a regression would give each of them a number."""
    other = make_phantoms("histology", "normal", 4).images
    for images in (other, noise(4)):
        for kind, label in (("prostate", "tumour"), ("chest", "pneumonia")):
            with pytest.raises(ValueError, match=f"no phantoms of the {kind}"):
                disease_score(images, kind, label)


def test_images_drawn_by_the_tiny_base_get_a_score(tiny):
    from medbudget import sample
    from medbudget.tiny import load_trained

    word = load_trained("chest", "pneumonia", tiny)
    images = sample(tiny, "<pneumonia>", embeddings=[word], n=4, steps=8)
    assert disease_score(images, "chest", "pneumonia").shape == (4,)


@pytest.mark.realdata
def test_real_x_rays_get_no_disease_score_of_phantoms(real_data):
    from medbudget import load_images

    files = sorted((real_data / "chest_xray" / "pneumonia").iterdir())[:12]
    with pytest.raises(ValueError, match="no phantoms of the chest"):
        disease_score(load_images(files, size=224), "chest", "pneumonia")
