"""What a study is: its settings, its lines, and the tasks that these need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from medbudget.settings import Settings
from medbudget.studies.tasks import Store, Task


@dataclass(frozen=True)
class StudySettings(Settings):
    """Settings of all studies; defaults are the paper's final configuration."""

    base: str = "sd2"  # see `load_base`
    inversion: str = "paper"  # preset of InversionSettings
    overrides: Mapping[str, Any] = field(default_factory=dict)  # changes to that preset
    size: int = 512  # pixels an edge
    n: int = 1000  # images generated, and as many real ones that they are compared with
    steps: int = 100  # sampling steps
    cfg_scale: float = 2.0
    vectors: int = 64
    cases: int = 100  # real images of a class in each split
    extractors: tuple[str, ...] = ("inception", "radimagenet-keras")  # NAME or NAME=WEIGHTS
    z_scored: bool = True  # also distances of images z-scored as by the paper's script (Table 1)
    phantoms: bool = False  # draw phantoms where no folders of real images are given
    # Table 1, Figure 5 and the axes
    grid: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "sampling steps": (25, 50, 75, 100), "CFG scale": (1, 2, 3, 5),
            "vectors": (8, 16, 32, 64), "cases": (5, 10, 50, 100),
        }
    )  # values tried, one setting at a time  # fmt: skip
    # Table 2
    classifier: str = "paper"  # preset of ClassifierSettings
    changes: Mapping[str, Any] = field(default_factory=dict)  # changes to that preset
    runs: int = 10  # trainings of each line
    many: int = 2000  # synthetic images of both classes together
    some: int = 0  # synthetic images of one more line; 0: no such line
    few_cases: int = 10  # cases of the words with an asterisk
    noise: Mapping[str, float] = field(default_factory=dict)  # sd on phantoms, by problem
    repeats: int = 2000  # of the bootstrap
    # Section 4.2
    stylegan3: str = "paper"  # preset of StyleGAN3Settings
    gan: Mapping[str, Any] = field(default_factory=dict)  # changes to that preset
    # Equal budgets
    methods: tuple[str, ...] = (
        "word 1", "word 8", "word 64", "LoRA 4", "LoRA 16", "LoRA 16 + word 8", "full tuning",
        "StyleGAN3",
    )  # fmt: skip
    problems: tuple[str, ...] = ("prostate", "chest", "histology")  # of phantoms
    paces: Mapping[str, float] = field(default_factory=dict)  # time for an image, by method

    LIMITS: ClassVar = {
        "size": (8, None), "n": (2, None), "steps": (1, None), "vectors": (1, 74),
        "cases": (1, None), "runs": (1, None), "few_cases": (1, None), "some": (0, None),
        "cfg_scale": (0, None), "many": (2, None), "repeats": (1, None),
    }  # fmt: skip
    PRESETS: ClassVar = {
        "tiny": {
            "base": "tiny", "inversion": "tiny", "size": 64, "n": 64, "steps": 25,
            "extractors": ("efficientnet-lite0", "layout"), "z_scored": False, "phantoms": True,
            "grid": {
                "sampling steps": (10, 25, 50, 100), "CFG scale": (1, 2, 3, 5),
                "vectors": (8, 16, 32, 64), "cases": (5, 10, 50, 100),
            },
            "classifier": "tiny", "runs": 5, "many": 400, "some": 96,
            "noise": {"histology": 224.0}, "stylegan3": "tiny",
        },
        "colab": {
            "inversion": "colab", "n": 200, "steps": 50,
            "extractors": ("inception", "efficientnet-lite0"),
            "classifier": "modern", "changes": {"steps": 1500}, "runs": 3, "many": 400, "some": 96,
        },
        "paper": {},
    }  # fmt: skip


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Return changes of settings out of texts such as ``n=20`` or ``overrides.steps=100``.

    Values are JSON, or else text; a list may be written with commas.
    """
    kinds = {f.name: str(f.type) for f in fields(StudySettings)}
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, inner = key.partition(".")
        if not equals or name not in kinds or bool(dot) != kinds[name].startswith("Mapping"):
            plain = [f"{n}.NAME" if k.startswith("Mapping") else n for n, k in kinds.items()]
            raise ValueError(f"{text!r} is not SETTING=VALUE; settings are {', '.join(plain)}")
        parsed: Any = value
        if kinds[name].startswith("tuple"):
            parsed = tuple(value.split(","))
        else:
            with suppress(ValueError):
                parsed = json.loads(f"[{value}]" if name == "grid" and value[:1] != "[" else value)
        if dot:
            changes.setdefault(name, {})[inner] = parsed
        else:
            changes[name] = parsed
    return changes


def parse_sources(texts: Sequence[str]) -> dict[str, Path]:
    """Return folders by role out of texts such as ``train=FOLDER``."""
    for text in texts:
        if "=" not in text:
            raise ValueError(
                f"--data {text!r} is not ROLE=FOLDER, such as train=FOLDER or prostate=FOLDER"
            )
    pairs = [text.split("=", 1) for text in texts]
    return {role: Path(path) for role, path in pairs}


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    group: str  # what is changed here,
    value: float | str  # and to what: the line's first two cells
    score: Task | None = None  # its result is JSON: column to `Score.to_dict`
    compare: Task | None = None  # test against another line: JSON with difference and p_value
    paper: Mapping[str, float | str] = field(default_factory=dict)  # its numbers, by column
    images: tuple[Task, ...] = ()  # generated images for the figure, from the study's first seed
    details: Task | None = None  # whatever else is recorded of the line, JSON

    @property
    def tasks(self) -> list[Task]:
        """The results that the line shows."""
        return [t for t in (*self.images[:1], self.score, self.compare, self.details) if t]


@dataclass(frozen=True)
class Study:
    """A named list of lines, and what a reader must know of them."""

    rows: tuple[Row, ...]
    about: str  # sentences above the table: what was compared, n, what p tests, caveats
    floor: Task | None = None  # scores of real against real images
    head: tuple[str, str] = ("setting", "value")  # heads of the first two columns
    extra: tuple[Task, ...] = ()  # results that are needed beside those of the lines
    name: str = ""
    preset: str = ""
    settings: StudySettings = field(default_factory=StudySettings)
    base_hash: str = ""
    sources: Mapping[str, Path] = field(default_factory=dict)  # of images and weights, by role

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The results that the report needs, without what they are made from."""
        floor = [self.floor] if self.floor else []
        return (*floor, *self.extra, *(task for row in self.rows for task in row.tasks))

    def store(self, folder: str | Path) -> Store:
        """Return the store of this study's results in `folder`."""
        return Store(Path(folder), self.sources)
