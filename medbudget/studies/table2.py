"""The paper's Table 2: does a classifier gain from synthetic training images?

A line is a training set, repeated over runs that differ in their seed; see `classifying`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from medbudget.cases import Cases, check_drawn, check_splits, order_classes
from medbudget.data.pcam import load_patches
from medbudget.files import hash_tensors
from medbudget.studies.classifying import PCAM, find_patches, plan_auc, plan_runs
from medbudget.studies.drawing import BLOCK, Plan, read_source
from medbudget.studies.study import Row, Study
from medbudget.studies.tasks import Task

OWN = "own"  # role of a folder with any two classes, as `medbudget prepare folder` writes it
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """Two classes to tell apart, the first without disease."""

    phantoms: tuple[str, str]  # their labels as phantoms
    folders: tuple[str, str]  # as `medbudget prepare` names their folders


PROBLEMS = {
    "prostate": Problem(("healthy", "tumour"), ("negative", "positive")),
    "chest": Problem(("healthy", "cardiomegaly"), ("no_finding", "cardiomegaly")),
    "histology": Problem(("normal", "metastasis"), ("normal", "metastasis")),
}


@dataclass(frozen=True)
class Line:
    """A training set of Table 2."""

    name: str
    synthetic: str = ""  # how many: as many as "real", "many" or "some" (settings); "": none
    real: bool = True  # whether real images are trained on
    few: bool = False  # whether the words are learned from 10 cases
    filtered: bool = False  # by the classifiers that were trained on real images
    shown: bool = False  # in the figure
    paper: Mapping[str, str] = field(default_factory=dict)  # AUC by problem


# de Wilde et al. 2024, Table 2: mean ± standard deviation of 10 runs. Beyond the paper: the last two.
TABLE2 = (
    Line("{real} real", paper={
        "prostate": ".780 ± .017", "chest": ".732 ± .021", "histology": ".878 ± .011",
    }),
    Line("{real} real + {many} synthetic", "many", shown=True, paper={
        "prostate": ".803 ± .009", "chest": ".737 ± .019", "histology": ".862 ± .017",
    }),
    Line("{real} synthetic", "real", real=False, paper={"prostate": ".737 ± .019"}),
    Line("{many} synthetic", "many", real=False, shown=True, paper={"prostate": ".766 ± .020"}),
    Line("{real} real + {real} synthetic", "real", paper={"prostate": ".773 ± .015"}),
    Line("{many} synthetic*", "many", real=False, few=True, shown=True,
         paper={"prostate": ".562 ± .036"}),
    Line("{real} real + {many} synthetic*", "many", few=True, paper={"prostate": ".745 ± .012"}),
    Line("{real} real + {some} synthetic", "some"),
    Line("{real} real + {many} synthetic, filtered", "many", filtered=True),
)  # fmt: skip


def find_given(p: Plan, *others: str) -> list[str]:
    """Return the problems of which real images are given; raise if there are neither these nor phantoms."""
    given = [name for name in (*PROBLEMS, *others) if name in p.sources]
    if not given and not p.s.phantoms:
        raise ValueError(
            f"the study needs real images: --data {'=FOLDER or '.join((*PROBLEMS, *others))}"
            "=FOLDER, each as medbudget prepare writes it ({train,val,test}/CLASS/*.png)"
        )
    return given


def list_classes(split: Path) -> list[str]:
    """Return the folders of classes in a split of a prepared folder."""
    return sorted(p.name for p in split.iterdir() if p.is_dir()) if split.is_dir() else []


def find_folder(sources: Mapping[str, Path], name: str, split: str, label: int) -> str:
    """Return where a class of a prepared problem lies: ``chest/train/no_finding``.

    Capitals and spaces do not matter: ``No Finding`` is found too.
    """
    root = sources[name] / split
    folders = list_classes(root)
    if name == OWN:
        both = list_classes(sources[name] / "train")
        wanted = order_classes(both, None, root) if len(both) == 2 else ("two", "classes")
    else:
        wanted = PROBLEMS[name].folders
    for folder in folders:
        if wanted[label] in (folder, folder.lower().replace(" ", "_")):
            return f"{name}/{split}/{folder}"
    official = f", or val and test by --data {PCAM}=FOLDER" if name == "histology" else ""
    raise ValueError(
        f"{root} has the folders of classes {', '.join(folders) or 'none'}; needed are "
        f"{{train,val,test}}/{{{','.join(wanted)}}}, as medbudget prepare writes them{official}"
    )


def plan_class(p: Plan, name: str, split: str, label: int, n: int) -> Task:
    """Return the task of `n` images of a problem's class: real ones if given, else phantoms."""
    if name in p.sources:
        return p.folder(find_folder(p.sources, name, split, label), n)
    return p.phantoms(name, PROBLEMS[name].phantoms[label], split, n)


def _plan_patches(p: Plan, split: str, label: int) -> tuple[Task, int]:
    """Return the task of one class of an official split, all of it, and how many patches that is."""
    classifier, folder = p.classifier(), p.sources[PCAM]
    indices = find_patches(folder, split, label)
    some = load_patches(folder, split, indices[:: max(1, len(indices) // 16)].tolist(), size=96)
    settings = {
        "split": split, "label": label, "size": p.s.size, "seen": classifier.size,
        "antialias": classifier.antialias,
        "hash": hash_tensors({"indices": torch.from_numpy(indices), "some": some}),
    }  # fmt: skip
    return Task("patches", settings), len(indices)


def _plan_real(p: Plan, name: str) -> dict[tuple[str, int], tuple[Task, int]]:
    """Return by split and label the task of real images, and how many there are."""
    official = ("val", "test") if name == "histology" and {name, PCAM} <= set(p.sources) else ()
    real = {
        (split, label): _plan_patches(p, split, label) if split in official
        else (plan_class(p, name, split, label, p.s.cases), p.s.cases)
        for split, label in product(SPLITS, (0, 1))
    }  # fmt: skip
    if name in p.sources:
        splits = {}
        for split in [one for one in SPLITS if one not in official]:
            folders = [find_folder(p.sources, name, split, label) for label in (0, 1)]
            splits[split] = Cases.of(*(read_source(p.sources, f, p.s.size) for f in folders))
        check_splits(splits)
        check_drawn(splits["train"], "training")
    return real


def _make_rows(p: Plan, name: str) -> list[Row]:
    s, real = p.s, _plan_real(p, name)
    numbers = {"real": 2 * s.cases, "many": s.many, "some": s.some}
    lines = [
        line for line in TABLE2
        if (name == "prostate" or name in line.paper) and numbers.get(line.synthetic) != 0
    ]  # fmt: skip
    drawn = {}
    for few in {line.few for line in lines}:
        cases = s.few_cases if few else s.cases
        words = [p.word(real["train", label][0], cases=cases) for label in (0, 1)]
        drawn[few] = [
            p.blocks([word], n=s.many // 2, seed=label * 1_000_000)
            for label, word in enumerate(words)
        ]
    base: tuple[Task, ...] = ()
    rows = []
    for line in lines:
        parts: list[tuple[str, int, Sequence[Task], int]] = []
        for split, role in (("train", "real"), ("val", "val"), ("test", "test")):
            for label in (0, 1) if split != "train" or line.real else ():
                task, n = real[split, label]
                parts.append((role, label, [task], n))
        role = "synthetic" if line.synthetic else "also"
        half = numbers.get(line.synthetic, s.many) // 2
        for label, blocks in enumerate(drawn[line.few]):
            parts.append((role, label, blocks[: -(-half // BLOCK)], half))
        runs = plan_runs(p, name, parts, base if line.filtered else ())
        score, gain = plan_auc(p, runs, base)
        base = base or runs
        paper = {"AUC": line.paper[name]} if name in line.paper else {}
        images = drawn[line.few][1] if line.shown else ()
        value = line.name.format(**numbers)
        rows.append(Row(name, value, score, gain, paper, images, Task("runs", {}, runs)))
    return rows


def make_table2(p: Plan) -> Study:
    """Table 2: prostate in seven lines and two beyond the paper, chest and histology in two."""
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
    c = p.classifier()
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
