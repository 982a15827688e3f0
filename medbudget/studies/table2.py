"""The paper's Table 2: does a classifier gain from synthetic training images?

A line is a training set, repeated over runs that differ in their seed. Every run saves the score
of every test case. Intervals come from a bootstrap over cases and runs, differences to the line of
real images alone from the same cases in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.cases import Cases, check_splits
from medbudget.classifier import (
    ClassifierSettings,
    score_gain,
    score_runs,
    train_classifier,
)
from medbudget.embeddings import Embedding
from medbudget.files import hash_tensors, write_json
from medbudget.metrics.auc import (
    Difference,
    auc,
    bootstrap_auc,
    calibration,
    delong_difference,
)
from medbudget.metrics.scores import Score
from medbudget.studies.tables import Row, Study, StudySettings, make_blocks, make_embedding
from medbudget.studies.tasks import KINDS, Kind, Store, Task, read_images, read_source
from medbudget.tiny.trained import SPECS, find_trained

TOKEN = "<class>"


@dataclass(frozen=True)
class Problem:
    """Two classes to tell apart, the first without disease.

    Attributes
    ----------
    phantoms, folders : (str, str)
        Their labels as phantoms, and as folders of prepared images.
    few : bool
        Whether there are lines with words from 10 cases.
    paper : mapping
        AUC of the paper by line.
    """

    phantoms: tuple[str, str]
    folders: tuple[str, str]
    few: bool
    paper: Mapping[str, str]


# de Wilde et al. 2024, Table 2: mean ± standard deviation of 10 runs
PROBLEMS = {
    "prostate": Problem(
        ("healthy", "tumour"), ("negative", "positive"), True,
        {
            "real": ".780 ± .017", "real + many": ".803 ± .009", "as many": ".737 ± .019",
            "many": ".766 ± .020", "real + as many": ".773 ± .015", "few": ".562 ± .036",
            "real + few": ".745 ± .012",
        },
    ),
    "chest": Problem(
        ("healthy", "cardiomegaly"), ("No Finding", "Cardiomegaly"), False,
        {"real": ".732 ± .021", "real + many": ".737 ± .019"},
    ),
    "histology": Problem(
        ("normal", "metastasis"), ("normal", "metastasis"), False,
        {"real": ".878 ± .011", "real + many": ".862 ± .017"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Table2Settings:
    """What a preset fixes.

    Attributes
    ----------
    base, inversion, size, steps, cfg_scale, vectors, overrides
        As in `StudySettings`.
    classifier : str
        Preset of `ClassifierSettings`.
    changes : mapping
        Changes to that preset.
    runs : int
        Trainings of each line.
    many, some : int
        Synthetic images in the lines with many (both classes together), and in one more line that
        only the curve over their number has (0: none).
    cases, few_cases : int
        Real images of each class in every split, and those that the words with an asterisk saw.
    phantoms : bool
        Whether to draw phantoms; else folders of prepared images are needed.
    noise : mapping of str to float
        Standard deviation, gray levels, of noise that is added to all images of a problem, real
        and synthetic, before the classifier sees them.
    """

    base: str
    inversion: str
    classifier: str
    runs: int
    many: int
    some: int
    steps: int
    size: int
    phantoms: bool
    cases: int = 100
    few_cases: int = 10
    cfg_scale: float = 2.0
    vectors: int = 64
    noise: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 2000

    def __post_init__(self) -> None:
        if self.many < max(2 * self.cases, self.some) or self.many % 2 or self.some % 2:
            raise ValueError(
                f"many and some must be even, and many at least some ({self.some}) and the number "
                f"of real images ({2 * self.cases}), got {self.many}"
            )


PRESETS = {
    "tiny": Table2Settings(
        base="tiny", inversion="tiny", classifier="tiny", runs=5, many=400, some=96, steps=25,
        size=64, phantoms=True, noise={"histology": 128.0},
    ),
    "colab": Table2Settings(
        base="sd2", inversion="colab", classifier="modern", runs=3, many=400, some=96, steps=50,
        size=512, phantoms=False, changes={"steps": 1500},
    ),
    "paper": Table2Settings(
        base="sd2", inversion="paper", classifier="paper", runs=10, many=2000, some=0, steps=100,
        size=512, phantoms=False,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------- what tasks do


def _run_word(task: Task, store: Store, path: Path, scratch: Path) -> None:
    """Copy a word that ships with the package, under the name that words of studies have."""
    s = task.settings
    word = Embedding.load(
        find_trained(s["kind"], s["label"], n_vectors=s["vectors"], cases=s["cases"])
    )
    if word.base_hash != s["base_hash"] or hash_tensors({"v": word.vectors}) != s["hash"]:
        raise ValueError(
            f"the word for {s['label']} in this package is not the one that the study was planned "
            "with: use the same version of medbudget on every machine, or plan anew"
        )
    replace(word, token=TOKEN).save(path)


def add_noise(images: torch.Tensor, sd: float, seed: int) -> torch.Tensor:
    """Add Gaussian noise of `sd` gray levels: ``(N, 3, H, W) uint8`` both ways."""
    if not sd:
        return images
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    return (images + sd * noise).round_().clamp_(0, 255).to(torch.uint8)


def _read_part(tasks: Sequence[Task], n: int, noise: float, store: Store) -> torch.Tensor:
    """Read one class of one split; an image has the same noise wherever it is used."""
    images = [
        add_noise(read_images(store, [task]), noise, int(task.key, 16) % 2**63) for task in tasks
    ]
    return torch.cat(images)[:n]


def read_runs(tasks: Sequence[Task], store: Store) -> list[dict[str, Any]]:
    """Return the results of tasks of kind ``classifier``."""
    return [json.loads(store.path(task).read_text(encoding="utf-8")) for task in tasks]


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


def _run_classifier(task: Task, store: Store, path: Path, scratch: Path) -> None:
    s = task.settings
    parts: dict[str, dict[int, torch.Tensor]] = {}
    first = 0
    for role, label, count, n in s["parts"]:
        images = _read_part(task.inputs[first : first + count], n, s["noise"], store)
        parts.setdefault(role, {})[label] = images
        first += count
    cases = {role: Cases.of(both[0], both[1]) for role, both in parts.items()}
    kept: list[int] = []
    if judges := read_runs(task.inputs[first:], store):
        made, real = cases.pop("synthetic"), cases["real"]
        keep = keep_agreed(made.labels, [run["also"]["scores"] for run in judges])
        kept = [int((keep & (made.labels.numpy() == label)).sum()) for label in (0, 1)]
        which = torch.from_numpy(keep)  # perhaps of one class only, so no Cases of their own
        cases["real"] = Cases(
            torch.cat([real.images, made.images[which]]),
            torch.cat([real.labels, made.labels[which]]),
        )
    check_splits({role: cases[role] for role in cases if role != "also"})
    both = [cases[role] for role in ("real", "synthetic") if role in cases]
    train = both[0] if len(both) == 1 else both[0] + both[1]
    settings = ClassifierSettings(**s["classifier"])
    classifier = train_classifier(
        train, cases["val"], settings, checkpoint=scratch.with_suffix(".ckpt")
    )
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


def _run_gain(task: Task, store: Store, path: Path, scratch: Path) -> None:
    """Compare the runs of one line with those of another on the same test cases."""
    half = task.settings["runs"]
    labels, own = _scores(read_runs(task.inputs[:half], store))
    _, other = _scores(read_runs(task.inputs[half:], store))
    found = bootstrap_auc(labels, own, other, repeats=task.settings["repeats"])
    one = delong_difference(labels, own[0], other[0])
    result = {
        "difference": found.value,
        "interval": list(found.interval),
        "se": found.se,
        "p_value": found.p_value,
        "delong": {
            "difference": one.value, "interval": list(one.interval), "p_value": one.p_value
        },
    }  # fmt: skip
    write_json(path, result)


def _run_auc(task: Task, store: Store, path: Path, scratch: Path) -> None:
    """Score a line: mean AUC with its interval, spread, gain, calibration."""
    count = task.settings["runs"]
    runs = read_runs(task.inputs[:count], store)
    labels, scores = _scores(runs)
    rows = score_runs(labels, scores, repeats=task.settings["repeats"])
    if len(task.inputs) > count:
        gain = json.loads(store.path(task.inputs[count]).read_text(encoding="utf-8"))
        found = Difference(
            gain["difference"], gain["se"], tuple(gain["interval"]), "bootstrap", gain["p_value"]
        )
        rows[-1:-1] = score_gain(found, (labels.count(0), labels.count(1)))
    if "also" in runs[0]:
        truth = runs[0]["also"]["labels"]
        reverse = auc(truth, [run["also"]["scores"] for run in runs])
        rows.append(Score("AUC on synthetic", reverse, None, len(truth), note="mean of runs"))
    write_json(path, {row.name: row.to_dict() for row in rows})


def _run_runs(task: Task, store: Store, path: Path, scratch: Path) -> None:
    """Collect what the runs of a line found, scores as text to four decimals."""
    runs = read_runs(task.inputs, store)
    found = calibration(*_scores(runs))
    result = {
        "aucs": [run["auc"] for run in runs],
        "best_steps": [run["best_step"] for run in runs],
        "kept": runs[0]["kept"],
        "calibration": asdict(found),
        "scores": [" ".join(f"{score:.4f}" for score in run["scores"]) for run in runs],
    }
    write_json(path, result)


def _steps(task: Task) -> float:
    return float(task.settings["classifier"]["steps"] * task.settings["classifier"]["batch_size"])


KINDS |= {
    "word": Kind(_run_word, ".safetensors"),
    "classifier": Kind(_run_classifier, ".json", heavy=True, cost=_steps),
    "gain": Kind(_run_gain, ".json"),
    "auc": Kind(_run_auc, ".json"),
    "runs": Kind(_run_runs, ".json"),
}


# ------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Sets:
    """Tasks of the images of one problem: by split and label, and blocks by word and label."""

    real: Mapping[tuple[str, int], Task]
    words: Mapping[str, tuple[tuple[Task, ...], tuple[Task, ...]]]


def _find_real(
    s: Table2Settings, name: str, problem: Problem, sources: Mapping[str, Path]
) -> dict[tuple[str, int], Task]:
    found = {}
    for split in ("train", "val", "test"):
        for label in (0, 1):
            if s.phantoms and not sources:
                settings: dict[str, Any] = {
                    "source": "phantoms", "kind": name, "label": problem.phantoms[label],
                    "split": split, "seed": 0,
                }  # fmt: skip
            else:
                source = f"{name}/{split}/{problem.folders[label]}"
                images = read_source(sources, source, s.size)
                settings = {"source": source, "hash": hash_tensors({"images": images})}
            found[split, label] = Task("images", settings | {"n": s.cases, "size": s.size})
    return found


def _make_word(
    s: Table2Settings, base_hash: str, name: str, label: str, train: Task, cases: int
) -> Task:
    """Return the word of a class: shipped where the package has it, else to be trained."""
    shipped = (name, label, s.vectors, cases) in SPECS and not s.overrides
    if s.base == "tiny" and train.settings["source"] == "phantoms" and shipped:
        word = Embedding.load(find_trained(name, label, n_vectors=s.vectors, cases=cases))
        settings = {
            "kind": name, "label": label, "vectors": s.vectors, "cases": cases,
            "base_hash": base_hash, "hash": hash_tensors({"v": word.vectors}),
        }  # fmt: skip
        return Task("word", settings)
    return make_embedding(_drawing(s), base_hash, train, s.vectors, cases)


def _drawing(s: Table2Settings) -> StudySettings:
    """Return what words and images are made with."""
    return StudySettings(
        base=s.base, inversion=s.inversion, n=s.many // 2, steps=s.steps, size=s.size, grid={},
        extractors=(), phantom=None, overrides=s.overrides,
    )  # fmt: skip


def _find_sets(s: Table2Settings, base_hash: str, name: str, sources: Mapping[str, Path]) -> _Sets:
    problem = PROBLEMS[name]
    real = _find_real(s, name, problem, sources)
    words = {}
    for key, cases in (("many", s.cases), ("few", s.few_cases))[: 1 + problem.few]:
        blocks = []
        for label in (0, 1):
            title = problem.phantoms[label]
            word = _make_word(s, base_hash, name, title, real["train", label], cases)
            blocks.append(
                make_blocks(
                    _drawing(s), base_hash, (word,), TOKEN, n=s.many // 2, steps=s.steps,
                    cfg_scale=s.cfg_scale, seed=label * 1_000_000,
                )
            )  # fmt: skip
        words[key] = (blocks[0], blocks[1])
    return _Sets(real, words)


def make_table2(
    name: str, preset: str, s: Table2Settings, base_hash: str, sources: Mapping[str, Path]
) -> Study:
    """Table 2: prostate in seven lines, chest and histology in two, and what the paper lacks.

    Beyond the paper: one more number of synthetic images, and a line whose synthetic images were
    filtered by the classifiers that were trained on real ones.
    """
    wanted = [p for p in PROBLEMS if p in sources or (s.phantoms and not sources)]
    if not wanted:
        raise ValueError(
            "table2 needs real images: --data prostate=FOLDER, chest=FOLDER or histology=FOLDER, "
            "each as medbudget prepare writes it ({train,val,test}/CLASS/*.png)"
        )
    rows = [row for p in wanted for row in _make_rows(s, base_hash, p, sources)]
    tasks = [t for row in rows for t in (row.score, row.compare, row.details) if t]
    return Study(
        name, preset, s.base, base_hash, tuple(rows), tuple(tasks), _about(s, bool(sources)),
        head=("images", "trained on"),
    )  # fmt: skip


def _make_rows(
    s: Table2Settings, base_hash: str, name: str, sources: Mapping[str, Path]
) -> list[Row]:
    problem, sets = PROBLEMS[name], _find_sets(s, base_hash, name, sources)
    n_real = 2 * s.cases
    settings = asdict(ClassifierSettings.preset(s.classifier, **s.changes))

    def add(role: str, word: str, n: int) -> tuple[list[list[Any]], list[Task]]:
        need = -(-n // 2 // 16)
        blocks = [sets.words[word][label][:need] for label in (0, 1)]
        return (
            [[role, label, len(b), n // 2] for label, b in enumerate(blocks)],
            [task for b in blocks for task in b],
        )

    def train(
        real: bool, n: int = 0, word: str = "many", *, also: bool = False,
        judges: Sequence[Task] = (),
    ) -> tuple[Task, ...]:  # fmt: skip
        parts: list[list[Any]] = []
        inputs: list[Task] = []
        for split, role in (("train", "real"), ("val", "val"), ("test", "test")):
            if split != "train" or real:
                parts += [[role, label, 1, s.cases] for label in (0, 1)]
                inputs += [sets.real[split, label] for label in (0, 1)]
        for role in ("synthetic",) * (n > 0) + ("also",) * also:
            more = add(role, word, n or s.many)
            parts += more[0]
            inputs += more[1]
        return tuple(
            Task(
                "classifier",
                {
                    "classifier": settings | {"seed": seed}, "parts": parts,
                    "noise": float(s.noise.get(name, 0)),
                    **({"filter": "median"} if judges else {}),
                },
                (*inputs, *judges),
            )
            for seed in range(s.runs)
        )  # fmt: skip

    base = train(True, also=True)
    many = s.many
    lines: list[tuple[str, str, tuple[Task, ...], bool]] = [
        ("real", f"{n_real} real", base, False),
        ("real + many", f"{n_real} real + {many} synthetic", train(True, many), True),
    ]
    if problem.few:
        lines += [
            ("as many", f"{n_real} synthetic", train(False, n_real), False),
            ("many", f"{many} synthetic", train(False, many), True),
            ("real + as many", f"{n_real} real + {n_real} synthetic", train(True, n_real), False),
            ("few", f"{many} synthetic*", train(False, many, "few"), True),
            ("real + few", f"{n_real} real + {many} synthetic*", train(True, many, "few"), False),
        ]
        if s.some:
            value = f"{n_real} real + {s.some} synthetic"
            lines.append(("real + some", value, train(True, s.some), False))
        value = f"{n_real} real + {many} synthetic, filtered"
        lines.append(("filtered", value, train(True, many, judges=base), False))
    rows = []
    for line, value, runs, show in lines:
        counted = {"runs": s.runs, "repeats": s.repeats}
        gain = None if runs is base else Task("gain", counted, (*runs, *base))
        score = Task("auc", counted, (*runs, *((gain,) if gain else ())))
        paper = {"AUC": problem.paper[line]} if line in problem.paper else {}
        images = sets.words["few" if "few" in line else "many"][1] if show else ()
        rows.append(Row(name, value, score, gain, paper, images, details=Task("runs", {}, runs)))
    return rows


def _about(s: Table2Settings, given: bool) -> str:
    noise = [f"{name} ({sd:g} gray levels)" for name, sd in s.noise.items() if sd]
    settings = ClassifierSettings.preset(s.classifier, **s.changes)
    return (
        f"AUC of classifiers ({settings.network}, {settings.size} px, {settings.steps} batches of "
        f"{settings.batch_size}) that were trained on real and synthetic images of base {s.base} "
        f"({s.steps} steps, CFG {s.cfg_scale:g}, {s.vectors} vectors; *: words from "
        f"{s.few_cases} cases) and tested on {2 * s.cases} "
        f"{'real images' if given or not s.phantoms else 'phantoms'}; mean of {s.runs} runs. "
        "gain: over real images alone, on the same cases; p tests it, over cases and runs "
        "(two-level bootstrap). detectable: the gain that such a comparison finds in four of five "
        "cases. ECE: calibration error. AUC on synthetic: trained on real, tested on synthetic. "
        + (f"Noise was added to all images of {', '.join(noise)}. " if noise else "")
        + "The paper's AUCs are of other images and networks."
    )
