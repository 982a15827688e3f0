"""A blinded reader study: pairs of images in a folder that a reader may see, and their key outside.

Which image came from which source stands in the key alone, a file beside the folder.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medbudget.files import PathLike, check_output, hold, write_bytes, write_json
from medbudget.images import find_images, hash_pixels, load_image, to_png, to_url
from medbudget.metrics.scores import Score
from medbudget.progress import tqdm
from medbudget.reader.analysis import score_answers
from medbudget.reader.answers import SIDES, ReaderError, Reading

QUESTION = "Which image looks more like a real one?"
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class ReaderStudy:
    """Blinded pairs in a folder: ``study.json``, ``images/``, and ``answers/`` as they come."""

    folder: Path
    id: str  # hash of everything that a reader sees
    question: str
    pairs: tuple[tuple[str, str], ...]  # files of the left and the right image, in order

    @classmethod
    def create(
        cls,
        a: PathLike,
        b: PathLike,
        out: PathLike,
        *,
        seed: int | None = None,
        n_pairs: int = 50,
        repeats: float = 0.1,
        question: str = QUESTION,
        key: PathLike | None = None,
    ) -> ReaderStudy:
        """Pair images of two folders at random and write the study and its key.

        `a` and `b` are folders of images, all of one size, of which `n_pairs` each (paper: 50) are
        drawn; `a` stands on the left in one half of the pairs. The share `repeats`, up to 1/3, of
        the pairs comes again at the end with its sides swapped. `out` must not exist, and the `key`
        (default: `default_key`) must lie outside it. Who knows the `seed` (default: a random one,
        kept in the key) can work out the key: tell no reader.
        """
        out = Path(out)
        key = Path(key) if key is not None else default_key(out)
        if key.resolve().is_relative_to(out.resolve()):
            raise ReaderError(f"the key {key} must not lie in {out}, which readers see")
        if out.exists():
            raise FileExistsError(f"{out} exists: choose another place, or delete it")
        if not 0 <= repeats <= 1 / 3:
            raise ReaderError(f"repeats is a share of the pairs from 0 to 1/3, got {repeats}")
        files = _check_sources(Path(a), Path(b), n_pairs)
        labels = [Path(a).resolve().name, Path(b).resolve().name]
        if labels[0] == labels[1]:
            raise ReaderError(f"both folders are called {labels[0]!r}: rename one of them")
        seed = secrets.randbelow(2**32) if seed is None else seed
        items = _draw_items(files, n_pairs, repeats, np.random.default_rng(seed))
        scratch = out.with_name(f".{out.name}.tmp")
        for place in (out, key):
            place.parent.mkdir(parents=True, exist_ok=True)
        with hold(out):
            shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted call
            try:
                study = _write_study(scratch, {"a": a, "b": b}, items, question)
                secret = {"study": study, "seed": seed, "labels": labels, "pairs": items}
                if key.exists() and _read_json(key) != secret:
                    raise FileExistsError(f"{key} exists: choose another place, or delete it")
                write_json(key, secret)
                os.rename(scratch, out)  # the last step
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return cls.load(out)

    @classmethod
    def load(cls, folder: PathLike) -> ReaderStudy:
        """Open a study's folder, or refuse one that lacks images."""
        folder = Path(folder)
        about = _read_json(folder / "study.json", "study", "question", "pairs")
        pairs = tuple((str(left), str(right)) for left, right in about["pairs"])
        for name in (name for pair in pairs for name in pair):
            if not re.fullmatch(r"images/\w+\.png", name) or not (folder / name).is_file():
                raise ReaderError(f"{folder} has no image {name!r}, which its study.json names")
        return cls(folder, about["study"], about["question"], pairs)

    def urls(self, pair: int) -> list[str]:
        """Return the left and the right image of a pair as data URLs, for a page."""
        return [to_url((self.folder / name).read_bytes()) for name in self.pairs[pair]]

    def _read_key(self, path: Path) -> dict[str, Any]:
        secret: dict[str, Any] = _read_json(path, "study", "labels", "pairs")
        if secret["study"] != self.id:
            raise ReaderError(f"{path} is the key of study {secret['study']}, not of {self.id}")
        return secret

    def reader(self, name: str) -> Reading:
        """Return the answers of one reader, to go on with."""
        return Reading(self.folder, self.id, len(self.pairs), name)

    def readers(self) -> list[str]:
        """Return the names of the readers who have answered something."""
        return sorted(p.stem for p in (self.folder / "answers").glob("*.jsonl"))

    def export(
        self,
        path: PathLike | None = None,
        *,
        overwrite: bool = False,
        reveal: PathLike | None = None,
        reference: tuple[torch.Tensor, str] | None = None,
    ) -> str:
        """Return the study as one HTML page that needs no network, and write it if asked to.

        The page keeps each answer in the browser's own storage and gives the answers as a JSON
        file, for `import_answers`.

        With `reveal`, the key, it ends with the result, beside that of the paper's reader, and
        tells which image came from where. For teaching only: the key can be read in the page's
        source. The `reference` is an image ``(3, H, W) uint8`` to compare with, and what it shows.
        """
        urls = [self.urls(pair) for pair in range(len(self.pairs))]
        data: dict[str, Any] = {"study": self.id, "question": self.question, "pairs": urls}
        if reveal:
            secret = self._read_key(Path(reveal))
            data["reveal"] = {
                "labels": secret["labels"],
                "left": [item["left"] for item in secret["pairs"]],
                "repeated": [item["repeats"] is not None for item in secret["pairs"]],
            }
        if reference is not None:
            image, shows = reference
            data["reference"] = {"url": to_url(to_png(image)), "text": shows}
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        parts = {"TITLE": html.escape(self.question), "STUDY": text}
        template = TEMPLATE.read_text(encoding="utf-8")
        page = re.sub(r"\$(TITLE|STUDY)", lambda match: parts[match[1]], template)
        if path is not None:
            check_output(path, overwrite=overwrite)
            write_bytes(path, page.encode())
        return page

    def import_answers(self, path: PathLike) -> Reading:
        """Add the answers that the exported page wrote; what is here already is not added twice."""
        records = _read_json(Path(path))
        if not (isinstance(records, list) and records and isinstance(records[0], dict)):
            raise ReaderError(f"{path} holds no answers: download them again from the study's page")
        reading = self.reader(str(records[0].get("reader")))
        reading.merge(records, str(path))
        return reading

    def analyse(self, key: PathLike | None = None) -> list[Score]:
        """Open the key, by default where `create` puts it; return the scores of the answers so far.

        For each reader the preference for the first source, and for the left side (exact binomial
        test against one half, Wilson's interval), whether repeats got the same answer, and the
        median time. With several readers also the preference of their majority, pair by pair, and
        Krippendorff's alpha. Answers without a preference are left out of the tests, as in a sign
        test, and counted; repeats do not count for the preference.
        """
        secret = self._read_key(Path(key) if key is not None else default_key(self.folder))
        own = {name: self.reader(name).answers() for name in self.readers()}
        answers = {name: given for name, given in own.items() if given}
        if not answers:
            raise ReaderError(f"{self.folder} has no answers yet: import them, or ask a reader")
        return score_answers(answers, secret["pairs"], secret["labels"])


def _write_study(
    folder: Path, sources: dict[str, Any], items: list[dict[str, Any]], question: str
) -> str:
    """Write what readers see, and return its hash."""
    (folder / "images").mkdir(parents=True)
    pairs, digest = [], hashlib.sha256(question.encode())
    for number, item in enumerate(tqdm(items, desc="pairs")):
        pairs.append([f"images/{number:03d}_{side}.png" for side in SIDES])
        for side, name in zip(SIDES, pairs[-1]):
            # the pixels, and nothing else of the file
            png = to_png(load_image(Path(sources[item[side]]) / item[item[side]]))
            (folder / name).write_bytes(png)
            digest.update(png)
    study = digest.hexdigest()[:12]
    write_json(folder / "study.json", {"study": study, "question": question, "pairs": pairs})
    return study


def default_key(folder: PathLike) -> Path:
    """Return where the key of a study lies unless it was put elsewhere: beside its folder."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}.key.json")


def _check_sources(a: Path, b: Path, n_pairs: int) -> tuple[list[Path], list[Path]]:
    """Return the image files of both folders, or refuse what would spoil a comparison."""
    files = find_images(a), find_images(b)
    most = min(map(len, files))
    if not 1 <= n_pairs <= most:
        raise ReaderError(
            f"{n_pairs} pairs cannot be made: {a} has {len(files[0])} images and {b} "
            f"{len(files[1])}, and none is used twice; allowed are 1 to {most} pairs"
        )
    seen: dict[str, Path] = {}
    shape = load_image(files[0][0]).shape
    for file in (*files[0], *files[1]):
        image = load_image(file)
        if (twin := seen.setdefault(hash_pixels(image), file)) != file:
            raise ReaderError(f"{twin} and {file} are the same image: delete one of them")
        if image.shape != shape:
            raise ReaderError(
                f"{files[0][0]} and {file} have different sizes, which tells them apart; bring all "
                "images to one size with `medbudget prepare folder`"
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
    tail = [(k, False) for k in range(n - third, n)]
    tail += [(int(k), True) for k in rng.permutation(third)[:n_again]]
    order = [(k, False) for k in range(n - third)] + [tail[i] for i in rng.permutation(len(tail))]
    items = []
    for k, repeated in order:
        left, right = ("a", "b") if a_left[k] != repeated else ("b", "a")
        names = {"a": chosen[0][k], "b": chosen[1][k]}
        items.append({"left": left, "right": right, **names, "repeats": k if repeated else None})
    return items


def _read_json(path: Path, *keys: str) -> Any:
    """Return what a JSON file holds, or refuse one that lacks a key."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReaderError(f"{path} is not JSON ({error})") from None
    if keys and not (isinstance(value, dict) and set(keys) <= set(value)):
        raise ReaderError(f"{path} must have the keys {', '.join(keys)}")
    return value
