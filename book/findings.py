"""Put measured numbers into the book's sentences: ``{{ name }}`` in a page, replaced by the build.

Each number is read from a recorded result, or computed from the paper's by the library, so that no
sentence can go stale; a verdict is a word chosen by the test that it reports. A chapter is also read
without a build, so its marks hold their number: ``<!-- name -->.66<!-- / -->``.
``python book/findings.py`` prints all names with their values; ``--write`` brings the chapters up
to date, also where ``{{ name }}`` was written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

if (BOOK := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.insert(0, BOOK)
from abilities import mixing, painting, table1
from budget_findings import budget
from evidence import paper_numbers, privacy, stylegan3, table2, xrays
from methods import autoencoder, coverage, distances, words
from practice import machines, preparation, tiny
from wording import FOLDERS, ROOT

MARK = re.compile(r"\{\{ ([\w.]+) \}\}|<!-- ([\w.]+) -->(?:(?!<!--).)*<!-- / -->")


def read_numbers(folders: Iterable[Path] = FOLDERS) -> dict[str, str]:
    """Return every number that a page may name, as the text that stands in its place."""
    folders = tuple(folders)
    numbers = paper_numbers()
    for part in (
        autoencoder, words, distances, coverage, table1, table2, xrays, privacy, tiny, stylegan3,
        mixing, painting, preparation, machines, budget,
    ):  # fmt: skip
        numbers |= part(folders)
    return numbers


def find_names(text: str) -> set[str]:
    """Return the names of all numbers that a page names."""
    return {match[1] or match[2] for match in MARK.finditer(text)}


def fill_numbers(text: str, numbers: Mapping[str, str], page: str, *, keep: bool = False) -> str:
    """Replace every mark of a page by its number, within the mark if the mark should be kept.

    Raises
    ------
    ValueError
        The page names a number that no recorded result gives.
    """
    if unknown := sorted(find_names(text) - set(numbers)):
        raise ValueError(
            f"{page} names {', '.join(unknown)}, which book/findings.py does not read; "
            f"it has: {', '.join(numbers)}"
        )

    def fill(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        value = numbers[name]
        if page.endswith(".ipynb"):  # stands within a string of JSON
            value = json.dumps(value, ensure_ascii=False)[1:-1]
        return f"<!-- {name} -->{value}<!-- / -->" if keep else value

    return MARK.sub(fill, text)


if __name__ == "__main__":
    found = read_numbers()
    if "--write" in sys.argv:
        for chapter in sorted((ROOT / "notebooks").glob("*.ipynb")):
            content = chapter.read_text(encoding="utf-8")
            filled = fill_numbers(content, found, chapter.name, keep=True)
            if filled != content:
                chapter.write_text(filled, encoding="utf-8")
                print(f"brought up to date: {chapter.name}")
    else:
        for key, value in found.items():
            print(f"{key:<24}{value}")
