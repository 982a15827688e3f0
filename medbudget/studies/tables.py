"""What studies are made of, and the paper's Table 1 and Figure 5: settings, tasks, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medbudget.files import hash_tensors
from medbudget.inversion import InversionSettings
from medbudget.studies.tasks import BLOCK, Task, read_source

# de Wilde et al. 2024, Table 1: FID, MFID (T2W, healthy prostate, 1000 real and 1000 generated).
TABLE1 = {
    ("sampling steps", 25): (118, 4.04), ("sampling steps", 50): (106, 3.38),
    ("sampling steps", 75): (101, 3.11), ("sampling steps", 100): (99, 2.87),
    ("CFG scale", 1): (85, 4.50), ("CFG scale", 2): (99, 2.87),
    ("CFG scale", 3): (146, 4.51), ("CFG scale", 5): (173, 61.4),
    ("vectors", 8): (100, 2.92), ("vectors", 16): (110, 3.22),
    ("vectors", 32): (149, 2.86), ("vectors", 64): (99, 2.87),
    ("cases", 5): (158, 2.55), ("cases", 10): (106, 3.25),
    ("cases", 50): (96, 3.41), ("cases", 100): (99, 2.87),
}  # fmt: skip


@dataclass(frozen=True)
class StudySettings:
    """What a preset fixes.

    Attributes
    ----------
    base : str
        See `load_base`.
    inversion : str
        Preset of `InversionSettings`.
    n : int
        Images generated and compared with as many real ones.
    steps : int
        Sampling steps of the final configuration.
    grid : mapping
        The values tried, one setting at a time.
    extractors : tuple of str
        Distances, the first is the one that comparisons test.
    phantom : tuple of str or None
        Kind and label of phantoms; None needs folders of real images.
    overrides : mapping
        Changes to the preset of `InversionSettings`.
    """

    base: str
    inversion: str
    n: int
    steps: int
    size: int
    grid: Mapping[str, tuple[float, ...]]
    extractors: tuple[str, ...]
    phantom: tuple[str, str] | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    cfg_scale: float = 2.0
    vectors: int = 64
    cases: int = 100


PAPER_GRID = {
    "sampling steps": (25, 50, 75, 100),
    "CFG scale": (1, 2, 3, 5),
    "vectors": (8, 16, 32, 64),
    "cases": (5, 10, 50, 100),
}
PRESETS = {
    "tiny": StudySettings(
        base="tiny", inversion="tiny", n=64, steps=25, size=64,
        grid=PAPER_GRID | {"sampling steps": (10, 25, 50, 100)},
        extractors=("efficientnet-lite0", "layout"), phantom=("prostate", "healthy"),
    ),
    "colab": StudySettings(
        base="sd2", inversion="colab", n=200, steps=50, size=512, grid=PAPER_GRID,
        extractors=("inception", "efficientnet-lite0"), phantom=None,
    ),
    "paper": StudySettings(
        base="sd2", inversion="paper", n=1000, steps=100, size=512, grid=PAPER_GRID,
        extractors=("inception", "radimagenet"), phantom=None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes
    ----------
    group, value : str, float or str
        What is changed here, and to what: the line's first two cells.
    score : Task
        Its result is JSON: column to `Score.to_dict`.
    compare : Task or None
        Test against another line; its result is JSON with ``difference`` and ``p_value``.
    paper : mapping of str to float or str
        The paper's numbers for this line, by column; empty where it has none.
    images : tuple of Task
        Blocks of 16 generated images for the report's figure, the first from the study's first
        seed; empty where the line has none.
    details : Task or None
        Whatever else is recorded of the line; its result is JSON.
    """

    group: str
    value: float | str
    score: Task
    compare: Task | None = None
    paper: Mapping[str, float | str] = field(default_factory=dict)
    images: tuple[Task, ...] = ()
    details: Task | None = None


@dataclass(frozen=True)
class Study:
    """A named list of lines, and what a reader must know of them.

    Attributes
    ----------
    base, base_hash : str
        The base that the images are drawn with.
    rows : tuple of Row
    tasks : tuple of Task
        The results that the report needs, without what they are made from.
    about : str
        Sentences above the report's table: what was compared, n, what p tests, caveats.
    floor : Task or None
        Scores of real against real images.
    head : (str, str)
        Heads of the first two columns.
    """

    name: str
    preset: str
    base: str
    base_hash: str
    rows: tuple[Row, ...]
    tasks: tuple[Task, ...]
    about: str
    floor: Task | None = None
    head: tuple[str, str] = ("setting", "value")


def make_phantom_cases(kind: str, label: str, split: str, n: int, size: int) -> Task:
    """Return the task of `n` phantoms of a class."""
    settings = {
        "source": "phantoms", "kind": kind, "label": label, "split": split, "seed": 0, "n": n,
        "size": size,
    }  # fmt: skip
    return Task("images", settings)


def make_cases(s: StudySettings, sources: Mapping[str, Path], role: str, n: int, size: int) -> Task:
    """Return the task of real images for a role: ``train``, ``reference`` or ``floor``."""
    if s.phantom is not None and not sources:
        split = {"train": "train", "reference": "test", "floor": "val"}[role]
        return make_phantom_cases(*s.phantom, split, n, size)
    found = {"source": role, "hash": hash_tensors({"images": read_source(sources, role, size)})}
    return Task("images", found | {"n": n, "size": size})


def make_embedding(s: StudySettings, base_hash: str, train: Task, vectors: int, cases: int) -> Task:
    """Return the task that trains the word of a row."""
    inversion = InversionSettings.preset(
        s.inversion, **(dict(s.overrides) | {"n_vectors": vectors})
    )
    settings = {
        "base": s.base, "base_hash": base_hash, "token": "<class>", "cases": cases,
        "inversion": asdict(inversion),
    }  # fmt: skip
    return Task("embedding", settings, (train,))


def make_blocks(
    s: StudySettings, base_hash: str, words: tuple[Task, ...], prompt: str, *, n: int,
    steps: int, cfg_scale: float, seed: int = 0, tokens: Sequence[str] = (),
) -> tuple[Task, ...]:  # fmt: skip
    """Return the tasks of `n` images in blocks of 16, the last one filled up.

    All words are learned as ``<class>``; `tokens` renames them for a prompt of several.
    """
    settings: dict[str, Any] = {
        "base": s.base, "base_hash": base_hash, "prompt": prompt, "steps": steps,
        "cfg_scale": float(cfg_scale), "size": s.size, "seed": seed,
    }  # fmt: skip
    if tokens:
        settings["tokens"] = list(tokens)
    blocks = range(-(-n // BLOCK))
    return tuple(Task("block", settings | {"block": i}, words) for i in blocks)


def make_fd(made: tuple[Task, ...], real: Task, n: int, extractors: tuple[str, ...]) -> Task:
    """Return the task of the Fréchet distances of `n` images from as many real ones."""
    settings = {"sets": [[len(made), n], [1, n]], "extractors": list(extractors)}
    return Task("score", settings, (*made, real))


def describe_images(base: str, phantoms: bool) -> str:
    """Return what the images are, as every report says it."""
    kind = "on the tiny base" if base == "tiny" else f"on base {base}"
    return (
        f"Synthetic images {kind}, {'phantoms' if phantoms else 'the images given'} as real ones."
    )


def make_table1(
    name: str, preset: str, s: StudySettings, base_hash: str, sources: Mapping[str, Path]
) -> Study:
    """Table 1: steps, guidance, vectors and cases, one at a time from the final configuration."""
    train = make_cases(s, sources, "train", s.cases, s.size)
    real = make_cases(s, sources, "reference", s.n, s.size)
    final = {
        "sampling steps": s.steps, "CFG scale": s.cfg_scale, "vectors": s.vectors,
        "cases": s.cases,
    }  # fmt: skip

    def images(chosen: Mapping[str, float]) -> tuple[Task, ...]:
        vectors, cases = int(chosen["vectors"]), int(chosen["cases"])
        word = make_embedding(s, base_hash, train, vectors, cases)
        return make_blocks(
            s, base_hash, (word,), "<class>", n=s.n, steps=int(chosen["sampling steps"]),
            cfg_scale=chosen["CFG scale"],
        )  # fmt: skip

    best = images(final)
    rows = []
    for group, values in s.grid.items():
        for value in values:
            made = images(final | {group: value})
            compare = None
            if value != final[group]:
                sets = [[len(made), s.n], [len(best), s.n], [1, s.n]]
                settings = {
                    "sets": sets, "extractor": s.extractors[0], "paired": True, "repeats": 1000
                }  # fmt: skip
                compare = Task("compare", settings, (*made, *best, real))
            paper = dict(zip(("FID", "MFID"), TABLE1.get((group, int(value)), ())))
            score = make_fd(made, real, s.n, s.extractors)
            rows.append(Row(group, value, score, compare, paper, made))
    floor = None
    if (s.phantom and not sources) or "floor" in sources:
        floor = make_fd((make_cases(s, sources, "floor", s.n, s.size),), real, s.n, s.extractors)
    wanted = [floor, *(task for row in rows for task in (row.images[0], row.score, row.compare))]
    about = (
        f"{describe_images(s.base, s.phantom is not None and not sources)} One setting at a time is "
        f"changed from {s.steps} sampling steps, CFG {s.cfg_scale:g}, {s.vectors} vectors and "
        f"{s.cases} cases; n = {s.n} generated against {s.n} real. p: permutation test of the first "
        "distance against the unchanged configuration, images paired by seed. The paper's FID and "
        "MFID have other features, images and n: compare directions, not values."
    )
    return Study(
        name, preset, s.base, base_hash, tuple(rows), tuple(task for task in wanted if task), about,
        floor,
    )  # fmt: skip


def make_figure5(
    name: str, preset: str, s: StudySettings, base_hash: str, sources: Mapping[str, Path]
) -> Study:
    """Figure 5: the same seeds on every line of Table 1, without the scores."""
    study = make_table1(name, preset, s, base_hash, sources)
    real = study.rows[0].score.inputs[-1]
    return replace(study, tasks=(real, *(row.images[0] for row in study.rows)))
