"""How diseased an image looks: logistic regressions on network features, fitted on phantoms.

``pretraining.diseases`` fits them and writes ``disease.safetensors`` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import t

from medbudget.data.phantoms import KINDS
from medbudget.images import check_images, shrink
from medbudget.metrics.extractors import load_extractor, resize
from medbudget.metrics.features import compute_features
from medbudget.metrics.kernel import squared_distances
from medbudget.metrics.scores import Score
from medbudget.weights import OFFLINE

FILE = Path(__file__).parent / "disease.safetensors"
SIZE = 64  # pixels that every image is brought to before its features
# Median distance to the nearest of 24 phantoms of each label. Phantoms: 4 to 10; drawn by `tiny`: 9
# to 12; real chest X-rays: 12.7; flat images and noise 12 to 18, other kinds 15.7 on. At the size of
# `tiny` a poor drawing is given the benefit of the doubt; larger images are real, or of a real base.
FAR, FAR_LARGE = 15.5, 12.2
GLAND = slice(12, 52)  # of 64 pixels, around a prostate's gland
BLUR = 1.0  # standard deviation, pixels: grain tells a phantom from a drawn image, not a disease


def disease_score(
    images: torch.Tensor, kind: str, label: str | None = None
) -> npt.NDArray[np.float64]:
    """Return how diseased images look: the log odds of `label` against healthy, ``(N,)``.

    Above 0 an image looks more like the diseased phantoms, below 0 more like the healthy ones.
    Scikit-learn's logistic regression on EfficientNet-Lite0 features of phantoms, at 64 pixels
    and blurred by one of them; of prostates by how much DWI is brighter than ADC around the gland.
    Each disease is fitted against healthy alone: in the chest, another disease scores high too.

    Images are ``(N, 3, H, W) uint8``, square, of any size; `kind` is prostate, chest (which has
    three diseases and needs a `label`) or histology. Images that are no phantoms nor drawn like
    them raise ValueError; up to 128 pixels only those that are further away than poor drawings of
    the embedded base, so that small real images may get a score, which says nothing about them.
    """
    tensors, record = load_regressions()
    row = tensors[f"{kind}_{_find_label(kind, label)}"].double().numpy()
    extractor = load_extractor(OFFLINE)
    if extractor.hash != record["extractor_hash"]:
        raise ValueError(
            f"the disease scores were fitted on features of {extractor.title} "
            f"{record['extractor_hash']}, installed is {extractor.hash}; fit them again with "
            "python -m pretraining.diseases"
        )
    x = whole_features(images)
    _check_contrast(images, kind)
    phantoms = tensors[f"phantoms_{kind}"].double().numpy()
    distance = float(np.median(np.sqrt(squared_distances(x, phantoms).min(1))))
    if distance > (limit := FAR if images.shape[-1] <= 128 else FAR_LARGE):
        raise ValueError(
            f"these images are no phantoms of the {kind}, nor drawn like them (distance of features "
            f"{distance:.1f}, at most {limit} is allowed), and the disease scores know no others; "
            "train a classifier on labelled images instead (`medbudget classify`)"
        )
    if kind == "prostate":
        x = disease_features(images, kind)
    return x @ row[:-1] + row[-1]


def _check_contrast(images: torch.Tensor, kind: str) -> None:
    """Raise ValueError for images in which there is nothing to score."""
    low, high = images.flatten(1).aminmax(dim=1)
    if flat := int((low == high).sum()):
        raise ValueError(
            f"{flat} of {len(images)} images have one gray level throughout: leave them out"
        )
    same = (images[:, 1] == images[:, 2]).flatten(1).all(1)
    if kind == "prostate" and same.any():
        raise ValueError(
            f"{int(same.sum())} of {len(images)} prostates have the same ADC and DWI: T2W, ADC and "
            "DWI as red, green and blue are needed"
        )


def disease_axis(
    axis: Mapping[float, torch.Tensor], kind: str, label: str | None = None
) -> dict[float, Score]:
    """Return the mean `disease_score`, with Student's interval, at each place of an axis."""
    scores = {}
    extractor = load_extractor(OFFLINE)
    for place, images in axis.items():
        values = disease_score(images, kind, label)
        if len(values) < 2:
            raise ValueError("an interval needs at least 2 images at each place of the axis")
        half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        mean = float(values.mean())
        scores[place] = Score(
            name=f"disease score ({label or kind})",
            value=mean,
            interval=(mean - float(half), mean + float(half)),
            n=len(values),
            extractor=extractor.name,
            extractor_hash=extractor.hash,
            resize=f"area to {SIZE}x{SIZE}, blur of {BLUR} pixel, then {extractor.resize_rule}",
            note="mean log odds; Student's interval over images",
        )
    return scores


def _find_label(kind: str, label: str | None) -> str:
    """Return the disease that is meant."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed are {', '.join(sorted(KINDS))}")
    _, *labels = KINDS[kind]
    if label is None and len(labels) == 1:
        return labels[0]
    if label not in labels:
        raise ValueError(f"{label!r} is no disease of {kind}; allowed are {', '.join(labels)}")
    return label


@lru_cache(maxsize=1)
def load_regressions() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return each regression, ``kind_label``, the features of phantoms, ``phantoms_kind``, and how
    the regressions were fitted, with the AUC measured.
    """
    with safe_open(FILE, framework="pt") as file:
        return load_file(FILE), json.loads((file.metadata() or {})["record"])


def disease_features(images: torch.Tensor, kind: str) -> npt.NDArray[np.float64]:
    """Return the features that the scores of a kind are linear in, ``(N, 1280)``.

    A prostate's tumour is too faint for those of the whole: four times what DWI has above ADC.
    """
    if kind != "prostate":
        return whole_features(images)
    _, adc, dwi = _bring_to_size(images)[:, :, GLAND, GLAND].short().unbind(1)
    excess = (4 * (dwi - adc)).clamp(0, 255).byte()[:, None].expand(-1, 3, -1, -1)
    return compute_features(excess, OFFLINE).astype(np.float64)


def whole_features(images: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the features of whole images, ``(N, 1280)``."""
    return compute_features(_bring_to_size(images), OFFLINE).astype(np.float64)


def _bring_to_size(images: torch.Tensor) -> torch.Tensor:
    """Return images of 64 px, blurred by one of them."""
    from torchvision.transforms.functional import gaussian_blur

    check_images(images)
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"square images are needed, got {tuple(images.shape[2:])} (H, W)")
    if images.shape[2] > SIZE:  # by averages: noise falls as in a camera that bins pixels
        images = shrink(images, SIZE)
    elif images.shape[2] < SIZE:
        images = resize(images, SIZE).round().clamp(0, 255).byte()
    return gaussian_blur(images, [7, 7], [BLUR, BLUR])
