"""Fit the disease scores on phantoms: ``python -m medbudget.tiny.diseases`` writes them anew."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from medbudget.artifacts import atomic_path
from medbudget.data.phantoms import KINDS, make_phantoms
from medbudget.metrics.auc import auc
from medbudget.metrics.disease import FILE, SIZE, disease_features
from medbudget.metrics.features import OFFLINE, load_extractor

CASES = 200  # phantoms of each class that the regressions are fitted on
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse penalties, C, to choose from


def vary_grain(images: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Blur each image by 0 to 1 pixels and add noise of 0 to 6 gray levels, as decoders do.

    Generated images differ from phantoms in grain before all else; a score should not see it.
    """
    rng = np.random.default_rng(seed)
    out = np.empty(images.shape, np.uint8)
    for i, image in enumerate(images.numpy().astype(np.float32)):
        soft = gaussian_filter(image, (0, *(rng.uniform(0, 1.0),) * 2))
        noisy = soft + rng.uniform(0, 6) * rng.standard_normal(image.shape, dtype=np.float32)
        out[i] = np.rint(np.clip(noisy, 0, 255))
    return torch.from_numpy(out)


def make_features(kind: str, label: str, n: int, *, split: str) -> npt.NDArray[np.float64]:
    """Return the features ``(n, 1280)`` of phantoms, of which every other has varied grain."""
    images = make_phantoms(kind, label, n, size=SIZE, split=split).images
    images[::2] = vary_grain(images[::2], seed=0)
    return disease_features(images)


def fit_disease(kind: str, label: str, n: int = CASES) -> tuple[torch.Tensor, dict[str, float]]:
    """Fit one regression: a row of 1280 coefficients and the intercept, and what was measured.

    `n` phantoms of each class of split ``train``, the penalty chosen in five folds of them; the
    AUC is that of ``n / 2`` others of each class (split ``test``).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = {}
    for split, count in (("train", n), ("test", n // 2)):
        pair = [make_features(kind, one, count, split=split) for one in (KINDS[kind][0], label)]
        sets[split] = np.concatenate(pair), np.repeat([0, 1], count)
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    choices = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(plain, choices, scoring="neg_log_loss", cv=5).fit(*sets["train"])
    scaler, regression = (step for _, step in search.best_estimator_.steps)
    coefficients = regression.coef_[0] / scaler.scale_
    row = np.append(coefficients, regression.intercept_[0] - coefficients @ scaler.mean_)
    x, y = sets["test"]
    measured = {"C": regression.C, "auc": round(auc(y, x @ row[:-1] + row[-1]), 4)}
    return torch.from_numpy(row).float(), measured


def main() -> None:
    """Fit all and write them."""
    rows, measured = {}, {}
    for kind, labels in KINDS.items():
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
