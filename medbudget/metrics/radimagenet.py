"""The two conventions of RadImageNet's ResNet-50; the paper does not say which it used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from medbudget.weights import find_weights, fit, freeze, load_state


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


CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


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
