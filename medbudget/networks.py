"""The networks that can be trained to tell two classes apart: settings and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from medbudget.augment import LEVELS
from medbudget.settings import Settings
from medbudget.weights import WeightsError, download, efficientnet_network, fit, load_state

RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
RESNET18_HASH = "f37072fd"


@dataclass(frozen=True)
class ClassifierSettings(Settings):
    """Settings of `train_classifier`; the defaults are the paper's.

    ``tiny``: 64 px, EfficientNet-Lite0 without augmentation (200 steps are too few for the paper's),
    under a minute on a CPU; ``modern``: the paper's at 224 px, antialiased and normalised; ``colab``:
    the same in fewer steps.
    """

    network: str = "resnet18"  # or efficientnet-lite0: real ImageNet weights, no download
    weights: str = "imagenet"  # none, or a file (.safetensors or .pth)
    size: int = 196  # pixels; images are resized once, bilinearly
    antialias: bool = False  # in that resize; the paper's had none
    normalize: bool = False  # to what the weights were trained on; the paper left [0, 1]
    augment: str = "heavy"  # the paper's, or none
    frozen: int = 0  # leading stages that keep their weights: stem, then groups of blocks
    steps: int = 6250  # batches
    batch_size: int = 32
    lr: float = 1e-4  # of Adam, constant
    validate_every: int = 50  # steps; the step of the best validation counts
    precision: str = "auto"  # bfloat16 or float16 where a GPU has it, else float32
    seed: int = 0
    checkpoint_every: int = 500  # steps, where a checkpoint is asked for

    PRESETS: ClassVar = {
        "paper": {},
        "modern": {"size": 224, "antialias": True, "normalize": True},
        "colab": {"size": 224, "antialias": True, "normalize": True, "steps": 1500},
        "tiny": {
            "network": "efficientnet-lite0", "size": 64, "antialias": True, "normalize": True,
            "augment": "none", "steps": 200, "batch_size": 16, "lr": 1e-3, "validate_every": 25,
        },
    }  # fmt: skip
    CHOICES: ClassVar = {
        "network": ("resnet18", "efficientnet-lite0"),
        "augment": tuple(LEVELS),
        "precision": ("auto", "float32", "bfloat16", "float16"),
    }
    LIMITS: ClassVar = {
        "size": (32, None), "frozen": (0, None), "steps": (1, None), "batch_size": (2, None),
        "lr": (1e-9, 0.999), "validate_every": (1, None), "seed": (0, None),
        "checkpoint_every": (1, None),
    }  # fmt: skip


class Network(nn.Module):
    """Stages and a linear head for two classes: ``(B, 3, H, W)`` in [0, 1] to logits ``(B, 2)``.

    Frozen stages keep weights and running statistics.
    """

    def __init__(
        self, stages: Sequence[nn.Module], width: int, mean: Sequence[float], sd: Sequence[float],
        frozen: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if frozen > len(stages):
            raise ValueError(f"frozen must be 0 to {len(stages)} for this network, got {frozen}")
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(width, 2)
        self.frozen = frozen
        self.mean: torch.Tensor
        self.sd: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("sd", torch.tensor(sd).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(True)
        for stage in self.stages[:frozen]:
            stage.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        return self

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Bring values to what the weights were trained on."""
        return ((images - self.mean) / self.sd).contiguous(memory_format=torch.channels_last)

    def run(self, x: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Pass feature maps through some of the stages."""
        for stage in self.stages[start:stop]:
            x = stage(x)
        return x

    def decide(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the last stage's maps into logits."""
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decide(self.run(self.normalize(images)))


def make_network(settings: ClassifierSettings) -> Network:
    """Build the network, load its weights, and give it a head drawn from the seed."""
    path = None if settings.weights in ("imagenet", "none") else Path(settings.weights)
    mean: tuple[float, ...] = (0.0,) * 3
    sd: tuple[float, ...] = (1.0,) * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.network == "resnet18":
            from torchvision.models import resnet18

            net: Any = resnet18(weights=None)
            if settings.weights != "none":
                path = path or _resnet18_file()
                fit(net, load_state("resnet18", path), "resnet18", path)
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [stem, net.layer1, net.layer2, net.layer3, net.layer4]
            width = 512
            if settings.normalize:
                mean, sd = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        else:
            if settings.weights == "none":
                import timm

                net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            else:
                net, _ = efficientnet_network(torch.device("cpu"), path)
            stem = nn.Sequential(net.conv_stem, net.bn1)
            stages = [stem, *net.blocks, nn.Sequential(net.conv_head, net.bn2)]
            width = 1280
            if settings.normalize:
                mean, sd = (127 / 255,) * 3, (128 / 255,) * 3
        network = Network(stages, width, mean, sd, settings.frozen)
    return network.to(memory_format=torch.channels_last)


def _resnet18_file() -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(RESNET18_URL).name
    try:
        return cached if cached.is_file() else download("resnet18", RESNET18_URL, RESNET18_HASH)
    except WeightsError:
        raise WeightsError(
            f"the weights of resnet18 could not be downloaded from {RESNET18_URL}; fetch them "
            "elsewhere and name the file (weights=PATH, --weights PATH), or take preset tiny, whose "
            "weights come with a package"
        ) from None


def resize(images: torch.Tensor, size: int, *, antialias: bool) -> torch.Tensor:
    """Resize bilinearly to a square and round: ``(N, 3, H, W) uint8`` both ways."""
    if images.shape[2:] == (size, size):
        return images
    parts = [
        F.interpolate(
            part.float(), size=(size, size), mode="bilinear", align_corners=False,
            antialias=antialias,
        ).round().clamp(0, 255).to(torch.uint8)
        for part in images.split(64)
    ]  # fmt: skip
    return torch.cat(parts)
