"""The two conventions of RadImageNet's ResNet-50; the paper does not say which it used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from medbudget.weights import find_weights, fit, freeze, load_state


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


def load_radimagenet(
    convention: str, weights: Path | None, device: torch.device
) -> tuple[nn.Module, Path]:
    """Return ResNet-50 of a convention, "keras" or "torch", frozen, and its weights file."""
    name = f"radimagenet-{convention}"
    path = find_weights(name, weights)
    network = keras_resnet50() if convention == "keras" else torch_resnet50()
    fit(network, rename_radimagenet(load_state(name, path)), name, path)
    return freeze(network, device), path
