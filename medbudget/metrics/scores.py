"""`Score`: a number that is never bare, and tables of scores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from medbudget.files import write_text

if TYPE_CHECKING:
    import pandas as pd


FEW = 30  # images; below, a score says in its own line on how few it rests
HALVED = "n is half of the"  # real images, where a remark says why n is small
FLOOR = ", real vs real"  # ends the name of a distance between two real sets


def format_number(value: float) -> str:
    """Four significant digits, and at most one decimal from 100 on."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


@dataclass(frozen=True)
class Score:
    """A measured number with what is needed to compare it with another one.

    Examples
    --------
    >>> print(Score("AUC", 0.803, (0.75, 0.85), 200, note="bootstrap over cases"))
    AUC 0.803 [0.75, 0.85], n = 200; bootstrap over cases
    """

    name: str  # as printed, e.g. "FD (EfficientNet-Lite0)"
    value: float
    interval: tuple[float, float] | None  # 95 % unless the note says otherwise
    n: int | tuple[int, int]  # images in each set, or (real, synthetic) where they differ
    extractor: str = ""  # this and the next two: see medbudget.metrics.Extractor
    extractor_hash: str = ""
    resize: str = ""
    normalisation: str = "none"  # or "paper"
    note: str = ""  # how the interval was made, and caveats, with "; " between them
    remark: str = ""  # what must be read with the number: few images, training images

    @property
    def smallest(self) -> int:
        """Return the number of images in the smaller set."""
        return self.n if isinstance(self.n, int) else min(self.n)

    @property
    def sizes(self) -> str:
        """Return n in words: "100", or "5 vs 7"."""
        return str(self.n) if isinstance(self.n, int) else f"{self.n[0]} vs {self.n[1]}"

    @property
    def features(self) -> str:
        """Return extractor and hash."""
        return f"{self.extractor} {self.extractor_hash}".strip()

    def __str__(self) -> str:
        head = f"{self.name} {format_number(self.value)}"
        if self.interval is not None:
            head += f" [{', '.join(map(format_number, self.interval))}]"
        features = f"{self.features}, {self.resize}" if self.extractor else ""
        rule = f"normalisation: {self.normalisation}" if self.normalisation != "none" else ""
        parts = (f"{head}, n = {self.sizes}", self.remark, features, rule, self.note)
        return "; ".join(filter(None, parts))

    def remarked(self, remark: str, *, last: bool = False) -> Score:
        """Return the score with a remark before its own, or after it."""
        remarks = (self.remark, remark) if last else (remark, self.remark)
        return replace(self, remark="; ".join(filter(None, remarks)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields


def to_table(scores: Sequence[Score]) -> pd.DataFrame:
    """Return one row per score: value, interval, n, extractor, resize, normalisation, remark, note."""
    import pandas as pd

    columns = ["score", "value", "low", "high", "n", "extractor", "resize", "normalisation",
               "remark", "note"]  # fmt: skip
    rows = [
        (s.name, s.value, *(s.interval or (float("nan"),) * 2),
         s.n if isinstance(s.n, int) else s.sizes, s.features, s.resize, s.normalisation,
         s.remark, s.note)
        for s in scores
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def format_table(scores: Sequence[Score], *, notes: bool = True) -> str:
    """Return the scores as text: a table of values, below it the extractors and numbered notes."""
    numbers: dict[str, int] = {}
    rows = [["score", "value", "95 % interval", "n", "remark", "notes"]]
    for score in scores:
        interval = " to ".join(map(format_number, score.interval)) if score.interval else ""
        marks = [numbers.setdefault(p, len(numbers) + 1) for p in score.note.split("; ") if p]
        rows.append([score.name, format_number(score.value), interval, score.sizes, score.remark,
                     ", ".join(map(str, marks))])  # fmt: skip
    if not any(score.remark for score in scores):
        rows = [row[:4] + row[5:] for row in rows]
    if not notes:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [f"{text:<{width}}" for text, width in zip(row, widths)]
        cells[1] = f"{row[1]:>{widths[1]}}"
        lines.append("  ".join(cells).rstrip())
    extractors = [
        ", ".join(filter(None, (s.features, s.resize, f"normalisation {s.normalisation}")))
        for s in scores
        if s.extractor
    ]
    lines += [f"features: {about}" for about in dict.fromkeys(extractors)]
    if notes:
        lines += [f"{number}: {part}" for part, number in numbers.items()]
    return "\n".join(lines)


def to_json(scores: Sequence[Score], path: str | os.PathLike[str] | None = None) -> str:
    """Return the scores as a JSON list, and write it to `path` (atomically) if one is given."""
    text = json.dumps([score.to_dict() for score in scores], indent=1, ensure_ascii=False) + "\n"
    if path is not None:
        write_text(path, text)
    return text
