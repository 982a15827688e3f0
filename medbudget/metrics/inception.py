"""FID's Inception-v3 of 2015: torchvision's network with the pooling and resize of its time."""

from __future__ import annotations

from functools import partial
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
POOLED = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")  # blocks with a pooling branch


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
        weight = (position - low).view([size if i == axis else 1 for i in range(4)])
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def inception_network() -> nn.Module:
    """Return torchvision's Inception-v3 of 1008 classes without weights."""
    from torchvision.models import Inception3

    return Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)


class _Repooled(nn.Module):
    """An Inception block whose pooling branch pools as the network of 2015 does.

    Averages leave the zero padding out of the count, and the last block takes the maximum.
    """

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

    Without `weights`: from torch hub's cache, where torch-fidelity and pytorch-fid put the same
    file, else fetched.
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
