"""Does a classifier gain from synthetic training images? Repeated trainings on a user's own sets.

As in the paper's Table 2: each training set is trained on with several seeds, and every run keeps
the score of every test case. Intervals come from a bootstrap over patients (cases, where they are
not known) and runs, the gain from the same cases on both sides.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.cases import Cases, check_drawn, check_splits, load_cases
from medbudget.classifier import (
    ClassifierSettings,
    choose_settings,
    train_classifier,
)
from medbudget.data.pcam import find_split
from medbudget.files import (
    atomic_path,
    check_apart,
    check_output,
    check_writable,
    hash_tensors,
    hold,
    write_json,
)
from medbudget.metrics.auc import bootstrap_auc, delong_difference
from medbudget.metrics.scores import Score, format_table, to_json
from medbudget.networks import resize
from medbudget.progress import tqdm
from medbudget.settings import check_seed
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
        comparison goes on there; another one is refused.
    settings : ClassifierSettings, optional
        Default: ``tiny`` on a CPU, ``modern`` on a GPU.
    runs : int
        Trainings that differ in their seed; paper: 10.
    positive, size
        See `load_cases`.
    overwrite : bool
        Replace another comparison in `out`.
    """
    if runs < 1:
        raise ValueError(f"at least one run is needed, got {runs}")
    out, place = Path(out), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = settings or choose_settings(device=place)
    sources = {"train": train, "val": val, "test": test}
    sources |= {} if synthetic is None else {"synthetic": synthetic}
    check_apart(out, *(one for one in sources.values() if isinstance(one, str | os.PathLike)))
    check_seed(settings.seed, runs)
    cases = _load(sources, settings, positive, size)
    sets = {"real": cases["train"]}
    if synthetic is not None:
        sets["real + synthetic"] = cases["train"] + cases["synthetic"]
    labels, patients = cases["test"].labels.numpy(), cases["test"].patients or None
    for label, name in enumerate(cases["test"].classes):
        if patients and len({patients[i] for i in np.flatnonzero(labels == label)}) < 2:
            raise ValueError(f"test has one patient with {name}: at least 2 of each are needed")
    record = {
        "runs": runs,
        **_describe(settings),
        **{name: f"{len(one)} images, {_hash(one)}" for name, one in cases.items()},
    }
    _settle(out, record, overwrite)
    scores: dict[str, npt.NDArray[np.float64]] = {}
    rows: list[Score] = []
    verdict = ""
    with hold(out):
        for name, chosen in sets.items():
            scores[name] = repeat_classifier(
                chosen, cases["val"], cases["test"], settings, runs=runs,
                folder=out / _folder(name), device=place,
            )  # fmt: skip
            found = score_runs(labels, scores[name], patients=patients)
            if name != "real":
                gain = bootstrap_auc(labels, scores[name], scores["real"], patients=patients)
                n = (int((labels == 0).sum()), int((labels == 1).sum()))
                found += score_gain(gain, n)
                if patients is None or len(set(patients)) == len(patients):
                    found.append(_check_gain(labels, scores[name][0], scores["real"][0], n))
                verdict = judge_gain(gain)
            rows += [replace(score, name=f"{score.name}, {name}") for score in found]
        _write_scores(out / "scores.csv", cases["test"], scores, settings.seed)
        to_json(rows, out / "result.json")
    counts = {name: len(one) for name, one in cases.items()}
    known = len(set(patients or ()))
    return Comparison(rows, verdict, counts, cases["test"].classes, known, out)


def repeat_classifier(
    train: Cases,
    val: Cases,
    test: Cases,
    settings: ClassifierSettings,
    *,
    runs: int = 10,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> npt.NDArray[np.float64]:
    """Train and test with the seeds ``settings.seed``, + 1, …: scores of every case in every run.

    Parameters
    ----------
    folder : path, optional
        Each run leaves ``run_SEED.json`` there, and is not repeated where that is of the same
        settings and images; a run that was stopped goes on from its checkpoint.

    Returns
    -------
    numpy.ndarray
        ``(runs, N) float64``: probabilities of class 1.

    Raises
    ------
    ValueError
        Fewer than one run, splits that do not fit together, another study's runs in `folder`.
    """
    if runs < 1:
        raise ValueError(f"at least one run is needed, got {runs}")
    check_splits({"train": train, "val": val, "test": test})
    hashes = {"train": _hash(train), "val": _hash(val), "test": _hash(test)}
    scores = []
    for seed in tqdm(range(settings.seed, settings.seed + runs), desc="runs", unit="run"):
        mine = replace(settings, seed=seed)
        identity = {"settings": _describe(mine), **hashes}
        path = None if folder is None else check_writable(Path(folder) / f"run_{seed}.json")
        unfinished = None if path is None else path.with_suffix(".ckpt")
        if path is not None and path.exists():
            scores.append(_read_run(path, identity))
            path.with_suffix(".ckpt").unlink(missing_ok=True)  # if killed just after the record
            continue
        made = train_classifier(train, val, mine, checkpoint=unfinished, device=device)
        probabilities, score = made.test(test)
        if path is not None and unfinished is not None:
            record = {
                "identity": identity,
                "auc": score.value,
                "record": made.record,
                "names": list(test.names),
                "labels": test.labels.tolist(),
                "scores": probabilities.tolist(),
            }
            write_json(path, record)
            unfinished.unlink(missing_ok=True)
        scores.append(probabilities)
    return np.stack(scores)


def _read_run(path: Path, identity: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, scores = stored["identity"], np.array(stored["scores"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of a run; remove it to run it again") from None
    if found != identity:
        differs = [key for key in identity if found.get(key) != identity[key]]
        raise ValueError(
            f"{path} is of another study: {', '.join(differs)} differ; name another folder, or "
            "remove it"
        )
    return scores


def _load(
    sources: Mapping[str, Source], settings: ClassifierSettings, positive: str | None,
    size: int | None,
) -> dict[str, Cases]:  # fmt: skip
    """Load and check the sets, and bring them to the network's size."""
    change = partial(resize, size=settings.size, antialias=settings.antialias)
    cases = {
        name: one if isinstance(one, Cases) else load_cases(one, positive=positive, size=size)
        for name, one in sources.items()
        if isinstance(one, Cases) or find_split(one) is None
    }
    check_splits(cases)
    edge = size or max(max(one.images.shape[2:]) for one in cases.values()) if cases else None
    official = {name: one for name, one in sources.items() if name not in cases}
    cases = {name: one.transform(change) for name, one in cases.items()}
    cases |= {
        name: load_cases(one, positive=positive, size=edge, change=change)  # type: ignore[arg-type]
        for name, one in official.items()
    }
    cases = {name: cases[name] for name in sources}
    check_splits(cases)
    for name in ("train", "synthetic"):
        if name in cases:
            check_drawn(cases[name], name)
    return cases


def _describe(settings: ClassifierSettings) -> dict[str, Any]:
    """Return the settings that a run's scores depend on."""
    return settings.without("checkpoint_every")


def _hash(cases: Cases) -> str:
    return hash_tensors({"images": cases.images, "labels": cases.labels})


def _folder(name: str) -> str:
    return name.replace(" + ", "_and_")


def _settle(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write what is compared into the folder, or check that it is what was compared there.

    A comparison may be given more runs later.
    """
    file = out / "settings.json"

    def read(path: Path) -> dict[str, Any] | None:
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fewer = stored["runs"] <= record["runs"]
        except (ValueError, KeyError, TypeError):
            return None
        return stored | {"runs": record["runs"]} if fewer else stored

    if overwrite or not check_output(file, record, read):
        for result in ("result.json", "scores.csv"):
            check_output(out / result, overwrite=overwrite)
        for run in [*out.glob("real*/run_*.json"), *out.glob("real*/run_*.ckpt")]:
            run.unlink()
    write_json(check_writable(file), record)


def _check_gain(
    labels: npt.ArrayLike, scores: npt.ArrayLike, other: npt.ArrayLike, n: tuple[int, int]
) -> Score:
    """Return the gain of one pair of runs by DeLong, which takes cases for independent."""
    one = delong_difference(labels, scores, other)
    note = f"DeLong, p = {one.p_value:.3g}; a check on one pair of runs"
    return Score("gain of the first run", one.value, one.interval, n, note=note)


def _write_scores(
    path: Path, test: Cases, scores: Mapping[str, npt.NDArray[np.float64]], seed: int
) -> None:
    """Write one line for each case, training set and run."""
    names = test.names or [f"image {i}" for i in range(len(test))]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "label", "trained on", "seed", "score"])
        for name, by_run in scores.items():
            for i, run in enumerate(by_run):
                writer.writerows(
                    [case, int(label), name, seed + i, f"{score:.6f}"]
                    for case, label, score in zip(names, test.labels, run)
                )
