"""Downloadable extractors, without their weights: same network, same rules, safe loading."""

import numpy as np
import pytest
import torch

from medbudget import metrics, weights
from medbudget.files import hash_file
from medbudget.metrics import WeightsError, extractors, pretrained
from medbudget.metrics.extractors import resize

pytestmark = pytest.mark.usefixtures("own_cache")


def randomise(network, seed=0):
    """Random weights and running statistics that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if value.ndim > 1:
            fan = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
        elif key.endswith(("running_var", "weight")) and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return network


@pytest.mark.parametrize("size", [(64, 48), (400, 300)])
def test_tf1_resize_agrees_with_torch_fidelity(size, noise):
    tf1 = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = noise(2, 400)[..., : size[0], : size[1]]
    want = tf1.interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(pretrained.resize_tf1(images, 299), want, atol=1e-3, rtol=0)


def test_resize_rules_differ_on_a_checkerboard():
    # TF1 at exactly half the size picks every second pixel: a checkerboard turns white;
    # antialiasing gives its mean
    board = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    board[..., ::2, ::2] = 255
    board[..., 1::2, 1::2] = 255
    assert pretrained.resize_tf1(board, 224).unique().tolist() == [255]
    inner = resize(board, 224)[..., 4:-4, 4:-4]
    assert inner.min() > 126.5 and inner.max() < 128.5


def test_inception_agrees_with_torch_fidelity_at_random_weights(tmp_path, noise):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "inception.pth"
    torch.save(randomise(pretrained.inception_network()).state_dict(), path)
    reference = fidelity.FeatureExtractorInceptionV3("i", ["2048"], str(path))
    images = noise(2)
    (want,) = reference(images)
    ours = metrics.load_extractor(f"inception={path}", device="cpu")
    assert ours.distance_name == "FID" and ours.dim == 2048
    got = ours(images)
    assert want.std() > 0.01  # the comparison is not between zeros
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        metrics.compute_features(images, ours, batch_size=1), got.numpy(), atol=1e-4, rtol=1e-4
    )


def test_radimagenet_conventions_are_two_networks_with_two_input_rules(tmp_path, noise):
    from torchvision.models import resnet50

    reference = randomise(resnet50(weights=None)).eval()
    path = tmp_path / "torch.pth"
    # the official file: a Sequential of ResNet's children behind "backbone."
    children = torch.nn.Sequential(*list(reference.children())[:-1])
    torch.save({f"backbone.{k}": v for k, v in children.state_dict().items()}, path)
    ours = metrics.load_extractor("radimagenet-torch", weights=path, device="cpu")
    images = noise(2, 224)
    with torch.no_grad():
        bgr = (images.float()[:, [2, 1, 0]] - 127.5) * 2 / 255
        want = children(bgr).flatten(1)
    torch.testing.assert_close(ours(images), want, atol=1e-5 * float(want.max()), rtol=1e-4)
    # the Keras conversion has biases in its convolutions, so the official file must be refused
    with pytest.raises(
        WeightsError, match=r"radimagenet-keras: \d+ of \d+ tensors .* e\.g\. conv1\.bias"
    ):
        metrics.load_extractor("radimagenet-keras", weights=path, device="cpu")
    keras = randomise(pretrained.radimagenet_network("keras"))
    assert keras.layer2[0].conv1.stride == (2, 2) and keras.layer2[0].conv2.stride == (1, 1)
    path = tmp_path / "keras.pth"
    torch.save(keras.state_dict(), path)
    other = metrics.load_extractor("radimagenet-keras", weights=path, device="cpu")
    with torch.no_grad():
        mean = torch.tensor([0.406, 0.456, 0.485]).view(1, 3, 1, 1)
        want = keras.eval()(images.float()[:, [2, 1, 0]] / 255 - mean)
    torch.testing.assert_close(other(images), want, atol=1e-5 * float(want.max()), rtol=1e-4)
    assert other.hash != ours.hash and other.input_rule != ours.input_rule


def test_dinov2_from_a_local_file(tmp_path, monkeypatch, noise):
    import timm
    from safetensors.torch import save_file

    monkeypatch.setattr(extractors, "DINOV2", "vit_small_patch14_dinov2")
    network = timm.create_model(extractors.DINOV2, pretrained=False, num_classes=0, img_size=224)
    path = tmp_path / "dino.safetensors"
    save_file(network.state_dict(), path)
    ours = metrics.load_extractor(f"dinov2={path}", device="cpu")
    images = noise(1, 224)
    with torch.no_grad():
        mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (images.float() / 255 - mean.view(1, 3, 1, 1)) / sd.view(1, 3, 1, 1)
        want = network.eval()(x)
    torch.testing.assert_close(ours(images), want, atol=1e-4, rtol=1e-4)


def test_missing_weights_name_the_offline_extractor(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="efficientnet-lite0, which needs no download"):
        metrics.load_extractor("radimagenet-torch")
    monkeypatch.setattr(pretrained, "URL", (tmp_path / "absent").as_uri())
    with pytest.raises(
        WeightsError, match=r"inception could not be downloaded.*efficientnet-lite0"
    ):
        metrics.load_extractor("inception")
    with pytest.raises(ValueError, match=r"radimagenet-keras.*radimagenet-torch"):
        metrics.load_extractor("radimagenet")


def test_a_download_is_announced_and_checked(tmp_path, capsys):
    source = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(3)}, source)
    right = hash_file(source)[:8]
    path = weights.download("thing", source.as_uri(), right)
    assert f"downloading the weights of thing from {source.as_uri()}" in capsys.readouterr().err
    assert weights.download("thing", "nowhere://", right) == path  # from the cache
    with pytest.raises(WeightsError, match="could not be downloaded"):
        weights.download("other", source.as_uri(), "00000000")
    assert not weights.find_weights("other").exists()
    path.write_bytes(b"damaged since")  # found out, and fetched again
    weights.download("thing", source.as_uri(), right)
    assert path.read_bytes() == source.read_bytes()


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


OFFERED = ("inception", "radimagenet-torch", "dinov2", "efficientnet-lite0")


@pytest.mark.parametrize("name", OFFERED)
def test_wrong_files_are_refused_and_no_code_from_them_runs(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(extractors, "DINOV2", "vit_tiny_patch16_224")
    good = {f"layer{i}.weight": torch.ones(3, 3) for i in range(4)}
    torch.save(good, tmp_path / "other.pth")
    torch.save(_Evil(), tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    for file, said in (
        ("evil.pth", "without running code"),
        ("cut.pth", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
        ("list.pth", "holds list, not a state dict"),
        ("other.pth", "does not hold the weights of"),
        ("absent.pth", "efficientnet-lite0"),
    ):
        with pytest.raises(WeightsError, match=said):
            metrics.load_extractor(f"{name}={tmp_path / file}", device="cpu")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.network
def test_inception_weights_download():
    assert metrics.load_extractor("inception").hash.startswith(pretrained.HASH)


def test_inception_is_found_in_torch_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's name
    torch.save(randomise(pretrained.inception_network()).state_dict(), path)
    monkeypatch.setattr(pretrained, "URL", (tmp_path / "absent").as_uri())
    with pytest.raises(WeightsError, match="could not be downloaded"):
        metrics.load_extractor("inception")  # another file than its name says
    assert weights.find_in_hub_cache("*6726825d.pth", hash_file(path)[:8]) == path
    monkeypatch.setattr(pretrained, "find_in_hub_cache", lambda *_: path)
    assert metrics.load_extractor("inception").hash == hash_file(path)[:12]
