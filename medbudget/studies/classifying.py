"""Tasks of Table 2: trainings that keep the score of every test case, and what these scores say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.cases import Cases, check_drawn, check_splits
from medbudget.classifier import ClassifierSettings, train_classifier
from medbudget.data.pcam import load_labels, load_patches
from medbudget.metrics.auc import bootstrap_auc, calibration, compute_auc, delong_difference
from medbudget.metrics.frechet import Estimate
from medbudget.metrics.scores import Score
from medbudget.networks import make_network, resize
from medbudget.studies.comparison import score_gain, score_runs
from medbudget.studies.drawing import Plan
from medbudget.studies.tasks import Store, Task, kind

PCAM = "pcam"  # role of the folder of PatchCamelyon's official HDF5 files


@kind("patches", ".safetensors")
def _run_patches(task: Task, store: Store) -> torch.Tensor:
    """Read one class of an official split of PatchCamelyon, at the size that a classifier sees."""
    s, folder = task.settings, store.sources[PCAM]
    indices = find_patches(folder, s["split"], s["label"])
    parts = np.array_split(indices, max(1, len(indices) // 64))
    patches = (load_patches(folder, s["split"], part.tolist(), size=s["size"]) for part in parts)
    return torch.cat([resize(part, s["seen"], antialias=s["antialias"]) for part in patches])


def find_patches(folder: Path, split: str, label: int) -> npt.NDArray[np.int64]:
    """Return the indices of the patches of one class in an official split."""
    return np.flatnonzero(load_labels(folder, split).numpy() == label)


def read_part(
    tasks: Sequence[Task], n: int, noise: float, store: Store, seen: ClassifierSettings
) -> torch.Tensor:
    """Read `n` images of one class as a classifier sees them, with Gaussian noise of sd `noise`.

    An image has the same noise, in gray levels of the classifier's size, wherever it is used.
    """
    parts = []
    for task in tasks:
        images = resize(store.read_images([task]), seen.size, antialias=seen.antialias)
        if noise:
            generator = torch.Generator().manual_seed(int(task.key, 16) % 2**63)
            added = images + noise * torch.randn(images.shape, generator=generator)
            images = added.round_().clamp_(0, 255).to(torch.uint8)
        parts.append(images)
    return torch.cat(parts)[:n]


def keep_agreed(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which images the judges, on average, rank on the side that they were made for.

    Labels are ``(n,)``, probabilities of class 1 ``(judges, n)``. The median divides them: of
    classifiers that were trained briefly, all may lie on one side of 0.5.
    """
    mean = np.asarray(probabilities).mean(0)
    return (mean > np.median(mean)) == np.asarray(labels, bool)


def _need_network(task: Task, store: Store) -> None:
    if task.settings["classifier"]["seed"] == 0:  # once a line
        make_network(ClassifierSettings(**task.settings["classifier"]))


@kind("classifier", heavy=True, needs=_need_network)
def _run_classifier(task: Task, store: Store) -> dict[str, Any]:
    s, inputs = task.settings, iter(task.inputs)
    settings = ClassifierSettings(**s["classifier"])
    parts: dict[str, list[torch.Tensor]] = {}
    for role, _, number, n in s["parts"]:
        images = read_part([next(inputs) for _ in range(number)], n, s["noise"], store, settings)
        parts.setdefault(role, []).append(images)
    cases = {role: Cases.of(*both) for role, both in parts.items()}
    if "synthetic" in cases:
        check_drawn(cases["synthetic"], "synthetic")
    kept: list[int] = []
    if judges := [store.read_json(judge)["also"]["scores"] for judge in inputs]:
        synthetic, real = cases.pop("synthetic"), cases["real"]
        keep = torch.from_numpy(keep_agreed(synthetic.labels, judges))
        labels = synthetic.labels[keep]  # may be of one class only, so no Cases of their own
        kept = labels.bincount(minlength=2).tolist()
        images = torch.cat([real.images, synthetic.images[keep]])
        cases["real"] = Cases(images, torch.cat([real.labels, labels]))
    also = cases.pop("also", None)
    check_splits(cases)
    first, *more = (cases[role] for role in ("real", "synthetic") if role in cases)
    classifier = train_classifier(
        first + more[0] if more else first, cases["val"], settings,
        checkpoint=store.scratch(task, "checkpoint"),
    )  # fmt: skip
    scores, score = classifier.test(cases["test"])
    result: dict[str, Any] = {
        "auc": score.value,
        **{key: classifier.record[key] for key in ("best_auc", "best_step", "history", "tests")},
        "labels": cases["test"].labels.tolist(),
        "scores": scores.tolist(),
        "kept": kept,
    }
    if also:
        result["also"] = {
            "labels": also.labels.tolist(),
            "scores": classifier.predict(also.images).tolist(),
        }
    return result


def _read_scores(
    tasks: Sequence[Task], store: Store
) -> tuple[list[int], npt.NDArray[np.float64], list[Any]]:
    """Return labels ``(n,)``, scores ``(runs, n)`` and the results of a line's runs."""
    runs = list(map(store.read_json, tasks))
    return runs[0]["labels"], np.array([run["scores"] for run in runs]), runs


@kind("gain")
def _run_gain(task: Task, store: Store) -> dict[str, Any]:
    """Compare the runs of one line with those of another on the same test cases."""
    half = task.settings["runs"]
    labels, own, _ = _read_scores(task.inputs[:half], store)
    _, other, _ = _read_scores(task.inputs[half:], store)
    gain = bootstrap_auc(labels, own, other, repeats=task.settings["repeats"])
    one = delong_difference(labels, own[0], other[0])
    return {
        "difference": gain.value, "interval": list(gain.interval), "se": gain.se,
        "p_value": gain.p_value,
        "delong": {
            "difference": one.value, "interval": list(one.interval), "p_value": one.p_value
        },
    }  # fmt: skip


@kind("auc")
def _run_auc(task: Task, store: Store) -> dict[str, Any]:
    """Score a line: mean AUC with its interval, spread, gain, calibration."""
    count = task.settings["runs"]
    labels, scores, runs = _read_scores(task.inputs[:count], store)
    rows = score_runs(labels, scores, repeats=task.settings["repeats"])
    for g in map(store.read_json, task.inputs[count:]):
        gain = Estimate(g["difference"], g["se"], tuple(g["interval"]), "bootstrap", g["p_value"])
        rows[-1:-1] = score_gain(gain, (labels.count(0), labels.count(1)))
    if "also" in runs[0]:
        truth = runs[0]["also"]["labels"]
        reverse = compute_auc(truth, [run["also"]["scores"] for run in runs])
        rows.append(Score("AUC on synthetic", reverse, None, len(truth), note="mean of runs"))
    return {row.name: row.to_dict() for row in rows}


@kind("runs")
def _run_runs(task: Task, store: Store) -> dict[str, Any]:
    """Collect what the runs of a line gave, scores as text to four decimals."""
    labels, scores, runs = _read_scores(task.inputs, store)
    return {
        "aucs": [run["auc"] for run in runs],
        "best_steps": [run["best_step"] for run in runs],
        "kept": runs[0]["kept"],
        "calibration": asdict(calibration(labels, scores)),
        "scores": [" ".join(f"{score:.4f}" for score in run) for run in scores],
    }


def plan_runs(
    p: Plan, name: str, parts: Sequence[tuple[str, int, Sequence[Task], int]],
    judges: Sequence[Task] = (),
) -> tuple[Task, ...]:  # fmt: skip
    """Return the trainings of a line, which differ in their seed.

    `parts` are a role (``real``, ``synthetic``, ``val``, ``test`` or ``also``), a label, the tasks of
    its images, and how many of these; `judges` are trainings that filter the synthetic ones.
    """
    s, classifier = p.s, asdict(p.classifier())
    common = {
        "parts": [[role, label, len(tasks), n] for role, label, tasks, n in parts],
        "noise": 0.0 if name in p.sources else float(s.noise.get(name, 0)),
    } | ({"filter": "median"} if judges else {})
    inputs = [task for _, _, tasks, _ in parts for task in tasks]
    each = [common | {"classifier": classifier | {"seed": seed}} for seed in range(s.runs)]
    return tuple(Task("classifier", one, (*inputs, *judges)) for one in each)


def plan_auc(p: Plan, runs: Sequence[Task], base: Sequence[Task]) -> tuple[Task, Task | None]:
    """Return the scores of a line's runs, and their gain over other runs, where there are any."""
    counted = {"runs": p.s.runs, "repeats": p.s.repeats}
    gain = Task("gain", counted, (*runs, *base)) if base else None
    return Task("auc", counted, (*runs, *((gain,) if gain else ()))), gain
