"""Extractors: functions from images to features, with all that a score must state about them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medbudget.files import hash_file, hash_tensors
from medbudget.metrics.pretrained import load_inception, load_radimagenet, resize_tf1
from medbudget.metrics.untrained import SIDE, WIDTHS, convolve, draw_filters, ring_powers
from medbudget.weights import (
    OFFLINE,
    efficientnet_network,
    fit,
    freeze,
    load_state,
    report_missing,
)

DINOV2 = "vit_large_patch14_dinov2"
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Extractor:
    """A function from images to features, with all that a score must state about it."""

    name: str  # "efficientnet-lite0"
    title: str  # the words for print, "EfficientNet-Lite0"
    hash: str  # 12 hex digits of SHA-256 of the weights file (of the rule, without weights)
    input_rule: str  # what happens to the pixel values, in words
    resize_rule: str  # what happens to the size, in words
    dim: int  # number of features, d
    function: Function = field(repr=False)  # (B, 3, H, W) uint8 on `device` to (B, d) float32
    device: torch.device = field(repr=False)
    note: str = ""  # a caveat that every score made with it repeats

    @property
    def distance_name(self) -> str:
        """The name of the Frechet distance of these features; only Inception's is "FID"."""
        names = {"inception": "FID", "layout": "Layout distance"}
        return names.get(self.name, f"FD ({self.title})")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        exact = {"enabled": True, "benchmark": False, "deterministic": False, "allow_tf32": False}
        # TF32 in convolutions moves features by 1e-3
        with torch.inference_mode(), torch.backends.cudnn.flags(**exact):
            return self.function(images.to(self.device)).float()


def resize(images: torch.Tensor, size: int, mode: str = "bilinear") -> torch.Tensor:
    """Antialiased resize to a square: ``(B, 3, H, W) uint8 -> float32`` in [0, 255], not rounded."""
    square, x = (size, size), images.float()
    return F.interpolate(x, size=square, mode=mode, align_corners=False, antialias=True)


def thumbnails(images: torch.Tensor, size: int = 8) -> torch.Tensor:
    """Area-pooled RGB thumbnails in [0, 1]: ``(B, 3, H, W) uint8 -> (B, 3 * size**2)``.

    They see where things are and how bright; grain and texture average out.
    """
    return F.adaptive_avg_pool2d(images.float() / 255, size).flatten(1)


# ---- each returns the function and the hash of its weights --------------------------------------


def _efficientnet(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    network, path = efficientnet_network(device, weights)
    return _chain(network, lambda x: (resize(x, 224) - 127) / 128), hash_file(path)


def _layout(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    return thumbnails, hashlib.sha256(b"layout area pooling to 8x8 [0, 1]").hexdigest()


def _convolutions(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    filters = {str(i): one for i, one in enumerate(draw_filters())}
    return lambda images: convolve(resize(images, SIDE)), hash_tensors(filters)


def _spectrum(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    rule = hashlib.sha256(b"log10 power + 1/12 in 12 rings of 1 to 91 periods, Hann window")
    return lambda images: ring_powers(resize(images, SIDE)), rule.hexdigest()


def _inception(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    network, path = load_inception(weights, device)
    return _chain(network, lambda x: (resize_tf1(x, 299) - 128) / 128), hash_file(path)


def _radimagenet(
    convention: str, weights: Path | None, device: torch.device
) -> tuple[Function, str]:
    network, path = load_radimagenet(convention, weights, device)
    mean = torch.tensor([0.406, 0.456, 0.485], device=device).view(1, 3, 1, 1)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        x = resize(images, 224).flip(1)
        return x / 255 - mean if convention == "keras" else (x - 127.5) * 2 / 255

    return _chain(network, prepare), hash_file(path)


def _dinov2(weights: Path | None, device: torch.device) -> tuple[Function, str]:
    import timm

    options: dict[str, Any] = {"num_classes": 0, "img_size": 224}
    network: Any
    if weights is None:
        print(f"loading {DINOV2} (1.2 GB) from the Hugging Face hub or its cache", file=sys.stderr)
        try:
            network = timm.create_model(f"{DINOV2}.lvd142m", pretrained=True, **options)
        except Exception as error:
            raise report_missing("dinov2", f"could not be downloaded ({error!r:.120})") from None
    else:
        network = timm.create_model(DINOV2, pretrained=False, **options)
        fit(network, load_state("dinov2", weights), "dinov2", weights)
    digest = hash_tensors(network.state_dict())
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        x = resize(images, 224, "bicubic")
        return (x.clamp(0, 255) / 255 - mean) / sd

    return _chain(freeze(network, device), prepare), digest


def _chain(network: Function, prepare: Function) -> Function:
    return lambda images: network(prepare(images).contiguous(memory_format=torch.channels_last))


_RADIMAGENET = "the paper does not say which RadImageNet convention its MFID used"
_EXTRACTORS: dict[str, tuple[Callable[..., tuple[Function, str]], dict[str, Any]]] = {
    OFFLINE: (_efficientnet, {
        "title": "EfficientNet-Lite0", "input_rule": "RGB, (x - 127) / 128", "dim": 1280,
        "resize_rule": "antialiased bilinear to 224x224",
    }),
    "layout": (_layout, {
        "title": "8x8 RGB thumbnail", "input_rule": "RGB, x / 255", "dim": 192,
        "resize_rule": "area pooling to 8x8", "note": "sees layout and brightness, not grain",
    }),
    "random-convolutions": (_convolutions, {
        "title": "random convolutions", "dim": 2 * sum(WIDTHS),
        "input_rule": "RGB, x / 127.5 - 1; mean and sd of fixed random filters",
        "resize_rule": f"antialiased bilinear to {SIDE}x{SIDE}", "note": "trained on nothing",
    }),
    "spectrum": (_spectrum, {
        "title": "power spectrum", "dim": 36,
        "input_rule": "RGB, minus the mean; log10 power in 12 rings of frequency",
        "resize_rule": f"antialiased bilinear to {SIDE}x{SIDE}",
        "note": "sees grain and sharpness, not layout",
    }),
    "inception": (_inception, {
        "title": "Inception-v3 2015-12-05", "input_rule": "RGB, (x - 128) / 128", "dim": 2048,
        "resize_rule": "TF1 bilinear to 299x299, not antialiased",
    }),
    "radimagenet-keras": (partial(_radimagenet, "keras"), {
        "title": "RadImageNet ResNet-50 (Keras conversion)", "dim": 2048,
        "input_rule": "BGR, x / 255 minus (.406, .456, .485)",
        "resize_rule": "antialiased bilinear to 224x224", "note": _RADIMAGENET,
    }),
    "radimagenet-torch": (partial(_radimagenet, "torch"), {
        "title": "RadImageNet ResNet-50 (official torch)", "dim": 2048,
        "input_rule": "BGR, (x - 127.5) * 2 / 255",
        "resize_rule": "antialiased bilinear to 224x224", "note": _RADIMAGENET,
    }),
    "dinov2": (_dinov2, {
        "title": "DINOv2 ViT-L/14", "input_rule": "RGB, ImageNet mean and sd; class token",
        "dim": 1024, "resize_rule": "antialiased bicubic to 224x224",
    }),
}  # fmt: skip


def extractor_names() -> tuple[str, ...]:
    """Return the known extractors; the first four need no download."""
    return tuple(_EXTRACTORS)


def load_extractor(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> Extractor:
    """Load a feature extractor of `extractor_names`, or ``"NAME=PATH"`` with a local weights file.

    Weights that are absent, damaged or of another network raise WeightsError.
    """
    name, _, path = name.partition("=")
    weights = weights or path or None
    if name not in _EXTRACTORS:
        raise ValueError(
            f"unknown extractor {name!r}; {OFFLINE} works without a download; allowed are "
            f"{', '.join(extractor_names())}"
        )
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _load(name, None if weights is None else Path(weights), torch.device(place))


@lru_cache(maxsize=4)
def _load(name: str, weights: Path | None, device: torch.device) -> Extractor:
    make, about = _EXTRACTORS[name]
    function, digest = make(weights, device)
    return Extractor(name=name, hash=digest[:12], function=function, device=device, **about)
