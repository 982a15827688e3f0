"""The networks of FID and of the paper's MFID, as torchvision's with what they do otherwise.

FID's Inception-v3 of 2015 has the pooling and resize of its time; RadImageNet's ResNet-50 comes in
two conventions, and the paper does not say which it used.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medbudget.weights import (
    download,
    find_in_hub_cache,
    find_weights,
    fit,
    freeze,
    load_state,
)

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
HASH = "6726825d"
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
POOLED = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")  # blocks with a pooling branch


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize as TensorFlow 1 and the original FID: ``(B, 3, H, W) uint8 -> float32`` in [0, 255].

    Bilinear, without half-pixel centres, so the image moves up and left, and without antialiasing.
    """
    x = images.float()
    for axis in (2, 3):
        n = x.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.floor().long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = (position - low).view([size if i == axis else 1 for i in range(4)])
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def inception_network() -> nn.Module:
    """Return torchvision's Inception-v3 of 1008 classes without weights."""
    from torchvision.models import Inception3

    return Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)


class _Repooled(nn.Module):
    """An Inception block that pools as in 2015: means without the padding; the last the maximum."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.block: Any = block
        average = partial(F.avg_pool2d, count_include_pad=False)
        self.pool = F.max_pool2d if last else average

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = self.block._forward(x)
        branches[-1] = self.block.branch_pool(self.pool(x, 3, stride=1, padding=1))
        return torch.cat(branches, 1)


def load_inception(weights: Path | None, device: torch.device) -> tuple[nn.Module, Path]:
    """Return the network of 2015-12-05 with its weights, frozen, and their file.

    Without `weights`: from torch hub's cache (torch-fidelity's, pytorch-fid's), else downloaded.
    """
    path = weights or find_in_hub_cache(f"*inception-2015-12-05-{HASH}.pth", HASH)
    path = path or download("inception", URL, HASH)
    network = inception_network()
    fit(network, load_state("inception", path), "inception", path)
    for block in POOLED:
        old = getattr(network, f"Mixed_{block}")
        setattr(network, f"Mixed_{block}", _Repooled(old, last=block == POOLED[-1]))
    network.fc = nn.Identity()
    return freeze(network, device), path


def radimagenet_network(convention: str) -> nn.Module:
    """Return ResNet-50 without `fc` and without weights, under torchvision's parameter names.

    "torch" is torchvision's. "keras", against it: biases in convolutions, the stride in each
    block's first convolution, and another epsilon in the batch norms.
    """
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.fc = nn.Identity()
    if convention == "keras":
        for layer in (network.layer2, network.layer3, network.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 1.001e-5
    return network


def load_radimagenet(
    convention: str, weights: Path | None, device: torch.device
) -> tuple[nn.Module, Path]:
    """Return ResNet-50 of a convention, "keras" or "torch", frozen, and its weights file.

    The official file calls ``layer1.0…`` ``backbone.4.0…``: a Sequential of ResNet's children.
    """
    name = f"radimagenet-{convention}"
    path = weights or find_weights(name)
    state = {}
    for key, value in load_state(name, path).items():
        for prefix in ("module.", "backbone.", "model."):
            key = key.removeprefix(prefix)
        head, dot, rest = key.partition(".")
        state[CHILDREN.get(head, head) + dot + rest] = value
    network = radimagenet_network(convention)
    fit(network, state, name, path)
    return freeze(network, device), path
