"""The paper's Table 2: does a classifier gain from synthetic training images?

A line is a training set, repeated over runs that differ in their seed; see `classifying`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medbudget.cases import Cases, check_drawn, check_splits
from medbudget.classifier import ClassifierSettings
from medbudget.data.pcam import load_patches
from medbudget.files import hash_tensors
from medbudget.studies.classifying import PCAM, find_patches, plan_runs
from medbudget.studies.drawing import BLOCK, Plan, read_source
from medbudget.studies.study import Row, Study
from medbudget.studies.tasks import Task

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """Two classes to tell apart, the first without disease."""

    phantoms: tuple[str, str]  # their labels as phantoms
    folders: tuple[str, str]  # as `medbudget prepare` names their folders
    few: bool  # whether there are lines with words from 10 cases
    paper: Mapping[str, str]  # AUC of the paper by line


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
        ("healthy", "cardiomegaly"), ("no_finding", "cardiomegaly"), False,
        {"real": ".732 ± .021", "real + many": ".737 ± .019"},
    ),
    "histology": Problem(
        ("normal", "metastasis"), ("normal", "metastasis"), False,
        {"real": ".878 ± .011", "real + many": ".862 ± .017"},
    ),
}  # fmt: skip


def find_given(p: Plan, *others: str) -> list[str]:
    """Return the problems of which real images are given; raise if there are neither these nor phantoms."""
    given = [name for name in (*PROBLEMS, *others) if name in p.sources]
    if not given and not p.s.phantoms:
        own = "".join(f", or {name}=FOLDER with any two classes" for name in others)
        raise ValueError(
            "the study needs real images: --data prostate=FOLDER, chest=FOLDER or "
            f"histology=FOLDER{own}, each as medbudget prepare writes it "
            "({train,val,test}/CLASS/*.png)"
        )
    return given


def list_classes(split: Path) -> list[str]:
    """Return the folders of classes in a split of a prepared folder."""
    return sorted(p.name for p in split.iterdir() if p.is_dir()) if split.is_dir() else []


def find_folder(sources: Mapping[str, Path], name: str, split: str, label: int) -> str:
    """Return where a class of a prepared problem lies: ``chest/train/no_finding``.

    Capitals and spaces do not matter: ``No Finding`` is found too.
    """
    wanted, root = PROBLEMS[name].folders[label], Path(sources[name]) / split
    folders = list_classes(root)
    for folder in folders:
        if folder.lower().replace(" ", "_") == wanted:
            return f"{name}/{split}/{folder}"
    raise ValueError(
        f"{root} has no folder {wanted} (it has: {', '.join(folders) or 'none'}); needed are "
        "{train,val,test}/{" + ",".join(PROBLEMS[name].folders) + "}, as medbudget prepare writes "
        "them" + (f", or val and test by --data {PCAM}=FOLDER" if name == "histology" else "")
    )


def _plan_real(p: Plan, name: str) -> dict[tuple[str, int], tuple[Task, int]]:
    """Return by split and label the task of real images, and how many there are."""
    n, sources = p.s.cases, p.sources
    if name not in sources:
        return {
            (split, label): (p.phantoms(name, title, split, n), n)
            for split in SPLITS
            for label, title in enumerate(PROBLEMS[name].phantoms)
        }
    real: dict[tuple[str, int], tuple[Task, int]] = {}
    splits = {}
    for split in SPLITS:
        if name == "histology" and split != "train" and PCAM in sources:
            real |= {(split, label): _plan_patches(p, split, label) for label in (0, 1)}
            continue
        folders = [find_folder(sources, name, split, label) for label in (0, 1)]
        images = [read_source(sources, folder, p.s.size) for folder in folders]
        for label, (folder, one) in enumerate(zip(folders, images)):
            real[split, label] = p.folder(folder, n, one), n
        splits[split] = Cases.of(*images)
    check_splits(splits)
    check_drawn(splits["train"], "training")
    return real


def _plan_patches(p: Plan, split: str, label: int) -> tuple[Task, int]:
    """Return the task of one class of an official split, all of it, and how many patches that is."""
    classifier = ClassifierSettings.preset(p.s.classifier, **p.s.changes)
    folder = p.sources[PCAM]
    indices = find_patches(folder, split, label)
    some = load_patches(folder, split, indices[:: max(1, len(indices) // 16)].tolist(), size=96)
    settings = {
        "split": split, "label": label, "size": p.s.size, "seen": classifier.size,
        "antialias": classifier.antialias,
        "hash": hash_tensors({"indices": torch.from_numpy(indices), "some": some}),
    }  # fmt: skip
    return Task("patches", settings), len(indices)


def make_table2(p: Plan) -> Study:
    """Table 2: prostate in seven lines, chest and histology in two, and what the paper lacks.

    Beyond the paper: one more number of synthetic images, and a line whose synthetic images were
    filtered by the classifiers that were trained on real ones.
    """
    s = p.s
    if s.many < max(2 * s.cases, s.some) or s.many % 2 or s.some % 2:
        raise ValueError(
            f"many and some must be even, and many at least some ({s.some}) and the number of real "
            f"images ({2 * s.cases}), got {s.many}"
        )
    if s.few_cases > s.cases:
        raise ValueError(f"few_cases must be at most cases ({s.cases}), got {s.few_cases}")
    given = find_given(p)
    rows = [row for name in given or PROBLEMS for row in _make_rows(p, name)]
    added = {name: sd for name, sd in s.noise.items() if sd and name not in p.sources}
    noise = [f"{name} ({sd:g} gray levels)" for name, sd in added.items()]
    c = ClassifierSettings.preset(s.classifier, **s.changes)
    about = (
        f"AUC of classifiers ({c.network}, {c.size} px, {c.steps} batches of "
        f"{c.batch_size}) that were trained on real and synthetic images of base {s.base} "
        f"({s.steps} steps, CFG {s.cfg_scale:g}, {s.vectors} vectors; *: words from "
        f"{s.few_cases} cases) and tested on {2 * s.cases} {'real images' if given else 'phantoms'}"
        f"; mean of {s.runs} runs. "
        "gain: over real images alone, on the same cases; p tests it, over cases and runs "
        "(two-level bootstrap). detectable: the gain that such a comparison finds in four of five "
        "cases. ECE: calibration error. AUC on synthetic: trained on real, tested on synthetic. "
        + (f"Noise was added to all images of {', '.join(noise)}. " if noise else "")
        + "The paper's AUCs are of other images and networks."
    )
    return Study(tuple(rows), about, head=("images", "trained on"))


def _make_rows(p: Plan, name: str) -> list[Row]:
    s, problem, real = p.s, PROBLEMS[name], _plan_real(p, name)
    drawn: dict[str, list[tuple[Task, ...]]] = {}
    for word, cases in (("many", s.cases), ("few", s.few_cases))[: 1 + problem.few]:
        for label in (0, 1):
            token = p.shipped_word(real["train", label][0], cases=cases)
            blocks = p.blocks([token], n=s.many // 2, seed=label * 1_000_000)
            drawn.setdefault(word, []).append(blocks)

    def train(
        with_real: bool, n: int = 0, word: str = "many", *, also: bool = False,
        judges: Sequence[Task] = (),
    ) -> tuple[Task, ...]:  # fmt: skip
        parts: list[tuple[str, int, Sequence[Task], int]] = []
        for split, role in (("train", "real"), ("val", "val"), ("test", "test")):
            for label in (0, 1) if split != "train" or with_real else ():
                task, number = real[split, label]
                parts.append((role, label, [task], number))
        for role in ("synthetic",) * (n > 0) + ("also",) * also:
            half = (n or s.many) // 2
            for label, blocks in enumerate(drawn[word]):
                parts.append((role, label, blocks[: -(-half // BLOCK)], half))
        return plan_runs(p, name, parts, judges)

    n_real, many = 2 * s.cases, s.many
    base = train(True, also=True)
    lines = {
        "real": (f"{n_real} real", base),
        "real + many": (f"{n_real} real + {many} synthetic", train(True, many)),
    }
    if problem.few:
        lines |= {
            "as many": (f"{n_real} synthetic", train(False, n_real)),
            "many": (f"{many} synthetic", train(False, many)),
            "real + as many": (f"{n_real} real + {n_real} synthetic", train(True, n_real)),
            "few": (f"{many} synthetic*", train(False, many, "few")),
            "real + few": (f"{n_real} real + {many} synthetic*", train(True, many, "few")),
        }
        if s.some:
            lines["real + some"] = f"{n_real} real + {s.some} synthetic", train(True, s.some)
        filtered = f"{n_real} real + {many} synthetic, filtered"
        lines["filtered"] = filtered, train(True, many, judges=base)
    counted = {"runs": s.runs, "repeats": s.repeats}
    shown = {"real + many": drawn["many"][1], "many": drawn["many"][1]}
    shown |= {"few": drawn["few"][1]} if problem.few else {}
    rows = []
    for line, (value, runs) in lines.items():
        gain = None if runs is base else Task("gain", counted, (*runs, *base))
        score = Task("auc", counted, (*runs, *((gain,) if gain else ())))
        paper = {"AUC": problem.paper[line]} if line in problem.paper else {}
        images, details = shown.get(line, ()), Task("runs", {}, runs)
        rows.append(Row(name, value, score, gain, paper, images, details))
    return rows
