"""`Score`: a number that is never bare; tables of scores, and a verdict in words on them."""

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
FAR = 2.0  # times the floor
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
        if self.interval:
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


def judge(scores: Sequence[Score]) -> str:
    """Return what the scores of `evaluate` say, in words: how near, how copied, how sure.

    The distance is near its floor where the two intervals overlap, far at twice the floor or more.

    Examples
    --------
    >>> fd, floor = ((f"FD (X){end}", value) for end, value in (("", 171.0), (FLOOR, 77.0)))
    >>> print(judge([Score(name, v, (v - 9, v + 9), 100, "X") for name, v in (fd, floor)]))
    far from the real images: FD (X) is 2.2 times its floor; copies: not checked (name the training images)
    """
    by_name = {score.name: score for score in scores}
    floor = next((score for score in scores if score.name.endswith(FLOOR)), None)
    parts = ["no floor, so no verdict on the distance"]
    if floor is not None:
        parts = [_judge_distance(by_name[floor.name.removesuffix(FLOOR)], floor)]
    few = ("only ", "rests on ", HALVED)
    remarks = scores[0].remark.split("; ") if scores else []
    if leaks := [remark for remark in remarks if remark and not remark.startswith(few)]:
        parts.insert(0, f"no test of the generator: {'; '.join(leaks)}")
    copied = next((s for s in scores if s.name.startswith("Copied share")), None)
    return "; ".join([*parts, _judge_copies(copied)])


def _judge_distance(score: Score, floor: Score) -> str:
    n = score.smallest
    times = score.value / floor.value if floor.value > 0 else float("inf")
    what = f"{times:.1f} times its floor" if floor.value > 0 else f"{score.value:.4g}, its floor 0"
    what = f"{score.name} is {what}"
    assert score.interval and floor.interval
    if score.interval[0] > floor.interval[1]:
        word = "far from the real images" if times >= FAR else "above the floor"
        return f"{word}: {what}" + f" (rough: only {n} images)" * (n < FEW)
    if n < FEW:
        return f"cannot be told: only {n} images; {what}"
    return f"near the floor: at n = {n} the distance does not tell them from real images ({what})"


def _judge_copies(copied: Score | None) -> str:
    if copied is None:
        return "copies: not checked (name the training images)"
    n = copied.smallest
    found = round(copied.value * n)
    if "rests on" in copied.remark:
        return f"copies: {found} of {n} flagged, but this {copied.remark}"
    if copied.interval and copied.interval[0] > 0.01:
        return f"copies: {found} of {n} are nearer to training images than chance explains"
    return f"copies: none beyond chance ({found} of {n} flagged)"


def summarize(scores: Sequence[Score]) -> str:
    """Return the verdict and the five numbers that matter most, each with its remark.

    Differences to another set come on top.
    """
    first = scores[0].name
    wanted = [first, first + FLOOR, "Precision", "Recall", "Copied share (pixels)"]
    if not any(score.name == wanted[-1] for score in scores):
        wanted.append("Layout distance")
    shown: dict[str, Score] = {}
    for score in scores:
        if score.name in wanted or ", difference to" in score.name:
            shown.setdefault(score.name, score)
    return f"verdict: {judge(scores)}\n{format_table(list(shown.values()), notes=False)}"
