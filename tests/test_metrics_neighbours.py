"""Memorisation: planted copies are found, honest generators are left alone."""

import numpy as np
import pytest
import torch

from medbudget import load_images, make_phantoms
from medbudget.metrics import memorisation, pixel_neighbours
from medbudget.metrics.neighbours import feature_neighbours


def scenes(n, *, seed, size=64):
    """Smooth random fields around a common mean image, like registered anatomy."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(99))
    field = common + 0.8 * torch.randn(n, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(field, size=(size, size), mode="bicubic")
    grain = 0.1 * torch.randn(n, 3, size, size, generator=generator)
    return ((smooth + grain) * 40 + 128).clamp(0, 255).to(torch.uint8)


def with_noise(images, sd, seed):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() + sd * noise).clamp(0, 255).to(torch.uint8)


def planted(train, fresh, seed=5):
    """Fresh images and 10 noisy copies: 4 plain, 3 mirrored, 3 shifted and darker."""
    copies = with_noise(train[:10], 15, seed)
    copies[4:7] = copies[4:7].flip(-1)
    edge = train.shape[-1]
    move = max(1, round(edge * 0.04))
    copies[7:] = (torch.roll(copies[7:].float(), move, dims=-1) * 0.7).to(torch.uint8)
    return torch.cat([fresh, copies])


def test_nearest_neighbour_of_a_changed_copy():
    train = scenes(20, seed=0)
    copy = train[[7]]
    for image in (
        copy,
        copy.flip(-1),
        torch.roll(copy, (2, -4), dims=(2, 3)),
        copy // 2 + 20,
        with_noise(copy, 20, 0),
        torch.nn.functional.interpolate(copy.float(), 96).to(torch.uint8),
    ):
        distance, index = pixel_neighbours(image, train)
        assert index[0] == 7 and distance[0] < 0.1
    other, _ = pixel_neighbours(scenes(10, seed=1), train)
    assert other.min() > 0.1


def test_correlation_by_hand():
    left = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    left[..., 16:] = 200
    mirrored, _ = pixel_neighbours(left, 200 - left)
    assert mirrored[0] == pytest.approx(0, abs=1e-5)
    down = left.transpose(2, 3).contiguous()
    inverse, _ = pixel_neighbours(down, 200 - down)  # no mirror image of it is the other
    assert inverse[0] > 1.2
    # a ramp keeps its shape under every shift, and one from top to bottom its mirror image
    rising = (4 * torch.arange(64)).to(torch.uint8).view(64, 1).expand(1, 3, 64, 64)
    opposite, _ = pixel_neighbours(rising, 255 - rising)
    assert opposite[0] == pytest.approx(2, abs=1e-5)
    across, _ = pixel_neighbours(rising, rising.transpose(2, 3).contiguous())
    assert across[0] == pytest.approx(1, abs=1e-5)


def test_feature_neighbours_see_mirror_images():
    train = scenes(12, seed=0)
    distance, index = feature_neighbours(train[[3, 5]].flip(-1), train, "layout")
    assert index.tolist() == [3, 5] and distance.max() < 1e-3


@pytest.mark.parametrize("space", ["pixels", "layout"])
def test_ten_planted_copies_of_a_hundred_are_found(space):
    train, heldout = scenes(50, seed=0), scenes(120, seed=1)
    found = memorisation(planted(train, scenes(90, seed=2)), train, heldout, space=space)
    n = 10 if space == "pixels" else 7  # features do not undo shifts and darkening
    assert found.flagged[90 : 90 + n].all() and found.flagged[:90].sum() <= 3
    assert sorted(found.worst(n)) == [(90 + j, j) for j in range(n)]


def test_an_honest_generator_is_near_the_level_and_c_t_has_the_stated_sign(noise):
    from scipy.stats import mannwhitneyu, norm

    train, heldout = scenes(40, seed=0), scenes(110, seed=1)
    honest = memorisation(scenes(100, seed=2), train, heldout)
    assert honest.share < 0.04 and honest.scores()[0].interval[0] <= 0.01
    p = mannwhitneyu(
        honest.distance, honest.heldout_distance, alternative="less", use_continuity=False,
        method="asymptotic",
    ).pvalue  # fmt: skip
    assert abs(honest.c_t) < 3 and honest.c_t == pytest.approx(norm.ppf(p), abs=1e-9)
    few = heldout[:40]
    copying = memorisation(with_noise(train, 15, 3), train, few)
    assert copying.c_t < -5 and copying.share > 0.95
    assert memorisation(noise(40), train, few).c_t > 5


def test_training_images_are_no_held_out_images_and_few_raise_the_level():
    train, fresh = scenes(10, seed=0), scenes(19, seed=1)
    found = memorisation(scenes(5, seed=2), train, torch.cat([train[:2], fresh]))
    assert found.level == pytest.approx(0.05) and "only 19 held-out images" in found.note
    text = str(found.scores()[0])
    assert "level raised from 0.01" in text and "2 real images that are training images" in text
    with pytest.raises(ValueError, match="also a training image"):
        memorisation(fresh, train, train[:4])


@pytest.mark.slow
def test_planted_copies_of_phantoms():
    """Chests are the hard ones: they resemble each other, so half a pixel matters."""
    train, heldout, fresh = (
        make_phantoms("chest", "healthy", n, split=split).images
        for n, split in ((30, "train"), (60, "test"), (40, "val"))
    )
    found = memorisation(planted(train, fresh), train, heldout)
    assert found.flagged[40:].all() and found.index[40:].tolist() == list(range(10))
    assert found.flagged[:40].sum() <= 2


def test_feature_scores_say_what_they_cannot_see():
    train, heldout = scenes(6, seed=0), scenes(20, seed=1)
    copies = torch.cat([train[:3].flip(-1), with_noise(train[3:6], 15, 5)])
    found = memorisation(copies, train, heldout, space="efficientnet-lite0", level=0.05)
    assert found.flagged[:3].all(), "mirror images, to the bit"
    assert not found.flagged[3:].all(), "a network that sees through noise: change the note"
    assert "rely on the pixels" in found.scores()[0].note
    assert "rely on the pixels" not in memorisation(copies, train, heldout).scores()[0].note


@pytest.mark.realdata
def test_planted_copies_of_real_x_rays(real_data):
    folder = real_data / "chest_xray" / "normal"
    if not folder.is_dir():
        pytest.skip(f"no chest_xray in {real_data}")
    images = load_images(folder)
    images = images[torch.from_numpy(np.random.default_rng(0).permutation(len(images)))]
    found = memorisation(planted(images[:60], images[180:240]), images[:60], images[60:180])
    assert found.flagged[60:].all() and found.flagged[:60].sum() <= 4
