"""Numbers that stand for an image: features of an extractor, computed once and kept."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from medbudget.files import atomic_path, cache_folder
from medbudget.images import check_images
from medbudget.metrics.extractors import Extractor, load_extractor
from medbudget.progress import tqdm
from medbudget.settings import check_counts
from medbudget.weights import OFFLINE

NORMALISATIONS = ("none", "paper")


def normalize_images(images: torch.Tensor, rule: str = "none") -> torch.Tensor:
    """Apply a per-image normalisation before the features: ``(N, 3, H, W) uint8`` both ways.

    The rule ``"paper"`` is what the released evaluation script of de Wilde et al. (2024) does: every
    image to mean 128 and standard deviation 64 over all its pixels, clipped to 0..255 and truncated.
    A score made with it cannot see darkness or contrast. (A constant image becomes 128.)
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


def _cache_key(images: torch.Tensor, extractor: Extractor, normalize: str) -> str:
    digest = hashlib.sha256()
    rules = (extractor.name, extractor.hash, extractor.input_rule, extractor.resize_rule)
    digest.update(repr((1, *rules, normalize, tuple(images.shape))).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def compute_features(
    images: torch.Tensor,
    extractor: str | Extractor = OFFLINE,
    *,
    normalize: str = "none",
    batch_size: int = 32,
    cache: bool = True,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Compute the features of images, or read them from the cache.

    Images are ``(N, 3, H, W) uint8``; features are ``(N, d) float32``, the same for every
    `batch_size` up to rounding (about 1e-6 relative). For the rule `normalize` see
    `normalize_images`. The `cache` keeps the result in `cache_folder`, named by the content hash of
    images and extractor; a folder that cannot be written is passed over.
    """
    normalize_images(check_images(images)[:1], normalize)  # an unknown rule is an error at once
    check_counts(batch_size=batch_size)
    if isinstance(extractor, str):
        extractor = load_extractor(extractor)
    path = cache_folder() / "features" / f"{_cache_key(images, extractor, normalize)}.npy"
    if cache and path.exists():
        with suppress(OSError, ValueError):
            stored = np.load(path, allow_pickle=False)
            if stored.shape == (len(images), extractor.dim):
                return stored
    batches = tqdm(
        images.split(batch_size), desc=f"features ({extractor.title})", disable=not progress,
        leave=False,
    )  # fmt: skip
    parts = [extractor(normalize_images(batch, normalize)).cpu().numpy() for batch in batches]
    result = np.concatenate(parts).astype(np.float32, copy=False)
    if not np.isfinite(result).all():
        raise ValueError(f"features of {extractor.title} are not finite: its weights are damaged")
    if cache:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, result)
    return result
