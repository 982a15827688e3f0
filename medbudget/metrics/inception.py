"""FID's Inception-v3 of 2015: torchvision's network with the pooling and resize of its time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medbudget.weights import download, find_in_hub_cache, fit, freeze, load_state

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
HASH = "6726825d"


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


def load_inception(weights: Path | None, device: torch.device) -> tuple[nn.Module, Path]:
    """Return the network with its weights, frozen, and their file.

    Without `weights`: from torch hub's cache, where torch-fidelity and pytorch-fid put the same
    file, else fetched.
    """
    path = weights or find_in_hub_cache(f"*inception-2015-12-05-{HASH}.pth", HASH)
    path = path or download("inception", URL, HASH)
    network = inception_network()
    fit(network, load_state("inception", path), "inception", path)
    return freeze(repool(network), device), path
