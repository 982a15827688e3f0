"""Prompts of several weighted parts: ``"<healthy>:0.25 AND <cardiomegaly>:0.75"``. Pure text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_AND = re.compile(r"(?<!\S)AND(?!\S)")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_AFTER = re.compile(r"^(.*):\s*(\S*)$", re.DOTALL)
_BEFORE = re.compile(rf"^({_NUMBER})\s*\*\s*(.*)$", re.DOTALL)
TOKEN = re.compile(r"<[^<>\s]+>")


class PromptError(ValueError):
    """A prompt that cannot be read; the message marks the place."""


def _fail(text: str, place: int, problem: str) -> PromptError:
    line = text.replace("\n", " ").replace("\t", " ")
    return PromptError(f"{problem}\n  {line}\n  {' ' * place}^")


def parse_prompt(text: str, *, tokens: Iterable[str] | None = None) -> list[tuple[str, float]]:
    """Split a prompt on the word ``AND`` into (text, weight).

    A1111's grammar: upper-case ``AND`` between spaces, ``text:weight`` with weight 1 by default,
    negative weights allowed. The paper's notation ``0.25*<healthy>`` is read too. Spaces around
    a part are dropped, also around ``:`` and ``*``; case is kept, so that ``and`` is a word like
    any other and ``<A>`` is not ``<a>``. An empty prompt is one empty part (the unconditional
    text).

    Parameters
    ----------
    tokens : iterable of str, optional
        The loaded tokens, ``<name>``; any other one in the prompt is an error.

    Raises
    ------
    PromptError
        A dangling AND, a weight that is no finite number, two weights on one part, or an unknown
        token; a caret marks the place.

    Examples
    --------
    >>> parse_prompt("<healthy>:0.25 AND <cardiomegaly>:0.75")
    [('<healthy>', 0.25), ('<cardiomegaly>', 0.75)]
    >>> parse_prompt("a photo")
    [('a photo', 1.0)]
    """
    if not text.strip():
        return [("", 1.0)]
    if tokens is not None:
        _check_tokens(text, sorted(tokens))
    borders = [0, *(x for match in _AND.finditer(text) for x in match.span()), len(text)]
    parts = []
    for start, end in zip(borders[::2], borders[1::2]):
        piece = text[start:end]
        place = start + len(piece) - len(piece.lstrip())
        piece = piece.strip()
        if not piece:
            near = max(0, start - 3) if start == len(text) or start else end
            raise _fail(text, near, "nothing stands on one side of AND; write e.g. `a AND b:0.5`")
        after, before = _AFTER.match(piece), _BEFORE.match(piece)
        if after:
            words, number, where = after[1].strip(), after[2], place + after.start(2)
        elif before:
            words, number, where = before[2].strip(), before[1], place
        else:
            words, number, where = piece, "1", place
        if not re.fullmatch(_NUMBER, number) or not math.isfinite(float(number)):
            found = f"{number!r}" if number else "nothing"
            raise _fail(
                text,
                where,
                f"a weight must be a finite number such as 0.5, found {found} after ':'",
            )
        if not words:
            raise _fail(text, place, f"the weight {number} has no text beside it")
        if after and _BEFORE.match(words):
            raise _fail(text, where, f"{piece} has two weights; keep one of them")
        parts.append((words, float(number)))
    return parts


def _check_tokens(text: str, known: list[str]) -> None:
    for match in TOKEN.finditer(text):
        if match[0] not in known:
            raise _fail(
                text,
                match.start(),
                f"unknown token {match[0]} in the prompt; loaded are: {', '.join(known) or 'none'}. "
                "Load its file with --embeddings FILE (Python: embeddings=[Embedding.load(…)])",
            )


def format_prompt(parts: list[tuple[str, float]]) -> str:
    """Write parts so that `parse_prompt` reads them back.

    >>> format_prompt([("<a>", 0.5), ("<b>", -1.0)])
    '<a>:0.5 AND <b>:-1.0'
    """
    return " AND ".join(f"{words}:{weight!r}" if words else "" for words, weight in parts)
