"""Read recorded results, and word their numbers and verdicts, for the book's sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "results", ROOT / "benchmarks" / "results")
LEVEL = 0.05  # of every test in the book
Key = TypeVar("Key")


def read_values(name: str, folders: Iterable[Path] = FOLDERS) -> Any:
    """Return the values of one recorded result."""
    for folder in folders:
        path = folder / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            return record.get("values", record)
    raise FileNotFoundError(f"no recorded result {name}.json in {', '.join(map(str, folders))}")


def share(value: float, digits: int = 2) -> str:
    """Write a number between -1 and 1 as the paper does, without the leading zero."""
    sign = "−" if value < 0 else ""
    text = f"{abs(value):.{digits}f}"
    return sign + (text[1:] if text.startswith("0.") else text)


def enumerate_words(words: Sequence[str]) -> str:
    """Write words as in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def p_value(value: float) -> str:
    if value > 0.99:
        return "p > .99"
    return "p < .001" if value < 0.001 else f"p = {share(value, 3 if value < 0.1 else 2)}"


def verdict(difference: float, p: float, *, above: str, below: str) -> str:
    """Return `above` or `below` where a test shows a difference, else that it shows none."""
    if p >= LEVEL:
        return f"not told apart ({p_value(p)})"
    return f"{above if difference > 0 else below} ({p_value(p)})"


def pass_holm(p_values: Mapping[Key, float]) -> list[Key]:
    """Return the tests that show something after Holm's correction, the smallest p first."""
    ordered = sorted(p_values, key=lambda key: p_values[key])
    for i, key in enumerate(ordered):
        if p_values[key] > LEVEL / (len(ordered) - i):
            return ordered[:i]
    return ordered


def badge(agrees: bool | None, text: str = "no evidence") -> str:
    """Return a verdict on the paper's claim: True agrees, False is opposite, None says `text`."""
    kind, text = {
        True: ("agrees", "agrees with the paper"),
        False: ("opposite", "opposite to the paper"),
        None: ("none", text),
    }[agrees]
    return f'<span class="verdict {kind}">{text}</span>'
