"""`Score`: a number that is never bare, and tables of scores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from medbudget.files import write_text

if TYPE_CHECKING:
    import pandas as pd


FEW = 30  # images; below, a score says in its own line on how few it rests
FLOOR = ", real vs real"  # ends the name of a distance between two real sets


def format_number(value: float) -> str:
    """Four significant digits, and at most one decimal from 100 on."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


@dataclass(frozen=True)
class Score:
    """A measured number with what is needed to compare it with another one.

    Attributes
    ----------
    name : str
        As printed, e.g. "FD (EfficientNet-Lite0)".
    value : float
    interval : (float, float) or None
        95 % unless the note says otherwise; `None` where no interval is defined.
    n : int or (int, int)
        Images in each set, or (real, synthetic) where they differ.
    extractor, extractor_hash, resize : str
        See `medbudget.metrics.Extractor`.
    normalisation : str
        "none" or "paper".
    note : str
        How the interval was made, and caveats.
    remark : str
        What must be read with the number and stands in its own line: few images, training images.

    Examples
    --------
    >>> print(Score("AUC", 0.803, (0.75, 0.85), 200, note="bootstrap over cases"))
    AUC 0.803 [0.75, 0.85], n = 200; bootstrap over cases
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int | tuple[int, int]
    extractor: str = ""
    extractor_hash: str = ""
    resize: str = ""
    normalisation: str = "none"
    note: str = ""
    remark: str = ""

    def __str__(self) -> str:
        parts = [f"{self.name} {format_number(self.value)}"]
        if self.interval is not None:
            parts[0] += f" [{', '.join(map(format_number, self.interval))}]"
        parts.append(
            f"n = {self.n}" if isinstance(self.n, int) else f"n = {self.n[0]} vs {self.n[1]}"
        )
        if self.remark:
            parts.append(self.remark)
        if self.extractor:
            parts.append(f"{self.extractor} {self.extractor_hash}, {self.resize}")
        if self.normalisation != "none":
            parts.append(f"normalisation: {self.normalisation}")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts[:2]) + "".join(f"; {part}" for part in parts[2:])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        fields = asdict(self)
        for key in ("interval", "n"):
            if isinstance(fields[key], tuple):
                fields[key] = list(fields[key])
        return fields


def to_table(scores: Sequence[Score]) -> pd.DataFrame:
    """Return one row per score: value, interval, n, extractor, resize, normalisation, remark, note."""
    import pandas as pd

    rows = []
    for score in scores:
        low, high = score.interval or (float("nan"), float("nan"))
        rows.append(
            {
                "score": score.name,
                "value": score.value,
                "low": low,
                "high": high,
                "n": score.n if isinstance(score.n, int) else f"{score.n[0]} vs {score.n[1]}",
                "extractor": f"{score.extractor} {score.extractor_hash}".strip(),
                "resize": score.resize,
                "normalisation": score.normalisation,
                "remark": score.remark,
                "note": score.note,
            }
        )
    columns = list(rows[0]) if rows else ["score", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def format_table(scores: Sequence[Score], *, notes: bool = True) -> str:
    """Return the scores as text: a table of values, below it the extractors and numbered notes."""
    numbers: dict[str, int] = {}
    extractors: dict[str, None] = {}
    rows = [["score", "value", "95 % interval", "n", "remark", "notes"]]
    for score in scores:
        interval = " to ".join(map(format_number, score.interval)) if score.interval else ""
        n = str(score.n) if isinstance(score.n, int) else f"{score.n[0]} vs {score.n[1]}"
        parts = [numbers.setdefault(p, len(numbers) + 1) for p in score.note.split("; ") if p]
        marks = ", ".join(map(str, parts))
        rows.append([score.name, format_number(score.value), interval, n, score.remark, marks])
        if score.extractor:
            about = (f"{score.extractor} {score.extractor_hash}".strip(), score.resize)
            normalised = f"normalisation {score.normalisation}"
            extractors[", ".join((*filter(None, about), normalised))] = None
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
    lines += [f"features: {about}" for about in extractors]
    if notes:
        lines += [f"{number}: {part}" for part, number in numbers.items()]
    return "\n".join(lines)


def to_json(scores: Sequence[Score], path: str | os.PathLike[str] | None = None) -> str:
    """Return the scores as a JSON list, and write it to `path` (atomically) if one is given."""
    text = json.dumps([score.to_dict() for score in scores], indent=1, ensure_ascii=False) + "\n"
    if path is not None:
        write_text(path, text)
    return text
