"""A blinded reader study: which of two images looks better? Pairs, answers, analysis.

A study is a folder that a reader may see; which image came from where stands in the key, a file
beside that folder. Answers name sides, never sources, and are only ever added: one line each,
flushed to the disk before the next pair is shown. Section 4.2 of the paper.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.stats import binom, binomtest

from medbudget.artifacts import InUseError, hold, locked, write_json, write_text
from medbudget.images import find_images, load_image, to_pil
from medbudget.metrics.scores import Score
from medbudget.progress import tqdm

QUESTION = "Which image looks more like a real one?"
SIDES = ("left", "right")
CHOICES = (*SIDES, "none")  # none: no preference
TEMPLATE = Path(__file__).with_suffix(".html")


class ReaderError(ValueError):
    """A study, key or file of answers that cannot be used; the message says why and what to do."""


# ---- the study ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReaderStudy:
    """Blinded pairs in a folder: ``study.json``, ``images/``, and ``answers/`` as they come.

    Attributes
    ----------
    folder : Path
    id : str
        Hash of everything that a reader sees.
    question : str
    pairs : tuple of (str, str)
        Files of the left and the right image, in the order in which they are asked.
    """

    folder: Path
    id: str
    question: str
    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def create(
        cls,
        a: str | os.PathLike[str],
        b: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        seed: int,
        n_pairs: int = 50,
        repeats: float = 0.1,
        question: str = QUESTION,
        labels: tuple[str, str] | None = None,
        key: str | os.PathLike[str] | None = None,
    ) -> ReaderStudy:
        """Pair images of two folders at random and write the study and its key.

        Every image is used once; on one half of the pairs `a` stands on the left. Some pairs of
        the first third come again among the last third with their sides swapped: they tell
        whether a reader agrees with himself.

        Parameters
        ----------
        a, b : path
            Folders of equally many images, all of one size.
        out : path
            The study's folder; must not exist.
        seed : int
            Chooses images, order and sides. Who knows it can work out the key: tell no reader.
        n_pairs : int
            Paper: 50.
        repeats : float
            Share of the pairs that is asked twice, up to 1/3.
        labels : (str, str), optional
            What the analysis calls the sources; default the folders' names.
        key : path, optional
            Default `out` with ``.key.json`` appended. Must lie outside `out`.

        Raises
        ------
        ReaderError
            Unequal or too small folders, different sizes, an image that is in both folders or
            twice in one, a key inside the study.
        FileExistsError
            `out`, or the key of another study, is there already.
        """
        out = Path(out)
        key = Path(key) if key is not None else out.with_name(f"{out.name}.key.json")
        if key.resolve().is_relative_to(out.resolve()):
            raise ReaderError(f"the key {key} must not lie in {out}, which readers see")
        if out.exists():
            raise FileExistsError(f"{out} exists: choose another place, or delete it")
        if not 0 <= repeats <= 1 / 3:
            raise ReaderError(f"repeats is a share of the pairs from 0 to 1/3, got {repeats}")
        files = _check_sources(Path(a), Path(b), n_pairs)
        names = labels or (Path(a).resolve().name, Path(b).resolve().name)
        if names[0] == names[1]:
            raise ReaderError(f"both sources are called {names[0]!r}: pass two labels")

        items = _draw_items(files, n_pairs, repeats, np.random.default_rng(seed))
        out.parent.mkdir(parents=True, exist_ok=True)
        key.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(f".{out.name}.tmp")
        try:
            with hold(out):
                shutil.rmtree(scratch, ignore_errors=True)  # of one who was killed
                study = _write_study(scratch, {"a": a, "b": b}, items, question)
                secret = {"study": study, "seed": seed, "labels": list(names), "pairs": items}
                if not key.exists():
                    write_json(key, secret)
                elif _read_json(key, ()) != secret:  # else of one who was killed before the end
                    raise FileExistsError(f"{key} exists: choose another place, or delete it")
            os.rename(scratch, out)  # the last step: nobody comes back to tidy up after it
        except InUseError:
            raise
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return cls.load(out)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ReaderStudy:
        """Open a study's folder.

        Raises
        ------
        FileNotFoundError, ReaderError
            No study there, or one that lacks images.
        """
        folder = Path(folder)
        about = _read_json(folder / "study.json", ("study", "question", "pairs"))
        pairs = tuple((str(left), str(right)) for left, right in about["pairs"])
        for name in (name for pair in pairs for name in pair):
            if not re.fullmatch(r"images/\w+\.png", name):
                raise ReaderError(
                    f"{folder / 'study.json'} names {name!r}, which is no image of it"
                )
        missing = [name for pair in pairs for name in pair if not (folder / name).is_file()]
        if missing:
            raise ReaderError(f"{folder} lacks {len(missing)} images, e.g. {missing[0]}")
        return cls(folder, about["study"], about["question"], pairs)

    def images(self, pair: int) -> tuple[bytes, bytes]:
        """Return the PNG files of the left and the right image of a pair."""
        left, right = ((self.folder / name).read_bytes() for name in self.pairs[pair])
        return left, right

    def urls(self, pair: int) -> list[str]:
        """Return the left and the right image of a pair as data URLs, for a page."""
        encoded = (base64.b64encode(png).decode() for png in self.images(pair))
        return [f"data:image/png;base64,{text}" for text in encoded]

    @property
    def width(self) -> int:
        """Pixels in a row of an image."""
        with Image.open(self.folder / self.pairs[0][0]) as image:
            return image.width

    def reader(self, name: str) -> Reading:
        """Return the answers of one reader, to go on with."""
        return Reading(self, name)

    def readers(self) -> list[str]:
        """Return the names of the readers who have answered something."""
        return sorted(p.stem for p in (self.folder / "answers").glob("*.jsonl"))

    def export(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the study as one HTML page without key or network, and write it if asked to.

        The page keeps each answer in the browser's own storage (IndexedDB, flushed to the disk)
        and gives the answers as a JSON file, for `import_answers`.
        """
        urls = [self.urls(pair) for pair in range(len(self.pairs))]
        data = {"study": self.id, "question": self.question, "pairs": urls}
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        parts = {"TITLE": html.escape(self.question), "STUDY": text}
        template = TEMPLATE.read_text(encoding="utf-8")
        page = re.sub(r"\$(TITLE|STUDY)", lambda place: parts[place[1]], template)
        if path is not None:
            write_text(path, page)
        return page

    def import_answers(self, path: str | os.PathLike[str]) -> Reading:
        """Add the answers that the exported page wrote; what is here already is not added twice.

        Raises
        ------
        ReaderError
            Not such a file, answers of another study, or answers that contradict those here.
        """
        path = Path(path)
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReaderError(f"{path} is not JSON ({error})") from None
        if not isinstance(records, list) or not records:
            raise ReaderError(f"{path} holds no answers: download them again from the study's page")
        first = records[0] if isinstance(records[0], dict) else {}
        reading = Reading(self, str(first.get("reader")))
        _fold(records, self, reading.name, str(path))
        with reading._alone():
            here = reading.records()
            common = min(len(here), len(records))
            if here[:common] != records[:common]:
                raise ReaderError(
                    f"{path} and {reading.path} both have answers of {reading.name}, and they "
                    "differ: give one of the two readers another name"
                )
            reading._append(records[len(here) :])
        return reading

    def analyse(
        self, key: str | os.PathLike[str] | None = None, *, readers: Sequence[str] | None = None
    ) -> list[Score]:
        """Open the key and return the scores of the answers so far.

        For each reader the preference for the first source, and for the left side (an exact
        binomial test against one half, and Wilson's interval), the agreement with himself on
        repeats and the median time. With several readers also the preference of their majority,
        pair by pair, and Krippendorff's alpha between them. Answers without a preference are
        left out of the tests, as in a sign test, and counted; repeats do not count for the
        preference.

        Parameters
        ----------
        key : path, optional
            Default: where `create` puts it.
        readers : sequence of str, optional
            Default: all.

        Raises
        ------
        FileNotFoundError, ReaderError
            No key, that of another study, or no answers.
        """
        key = Path(key) if key is not None else default_key(self.folder)
        secret = _read_json(key, ("study", "seed", "labels", "pairs"))
        if secret["study"] != self.id:
            raise ReaderError(f"{key} is the key of study {secret['study']}, not of {self.id}")
        names = list(readers) if readers is not None else self.readers()
        answers = {name: self.reader(name).answers() for name in names}
        answers = {name: given for name, given in answers.items() if given}
        if not answers:
            raise ReaderError(f"{self.folder} has no answers yet: import them, or ask a reader")
        return _analyse(answers, secret["pairs"], secret["labels"])


def _write_study(
    folder: Path, sources: dict[str, Any], items: list[dict[str, Any]], question: str
) -> str:
    """Write what readers see, and return its hash."""
    (folder / "images").mkdir(parents=True)
    pairs, digest = [], hashlib.sha256(question.encode())
    for number, item in enumerate(tqdm(items, desc="pairs")):
        pairs.append([f"images/{number:03d}_{side}.png" for side in SIDES])
        for side, name in zip(SIDES, pairs[-1]):
            png = _to_png(sources[item[side]], item[item[side]])
            (folder / name).write_bytes(png)
            digest.update(png)
    study = digest.hexdigest()[:12]
    write_json(folder / "study.json", {"study": study, "question": question, "pairs": pairs})
    return study


def default_key(folder: str | os.PathLike[str]) -> Path:
    """Return where the key of a study lies unless it was put elsewhere: beside its folder."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}.key.json")


def _check_sources(a: Path, b: Path, n_pairs: int) -> tuple[list[Path], list[Path]]:
    """Return the image files of both folders, or refuse what would spoil a comparison."""
    files = find_images(a), find_images(b)
    counts = tuple(map(len, files))
    if counts[0] != counts[1]:
        raise ReaderError(
            f"{a} has {counts[0]} images and {b} has {counts[1]}: the folders must have equally "
            "many, so that neither source is the more selected one"
        )
    if not 1 <= n_pairs <= counts[0]:
        raise ReaderError(
            f"{n_pairs} pairs cannot be made of {counts[0]} images a folder: allowed are 1 to "
            f"{counts[0]}, as every image is used once"
        )
    seen: dict[bytes, list[Path]] = {}
    sizes: dict[tuple[int, ...], Path] = {}
    for file in (*files[0], *files[1]):
        image = load_image(file)
        sizes.setdefault(tuple(image.shape[1:]), file)
        seen.setdefault(hashlib.sha256(image.numpy().tobytes()).digest(), []).append(file)
    if len(sizes) > 1:
        found = ", ".join(f"{h} x {w} ({file})" for (h, w), file in list(sizes.items())[:3])
        raise ReaderError(
            f"the images have different sizes, which tells them apart: {found}; bring all to one "
            "size with `medbudget prepare folder`"
        )
    same = [alike for alike in seen.values() if len(alike) > 1]
    if same:
        raise ReaderError(
            f"{same[0][0]} and {same[0][1]} are the same image: delete one of them"
            + (f" ({len(same)} images are there more than once)" if len(same) > 1 else "")
        )
    return files


def _draw_items(
    files: tuple[list[Path], list[Path]], n: int, repeats: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return what is asked, in order: source on the left and the right, files, which is repeated."""
    chosen = [[part[i].name for i in rng.permutation(len(part))[:n]] for part in files]
    a_left = rng.permutation(np.arange(n) % 2 == 0)
    third = n // 3
    n_again = min(round(repeats * n), third)
    tail = [(k, False) for k in range(n - third, n)] + [
        (int(k), True) for k in rng.permutation(third)[:n_again]
    ]
    order = [(k, False) for k in range(n - third)] + [tail[i] for i in rng.permutation(len(tail))]
    items = []
    for k, repeated in order:
        left, right = ("a", "b") if a_left[k] != repeated else ("b", "a")
        names = {"a": chosen[0][k], "b": chosen[1][k]}
        items.append({"left": left, "right": right, **names, "repeats": k if repeated else None})
    return items


def _to_png(folder: str | os.PathLike[str], name: str) -> bytes:
    """Return an image's pixels, and nothing else of its file, as PNG."""
    file = io.BytesIO()
    to_pil(load_image(Path(folder) / name)).save(file, format="PNG")
    return file.getvalue()


def _read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: is this the right folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReaderError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise ReaderError(f"{path} must have the keys {', '.join(keys)}")
    return value


# ---- answers ------------------------------------------------------------------------------------


class Reading:
    """The answers of one reader: a file of one JSON line for each, only ever added to.

    Parameters
    ----------
    study : ReaderStudy
    name : str
        Who reads: a pseudonym of lower-case letters, digits, ``-`` and ``_``.
    """

    def __init__(self, study: ReaderStudy, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name):
            raise ReaderError(
                f"reader {name!r}: allowed are lower-case letters, digits, - and _, at most 40; "
                "a pseudonym is enough"
            )
        self.study, self.name = study, name
        self.path = study.folder / "answers" / f"{name}.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Return every line: answers, and what was undone.

        Raises
        ------
        ReaderError
            Lines that no study of this kind has written. A last line that a crash cut short is
            none: its answer was never confirmed.
        """
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        records = []
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise ReaderError(
                        f"{self.path}, line {number} is not JSON: was the file edited? Restore it"
                    ) from None
        _fold(records, self.study, self.name, str(self.path))
        return records

    def answers(self) -> list[dict[str, Any]]:
        """Return the answers that stand, those to pair 0, 1, …"""
        return _fold(self.records(), self.study, self.name, str(self.path))

    def next(self) -> int | None:
        """Return the pair to ask now, or None if all are answered."""
        done = len(self.answers())
        return done if done < len(self.study.pairs) else None

    def answer(self, pair: int, choice: str, *, seconds: float, note: str = "") -> None:
        """Write down an answer; when this returns, it is on the disk.

        Parameters
        ----------
        pair : int
            Must be `next`, so that nothing is answered twice.
        choice : {"left", "right", "none"}
        seconds : float
            From showing the pair to the answer.
        note : str
            Free text.
        """
        if choice not in CHOICES:
            raise ReaderError(f"choice {choice!r}: allowed are {', '.join(CHOICES)}")
        with self._alone():
            if (due := self.next()) != pair:
                raise ReaderError(f"pair {pair} is not the next one ({due}): show that again")
            self._append([self._record(pair, choice, seconds=round(seconds, 2), note=note)])

    def undo(self) -> None:
        """Take back the last answer by another line; the answer itself stays in the file."""
        with self._alone():
            answers = self.answers()
            if not answers:
                raise ReaderError("there is no answer to undo")
            self._append([self._record(len(answers) - 1, "undo")])

    def _alone(self) -> AbstractContextManager[None]:
        """Let other processes that answer for this reader wait."""
        self.path.parent.mkdir(exist_ok=True)
        return locked(self.path)

    def _record(self, pair: int, choice: str, **more: Any) -> dict[str, Any]:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        who = {"study": self.study.id, "reader": self.name}
        return {**who, "pair": pair, "choice": choice, **more, "time": now}

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        new = not self.path.stat().st_size
        with open(self.path, "ab+") as file:
            file.seek(0)
            text = file.read()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):  # cut short by a crash: finish the line, or drop what is no line
                try:
                    json.loads(text[whole:])
                    file.write(b"\n")
                except ValueError:
                    file.truncate(whole)
            for record in records:
                file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new and hasattr(os, "O_DIRECTORY"):  # a new file's name is in its folder, not in itself
            handle = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(handle)
            os.close(handle)


def _fold(records: Any, study: ReaderStudy, reader: str, where: str) -> list[dict[str, Any]]:
    """Return the answers that stand after all undoing, or refuse records that make no sense."""
    answers: list[dict[str, Any]] = []
    for number, record in enumerate(records, 1):
        try:
            whose, pair, choice = (record[k] for k in ("study", "pair", "choice"))
            if choice != "undo":
                float(record["seconds"]), str(record["note"])
            right = record["reader"] == reader
        except (KeyError, TypeError, ValueError):
            raise ReaderError(f"{where}, record {number} is no answer: {record!r:.80}") from None
        if whose != study.id:
            raise ReaderError(f"{where} answers study {whose}; this one is {study.id}")
        if choice == "undo" and right and answers and pair == len(answers) - 1:
            answers.pop()
        elif choice in CHOICES and right and pair == len(answers) < len(study.pairs):
            answers.append(record)
        else:
            raise ReaderError(
                f"{where}, record {number} does not follow the ones before: {record!r:.80}"
            )
    return answers


# ---- analysis -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """How often one of two was chosen: share, Wilson's 95 % interval, exact two-sided p."""

    chosen: int
    n: int
    share: float
    interval: tuple[float, float]
    p_value: float


def compute_preference(chosen: int, n: int) -> Preference:
    """Test `chosen` of `n` decisions against one half.

    Exact binomial test, two-sided, and Wilson's score interval (Wilson 1927), both by SciPy.
    The paper's reader chose 36 of 50: p = .0026, 58.3 to 82.5 %.

    Raises
    ------
    ValueError
        No decision, or more choices than decisions.

    Examples
    --------
    >>> found = compute_preference(36, 50)
    >>> found.share, [round(limit, 3) for limit in found.interval], round(found.p_value, 4)
    (0.72, [0.583, 0.825], 0.0026)
    """
    if not 0 <= chosen <= n or n < 1:
        raise ValueError(f"{chosen} of {n}: at least one decision, and no more choices than those")
    test = binomtest(chosen, n, 0.5)
    low, high = test.proportion_ci(method="wilson")
    return Preference(chosen, n, chosen / n, (float(low), float(high)), float(test.pvalue))


def compute_power(
    n: int | npt.NDArray[np.int64], preference: float, *, alpha: float = 0.05
) -> npt.NDArray[np.float64]:
    """Return how probably the exact test of `n` decisions finds a true `preference`."""
    count: Any = np.asarray(n)
    low: Any = binom.ppf(alpha / 2, count, 0.5)  # the most choices that are significantly few
    low = low - (binom.cdf(low, count, 0.5) > alpha / 2)
    found: Any = binom.cdf(low, count, preference) + binom.sf(count - low - 1, count, preference)
    return np.asarray(found)


def required_pairs(
    preference: float, *, power: float = 0.8, alpha: float = 0.05, largest: int = 20_000
) -> int:
    """Return how many decisions the exact test needs to find a true `preference`.

    The power of an exact test goes up and down with n: this is the number from which on it does
    not fall below `power` again.

    Raises
    ------
    ValueError
        A preference of one half, numbers outside (0, 1), or more than `largest` decisions.

    Examples
    --------
    >>> required_pairs(0.72), required_pairs(0.60)
    (42, 210)
    """
    if not (0 < preference < 1 and 0 < power < 1 and 0 < alpha < 1) or preference == 0.5:
        raise ValueError(
            f"preference {preference}, power {power}, alpha {alpha}: all between 0 and 1, and the "
            "preference not 0.5, which no number of pairs can show"
        )
    enough = compute_power(np.arange(largest + 1), preference, alpha=alpha) >= power
    n = int(np.flatnonzero(~enough)[-1]) + 1
    if n > largest:
        raise ValueError(f"to show a preference of {preference:.1%} takes over {largest} pairs")
    return n


def _analyse(
    answers: dict[str, list[dict[str, Any]]], items: list[dict[str, Any]], labels: list[str]
) -> list[Score]:
    # picks[reader][k]: the source chosen for item k, "a" or "b", or "none"
    picks = {
        name: [items[a["pair"]].get(a["choice"], "none") for a in given]
        for name, given in answers.items()
    }
    first = [k for k, item in enumerate(items) if item["repeats"] is None]
    scores = []
    for name, given in answers.items():
        mine, notes = picks[name], ["one reader, who says nothing of others"]
        if len(given) < len(items):
            so_far = f"{len(given)} of {len(items)} pairs answered"
            notes.append(f"{so_far}: do not stop at a p-value you like")
        own = [mine[k] for k in first if k < len(mine)]
        scores.append(_score_preference(f"preference for {labels[0]}, {name}", own, "a", notes))
        sides = [a["choice"] for a in given]
        scores.append(_score_preference(f"choice of the left side, {name}", sides, "left", notes))
        pairs = [(mine[k], mine[items[k]["repeats"]]) for k in range(len(mine)) if k not in first]
        if pairs:
            same = compute_preference(sum(x == y for x, y in pairs), len(pairs))
            twice = "the same pair with its sides swapped, no preference counted as an answer"
            scores.append(
                Score(f"same answer twice, {name}", same.share, same.interval, same.n, note=twice)
            )
        seconds = median(float(a["seconds"]) for a in given)
        scores.append(Score(f"seconds an answer, {name}", seconds, None, len(given), note="median"))
    if len(picks) < 2:
        return scores
    majority = []
    for k in first:
        votes = [mine[k] for mine in picks.values() if k < len(mine)]
        lead = votes.count("a") - votes.count("b")
        majority.append("a" if lead > 0 else "b" if lead < 0 else "none")
    about = [f"{len(picks)} readers; says nothing of others"]
    most = _score_preference(f"preference for {labels[0]}, majority", majority, "a", about)
    return [
        most,
        *scores,
        _score_agreement({r: [p[k] for k in first if k < len(p)] for r, p in picks.items()}),
    ]


def _score_preference(name: str, picks: list[str], choice: str, note: list[str]) -> Score:
    """Test one choice against the other, without those who have no preference."""
    undecided = picks.count("none")
    left_out = [f"{undecided} of {len(picks)} without a preference left out"] if undecided else []
    n = len(picks) - undecided
    if n == 0:
        return Score(name, float("nan"), None, 0, note="; ".join([*left_out, *note]))
    found = compute_preference(picks.count(choice), n)
    about = "; ".join([f"exact binomial p = {found.p_value:.2g}", *left_out, *note])
    return Score(name, found.share, found.interval, n, note=about)


def _score_agreement(picks: dict[str, list[str]]) -> Score:
    """Krippendorff's alpha between readers: 1 agreement, 0 chance."""
    from nltk.metrics.agreement import AnnotationTask  # slow to import

    rows = [(name, str(k), pick) for name, mine in picks.items() for k, pick in enumerate(mine)]
    name, note = "Krippendorff's alpha", "nominal: one source, the other, or no preference"
    n = sorted(map(len, picks.values()))[-2]  # pairs that two readers or more have answered
    if len({pick for *_, pick in rows}) == 1:
        return Score(name, float("nan"), None, n, note=f"{note}; undefined, as all answers are one")
    return Score(name, float(AnnotationTask(rows).alpha()), None, n, note=note)
