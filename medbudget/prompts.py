"""Prompts of several weighted parts: ``"<healthy>:0.25 AND <cardiomegaly>:0.75"``. Pure text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

TOKEN = re.compile(r"<[^<>\s/\\]+>")  # the one grammar of a token
_AND = re.compile(r"\bAND\b")  # A1111's: `<a>AND<b>` has two parts, `sAND` has one
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PART = re.compile(rf"\s*()(?:({_NUMBER})\s*\*)?(.*?)(?::\s*(.*?))?\s*", re.DOTALL)
_MISPLACED = re.compile(
    rf"{_NUMBER}%?\s*{TOKEN.pattern}|.*{TOKEN.pattern}\s*[*=x]?\s*{_NUMBER}%?$", re.DOTALL
)  # weights as no notation has them: `0.5 <a>`, `<a> 50%`
_LEADING = re.compile(rf"{_NUMBER}%?\s")  # in a prompt of several parts: `0.5 red AND 0.5 blue`
_ESCAPED = re.compile(r"\\([()\[\]:<>\\])")
_SIGN = re.compile(r"[()\[\]<>]")


class PromptError(ValueError):
    """A prompt that cannot be read; the message marks the place."""


def _fail(text: str, place: int, problem: str) -> PromptError:
    line = re.sub(r"\s", " ", text)
    return PromptError(f"{problem}\n  {line}\n  {' ' * place}^")


def _hide(text: str) -> str:
    """Return `text`, of equal length, without the signs of tokens and escapes."""
    return re.sub(f"{TOKEN.pattern}|{_ESCAPED.pattern}", lambda m: "\0" * len(m[0]), text)


def parse_prompt(text: str, *, tokens: Iterable[str] | None = None) -> list[tuple[str, float]]:
    r"""Split a prompt on the word ``AND`` into (text, weight).

    A1111's grammar: upper-case ``AND`` as a word of its own, ``text:weight`` with weight 1 by
    default, negative weights allowed. The paper's notation ``0.25*<healthy>`` is read too. Spaces
    around a part, ``:`` and ``*`` are dropped; case is kept. An empty prompt is one empty part (the
    unconditional text).

    One rule for other signs: a colon stands before a weight, brackets ``( )`` and ``[ ]`` (A1111's
    emphasis, which this sampler does not have) and single ``<`` or ``>`` are errors, and a
    backslash makes plain text of each: ``\(``, ``\:``, ``\<``.

    Tokens that are not among `tokens`, if these are given, are errors too. PromptError says what to
    write, and a caret marks the place.

    Examples
    --------
    >>> parse_prompt("<healthy>:0.25 AND <cardiomegaly>:0.75")
    [('<healthy>', 0.25), ('<cardiomegaly>', 0.75)]
    >>> parse_prompt("a photo")
    [('a photo', 1.0)]
    """
    if not text.strip():
        return [("", 1.0)]
    known = None if tokens is None else sorted(tokens)
    for match in TOKEN.finditer(text):
        if known is not None and match[0] not in known:
            problem = (
                f"unknown token {match[0]} in the prompt; loaded are: {', '.join(known) or 'none'}. "
                "Load its file with --embeddings FILE (Python: embeddings=[Embedding.load(…)])"
            )
            raise _fail(text, match.start(), problem)
    hidden = _hide(text)
    borders = [0, *(x for match in _AND.finditer(hidden) for x in match.span()), len(text)]
    parts = []
    for start, end in zip(borders[::2], borders[1::2]):
        if not text[start:end].strip():
            near = max(0, start - 3) if start == len(text) or start else end
            raise _fail(text, near, "nothing stands on one side of AND; write e.g. `a AND b:0.5`")
        parts.append(_parse_part(text, hidden, start, end))
    return parts


def plain_text(text: str) -> str:
    """Return a prompt without parts and weights, such as a negative one, as the base reads it."""
    hidden = _hide(text)
    if match := re.search(rf"{_AND.pattern}|:(?=\s*{_NUMBER}\s*$)", hidden):
        problem = "a negative prompt has no parts and weights: leave AND and :weight out"
        raise _fail(text, match.start(), problem)
    _check_signs(text, hidden, 0, len(text))
    return _ESCAPED.sub(r"\1", text)


def _parse_part(text: str, hidden: str, start: int, end: int) -> tuple[str, float]:
    """Read one part, ``text[start:end]``."""
    match = _PART.fullmatch(hidden, start, end)
    assert match is not None  # it matches any text
    start, before, after = match.start(1), match[2], match[4]
    _check_signs(text, hidden, start, end)
    words = text[slice(*match.span(3))].strip()
    if before and after is not None:
        raise _fail(text, match.start(4), f"{text[start:end].strip()} has two weights; keep one")
    number = before or "1" if after is None else after
    if not re.fullmatch(_NUMBER, number) or not math.isfinite(float(number)):
        problem = f"a weight must be a finite number such as 0.5, found {number!r} after ':'"
        place = start if after is None else match.start(4)
        raise _fail(text, place, f"{problem}; a colon in the text is written \\:")
    if not words:
        raise _fail(text, start, f"the weight {number} has no text beside it")
    if before is None and after is None:
        wrong = _MISPLACED.match(words) or (_AND.search(hidden) and _LEADING.match(words))
        if wrong:
            raise _fail(text, start, "a weight stands behind its part: write e.g. <a>:0.5")
    return _ESCAPED.sub(r"\1", words), float(number)


def _check_signs(text: str, hidden: str, start: int, end: int) -> None:
    if sign := _SIGN.search(hidden, start, end):
        problem = (
            "brackets are emphasis in A1111, which this sampler does not have; weigh whole parts "
            "with AND, e.g. `a:1.3 AND b`"
        )
        if sign[0] in "<>":
            problem = "a token is written <name>, without spaces and slashes"
        raise _fail(text, sign.start(), f"{problem}. For the sign itself write \\{sign[0]}")


def unused_tokens(tokens: Iterable[str], *prompts: str) -> list[str]:
    """Say of each token that no prompt uses what to write, with a caret under its bare name."""
    written = {token for prompt in prompts for token in TOKEN.findall(prompt)}
    notes = []
    for token in sorted(set(tokens) - written):
        note = f"the prompt does not use {token}, which is loaded"
        if bare := re.search(rf"\b{re.escape(token[1:-1])}\b", prompts[0], re.IGNORECASE):
            note = str(_fail(prompts[0], bare.start(), f"{note}: write it with its brackets"))
        notes.append(note)
    return notes
