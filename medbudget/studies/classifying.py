"""Tasks of Table 2: trainings that keep the score of every test case, and what these scores say.

Intervals come from a bootstrap over cases and runs, differences to another line from the same cases
in both.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.cases import Cases, check_drawn, check_splits
from medbudget.classifier import ClassifierSettings, train_classifier
from medbudget.data.pcam import load_labels, load_patches
from medbudget.files import write_json
from medbudget.metrics.auc import (
    bootstrap_auc,
    calibration,
    compute_auc,
    delong_difference,
)
from medbudget.metrics.frechet import Estimate
from medbudget.metrics.scores import Score
from medbudget.networks import make_network, resize
from medbudget.studies.gains import score_gain, score_runs
from medbudget.studies.tasks import Store, Task, kind, write_images

PCAM = "pcam"  # role of the folder of PatchCamelyon's official HDF5 files


@kind("patches", ".safetensors")
def _run_patches(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Read one class of an official split of PatchCamelyon, at the size that a classifier sees."""
    s = task.settings
    indices = find_patches(store.sources[PCAM], s["split"], s["label"])
    small = [
        resize(
            load_patches(store.sources[PCAM], s["split"], part.tolist(), size=s["size"]),
            s["seen"], antialias=s["antialias"],
        )
        for part in np.array_split(indices, max(1, len(indices) // 64))
    ]  # fmt: skip
    write_images(path, torch.cat(small))


def find_patches(folder: Path, split: str, label: int) -> npt.NDArray[np.int64]:
    """Return the indices of the patches of one class in an official split."""
    return np.flatnonzero(load_labels(folder, split).numpy() == label)


def add_noise(images: torch.Tensor, sd: float, seed: int) -> torch.Tensor:
    """Add Gaussian noise of `sd` gray levels: ``(N, 3, H, W) uint8`` both ways."""
    if not sd:
        return images
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    return (images + sd * noise).round_().clamp_(0, 255).to(torch.uint8)


def read_part(tasks: Sequence[Task], n: int, noise: float, store: Store) -> torch.Tensor:
    """Read one class of one split; an image has the same noise wherever it is used."""
    images = [
        add_noise(store.read_images([task]), noise, int(task.key, 16) % 2**63) for task in tasks
    ]
    return torch.cat(images)[:n]


def read_runs(tasks: Sequence[Task], store: Store) -> list[dict[str, Any]]:
    """Return the results of tasks of kind ``classifier``."""
    return [store.read_json(task) for task in tasks]


def keep_agreed(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which images the judges, on average, rank on the side that they were made for.

    Half of the images are of either class, so the median divides them; 0.5 would not, as the
    probabilities of classifiers that were trained briefly all lie on one side of it.

    Parameters
    ----------
    labels : array_like
        ``(n,)`` of 0 and 1.
    probabilities : array_like
        ``(judges, n)``, of class 1.
    """
    mean = np.asarray(probabilities).mean(0)
    return (mean > np.median(mean)) == np.asarray(labels, bool)


def _read_cases(task: Task, store: Store) -> tuple[dict[str, Cases], int]:
    """Return the cases by role, and how many of the task's inputs they are."""
    s = task.settings
    parts: dict[str, dict[int, torch.Tensor]] = {}
    first = 0
    for role, label, number, n in s["parts"]:
        images = read_part(task.inputs[first : first + number], n, s["noise"], store)
        parts.setdefault(role, {})[label] = images
        first += number
    if any(t.kind == "patches" for t in task.inputs):  # which have the classifier's size already
        size, antialias = s["classifier"]["size"], s["classifier"]["antialias"]
        parts = {
            role: {k: resize(images, size, antialias=antialias) for k, images in both.items()}
            for role, both in parts.items()
        }
    return {role: Cases.of(both[0], both[1]) for role, both in parts.items()}, first


def make_classifier(settings: str) -> None:
    """Build a classifier's network out of its settings as JSON, to see that its weights are there."""
    make_network(ClassifierSettings(**json.loads(settings)))


def _need_network(task: Task, store: Store) -> list[tuple[Hashable, ...]]:
    return [(make_classifier, json.dumps(task.settings["classifier"] | {"seed": 0}))]


@kind("classifier", ".json", heavy=True, needs=_need_network)
def _run_classifier(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    cases, first = _read_cases(task, store)
    if "synthetic" in cases:
        check_drawn(cases["synthetic"], "synthetic")
    kept: list[int] = []
    if judges := read_runs(task.inputs[first:], store):
        synthetic, real = cases.pop("synthetic"), cases["real"]
        keep = keep_agreed(synthetic.labels, [run["also"]["scores"] for run in judges])
        kept = [int((keep & (synthetic.labels.numpy() == label)).sum()) for label in (0, 1)]
        which = torch.from_numpy(keep)  # perhaps of one class only, so no Cases of their own
        cases["real"] = Cases(
            torch.cat([real.images, synthetic.images[which]]),
            torch.cat([real.labels, synthetic.labels[which]]),
        )
    check_splits({role: cases[role] for role in cases if role != "also"})
    both = [cases[role] for role in ("real", "synthetic") if role in cases]
    train = both[0] if len(both) == 1 else both[0] + both[1]
    settings = ClassifierSettings(**task.settings["classifier"])
    classifier = train_classifier(train, cases["val"], settings, checkpoint=checkpoint)
    scores, score = classifier.test(cases["test"])
    result: dict[str, Any] = {
        "auc": score.value,
        **{key: classifier.record[key] for key in ("best_auc", "best_step", "history", "tests")},
        "labels": cases["test"].labels.tolist(),
        "scores": scores.tolist(),
        "kept": kept,
    }
    if "also" in cases:
        result["also"] = {
            "labels": cases["also"].labels.tolist(),
            "scores": classifier.predict(cases["also"].images).tolist(),
        }
    write_json(path, result)


def _scores(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], npt.NDArray[np.float64]]:
    return runs[0]["labels"], np.array([run["scores"] for run in runs])


@kind("gain", ".json")
def _run_gain(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Compare the runs of one line with those of another on the same test cases."""
    half = task.settings["runs"]
    labels, own = _scores(read_runs(task.inputs[:half], store))
    _, other = _scores(read_runs(task.inputs[half:], store))
    gain = bootstrap_auc(labels, own, other, repeats=task.settings["repeats"])
    one = delong_difference(labels, own[0], other[0])
    result = {
        "difference": gain.value, "interval": list(gain.interval), "se": gain.se,
        "p_value": gain.p_value,
        "delong": {
            "difference": one.value, "interval": list(one.interval), "p_value": one.p_value
        },
    }  # fmt: skip
    write_json(path, result)


@kind("auc", ".json")
def _run_auc(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Score a line: mean AUC with its interval, spread, gain, calibration."""
    count = task.settings["runs"]
    runs = read_runs(task.inputs[:count], store)
    labels, scores = _scores(runs)
    rows = score_runs(labels, scores, repeats=task.settings["repeats"])
    if len(task.inputs) > count:
        g = store.read_json(task.inputs[count])
        gain = Estimate(g["difference"], g["se"], tuple(g["interval"]), "bootstrap", g["p_value"])
        rows[-1:-1] = score_gain(gain, (labels.count(0), labels.count(1)))
    if "also" in runs[0]:
        truth = runs[0]["also"]["labels"]
        reverse = compute_auc(truth, [run["also"]["scores"] for run in runs])
        rows.append(Score("AUC on synthetic", reverse, None, len(truth), note="mean of runs"))
    write_json(path, {row.name: row.to_dict() for row in rows})


@kind("runs", ".json")
def _run_runs(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Collect what the runs of a line gave, scores as text to four decimals."""
    runs = read_runs(task.inputs, store)
    result = {
        "aucs": [run["auc"] for run in runs],
        "best_steps": [run["best_step"] for run in runs],
        "kept": runs[0]["kept"],
        "calibration": asdict(calibration(*_scores(runs))),
        "scores": [" ".join(f"{score:.4f}" for score in run["scores"]) for run in runs],
    }
    write_json(path, result)
