"""Tell whether a class name is a patient's identity: compare it with the tags of DICOM files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medbudget.data.decoding import get_text, quiet

NUMBERS = ("PatientID", "OtherPatientIDs")
NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName")
UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae"})


@dataclass(frozen=True)
class Person:
    """What tags, a table or a path say of who a patient is."""

    numbers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@quiet
def read_person(path: Path) -> Person:
    """Read who the patient of a DICOM file is."""
    import pydicom

    tags = ["SpecificCharacterSet", *NUMBERS, *NAMES]
    data = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
    names = [form for name in NAMES for form in get_text(data, name).split("=")]
    return Person(tuple(get_text(data, name) for name in NUMBERS), tuple(names))


def is_identity(label: str, people: Sequence[Person]) -> bool:
    """Tell whether a class name is a number or a name of one of its patients, or has one in it.

    Letter case, accents, punctuation, the order of names and leading zeros make no difference. A
    text that all of three or more patients carry is no identity.
    """
    words = _split(label)
    whole = "".join(words).lstrip("0")
    carried = [
        {"".join(_split(text)) for text in (*one.numbers, *one.names)}
        | {word for text in one.names for word in _split(text)}
        for one in people
    ]
    shared = set.intersection(*carried) if len(carried) >= 3 else set()
    for person in people:
        for text in (*person.numbers, *person.names):
            joined = "".join(_split(text))
            same = joined.lstrip("0") == whole and len(joined) > 1
            holds = text in person.numbers and _holds_number(words, _split(text))
            if joined not in shared and (same or holds):
                return True
        for text in person.names:
            for word in {*_split(text), *_split(text.casefold().translate(UMLAUTS))} - shared:
                if word in words and len(word) >= (3 if word.isascii() else 2) and word.isalpha():
                    return True
    return False


def _holds_number(words: list[str], own: list[str]) -> bool:
    """Tell whether a class name, in words, has a patient's number in it."""
    joined = "".join(own)
    if not any(c.isdigit() for c in joined) or len(joined) < 3:
        return False
    if len(joined) >= 6 and joined in "".join(words):
        return True
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    long = {word.lstrip("0") for word in own if word.isdigit() and len(word) >= 4}
    return joined in runs or bool(long & {word.lstrip("0") for word in words} - {""})


def _split(text: str) -> list[str]:
    """Split into folded words without accents; digits are words of their own."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W\d_]+|\d+", "".join(c for c in plain if not unicodedata.combining(c)))
