import pytest
import torch
from scipy.ndimage import binary_dilation

from medbudget.data.phantoms import KINDS, SPLITS, _seed_words, make_phantoms

CLASSES = [(kind, label) for kind, labels in KINDS.items() for label in labels]


@pytest.mark.parametrize(("kind", "label"), CLASSES)
def test_image_i_depends_on_seed_and_index_alone(kind, label):
    five, two = make_phantoms(kind, label, 5, seed=3), make_phantoms(kind, label, 2, seed=3)
    assert torch.equal(five.images[:2], two.images)
    assert five.images.shape == (5, 3, 64, 64) and five.images.dtype == torch.uint8
    assert five.masks.shape == (5, 64, 64) and five.masks.dtype == torch.bool
    assert not torch.equal(make_phantoms(kind, label, 2, seed=4).images, two.images)
    healthy = label in ("healthy", "normal")
    assert five.masks.flatten(1).any(1).tolist() == [not healthy] * 5


def test_no_image_stands_in_two_splits():
    seen = set()
    for split in ("train", "val", "test"):
        for seed in range(3):
            images = make_phantoms("chest", "healthy", 10, seed=seed, split=split).images
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


def test_tumour_is_dark_on_t2w_and_adc_and_bright_on_dwi():
    phantoms = make_phantoms("prostate", "tumour", 20)
    contrast = []
    for image, mask in zip(phantoms.images.float(), phantoms.masks.numpy()):
        ring = binary_dilation(mask, iterations=3) & ~binary_dilation(mask, iterations=1)
        contrast.append(image[:, mask].mean(1) - image[:, ring].mean(1))
    t2w, adc, dwi = torch.stack(contrast).T
    assert (dwi > 0).float().mean() >= 0.9 and dwi.mean() > 25
    assert adc.mean() < -10 and t2w.mean() < -8
    assert dwi.min() < 0.6 * dwi.mean()  # some are hard to see


def test_cardiomegaly_widens_the_bright_heart():
    def width(label):
        rows = make_phantoms("chest", label, 40).images[:, 0, 38:44].float().mean((0, 1))
        return int((rows > 140).sum())

    assert width("cardiomegaly") >= width("healthy") + 4


def test_effusion_brightens_a_lung_base_and_pneumonia_the_lung():
    healthy = make_phantoms("chest", "healthy", 40).images[:, 0].float()
    for label in ("pleural_effusion", "pneumonia"):
        sick = make_phantoms("chest", label, 40)
        inside = torch.stack([i[0].float()[m].mean() for i, m in zip(sick.images, sick.masks)])
        same_place = torch.stack([healthy.mean(0)[m].mean() for m in sick.masks])
        # exposures differ between patients
        assert (inside > same_place).float().mean() > 0.8 and inside.mean() > same_place.mean() + 8


def test_metastasis_has_fewer_dark_nuclei():
    dark = [
        (make_phantoms("histology", label, 20).images.float().mean(1) < 110).float().mean()
        for label in KINDS["histology"]
    ]
    assert dark[0] > 1.5 * dark[1]


def test_combined_diseases_keep_both_masks_and_names():
    both = make_phantoms("chest", ("pneumonia", "cardiomegaly"), 3)
    assert both.labels == ("pneumonia+cardiomegaly",) * 3
    alone = make_phantoms("chest", "cardiomegaly", 3)
    assert both.masks.float().mean() > alone.masks.float().mean()


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
