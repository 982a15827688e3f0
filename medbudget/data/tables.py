"""Read CSV tables as people write them, and find the files that they list."""

from __future__ import annotations

import csv
import re
import unicodedata
from pathlib import Path

BLANK = " \t\r\n\0\ufeff\xa0"
ENDING = re.compile(r"\.[a-z]\w{0,4}$")  # begins with a letter: no part of a UID


def read_table(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; cells and column names are stripped, missing cells are "".

    Columns are separated by commas, semicolons or tabs, whichever the first line has most of.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such table: {file}")
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            lines = list(csv.reader(opened, delimiter=find_separator(file)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is no CSV table in UTF-8 ({type(error).__name__}); save it as one"
        ) from None
    head, *rows = [[cell.strip(BLANK) for cell in line] for line in lines] or [[]]
    if twice := sorted({name for name in head if name and head.count(name) > 1}):
        raise ValueError(f"{file} has more than one column {', '.join(twice)}; rename them")
    for number, row in enumerate(rows, 2):
        if any(row[len(head) :]):
            raise ValueError(f"{file}: row {number} has more fields than the first line names")
    return [dict(zip(head, [*row, *[""] * (len(head) - len(row))])) for row in rows if any(row)]


def find_separator(file: Path) -> str:
    """Return comma, semicolon or tab, whichever the first line of a table has most of."""
    with open(file, encoding="utf-8-sig") as opened:
        return max(",;\t", key=opened.readline().count)


class Listing:
    """A folder in which the files of a table are looked up, as loosely as tables spell them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> tuple[str, str]:
        """Return the path of a listed file or folder, relative to the root, or "" and why not.

        Backslashes, letter case, the normal form of accents, a missing ending and the root's own
        name in front make no difference, as long as one file alone fits.
        """
        own = self.root.resolve()
        text = name.strip().replace("\\", "/").removeprefix(f"{own.as_posix()}/")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return "", "its path leads out of the folder" if text else "its row names no file"
        if not text.startswith("/") and (self.root / Path(*parts)).exists():
            return "/".join(parts), ""
        fits = self._walk(parts)
        if not fits and fold(parts[0]) == fold(own.name):
            fits = self._walk(parts[1:])
        if len(fits) == 1:
            return fits[0], ""
        if fits:
            return "", f"it fits several files: {', '.join(sorted(fits)[:3])}"
        near = self._walk([*parts[:-1], Path(parts[-1]).stem]) or self._walk(parts[-1:])
        return "", "not in the folder" + (f"; there is {sorted(near)[0]}" if near else "")

    def _walk(self, parts: list[str]) -> list[str]:
        """Return the relative paths that fit, in whatever letter case and with any ending."""
        places = [""] if parts else []
        for i, part in enumerate(parts):
            following = []
            for place in places:
                names = self._list(place).get(fold(part), [])
                exact = [name for name in names if fold(name) == fold(part)]
                fits = exact or (names if i == len(parts) - 1 else [])
                following += [f"{place}/{name}".lstrip("/") for name in fits]
            places = following
        return places

    def _list(self, folder: str) -> dict[str, list[str]]:
        """Return the names in a folder, by the spellings that mean them."""
        if folder not in self.folders:
            names = self.folders.setdefault(folder, {})
            for path in (self.root / folder).glob("[!.]*"):
                whole = fold(path.name)
                once = ENDING.sub("", whole)
                both = ENDING.sub("", once) if whole.endswith(".gz") else once
                for spelling in {whole, once, both}:
                    names.setdefault(spelling, []).append(path.name)
        return self.folders[folder]


def fold(text: str) -> str:
    """Write a name in one way, whatever the letter case and the form of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
