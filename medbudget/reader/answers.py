"""The answers of one reader: a file of JSON lines, each on the disk before the next pair shows."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from medbudget.files import write_text

SIDES = ("left", "right")
CHOICES = (*SIDES, "none")  # none: no preference


class ReaderError(ValueError):
    """A study, key or file of answers that cannot be used; the message says why and what to do."""


class Reading:
    """The answers of one reader to one study, in ``answers/NAME.jsonl`` of its folder.

    Lines are only ever added, and carry the study's id; the name is a pseudonym.
    """

    def __init__(self, folder: Path, study: str, n_pairs: int, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name):
            raise ReaderError(
                f"reader {name!r}: allowed are lower-case letters, digits, - and _, at most 40"
            )
        self.study, self.n_pairs, self.name = study, n_pairs, name
        self.path = folder / "answers" / f"{name}.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Return every line: answers, and what was undone on the page."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        try:
            records = [json.loads(line) for line in text.split("\n") if line]
        except ValueError as error:
            raise ReaderError(f"{self.path} is not JSON ({error}): restore it") from None
        self._fold(records, str(self.path))
        return records

    def answers(self) -> list[dict[str, Any]]:
        """Return the answers that stand, those to pair 0, 1, …"""
        return self._fold(self.records(), str(self.path))

    def next(self) -> int | None:
        """Return the pair to ask now, or None if all are answered."""
        done = len(self.answers())
        return done if done < self.n_pairs else None

    def answer(self, pair: int, choice: str, *, seconds: float, note: str = "") -> None:
        """Write down an answer to the `next` pair; when this returns, it is on the disk.

        `choice` is left, right or none; `seconds` go from showing the pair to the answer.
        """
        if choice not in CHOICES:
            raise ReaderError(f"choice {choice!r}: allowed are {', '.join(CHOICES)}")
        with self._locked():
            if (due := self.next()) != pair:
                raise ReaderError(f"pair {pair} is not the next one ({due}): show that again")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"study": self.study, "reader": self.name, "pair": pair, "choice": choice,
                      "seconds": round(seconds, 2), "note": note, "time": now}  # fmt: skip
            self._write([*self.records(), record])

    def merge(self, records: Any, source: str) -> None:
        """Add the records that an exported page wrote; those that are here already are left out."""
        self._fold(records, source)
        with self._locked():
            own = self.records()
            common = min(len(own), len(records))
            if own[:common] != records[:common]:
                raise ReaderError(
                    f"{source} and {self.path} differ: are these two readers? Rename one of them"
                )
            self._write([*own, *records[len(own) :]])

    def _locked(self) -> FileLock:
        """Make other processes wait that answer for this reader."""
        self.path.parent.mkdir(exist_ok=True)
        return FileLock(self.path.with_name(f".{self.name}.lock"))

    def _write(self, records: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def _fold(self, records: Any, source: str) -> list[dict[str, Any]]:
        """Return the answers that stand after all undoing, or refuse records that make no sense."""
        answers: list[dict[str, Any]] = []
        for number, record in enumerate(records, 1):
            try:
                study, pair, choice = (record[k] for k in ("study", "pair", "choice"))
                if choice != "undo":
                    float(record["seconds"]), str(record["note"])
                own = record["reader"] == self.name
            except (KeyError, TypeError, ValueError):
                raise ReaderError(
                    f"{source}, record {number} is no answer: {record!r:.80}"
                ) from None
            if study != self.study:
                raise ReaderError(f"{source} answers study {study}; this one is {self.study}")
            if choice == "undo" and own and answers and pair == len(answers) - 1:
                answers.pop()
            elif choice in CHOICES and own and pair == len(answers) < self.n_pairs:
                answers.append(record)
            else:
                raise ReaderError(
                    f"{source}, record {number} does not follow the ones before: {record!r:.80}"
                )
        return answers
