"""Does a classifier gain from synthetic training images? Repeated trainings, as in Table 2.

Every run keeps the score of every test case. Intervals come from a bootstrap over patients (cases,
where they are not known) and runs, the gain from the same cases on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from medbudget.cases import Cases, check_drawn, check_splits, load_cases
from medbudget.classifier import ClassifierSettings, choose_settings, find_device, train_classifier
from medbudget.data.pcam import find_split
from medbudget.files import (
    PathLike,
    check_apart,
    check_output,
    check_writable,
    hash_tensors,
    hold,
    read_json,
    write_json,
    write_text,
)
from medbudget.metrics.auc import (
    bootstrap_auc,
    calibration,
    compute_auc,
    delong_difference,
    detectable_difference,
)
from medbudget.metrics.frechet import Estimate
from medbudget.metrics.scores import Score, format_table, to_json
from medbudget.networks import resize
from medbudget.progress import tqdm
from medbudget.settings import check_counts, check_seed


def score_runs(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    repeats: int = 2000,
    patients: Sequence[Hashable] | None = None,
) -> list[Score]:
    """Return the mean AUC of repeated runs with its interval, their spread, and calibration.

    Labels are ``(n,)`` of 0 and 1, scores ``(runs, n)``: probabilities of class 1. The interval is
    that of `bootstrap_auc`.
    """
    truth, values = np.asarray(labels), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    n = (int((truth == 0).sum()), int((truth == 1).sum()))
    auc = bootstrap_auc(truth, values, repeats=repeats, patients=patients)
    what = "cases" if patients is None else f"{len(set(patients))} patients"
    note = f"mean of {len(values)} runs; two-level bootstrap over {what} and runs"
    rows = [Score("AUC", auc.value, auc.interval, n, note=note)]
    if len(values) > 1:
        sd = float(np.std([compute_auc(truth, one) for one in values], ddof=1))
        rows.append(Score("sd of runs", sd, None, n, note="training noise on one test set"))
    error = calibration(truth, values).error
    return [*rows, Score("ECE", error, None, n, note="calibration error, 10 bins, all runs")]


def score_gain(gain: Estimate, n: int | tuple[int, int]) -> list[Score]:
    """Return a gain of `bootstrap_auc` as a score, and the gain that could have been detected."""
    least = detectable_difference(gain.se)
    return [
        Score("gain", gain.value, gain.interval, n, note=f"p = {gain.p_value:.3g}; same cases"),
        Score("detectable", least, None, n, note="a true gain found with power 80 % at 5 %"),
    ]


def judge_gain(gain: Estimate) -> str:
    """Say in words whether a gain is shown, and if not, which one could have been found.

    Examples
    --------
    >>> judge_gain(Estimate(0.051, 0.0457, (-0.042, 0.137), "bootstrap", 0.29))
    'no gain shown (+0.051, interval -0.042 to +0.137, p = 0.29); 0.128 could have been found'
    """
    low, high = gain.interval
    numbers = f"{gain.value:+.3f}, interval {low:+.3f} to {high:+.3f}, p = {gain.p_value:.2g}"
    if low > 0:
        return f"a gain is shown ({numbers})"
    if high < 0:
        return f"a loss is shown ({numbers}): better without these synthetic images"
    least = detectable_difference(gain.se)
    return f"no gain shown ({numbers}); {least:.3f} could have been found"


@dataclass(frozen=True)
class Comparison:
    """What `classify` found."""

    scores: list[Score]
    sets: str  # the classes, and the cases of each set, in words
    verdict: str  # on synthetic images, in words; "" without them
    out: Path

    def __str__(self) -> str:
        verdict = f"verdict: {self.verdict}" if self.verdict else ""
        cases = f"every test case in every run: {self.out / 'scores.csv'}"
        return "\n".join(filter(None, (self.sets, verdict, format_table(self.scores), cases)))


def classify(
    train: PathLike,
    val: PathLike,
    test: PathLike,
    synthetic: PathLike | None = None,
    *,
    out: PathLike = "classified",
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
    train, val, test, synthetic : path
        See `load_cases`, also for `positive` and `size`. Official PatchCamelyon files are brought to
        the size of the training images. `val` chooses the best step, `test` is scored once a run.
    out : path
        Folder for ``settings.json``, ``scores.csv``, ``result.json`` and the runs. The same
        comparison goes on there, also with more runs; another one is refused.
    settings : ClassifierSettings, optional
        Default: ``tiny`` on a CPU, ``modern`` on a GPU.
    runs : int
        Trainings that differ in their seed; paper: 10.
    """
    check_counts(runs=runs)
    out, device = Path(out), find_device(device)
    settings = settings or choose_settings(device=device)
    check_seed(settings.seed, runs)
    sources = {"train": train, "val": val, "test": test}
    sources |= {"synthetic": synthetic} if synthetic is not None else {}
    check_apart(out, *sources.values())
    cases = _load(sources, settings, positive, size)
    sets = {"real": cases["train"]}
    if synthetic is not None:
        sets["real + synthetic"] = cases["train"] + cases["synthetic"]
    labels, patients = cases["test"].labels.numpy(), cases["test"].patients or None
    negative, positive = cases["test"].classes
    for label, name in enumerate((negative, positive)):
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
    with hold(out):
        for name, chosen in sets.items():
            folder = out / name.replace(" + ", "_and_")
            scores[name] = _repeat(chosen, cases, settings, folder, runs, device)
            own = score_runs(labels, scores[name], patients=patients)
            if name != "real":
                gain = bootstrap_auc(labels, scores[name], scores["real"], patients=patients)
                own += score_gain(gain, n := own[0].n)
                if patients is None or len(set(patients)) == len(patients):
                    # DeLong takes cases for independent
                    pair = delong_difference(labels, scores[name][0], scores["real"][0])
                    note = f"DeLong, p = {pair.p_value:.3g}; a check on one pair of runs"
                    title = "gain of the first run"
                    own.append(Score(title, pair.value, pair.interval, n, note=note))
                verdict = judge_gain(gain)
            rows += [replace(score, name=f"{score.name}, {name}") for score in own]
        _write_scores(out / "scores.csv", cases["test"], scores, settings.seed)
        to_json(rows, out / "result.json")
    sizes = ", ".join(f"{len(one)} {name}" for name, one in cases.items())
    owners = f"; the test cases are of {len(set(patients))} patients" if patients else ""
    return Comparison(rows, f"{positive} against {negative}: {sizes}{owners}", verdict, out)


def _repeat(
    train: Cases, cases: Mapping[str, Cases], settings: ClassifierSettings, folder: Path, runs: int,
    device: torch.device,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Train and test with each seed: scores ``(runs, N)`` of every case in every run.

    A run is not repeated where its ``run_SEED.json`` is in `folder`.
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
        scores.append(json.loads(path.read_text(encoding="utf-8"))["scores"])
        checkpoint.unlink(missing_ok=True)
    return np.array(scores)


def _load(
    sources: Mapping[str, PathLike], settings: ClassifierSettings, positive: str | None,
    size: int | None,
) -> dict[str, Cases]:  # fmt: skip
    """Load and check the sets, and bring them to the network's size."""
    change = partial(resize, size=settings.size, antialias=settings.antialias)
    folders = [name for name, source in sources.items() if find_split(source) is None]
    whole = {name: load_cases(sources[name], positive=positive, size=size) for name in folders}
    check_splits(whole)
    edge = size or max((max(one.images.shape[2:]) for one in whole.values()), default=None)
    cases = {
        name: whole[name].transform(change) if name in whole
        else load_cases(source, positive=positive, size=edge, change=change)
        for name, source in sources.items()
    }  # fmt: skip
    check_splits(cases)
    for name in cases.keys() & {"train", "synthetic"}:
        check_drawn(cases[name], name)
    return cases


def _settle(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Write what is compared into the folder, or check that it is what was compared there."""
    file = out / "settings.json"

    def read(path: Path) -> dict[str, Any]:
        stored = read_json(path)
        goes_on = stored.get("runs", runs + 1) <= runs
        return stored | {"runs": runs} if goes_on else stored

    runs = record["runs"]
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
    lines = [
        (case, label, name, seed + i, score)
        for name, by_run in scores.items()
        for i, run in enumerate(by_run)
        for case, label, score in zip(test.names, test.labels.tolist(), run)
    ]
    table = pd.DataFrame(lines, columns=["case", "label", "trained on", "seed", "score"])
    write_text(path, table.to_csv(index=False, float_format="%.6f"))
