"""Does a classifier gain from synthetic training images? Repeated trainings on a user's own sets.

As in the paper's Table 2: each training set is trained on with several seeds, and every run keeps
the score of every test case. Intervals come from a bootstrap over patients (cases, where they are
not known) and runs, the gain from the same cases on both sides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from medbudget.cases import Cases, check_drawn, check_splits, load_cases
from medbudget.classifier import (
    ClassifierSettings,
    choose_settings,
    find_device,
    train_classifier,
)
from medbudget.data.pcam import find_split
from medbudget.files import (
    check_apart,
    check_output,
    check_writable,
    hash_tensors,
    hold,
    write_json,
    write_text,
)
from medbudget.metrics.auc import bootstrap_auc, delong_difference
from medbudget.metrics.scores import Score, format_table, to_json
from medbudget.networks import resize
from medbudget.progress import tqdm
from medbudget.settings import check_counts, check_seed
from medbudget.studies.gains import judge_gain, score_gain, score_runs

Source = Cases | str | os.PathLike[str]


@dataclass(frozen=True)
class Comparison:
    """What `classify` found."""

    scores: list[Score]
    verdict: str  # on synthetic images, in words; "" without them
    counts: dict[str, int]  # cases of each set
    classes: tuple[str, str]  # negative, positive
    patients: int  # of the test cases; 0 where they are not known
    out: Path

    def __str__(self) -> str:
        negative, positive = self.classes
        sizes = ", ".join(f"{n} {name}" for name, n in self.counts.items())
        lines = [f"{positive} against {negative}: {sizes}"]
        if self.patients:
            lines[0] += f"; the test cases are of {self.patients} patients"
        if self.verdict:
            lines.append(f"verdict: {self.verdict}")
        lines.append(format_table(self.scores))
        lines.append(f"every test case in every run: {self.out / 'scores.csv'}")
        return "\n".join(lines)


def classify(
    train: Source,
    val: Source,
    test: Source,
    synthetic: Source | None = None,
    *,
    out: str | os.PathLike[str] = "classified",
    settings: ClassifierSettings | None = None,
    runs: int = 10,
    positive: str | None = None,
    size: int | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Train classifiers on real and on real + synthetic images; compare them on a test set.

    Parameters
    ----------
    train, val, test, synthetic : Cases or path
        See `load_cases`: folders with a folder of images for each class, or official PatchCamelyon
        files, which are brought to the size of the training images. `val` chooses the best step,
        `test` is looked at once a run.
    out : path
        Folder for ``settings.json``, ``scores.csv``, ``result.json`` and the runs. The same
        comparison goes on there, also with more runs; another one is refused.
    settings : ClassifierSettings, optional
        Default: ``tiny`` on a CPU, ``modern`` on a GPU.
    runs : int
        Trainings that differ in their seed; paper: 10.
    positive, size
        See `load_cases`.
    overwrite : bool
        Replace another comparison in `out`.
    """
    check_counts(runs=runs)
    out, place = Path(out), find_device(device)
    settings = settings or choose_settings(device=place)
    sources = {"train": train, "val": val, "test": test}
    sources |= {} if synthetic is None else {"synthetic": synthetic}
    check_apart(out, *(one for one in sources.values() if not isinstance(one, Cases)))
    check_seed(settings.seed, runs)
    cases = _load(sources, settings, positive, size)
    sets = {"real": cases["train"]}
    if synthetic is not None:
        sets["real + synthetic"] = cases["train"] + cases["synthetic"]
    labels, patients = cases["test"].labels.numpy(), cases["test"].patients or None
    for label, name in enumerate(cases["test"].classes):
        if patients and len({patients[i] for i in np.flatnonzero(labels == label)}) < 2:
            raise ValueError(f"test has one patient with {name}: at least 2 of each are needed")
    record = {"runs": runs, **settings.without("checkpoint_every")}
    for name, one in cases.items():
        digest = hash_tensors({"images": one.images, "labels": one.labels})
        record[name] = f"{len(one)} images, {digest}"
    _settle(out, record, overwrite)
    scores: dict[str, npt.NDArray[np.float64]] = {}
    rows: list[Score] = []
    verdict = ""
    n = (int((labels == 0).sum()), int((labels == 1).sum()))
    with hold(out):
        for name, chosen in sets.items():
            folder = out / name.replace(" + ", "_and_")
            scores[name] = _repeat(chosen, cases, settings, folder, runs, place)
            found = score_runs(labels, scores[name], patients=patients)
            if name != "real":
                gain = bootstrap_auc(labels, scores[name], scores["real"], patients=patients)
                found += score_gain(gain, n)
                if patients is None or len(set(patients)) == len(patients):
                    # DeLong takes cases for independent
                    first = delong_difference(labels, scores[name][0], scores["real"][0])
                    note = f"DeLong, p = {first.p_value:.3g}; a check on one pair of runs"
                    found.append(
                        Score("gain of the first run", first.value, first.interval, n, note=note)
                    )
                verdict = judge_gain(gain)
            rows += [replace(score, name=f"{score.name}, {name}") for score in found]
        _write_scores(out / "scores.csv", cases["test"], scores, settings.seed)
        to_json(rows, out / "result.json")
    counts = {name: len(one) for name, one in cases.items()}
    known = len(set(patients or ()))
    return Comparison(rows, verdict, counts, cases["test"].classes, known, out)


def _repeat(
    train: Cases, cases: Mapping[str, Cases], settings: ClassifierSettings, folder: Path, runs: int,
    device: torch.device,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Train and test with each seed: scores ``(runs, N)`` of every case in every run.

    Each run leaves ``run_SEED.json`` in `folder` and is not repeated where that is there already; a
    run that was stopped goes on from its checkpoint.
    """
    test, scores = cases["test"], []
    for seed in tqdm(range(settings.seed, settings.seed + runs), desc="runs", unit="run"):
        path = check_writable(folder / f"run_{seed}.json")
        checkpoint = path.with_suffix(".ckpt")
        if not path.exists():
            mine = replace(settings, seed=seed)
            made = train_classifier(train, cases["val"], mine, checkpoint=checkpoint, device=device)
            probabilities, score = made.test(test)
            record = {
                "auc": score.value, "record": made.record, "names": list(test.names),
                "labels": test.labels.tolist(), "scores": probabilities.tolist(),
            }  # fmt: skip
            write_json(path, record)
        try:
            scores.append(json.loads(path.read_text(encoding="utf-8"))["scores"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no record of a run; remove it to run it again") from None
        checkpoint.unlink(missing_ok=True)
    return np.array(scores)


def _load(
    sources: Mapping[str, Source], settings: ClassifierSettings, positive: str | None,
    size: int | None,
) -> dict[str, Cases]:  # fmt: skip
    """Load and check the sets, and bring them to the network's size."""
    change = partial(resize, size=settings.size, antialias=settings.antialias)
    whole, official = {}, {}
    for name, one in sources.items():
        if isinstance(one, Cases):
            whole[name] = one
        elif find_split(one) is None:
            whole[name] = load_cases(one, positive=positive, size=size)
        else:
            official[name] = one
    check_splits(whole)
    edge = size or max((max(one.images.shape[2:]) for one in whole.values()), default=None)
    cases = {name: one.transform(change) for name, one in whole.items()}
    for name, file in official.items():
        cases[name] = load_cases(file, positive=positive, size=edge, change=change)
    check_splits(cases)
    for name in ("train", "synthetic"):
        if name in cases:
            check_drawn(cases[name], name)
    return {name: cases[name] for name in sources}


def _settle(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write what is compared into the folder, or check that it is what was compared there."""
    file = out / "settings.json"

    def read(path: Path) -> dict[str, Any] | None:
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            more = record["runs"] >= stored["runs"]
        except (ValueError, KeyError, TypeError):
            return None
        return stored | {"runs": record["runs"]} if more else stored

    if overwrite or not check_output(file, record, read):
        for result in ("result.json", "scores.csv"):
            check_output(out / result, overwrite=overwrite)
        for run in [*out.glob("real*/run_*.json"), *out.glob("real*/run_*.ckpt")]:
            run.unlink()
    write_json(check_writable(file), record)


def _write_scores(
    path: Path, test: Cases, scores: Mapping[str, npt.NDArray[np.float64]], seed: int
) -> None:
    """Write one line for each case, training set and run."""
    case = test.names or [f"image {i}" for i in range(len(test))]
    lines = {"case": case, "label": test.labels.tolist()}
    tables = [
        pd.DataFrame(lines | {"trained on": name, "seed": seed + i, "score": run})
        for name, by_run in scores.items()
        for i, run in enumerate(by_run)
    ]
    write_text(path, pd.concat(tables).to_csv(index=False, float_format="%.6f"))
