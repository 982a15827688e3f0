"""The phantoms of the next base: drawn fine and averaged, with the statistics of real images."""

import numpy as np
import pytest
from PIL import Image

from pretraining.phantoms import make_phantoms
from pretraining.phantoms.drawing import shrink


def spectrum(images, radii):
    """Mean power of square images ``(n, s, s)`` at radii of frequency, over that at radius 1."""
    size = images.shape[-1]
    window = np.outer(np.hanning(size), np.hanning(size))
    centred = (images - images.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0).ravel()
    line = np.fft.fftfreq(size) * size
    radius = np.rint(np.hypot(line[:, None], line[None])).astype(int).ravel()
    mean = np.bincount(radius, power) / np.bincount(radius)
    return np.log10(mean[radii] / mean[1])


def test_shrink_averages_blocks():
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert shrink(image, 2).tolist() == [[2.5, 4.5], [10.5, 12.5]]


@pytest.mark.parametrize(
    "kind, healthy, ill",
    [
        ("prostate", "healthy", "tumour"),
        ("chest", "healthy", "pneumonia"),
        ("histology", "normal", "metastasis"),
    ],
)
def test_same_seed_same_image_and_masks_only_of_the_ill(kind, healthy, ill):
    first = make_phantoms(kind, ill, 2, size=64, seed=5)
    again = make_phantoms(kind, ill, 1, size=64, seed=5)
    assert first.images[0].equal(again.images[0])
    assert not first.images[0].equal(first.images[1])
    assert first.masks.any(2).any(1).all()
    assert not make_phantoms(kind, healthy, 1, size=64).masks.any()


def test_tumours_are_dark_on_adc_and_bright_on_dwi():
    phantoms = make_phantoms("prostate", "tumour", 6, size=64)
    ring = phantoms.masks.numpy()
    adc, dwi = (phantoms.images[:, c].numpy().astype(float) for c in (1, 2))
    near = np.zeros_like(ring)
    near[:, 20:44, 20:44] = True  # the gland and what is around it
    assert dwi[ring].mean() > 1.5 * dwi[near & ~ring].mean()
    assert adc[ring].mean() < adc[near & ~ring & (adc > 60)].mean()


@pytest.mark.realdata
def test_chest_has_the_spectrum_of_real_radiographs(real_data):
    files = sorted((real_data / "chest_xray").rglob("*.jpeg"))
    files = (files or sorted((real_data / "chest_xray").rglob("*.jpg")))[::10]
    real = np.stack([np.asarray(Image.open(f).convert("L").resize((64, 64), 4)) for f in files])
    drawn = make_phantoms("chest", "healthy", 24, size=64).images[:, 0].numpy()
    radii = [4, 8, 12, 16, 24, 31]
    difference = spectrum(drawn.astype(float), radii) - spectrum(real.astype(float), radii)
    assert np.abs(difference).max() < 0.5  # a factor of 3; of 2 at most radii
