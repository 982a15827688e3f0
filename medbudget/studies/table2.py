"""The paper's Table 2: does a classifier gain from synthetic training images?

A line is a training set, repeated over runs that differ in their seed; see `classifying`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medbudget.cases import Cases, check_splits
from medbudget.classifier import ClassifierSettings
from medbudget.data.pcam import load_patches
from medbudget.files import hash_tensors
from medbudget.studies.classifying import PCAM, find_patches
from medbudget.studies.drawing import (
    BLOCK,
    plan_blocks,
    plan_images,
    plan_phantoms,
    plan_shipped_word,
    read_source,
)
from medbudget.studies.study import Row, Study, StudySettings
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


def find_folder(sources: Mapping[str, Path], name: str, split: str, label: int) -> str:
    """Return where a class of a prepared problem lies: ``chest/train/no_finding``.

    Capitals and spaces do not matter: ``No Finding`` is found too.

    Raises
    ------
    ValueError
        No such folder; says which there are.
    """
    wanted, root = PROBLEMS[name].folders[label], Path(sources[name]) / split
    folders = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for folder in folders:
        if folder.lower().replace(" ", "_") == wanted:
            return f"{name}/{split}/{folder}"
    raise ValueError(
        f"{root} has no folder {wanted} (it has: {', '.join(folders) or 'none'}); table2 reads "
        "{train,val,test}/{" + ",".join(PROBLEMS[name].folders) + "} as medbudget prepare writes "
        "them" + (f", or val and test by --data {PCAM}=FOLDER" if name == "histology" else "")
    )


def _plan_real(
    s: StudySettings, name: str, sources: Mapping[str, Path]
) -> dict[tuple[str, int], tuple[Task, int]]:
    """Return by split and label the task of real images, and how many there are."""
    if name not in sources:
        return {
            (split, label): (plan_phantoms(name, title, split, s.cases, s.size), s.cases)
            for split in SPLITS
            for label, title in enumerate(PROBLEMS[name].phantoms)
        }
    real: dict[tuple[str, int], tuple[Task, int]] = {}
    splits = {}
    for split in SPLITS:
        if name == "histology" and split != "train" and PCAM in sources:
            real |= {
                (split, label): _plan_patches(s, sources[PCAM], split, label) for label in (0, 1)
            }
            continue
        both = []
        for label in (0, 1):
            folder = find_folder(sources, name, split, label)
            both.append(read_source(sources, folder, s.size))
            real[split, label] = plan_images(folder, both[label], s.cases, s.size), s.cases
        splits[split] = Cases.of(*both)
    check_splits(splits)
    return real


def _plan_patches(s: StudySettings, folder: Path, split: str, label: int) -> tuple[Task, int]:
    """Return the task of one class of an official split, all of it, and how many patches that is."""
    classifier = ClassifierSettings.preset(s.classifier, **s.changes)
    indices = find_patches(folder, split, label)
    some = load_patches(folder, split, indices[:: max(1, len(indices) // 16)].tolist(), size=96)
    settings = {
        "split": split, "label": label, "size": s.size, "seen": classifier.size,
        "antialias": classifier.antialias,
        "hash": hash_tensors({"indices": torch.from_numpy(indices), "some": some}),
    }  # fmt: skip
    return Task("patches", settings), len(indices)


def make_table2(s: StudySettings, base_hash: str, sources: Mapping[str, Path]) -> Study:
    """Table 2: prostate in seven lines, chest and histology in two, and what the paper lacks.

    Beyond the paper: one more number of synthetic images, and a line whose synthetic images were
    filtered by the classifiers that were trained on real ones.
    """
    if s.many < max(2 * s.cases, s.some) or s.many % 2 or s.some % 2:
        raise ValueError(
            f"many and some must be even, and many at least some ({s.some}) and the number of real "
            f"images ({2 * s.cases}), got {s.many}"
        )
    given = [name for name in PROBLEMS if name in sources]
    if not given and not s.phantoms:
        raise ValueError(
            "table2 needs real images: --data prostate=FOLDER, chest=FOLDER or histology=FOLDER, "
            "each as medbudget prepare writes it ({train,val,test}/CLASS/*.png)"
        )
    rows = [row for p in given or PROBLEMS for row in _make_rows(s, base_hash, p, sources)]
    return Study(tuple(rows), _about(s, bool(given)), head=("images", "trained on"))


def _make_rows(
    s: StudySettings, base_hash: str, name: str, sources: Mapping[str, Path]
) -> list[Row]:
    problem, real = PROBLEMS[name], _plan_real(s, name, sources)
    settings = asdict(ClassifierSettings.preset(s.classifier, **s.changes))
    drawn: dict[str, list[tuple[Task, ...]]] = {}
    for word, cases in (("many", s.cases), ("few", s.few_cases))[: 1 + problem.few]:
        for label in (0, 1):
            token = plan_shipped_word(s, base_hash, real["train", label][0], cases=cases)
            blocks = plan_blocks(s, base_hash, [token], n=s.many // 2, seed=label * 1_000_000)
            drawn.setdefault(word, []).append(blocks)

    def train(
        with_real: bool, n: int = 0, word: str = "many", *, also: bool = False,
        judges: Sequence[Task] = (),
    ) -> tuple[Task, ...]:  # fmt: skip
        parts: list[list[Any]] = []
        inputs: list[Task] = []
        for split, role in (("train", "real"), ("val", "val"), ("test", "test")):
            if split != "train" or with_real:
                parts += [[role, label, 1, real[split, label][1]] for label in (0, 1)]
                inputs += [real[split, label][0] for label in (0, 1)]
        for role in ("synthetic",) * (n > 0) + ("also",) * also:
            half = (n or s.many) // 2
            for label, blocks in enumerate(drawn[word]):
                blocks = blocks[: -(-half // BLOCK)]
                parts.append([role, label, len(blocks), half])
                inputs += blocks
        common = {"parts": parts, "noise": float(s.noise.get(name, 0))}
        common |= {"filter": "median"} if judges else {}
        return tuple(
            Task(
                "classifier", {"classifier": settings | {"seed": seed}} | common, (*inputs, *judges)
            )
            for seed in range(s.runs)
        )

    n_real, many = 2 * s.cases, s.many
    base = train(True, also=True)
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
    counted = {"runs": s.runs, "repeats": s.repeats}
    rows = []
    for line, value, runs, show in lines:
        gain = None if runs is base else Task("gain", counted, (*runs, *base))
        score = Task("auc", counted, (*runs, *((gain,) if gain else ())))
        paper = {"AUC": problem.paper[line]} if line in problem.paper else {}
        images = drawn["few" if "few" in line else "many"][1] if show else ()
        rows.append(Row(name, value, score, gain, paper, images, details=Task("runs", {}, runs)))
    return rows


def _about(s: StudySettings, given: bool) -> str:
    noise = [f"{name} ({sd:g} gray levels)" for name, sd in s.noise.items() if sd]
    settings = ClassifierSettings.preset(s.classifier, **s.changes)
    return (
        f"AUC of classifiers ({settings.network}, {settings.size} px, {settings.steps} batches of "
        f"{settings.batch_size}) that were trained on real and synthetic images of base {s.base} "
        f"({s.steps} steps, CFG {s.cfg_scale:g}, {s.vectors} vectors; *: words from "
        f"{s.few_cases} cases) and tested on {2 * s.cases} {'real images' if given else 'phantoms'}"
        f"; mean of {s.runs} runs. "
        "gain: over real images alone, on the same cases; p tests it, over cases and runs "
        "(two-level bootstrap). detectable: the gain that such a comparison finds in four of five "
        "cases. ECE: calibration error. AUC on synthetic: trained on real, tested on synthetic. "
        + (f"Noise was added to all images of {', '.join(noise)}. " if noise else "")
        + "The paper's AUCs are of other images and networks."
    )
