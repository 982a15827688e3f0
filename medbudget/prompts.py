"""Prompts of several weighted parts: ``"<healthy>:0.25 AND <cardiomegaly>:0.75"``. Pure text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

TOKEN = re.compile(r"<[^<>\s/\\]+>")  # the one grammar of a token
_AND = re.compile(r"\bAND\b")  # A1111's: `<a>AND<b>` has two parts, `sAND` has one
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BEFORE = re.compile(rf"({_NUMBER})\s*\*\s*", re.DOTALL)
_ESCAPED = re.compile(r"\\([()\[\]:<>\\])")
_SIGN = re.compile(r"[()\[\]<>]")
_HIDDEN = "\0"  # stands for every sign of a token or an escape where borders are looked for


class PromptError(ValueError):
    """A prompt that cannot be read; the message marks the place."""


def _fail(text: str, place: int, problem: str) -> PromptError:
    line = re.sub(r"\s", " ", text)
    return PromptError(f"{problem}\n  {line}\n  {' ' * place}^")


def _hide(text: str) -> str:
    """Return `text`, of equal length, without the signs of tokens and escapes."""
    pattern = re.compile(f"{TOKEN.pattern}|{_ESCAPED.pattern}")
    return pattern.sub(lambda match: _HIDDEN * len(match[0]), text)


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
    if tokens is not None:
        _check_tokens(text, sorted(tokens))
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
    start += len(text[start:end]) - len(text[start:end].lstrip())
    end = start + len(text[start:end].rstrip())
    colon = hidden.find(":", start, end)
    _check_signs(text, hidden, start, end)
    before = _BEFORE.match(hidden, start, end)
    number, where, first, last = "1", start, start, end
    if colon >= 0:
        last = colon
        number, where = text[colon + 1 : end].strip(), colon + 1
        where += len(text[where:end]) - len(text[where:end].lstrip())
        if before and before.end() <= colon:
            raise _fail(text, where, f"{text[start:end]} has two weights; keep one of them")
    elif before:
        number, first = before[1], before.end()
    if not re.fullmatch(_NUMBER, number) or not math.isfinite(float(number)):
        got = repr(number) if number else "nothing"
        problem = f"a weight must be a finite number such as 0.5, found {got} after ':'"
        raise _fail(text, where, f"{problem}; a colon in the text is written \\:")
    words = text[first:last].strip()
    if not words:
        raise _fail(text, start, f"the weight {number} has no text beside it")
    if colon < 0 and not before:
        _check_spelling(text, start, end)
    return _ESCAPED.sub(r"\1", words) if "\\" in words else words, float(number)


def _check_spelling(text: str, start: int, end: int) -> None:
    """Refuse weights that are written as no notation has it, such as ``0.5 <a>``."""
    several = _AND.search(_hide(text)) is not None
    piece, token = text[start:end], TOKEN.pattern
    first = re.match(rf"({_NUMBER})%?\s*({token}.*|(?<=\s)\S.*)$", piece, re.DOTALL)
    last = re.match(rf"(.*{token})\s*[*=x]?\s*({_NUMBER})%?$", piece, re.DOTALL)
    if first and (several or TOKEN.match(first[2])):
        words, number, where = first[2], first[1], start
    elif last:
        words, number, where = last[1], last[2], start + last.start(2)
    else:
        return
    share = f"{float(number) / 100:g}" if piece.rstrip().endswith("%") or "%" in piece else number
    raise _fail(text, where, f"a weight stands behind its part: write {words.strip()}:{share}")


def _check_signs(text: str, hidden: str, start: int, end: int) -> None:
    if sign := _SIGN.search(hidden, start, end):
        problem = (
            "brackets are emphasis in A1111, which this sampler does not have; weigh whole parts "
            "with AND, e.g. `a:1.3 AND b`"
        )
        if sign[0] in "<>":
            problem = "a token is written <name>, without spaces and slashes"
        raise _fail(text, sign.start(), f"{problem}. For the sign itself write \\{sign[0]}")


def _check_tokens(text: str, known: list[str]) -> None:
    for match in TOKEN.finditer(text):
        if match[0] not in known:
            problem = (
                f"unknown token {match[0]} in the prompt; loaded are: {', '.join(known) or 'none'}. "
                "Load its file with --embeddings FILE (Python: embeddings=[Embedding.load(…)])"
            )
            raise _fail(text, match.start(), problem)


def unused_tokens(tokens: Iterable[str], *prompts: str) -> list[str]:
    """Say of each token that no prompt uses what to write, with a caret under its bare name."""
    written = {token for prompt in prompts for token in TOKEN.findall(prompt)}
    notes = []
    for token in sorted(set(tokens) - written):
        note = f"the prompt does not use {token}, which is loaded"
        bare = re.search(rf"\b{re.escape(token[1:-1])}\b", prompts[0], re.IGNORECASE)
        if bare:
            line = re.sub(r"\s", " ", prompts[0])
            note += f": write it with its brackets\n  {line}\n  {' ' * bare.start()}^"
        notes.append(note)
    return notes
