"""Augmentation: every operation against a slow reference, and what a batch must never do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torchvision.transforms import functional as T

from medbudget.augment import HEAVY, NONE, Augmentation, augment, draw_augmentation, warp


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=3, size=(20, 24), seed=0):
    return torch.rand(n, 3, *size, generator=gen(seed))


def slow_warp(image, angle, scale, shift, k):
    """Forward matrices, inverted by numpy; one pixel after the other; scipy's interpolation."""
    _, h, w = image.shape
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    # y points down: counter-clockwise on the screen takes x to -y
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rows, columns = np.empty((h, w)), np.empty((h, w))
    for v in range(h):
        for u in range(w):
            d = np.array([u, v]) - centre
            r2 = (d**2).sum() / w**2
            moved = centre + d * (1 + k * r2 + k * r2**2)
            source = np.linalg.inv(turn) @ (moved - centre - shift * np.array([w, h])) + centre
            columns[v, u], rows[v, u] = source
    return np.stack([map_coordinates(c, [rows, columns], order=1, mode="mirror") for c in image])


@pytest.mark.parametrize("seed", range(4))
def test_warp_agrees_with_scipy_pixel_by_pixel(seed):
    images = pictures(3, seed=seed)
    d = draw_augmentation(3, Augmentation(distortion=0.5), generator=gen(seed))
    moved = warp(images, angle=d.angle, scale=d.scale, shift=d.shift, distortion=d.distortion)
    for i in range(3):
        want = slow_warp(
            images[i].numpy(), float(d.angle[i]), float(d.scale[i]), d.shift[i].numpy(),
            float(d.distortion[i]),
        )  # fmt: skip
        assert np.abs(moved[i].numpy() - want).max() < 2e-4


def test_warp_turns_shifts_and_enlarges_as_its_words_say():
    zero, one = torch.zeros(1), torch.ones(1)
    still = {"angle": zero, "scale": one, "shift": torch.zeros(1, 2), "distortion": zero}
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 6] = 1  # right of the centre
    assert torch.allclose(warp(image, **still), image)
    up = warp(image, **{**still, "angle": torch.tensor([torch.pi / 2])})
    assert up[0, 0, 2, 4] > 0.99  # counter-clockwise: above it
    right = warp(image, **{**still, "shift": torch.tensor([[1 / 9, 0.0]])})
    assert right[0, 0, 4, 7] > 0.99
    large = warp(image, **{**still, "scale": torch.tensor([2.0])})
    assert large[0, 0, 4, 8] > 0.99  # twice as far from the centre
    quarter = torch.tensor([torch.pi / 2])
    square = pictures(1, (8, 8))
    assert torch.allclose(
        warp(square, **{**still, "angle": quarter}), square.rot90(1, (2, 3)), atol=1e-5
    )


def one_change(images, **strength):
    """Return what one kind of change made of images, and what was drawn."""
    settings = replace(NONE, **strength)
    drawn = draw_augmentation(len(images), settings, generator=gen(5))
    return augment(images, settings, generator=gen(5)), drawn


def test_pointwise_operations_agree_with_torchvision_and_numpy():
    images = pictures(8)
    bright, drawn = one_change(images, gamma=0.1)
    for image, exponent, mine in zip(images, drawn.gamma, bright):
        assert torch.allclose(mine, T.adjust_gamma(image, float(exponent)), atol=1e-6)
    flipped, drawn = one_change(images, flip=0.5)
    for image, flip, mine in zip(images, drawn.flip, flipped):
        assert torch.equal(mine, T.hflip(image) if flip else image)
    assert 0 < int(drawn.flip.sum()) < 8
    changed, drawn = one_change(images, contrast=0.2, brightness=0.2)
    for image, factor, offset, mine in zip(images, drawn.contrast, drawn.brightness, changed):
        want = np.clip(image.numpy() * float(factor) + float(offset), 0, 1)
        assert np.allclose(mine.numpy(), want, atol=1e-6)
    dropped, drawn = one_change(images + 0.01, drop_channel=0.8)
    for image, channel, mine in zip(images + 0.01, drawn.dropped, dropped):
        for i in range(3):
            assert torch.equal(mine[i], torch.zeros(20, 24) if i == channel else image[i])
    gray = torch.full((2, 3, 64, 64), 0.5)
    noisy, drawn = one_change(gray, noise=0.02)
    assert noisy.var((1, 2, 3)).tolist() == pytest.approx(drawn.variance.tolist(), rel=0.05)
    assert one_change(gray, noise=0.1)[0].min() == 0, "clipped"


@given(seed=st.integers(0, 2**31), n=st.integers(1, 5))
def test_zero_strength_is_the_identity_and_all_strengths_stay_in_bounds(seed, n):
    images = pictures(n, (9, 11), seed)
    before = images.clone()
    assert torch.equal(augment(images, NONE, generator=gen(seed)), images)
    made = augment(images, HEAVY, generator=gen(seed))
    assert made.shape == images.shape and torch.isfinite(made).all()
    assert made.min() >= 0 and made.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(made, augment(images, HEAVY, generator=gen(seed)))


def test_samples_are_drawn_and_treated_each_on_its_own():
    one = pictures(1).expand(6, -1, -1, -1)
    made = augment(one, HEAVY, generator=gen())
    assert all(not torch.equal(made[0], other) for other in made[1:])
    images = pictures(6)
    changed = images.clone()
    changed[3] = 0
    a, b = (augment(x, HEAVY, generator=gen(2)) for x in (images, changed))
    assert torch.equal(a[[0, 1, 2, 4, 5]], b[[0, 1, 2, 4, 5]]) and not torch.equal(a[3], b[3])


def test_draws_fill_the_papers_ranges():
    d = draw_augmentation(20_000, generator=gen())
    ranges = {
        "variance": (0, 0.1), "gamma": (0.1, 1), "angle": (-torch.pi / 4, torch.pi / 4),
        "scale": (0.8, 1.2), "shift": (-0.1, 0.1), "distortion": (-0.05, 0.05),
        "contrast": (0.8, 1.2), "brightness": (-0.2, 0.2),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        values = getattr(d, name)
        span = high - low
        assert low <= values.min() < low + 0.01 * span, name
        assert high - 0.01 * span < values.max() <= high + 1e-6, name
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.02 * span), name
    assert float(d.flip.float().mean()) == pytest.approx(0.5, abs=0.02)
    shares = torch.bincount(d.dropped + 1, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3], abs=0.02)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="divide uint8"):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), generator=gen())
