"""Extractors that were trained on nothing: random convolutions, and the power spectrum."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from medbudget import make_phantoms
from medbudget.metrics import compute_features, frechet_distance, load_extractor
from medbudget.metrics.untrained import RINGS, draw_filters

pytestmark = pytest.mark.usefixtures("own_cache")
NEW = ("random-convolutions", "spectrum")


@pytest.mark.parametrize("name", NEW)
def test_blur_takes_images_away_and_more_blur_further(name: str) -> None:
    sets = [make_phantoms("histology", "normal", 40, split=s).images for s in ("val", "test")]
    reference = compute_features(sets[0], name)
    floor = frechet_distance(reference, compute_features(sets[1], name))
    far = [
        frechet_distance(reference, compute_features(gaussian_blur(sets[1], [7, 7], [s, s]), name))
        for s in (0.5, 1.0, 2.0)
    ]
    assert floor < far[0] < far[1] < far[2] and far[2] > 5 * floor


def test_filters_are_the_same_on_every_machine() -> None:
    """The first is NumPy's first standard normal number of seed 0, with variance 2 / (9 * 3)."""
    first = draw_filters()[0]
    assert float(first[0, 0, 0, 0]) == pytest.approx(1.117622 * math.sqrt(2 / 27), rel=1e-5)
    extractor = load_extractor("random-convolutions", device="cpu")
    assert extractor.hash == "a21a52369c19"
    assert extractor.distance_name == "FD (random convolutions)" and extractor.dim == 336


def test_white_noise_has_its_variance_in_every_ring() -> None:
    noise = 128 + 12 * torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    powers = torch.as_tensor(compute_features(noise.round().byte(), "spectrum"))
    rings = powers.view(8, 3, len(RINGS) - 1).mean((0, 1))
    assert rings.tolist()[3:] == pytest.approx([math.log10(144)] * 9, abs=0.05)


def test_a_wave_of_eight_periods_is_in_the_ring_of_eight() -> None:
    wave = 128 + 60 * torch.sin(torch.arange(128) / 128 * 2 * math.pi * 8)
    images = wave.round().byte().expand(1, 3, 128, 128).contiguous()
    powers = compute_features(images, "spectrum").reshape(3, -1)
    assert powers.argmax(1).tolist() == [RINGS.index(8)] * 3
    assert load_extractor("spectrum", device="cpu").dim == powers.size
