"""What all data preparations share: image sets with a manifest, made in parallel, resumable.

A preparation is a list of `Item` (which images, for whom) and a function that makes one of them.
Everything is written whole or not at all; a second run makes only what is missing.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from medbudget.data.splits import SPLITS
from medbudget.files import (
    atomic_path,
    check_writable,
    hash_file,
    hash_settings,
    hold,
    write_json,
    write_text,
)
from medbudget.images import save_images
from medbudget.processes import start_worker
from medbudget.progress import tqdm

COLUMNS = (
    "file",
    "split",
    "label",
    "patient",
    "sources",
    "slice_index",
    "spacing",
    "crop",
    "window",
    "masks",
    "note",
    "sha256",
)
JOURNAL = ".journal.jsonl"
THUMB, SHOWN = 96, 10  # contact sheet: pixels of an image, images of each split and label


class BrokenCase(ValueError):
    """A case that cannot be used; the message is its reason in the table at the end."""


def read_table(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; fields that a row lacks are "".

    Raises
    ------
    FileNotFoundError, ValueError
        Not there, no text, or a row with more fields than the first line names.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such table: {file}")
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened, restval=""))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is no CSV table in UTF-8 ({type(error).__name__}); save it as one"
        ) from None
    long = next((i for i, row in enumerate(rows, 2) if None in row), None)
    if long is not None:
        raise ValueError(f"{file}: row {long} has more fields than the first line names")
    return rows


@dataclass(frozen=True)
class Item:
    """One image that is wanted.

    Attributes
    ----------
    name : str
        File name without suffix.
    label, split, patient : str
    job : object
        What the making function needs to know; small and picklable.
    note : str
        For the manifest, e.g. that a reference case stands in another split too.
    """

    name: str
    label: str
    split: str
    patient: str
    job: Any = None
    note: str = ""

    @property
    def file(self) -> str:
        """Path of the image in the output folder."""
        return f"{self.split}/{self.label}/{self.name}.png"


@dataclass(frozen=True, eq=False)
class Made:
    """One image that was made, with what the manifest says of it.

    Attributes
    ----------
    image : torch.Tensor
        ``(3, H, W) uint8``.
    sources : tuple of str
        Files it came from, relative to the dataset's folder.
    window : str
        How intensities became 0..255.
    slice_index : int, optional
    spacing : tuple of float, optional
        Millimetres of a pixel of the output: (row, column).
    crop : str
        Which part of the source it shows.
    masks : mapping of str to torch.Tensor
        Name to ``(H, W) bool``, in the geometry of the image.
    """

    image: torch.Tensor
    sources: tuple[str, ...]
    window: str = ""
    slice_index: int | None = None
    spacing: tuple[float, float] | None = None
    crop: str = ""
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a preparation did.

    Attributes
    ----------
    out : Path
    counts : dict
        ``(split, label)`` to the number of images there.
    made, kept : int
        Images made by this run, and found from an earlier one.
    broken : tuple of (str, str)
        Case and reason.
    short : dict
        ``(split, label)`` to the images that are missing for lack of intact cases.
    notes : tuple of str
        What the reader should know: patients with two studies, overlaps, warnings.
    """

    out: Path
    counts: dict[tuple[str, str], int]
    made: int
    kept: int
    broken: tuple[tuple[str, str], ...] = ()
    short: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'split':<12}{'class':<24}{'images':>7}"]
        for (split, label), n in self.counts.items():
            missing = self.short.get((split, label), 0)
            lines.append(
                f"{split:<12}{label:<24}{n:>7}" + (f"  ({missing} missing)" if missing else "")
            )
        lines.append(f"{self.made} made, {self.kept} kept from an earlier run, in {self.out}")
        lines += [f"note: {note}" for note in self.notes]
        if self.broken:
            lines.append(f"{len(self.broken)} broken cases were left out:")
            width = max(len(name) for name, _ in self.broken)
            lines += [f"  {name:<{width}}  {reason}" for name, reason in self.broken]
        return "\n".join(lines)


def prepare_items(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    spares: Mapping[str, Sequence[Item]] | None = None,
    notes: Sequence[str] = (),
    workers: int = 1,
) -> Report:
    """Make all items that `out` does not have yet, then write manifest and contact sheet.

    Parameters
    ----------
    items : sequence of Item
    make : callable
        ``make(item) -> Made``; at module level or a `functools.partial` of such a function, so that
        other processes can run it. Whatever is wrong with a case, it raises as `BrokenCase`,
        ``ValueError``, ``RuntimeError`` or ``OSError``.
    settings : mapping
        What decides what the images look like; JSON. A later run must have the same.
    spares : mapping of str to sequence of Item, optional
        Label to the items that replace broken ones, in this order.
    workers : int
        Processes. On Windows and macOS, more than one needs ``if __name__ == "__main__":`` in a
        script.

    Raises
    ------
    ValueError
        No items, two items of one name, or an `out` that holds something else.
    InUseError
        Another process prepares the same folder.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not items:
        raise ValueError("nothing to prepare: no case was selected")
    files = [item.file for item in items]
    if len(set(files)) < len(files):
        twice = next(f for f in files if files.count(f) > 1)
        raise ValueError(f"two items would be written to {twice}")
    out = Path(out)
    check_writable(out / "settings.json")
    with hold(out):
        _settle(out, settings, items)
        return _prepare(items, make, out, spares or {}, notes, workers)


def _prepare(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    out: Path,
    spares: Mapping[str, Sequence[Item]],
    notes: Sequence[str],
    workers: int,
) -> Report:
    for stray in out.rglob(".*.tmp"):  # of a run that was killed
        stray.unlink()
    done = _read_done(out)
    earlier = set(done)
    queues = {label: list(queue) for label, queue in spares.items()}
    rows: dict[str, dict[str, Any]] = {}
    broken: list[tuple[str, str]] = []
    short: dict[tuple[str, str], int] = {}
    kept = 0
    todo = list(items)
    while todo:
        missing = []
        for item in todo:
            if item.file in done:
                rows[item.file] = done[item.file]
                kept += 1
            else:
                missing.append(item)
        failed = {}
        for item, row, reason in _run(missing, make, out, workers):
            if row is None:
                failed[item.file] = reason
                continue
            rows[item.file] = row
        todo = []
        for item in missing:
            if item.file not in failed:
                continue
            broken.append((item.name, failed[item.file]))
            if queues.get(item.label):
                todo.append(replace(queues[item.label].pop(0), split=item.split))
            else:
                cell = (item.split, item.label)
                short[cell] = short.get(cell, 0) + 1
    for stale in earlier - set(rows):  # a spare whose case has been mended since
        for path in (stale, *_masks_of(done[stale]).values()):
            with suppress(FileNotFoundError):
                (out / path).unlink()
    order = {split: place for place, split in enumerate(SPLITS)}
    cells = {(item.split, item.label) for item in items}
    counts = {c: 0 for c in sorted(cells, key=lambda c: (order.get(c[0], len(order)), c))}
    for row in rows.values():
        counts[row["split"], row["label"]] += 1
    _write_manifest(out, rows)
    (out / JOURNAL).unlink(missing_ok=True)
    _write_contact_sheet(out, rows)
    return Report(out, counts, len(rows) - kept, kept, tuple(broken), short, tuple(notes))


def check_settings(
    *, size: int, seed: int, workers: int = 1, per_class: int = 1, reference: int = 0
) -> None:
    """Raise ValueError for numbers that cannot be."""
    for name, value, least in (
        ("size", size, 8),
        ("seed", seed, 0),
        ("workers", workers, 1),
        ("per_class", per_class, 1),
        ("reference", reference, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _settle(out: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write the settings into a new folder, or check that they are those of the old one."""
    from medbudget._version import __version__

    chosen = [[i.file, i.patient, str(i.job)] for i in sorted(items, key=lambda i: i.file)]
    now = {
        "medbudget": __version__,
        **json.loads(json.dumps(dict(settings))),
        "selection": hash_settings({"items": chosen}),
    }
    file = out / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        keys = sorted({*now, *before} - {"medbudget"})
        other = [
            f"{k}: {before.get(k)!r} there, {now.get(k)!r} now"
            for k in keys
            if before.get(k) != now.get(k)
        ]
        if other:
            raise ValueError(
                f"{out} was prepared with other settings or from other cases "
                f"({'; '.join(other)}); choose another --out, or delete that folder"
            )
        return
    if out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ValueError(
            f"{out} is not empty and has no settings.json of an earlier run; choose a new folder"
        )
    write_json(file, now)


def _read_done(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of manifest and journal whose image is there, unchanged."""
    rows: list[dict[str, Any]] = []
    if (out / "manifest.csv").is_file():
        with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    if (out / JOURNAL).is_file():
        for line in (out / JOURNAL).read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a run that was killed
                rows.append(json.loads(line))
    return {
        row["file"]: row
        for row in rows
        if not any(".." in Path(p).parts for p in (row["file"], *_masks_of(row).values()))
        and (out / row["file"]).is_file()
        and hash_file(out / row["file"]) == row["sha256"]
        and all((out / mask).is_file() for mask in _masks_of(row).values())
    }


def _masks_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> file of the masks that a row lists."""
    return dict(part.split("=", 1) for part in row["masks"].split(" | ") if part)


def _run(
    items: Sequence[Item], make: Callable[[Item], Made], out: Path, workers: int
) -> Iterator[tuple[Item, dict[str, Any] | None, str]]:
    """Yield each item with its row, or with None and the reason."""
    if not items:
        return
    with tqdm(total=len(items), desc="preparing", unit="image") as bar:
        if workers == 1 or len(items) == 1:
            for item in items:
                yield item, *_make_one(item, make, out)
                bar.update()
            return
        # as torch's own DataLoader: fork on Linux, where it saves each worker all imports
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(items)), mp_context=context, initializer=start_worker
        )
        try:
            futures = {pool.submit(_make_one, item, make, out): item for item in items}
            for future in as_completed(futures):
                yield futures[future], *future.result()
                bar.update()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (out of memory?); what was made is kept: run the same "
                "command again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _make_one(
    item: Item, make: Callable[[Item], Made], out: Path
) -> tuple[dict[str, Any] | None, str]:
    """Make and write one image; what is wrong with a case comes back as the reason."""
    try:
        made = make(item)
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        return None, " ".join(str(error).split()) or type(error).__name__
    masks = {}
    for name, mask in made.masks.items():
        place = Path("masks") / name / item.split / item.label
        save_images(_as_image(mask), out / place, names=[item.name])
        masks[name] = (place / f"{item.name}.png").as_posix()
    (path,) = save_images(made.image[None], (out / item.file).parent, names=[item.name])
    row = {
        "file": item.file,
        "split": item.split,
        "label": item.label,
        "patient": item.patient,
        "sources": " | ".join(made.sources),
        "slice_index": "" if made.slice_index is None else str(made.slice_index),
        "spacing": " x ".join(f"{value:g}" for value in made.spacing or ()),
        "crop": made.crop,
        "window": made.window,
        "masks": " | ".join(f"{name}={file}" for name, file in masks.items()),
        "note": item.note,
        "sha256": hash_file(path),
    }
    # By who made it: a parent that lags behind and is killed would have it made again.
    with open(out / JOURNAL, "a", encoding="utf-8") as journal:
        journal.write(json.dumps(row) + "\n")
    return row, ""


def _as_image(mask: torch.Tensor) -> torch.Tensor:
    """``(H, W) bool`` to ``(1, 3, H, W) uint8``, 0 and 255."""
    return (mask.to(torch.uint8) * 255).expand(1, 3, -1, -1)


def _write_manifest(out: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_text(out / "manifest.csv", text.getvalue())


def _write_contact_sheet(out: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A few images of each split and label, in labelled rows."""
    cells: dict[str, list[str]] = {}
    for name in sorted(rows, key=lambda n: rows[n]["sha256"]):
        cells.setdefault(f"{rows[name]['split']} / {rows[name]['label']}", []).append(name)
    if not cells:
        return
    gap, line = 4, 16
    wide = max(min(len(names), SHOWN) for names in cells.values()) * (THUMB + gap) + gap
    sheet = Image.new("RGB", (max(wide, 280), len(cells) * (THUMB + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (title, names) in enumerate(sorted(cells.items())):
        y = gap + r * (THUMB + line + gap)
        draw.text((gap, y), f"{title}: {min(len(names), SHOWN)} of {len(names)}", fill="black")
        for c, name in enumerate(names[:SHOWN]):
            with Image.open(out / name) as image:
                image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
                sheet.paste(image, (gap + c * (THUMB + gap), y + line))
    with atomic_path(out / "contact_sheet.png") as temporary:
        sheet.save(temporary, format="PNG")


def load_manifest(out: str | os.PathLike[str]) -> Any:
    """Return the manifest of a prepared folder as a pandas table, all values as text.

    Raises
    ------
    FileNotFoundError
        No manifest there: the preparation has not finished.
    """
    import pandas as pd

    file = Path(out) / "manifest.csv"
    if not file.is_file():
        raise FileNotFoundError(f"no manifest.csv in {out}: run `medbudget prepare` to its end")
    return pd.read_csv(file, dtype=str, keep_default_na=False)
