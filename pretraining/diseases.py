"""Fit the disease scores on phantoms: ``python -m pretraining.diseases`` writes them anew."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms import KINDS, SPLITS, make_phantoms
from medbudget.files import atomic_path
from medbudget.metrics.auc import compute_auc
from medbudget.metrics.disease import FILE, SIZE, disease_features, whole_features
from medbudget.metrics.extractors import load_extractor
from medbudget.weights import OFFLINE

CASES = 200  # phantoms of each class that the regressions are fitted on
COMPONENTS = 64  # principal components of the features that are used
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties, C, to choose from


def vary_look(images: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Vary what a generator gets wrong without changing the disease: blur, grain and window.

    Each image is blurred by 0 to 1 pixels, gets noise of 0 to 16 gray levels that is correlated
    over 0.5 to 2 pixels, in all channels alike or not, and a contrast and brightness of its own.
    """
    rng = np.random.default_rng(seed)
    out = np.empty(images.shape, np.uint8)
    for i, image in enumerate(images.numpy().astype(np.float32)):
        soft = gaussian_filter(image, (0, *(rng.uniform(0, 1),) * 2))
        noise = rng.standard_normal((3, *image.shape[1:]), dtype=np.float32)
        noise = noise[:1] if rng.uniform() < 0.5 else noise
        noise = gaussian_filter(noise, (0, *(rng.uniform(0.5, 2),) * 2))
        soft = soft + rng.uniform(0, 16) * noise / noise.std()
        soft = (soft - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-12, 12)
        out[i] = np.rint(np.clip(soft, 0, 255))
    return torch.from_numpy(out)


def make_features(kind: str, label: str, n: int, *, split: str) -> npt.NDArray[np.float64]:
    """Return the features ``(n, 1280)`` of phantoms, of which every fourth is as it was drawn."""
    images = make_phantoms(kind, label, n, size=SIZE, split=split).images
    varied = vary_look(images, seed=SPLITS.index(split))
    varied[::4] = images[::4]
    return disease_features(varied, kind)


def fit_disease(kind: str, label: str, n: int = CASES) -> tuple[torch.Tensor, dict[str, float]]:
    """Fit one regression: a row of 1280 coefficients and the intercept, and what was measured.

    `n` phantoms of each class of split ``train``, the penalty chosen in five folds of them; the
    AUC is that of ``n / 2`` others of each class (split ``test``).
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    sets = {}
    for split, count in (("train", n), ("test", n // 2)):
        pair = [make_features(kind, one, count, split=split) for one in (KINDS[kind][0], label)]
        sets[split] = np.concatenate(pair), np.repeat([0, 1], count)
    # what phantoms hardly vary in would be extrapolated wildly on generated images: left out
    plain = make_pipeline(PCA(COMPONENTS, random_state=0), LogisticRegression(max_iter=5000))
    choices = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(plain, choices, scoring="neg_log_loss", cv=5).fit(*sets["train"])
    pca, regression = (step for _, step in search.best_estimator_.steps)
    coefficients = regression.coef_[0] @ pca.components_
    row = np.append(coefficients, regression.intercept_[0] - coefficients @ pca.mean_)
    x, y = sets["test"]
    measured = {"C": regression.C, "auc": round(compute_auc(y, x @ row[:-1] + row[-1]), 4)}
    return torch.from_numpy(row).float(), measured


def sample_features(kind: str) -> torch.Tensor:
    """Return features of phantoms, 24 of each label, which tell what is no phantom."""
    sets = [make_phantoms(kind, label, 24, seed=555).images for label in KINDS[kind]]
    return torch.from_numpy(np.concatenate([whole_features(images) for images in sets])).half()


def main() -> None:
    """Fit all and write them."""
    rows, measured = {}, {}
    for kind, labels in KINDS.items():
        rows[f"phantoms_{kind}"] = sample_features(kind)
        for label in labels[1:]:
            name = f"{kind}_{label}"
            rows[name], measured[name] = fit_disease(kind, label)
            print(f"{name}: {measured[name]}", flush=True)
    extractor = load_extractor(OFFLINE)
    record = {
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "size": SIZE,
        "cases": CASES,
        "measured": measured,
    }
    with atomic_path(FILE) as temporary:
        save_file(rows, temporary, metadata={"record": json.dumps(record)})
    print(f"wrote {FILE} ({FILE.stat().st_size / 1024:.0f} kB)")


if __name__ == "__main__":
    main()
