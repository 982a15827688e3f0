"""Extractors that need a download or a local weights file: Inception, RadImageNet, DINOv2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medbudget.files import cache_folder, hash_file, hash_tensors
from medbudget.metrics.features import (
    OFFLINE,
    Extractor,
    freeze,
    register_extractor,
    resize_bilinear,
)

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_HASH = "6726825d"
DINOV2 = "vit_large_patch14_dinov2"


class WeightsError(RuntimeError):
    """Weights that are missing, damaged or of another network; the message says what to do."""


def _stored(name: str) -> Path:
    return cache_folder() / "weights" / f"{name}.pth"


def _missing(name: str, why: str) -> WeightsError:
    return WeightsError(
        f"the weights of {name} {why}; pass a local file (features={name}=PATH), or put it at "
        f"{_stored(name)}, or use {OFFLINE}, which needs no download"
    )


def download(name: str, url: str, sha256: str) -> Path:
    """Fetch a weights file once, announced and checked against the start of its SHA-256."""
    path = _stored(name)
    if path.exists() and hash_file(path).startswith(sha256):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading the weights of {name} from {url} to {path}", file=sys.stderr)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:
        raise _missing(name, f"could not be downloaded ({error})") from None
    return path


def load_state(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file (``.safetensors`` or ``.pth``)."""
    if not path.exists():
        raise _missing(name, f"are not at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as weights without running code from it "
            f"({type(error).__name__}); save its state dict as .safetensors, or use {OFFLINE}"
        ) from None
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not all(
        isinstance(v, torch.Tensor) for v in stored.values()
    ):
        raise WeightsError(f"{path} holds {type(stored).__name__}, not a state dict of tensors")
    return stored


def fit(network: nn.Module, state: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Load `state` into `network`: every weight of the network must be there, in its shape."""
    own = network.state_dict()
    wrong = [
        key
        for key, value in own.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state or state[key].shape != value.shape)
    ]
    if wrong:
        raise WeightsError(
            f"{path} does not hold the weights of {name}: {len(wrong)} of {len(own)} tensors are "
            f"missing or of another shape, e.g. {wrong[0]}"
        )
    network.load_state_dict(state, strict=False)


# ------------------------------------------------------------------------------- Inception


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize as TensorFlow 1 did it: ``(B, 3, H, W) uint8 -> float32`` in [0, 255].

    Output pixel i takes its value at input position i * H / size: no half-pixel centres, so the
    image moves up and left, and no antialiasing. It is what the original FID used.
    """
    x = images.float()
    for axis in (2, 3):
        n = x.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.floor().long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        weight = (position - low).view(shape)
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


class _Repooled(nn.Module):
    """An Inception block whose pooling branch pools as the network of 2015 does."""

    def __init__(self, block: nn.Module, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block: Any = block
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = self.block._forward(x)
        branches[-1] = self.block.branch_pool(self.pool(x))
        return torch.cat(branches, 1)


def inception_network() -> nn.Module:
    """Return FID's Inception-v3 (2015-12-05, 1008 classes) without weights.

    It is torchvision's network but for the pooling branches: averages leave the zero padding out
    of the count, and the last block takes the maximum. Parameter names are torchvision's.
    """
    from torchvision.models import Inception3

    return Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)


def repool(network: nn.Module) -> nn.Module:
    """Put 2015's pooling into `inception_network`, after its weights are loaded."""

    def average(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        old = getattr(network, f"Mixed_{block}")
        setattr(network, f"Mixed_{block}", _Repooled(old, maximum if block == "7c" else average))
    network.fc = nn.Identity()
    return network


def _inception(weights: Path | None, device: torch.device) -> Extractor:
    path = weights or download("inception", INCEPTION_URL, INCEPTION_HASH)
    network = inception_network()
    fit(network, load_state("inception", path), "inception", path)
    network = freeze(repool(network), device)

    def function(images: torch.Tensor) -> torch.Tensor:
        x = (resize_tf1(images, 299) - 128) / 128
        out: torch.Tensor = network(x.contiguous(memory_format=torch.channels_last))
        return out

    return Extractor(
        name="inception",
        title="Inception-v3 2015-12-05",
        hash=hash_file(path)[:12],
        input_rule="RGB, (x - 128) / 128",
        resize_rule="TF1 bilinear to 299x299, not antialiased",
        dim=2048,
        function=function,
        device=device,
    )


# ----------------------------------------------------------------------------- RadImageNet


def keras_resnet50() -> nn.Module:
    """Return ResNet-50 as Keras builds it, under torchvision's parameter names, without `fc`.

    Against torchvision's: biases in convolutions, the stride in each block's first convolution,
    and another epsilon in the batch norms.
    """
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    for layer in (network.layer2, network.layer3, network.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    network.fc = nn.Identity()
    return network


def torch_resnet50() -> nn.Module:
    """Return torchvision's ResNet-50 without `fc`."""
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.fc = nn.Identity()
    return network


def rename_radimagenet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Map ``backbone.4.0.conv1.weight`` (a Sequential of ResNet's children) to ``layer1.0…``."""
    children = {
        "0": "conv1",
        "1": "bn1",
        "4": "layer1",
        "5": "layer2",
        "6": "layer3",
        "7": "layer4",
    }
    renamed = {}
    for key, value in state.items():
        for prefix in ("module.", "backbone.", "model."):
            key = key.removeprefix(prefix)
        head, dot, rest = key.partition(".")
        renamed[children.get(head, head) + dot + rest] = value
    return renamed


def _radimagenet(
    name: str, title: str, build: Callable[[], nn.Module], rule: str, keras: bool
) -> Callable[[Path | None, torch.device], Extractor]:
    def load(weights: Path | None, device: torch.device) -> Extractor:
        path = weights or _stored(name)
        network = build()
        fit(network, rename_radimagenet(load_state(name, path)), name, path)
        network = freeze(network, device)
        mean = torch.tensor([0.406, 0.456, 0.485], device=device).view(1, 3, 1, 1)

        def function(images: torch.Tensor) -> torch.Tensor:
            x = resize_bilinear(images, 224).flip(1)
            x = x / 255 - mean if keras else (x - 127.5) * 2 / 255
            out: torch.Tensor = network(x.contiguous(memory_format=torch.channels_last))
            return out

        return Extractor(
            name=name,
            title=title,
            hash=hash_file(path)[:12],
            input_rule=rule,
            resize_rule="antialiased bilinear to 224x224",
            dim=2048,
            function=function,
            device=device,
            note="the paper does not say which RadImageNet convention its MFID used",
        )

    return load


# ---------------------------------------------------------------------------------- DINOv2


def _dinov2(weights: Path | None, device: torch.device) -> Extractor:
    import timm
    from torchvision.transforms import functional as T

    network: Any
    if weights is None:
        print(f"loading {DINOV2} (1.2 GB) from the Hugging Face hub or its cache", file=sys.stderr)
        try:
            network = timm.create_model(
                f"{DINOV2}.lvd142m", pretrained=True, num_classes=0, img_size=224
            )
        except Exception as error:
            why = f"could not be downloaded ({type(error).__name__}: {str(error)[:100]})"
            raise _missing("dinov2", why) from None
    else:
        network = timm.create_model(DINOV2, pretrained=False, num_classes=0, img_size=224)
        fit(network, load_state("dinov2", weights), "dinov2", weights)
    digest = hash_tensors(network.state_dict())
    network = freeze(network, device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def function(images: torch.Tensor) -> torch.Tensor:
        x = T.resize(
            images.float(), [224, 224], interpolation=T.InterpolationMode.BICUBIC, antialias=True
        ).clamp(0, 255)
        out: torch.Tensor = network((x / 255 - mean) / sd)
        return out

    return Extractor(
        name="dinov2",
        title="DINOv2 ViT-L/14",
        hash=digest,
        input_rule="RGB, ImageNet mean and sd; class token",
        resize_rule="antialiased bicubic to 224x224",
        dim=network.num_features,
        function=function,
        device=device,
    )


register_extractor("inception", _inception)
register_extractor(
    "radimagenet-keras",
    _radimagenet(
        "radimagenet-keras",
        "RadImageNet ResNet-50 (Keras conversion)",
        keras_resnet50,
        "BGR, x / 255 minus (.406, .456, .485)",
        keras=True,
    ),
)
register_extractor(
    "radimagenet-torch",
    _radimagenet(
        "radimagenet-torch",
        "RadImageNet ResNet-50 (official torch)",
        torch_resnet50,
        "BGR, (x - 127.5) * 2 / 255",
        keras=False,
    ),
)
register_extractor("dinov2", _dinov2)
