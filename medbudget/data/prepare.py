"""What all data preparations share: image sets with a manifest, made in parallel, resumable.

A preparation is a list of `Item` (which images, of whom) and a function that makes one of them.
Each image is written whole, with its row of the manifest in it; a second run makes what is missing.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from medbudget.data.splits import SPLITS
from medbudget.files import (
    STALE,
    atomic_path,
    check_writable,
    hash_file,
    hash_settings,
    hold,
    write_json,
    write_text,
)
from medbudget.images import SHEET, ImageError, load_image, read_record, save_images
from medbudget.processes import start_worker
from medbudget.progress import tqdm

COLUMNS = (
    "file", "split", "label", "patient", "sources", "slice_index", "spacing", "crop", "window",
    "masks", "note", "sha256",
)  # fmt: skip
RECORD = ("sources", "slice_index", "spacing", "crop", "window", "masks", "note", "pixels")
SIZES = (8, 4096)  # pixels of an edge that can be asked for
CELL, SHOWN = 128, 10  # contact sheet: pixels of an image, about; images of each split and class
Row = dict[str, str]
Job = TypeVar("Job")
Result = TypeVar("Result")


class BrokenCase(ValueError):
    """A case that cannot be used; the message is its reason in the table at the end."""


@dataclass(frozen=True)
class Item:
    """One image that is wanted."""

    name: str  # file name without suffix
    label: str
    split: str
    patient: str
    job: Any = None  # what the making function needs to know; small and picklable
    note: str = ""  # for the manifest, e.g. that a reference case stands in another split too
    source: str = ""  # says which image of which file it is, where the name does not

    @property
    def file(self) -> str:
        """Path of the image in the output folder."""
        return f"{self.split}/{self.label}/{self.name}.png"


@dataclass(frozen=True, eq=False)
class Made:
    """One image that was made, with what the manifest says of it."""

    image: torch.Tensor  # (3, H, W) uint8
    sources: tuple[str, ...]  # files it came from, relative to the dataset's folder
    window: str = ""  # how intensities became 0..255
    slice_index: int | None = None
    spacing: tuple[float, float] | None = None  # mm of a pixel of the output: row, column
    crop: str = ""  # which part of the source it shows
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)  # name to (H, W) bool
    note: str = ""
    pixels: str = ""  # hash of the source's pixels, which may be in one split and one class alone


@dataclass(frozen=True)
class Report:
    """What a preparation did."""

    out: Path
    counts: dict[tuple[str, str], int]  # (split, class) to the number of images there
    made: int  # images made by this run
    kept: int  # images found from an earlier run
    broken: tuple[tuple[str, str], ...] = ()  # case and reason
    short: dict[tuple[str, str], int] = field(default_factory=dict)  # images missing
    notes: tuple[str, ...] = ()  # what the reader should know
    patients: dict[tuple[str, str], int] = field(default_factory=dict)  # as counts

    def __str__(self) -> str:
        wide = max((len(label) for _, label in self.counts), default=0) + 2
        lines = [f"{'split':<12}{'class':<{max(wide, 24)}}{'patients':>9}{'images':>9}"]
        for cell, n in self.counts.items():
            missing = self.short.get(cell, 0)
            lines.append(
                f"{cell[0]:<12}{cell[1]:<{max(wide, 24)}}{self.patients.get(cell, 0):>9}{n:>9}"
                + (f"  ({missing} missing)" if missing else "")
            )
        lines.append(f"{self.made} made, {self.kept} kept from an earlier run, in {self.out}")
        lines += [f"note: {note}" for note in self.notes]
        if self.broken:
            n = len(self.broken)
            lines.append(f"{n} broken case{'s were' if n > 1 else ' was'} left out:")
            width = max(len(name) for name, _ in self.broken)
            lines += [f"  {name:<{width}}  {reason}" for name, reason in self.broken]
        text = "\n".join(lines)
        return text.encode("utf-8", "backslashreplace").decode()  # names in unknown encodings


def check_settings(
    *, size: int, seed: int, workers: int = 1, per_class: int = 1, reference: int = 0
) -> None:
    """Raise ValueError for numbers that are out of range."""
    for name, value, least in (
        ("seed", seed, 0),
        ("workers", workers, 1),
        ("per_class", per_class, 1),
        ("reference", reference, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be from {SIZES[0]} to {SIZES[1]} pixels, got {size}")


def prepare_items(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    spares: Mapping[str, Sequence[Item]] | None = None,
    notes: Sequence[str] = (),
    workers: int = 1,
    broken: Sequence[tuple[str, str]] = (),
) -> Report:
    """Make all items that `out` does not have yet, then write manifest and contact sheet.

    Images of the same pixels (`Made.pixels`) stay in one split, the first of train, val, test and
    reference; those in two classes are all left out.

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
        Class to the items that replace broken ones, in this order.
    workers : int
        Processes. On Windows and macOS, more than one needs ``if __name__ == "__main__":`` in a
        script.
    broken : sequence of (str, str)
        Cases that are known to be unusable, and why.

    Raises
    ------
    ValueError
        No items, two items of one name, or an `out` that holds something else.
    InUseError
        Another process prepares the same folder.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not items and not broken:
        raise ValueError("nothing to prepare: no case was selected")
    files = [item.file for item in items]
    if len(set(files)) < len(files):
        twice = next(f for f in files if files.count(f) > 1)
        raise ValueError(f"two items would be written to {twice}")
    out = Path(out)
    check_writable(out / "settings.json")
    with hold(out):
        _settle(out, settings, items)
        return _prepare(items, make, out, spares or {}, [*notes], workers, [*broken])


def _settle(out: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write the settings into a new folder, or check that they are those of the old one."""
    from medbudget._version import __version__

    chosen = [[i.file, i.patient, i.source] for i in sorted(items, key=lambda i: i.file)]
    now = {
        "medbudget": __version__,
        **json.loads(json.dumps(dict(settings))),
        "selection": hash_settings({"items": chosen}),
    }
    file = out / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        keys = [key for key in {**before, **now} if key != "medbudget"]
        other = [
            f"{key}: {before.get(key)} there, {now.get(key)} now"
            if key != "selection"
            else "selection: the cases are others"
            for key in keys
            if before.get(key) != now.get(key)
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


def _prepare(
    items: Sequence[Item],
    make: Callable[[Item], Made],
    out: Path,
    spares: Mapping[str, Sequence[Item]],
    notes: list[str],
    workers: int,
    broken: list[tuple[str, str]],
) -> Report:
    for stray in out.rglob(".*.tmp"):
        if STALE.fullmatch(stray.name):  # of a run that was killed
            stray.unlink()
    queues = {label: list(queue) for label, queue in spares.items()}
    rows: dict[str, Row] = {}
    kept: set[str] = set()
    short: dict[tuple[str, str], int] = {}
    todo, tried = list(items), {item.file: item for item in items}
    while todo:
        rows |= {item.file: row for item in todo if (row := _read_row(out, item))}
        kept |= rows.keys() & {item.file for item in todo}
        missing = [item for item in todo if item.file not in rows]
        failed: dict[str, str] = {}
        work = partial(_make_one, make=make, out=out)
        for item, (row, reason) in run_parallel(work, missing, workers=workers, desc="preparing"):
            if row is None:
                failed[item.file] = reason
            else:
                rows[item.file] = row
        failed |= _refuse_twins(rows)
        for file in failed:
            rows.pop(file, None)
        todo = []
        for item in [item for item in tried.values() if item.file in failed]:
            broken.append((item.name, failed[item.file]))
            if queues.get(item.label):
                todo.append(replace(queues[item.label].pop(0), split=item.split))
            else:
                cell = (item.split, item.label)
                short[cell] = short.get(cell, 0) + 1
        tried = {file: item for file, item in tried.items() if file not in failed}
        tried |= {item.file: item for item in todo}
    _remove_others(out, rows)
    order = {split: i for i, split in enumerate((*SPLITS, "reference"))}
    cells = {(item.split, item.label) for item in items}
    counts = dict.fromkeys(sorted(cells, key=lambda c: (order.get(c[0], 9), c)), 0)
    patients: dict[tuple[str, str], set[str]] = {cell: set() for cell in counts}
    for row in rows.values():
        counts[row["split"], row["label"]] += 1
        patients[row["split"], row["label"]].add(row["patient"])
    notes += _describe(rows)
    _write_manifest(out, rows)
    _write_contact_sheet(out, rows, list(counts))
    kept &= rows.keys()
    return Report(
        out, counts, len(rows) - len(kept), len(kept), tuple(broken), short, tuple(notes),
        {cell: len(names) for cell, names in patients.items()},
    )  # fmt: skip


def _make_one(item: Item, *, make: Callable[[Item], Made], out: Path) -> tuple[Row | None, str]:
    """Make and write one image; what is wrong with a case comes back as the reason."""
    try:
        made = make(item)
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        return None, " ".join(str(error).split()) or type(error).__name__
    for name, mask in made.masks.items():
        image = (mask.to(torch.uint8) * 255).expand(1, 3, -1, -1)
        save_images(image, (out / _mask_file(name, item)).parent, names=[item.name])
    record = {
        "prepared": item.patient,
        "sources": " | ".join(made.sources),
        "slice_index": "" if made.slice_index is None else str(made.slice_index),
        "spacing": " x ".join(f"{value:g}" for value in made.spacing or ()),
        "crop": made.crop,
        "window": made.window,
        "masks": [*made.masks],
        "note": made.note,
        "pixels": made.pixels,
    }
    # masks first: an image that is there says that all of its case is
    save_images(made.image[None], (out / item.file).parent, names=[item.name], records=[record])
    return _fill_row(out, item, record), ""


def _mask_file(name: str, item: Item) -> str:
    return f"masks/{name}/{item.file}"


def _fill_row(out: Path, item: Item, record: Mapping[str, Any]) -> Row:
    """Join an item and the record in its image to a row of the manifest."""
    return {
        "file": item.file,
        "split": item.split,
        "label": item.label,
        "patient": item.patient,
        **{key: record[key] for key in RECORD[:5]},
        "masks": " | ".join(f"{name}={_mask_file(name, item)}" for name in record["masks"]),
        "note": "; ".join(filter(None, (item.note, record["note"]))),
        "sha256": hash_file(out / item.file),
        "pixels": record["pixels"],
    }


def _read_row(out: Path, item: Item) -> Row | None:
    """Return the row of an image that an earlier run has made, None if it has to be made."""
    record = read_record(out / item.file)
    if record is None or record.get("prepared") != item.patient or not record.keys() >= {*RECORD}:
        return None
    files = [out / item.file, *(out / _mask_file(name, item) for name in record["masks"])]
    try:
        for file in files:
            load_image(file)
    except (ImageError, OSError):
        return None
    return _fill_row(out, item, record)


def _refuse_twins(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return the images to leave out, and why, as another split or class has the same pixels."""
    order = {split: i for i, split in enumerate((*SPLITS, "reference"))}
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows.values(), key=lambda r: (order.get(r["split"], 9), r["file"])):
        groups.setdefault(row["pixels"], []).append(row)
    groups.pop("", None)
    refused = {}
    for group in groups.values():
        first = group[0]
        for row in group:
            other = next((r for r in group if r["label"] != row["label"]), None)
            if other is not None:
                refused[row["file"]] = (
                    f"{row['file']} and {other['file']} have the same pixels, in two classes: "
                    "keep it in the right one"
                )
            elif row["split"] != first["split"] and not row["note"].startswith("also in"):
                refused[row["file"]] = (
                    f"{row['file']} and {first['file']} have the same pixels: kept in "
                    f"{first['split']} alone"
                )
    return refused


def _remove_others(out: Path, rows: Mapping[str, Row]) -> None:
    """Remove images of earlier runs that are of this set no more, e.g. of a spare."""
    for path in out.glob("*/*/*.png"):
        file = path.relative_to(out).as_posix()
        record = None if file in rows else read_record(path)
        if record is not None and "prepared" in record:
            for name in record["masks"]:
                (out / "masks" / name / file).unlink(missing_ok=True)
            path.unlink()


def _describe(rows: Mapping[str, Row]) -> Iterator[str]:
    """Say what holds of the images in all."""
    padded = sum("padded" in row["note"] for row in rows.values())
    if padded:
        yield (
            f"{padded} of {len(rows)} images are not square: padded with black to a square, which "
            "a model learns too; crop them first where that matters"
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(rows):
        groups.setdefault((rows[name]["pixels"], rows[name]["split"]), []).append(name)
    twins = [names for (pixels, _), names in groups.items() if pixels and len(names) > 1]
    if twins:
        yield (
            f"{sum(map(len, twins)) - len(twins)} images have the pixels of another one, in the "
            f"same split and class, such as {twins[0][1]} of {twins[0][0]}"
        )


def run_parallel(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int, desc: str
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with what the function returns for it, in processes where that pays."""
    jobs = list(jobs)
    if not jobs:
        return
    with tqdm(total=len(jobs), desc=desc, unit="image") as bar:
        if workers == 1 or len(jobs) == 1:
            for job in jobs:
                yield job, function(job)
                bar.update()
            return
        # as torch's own DataLoader: fork on Linux, where it saves each worker all imports
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=start_worker
        )
        try:
            futures = {pool.submit(function, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (out of memory?); what was made is kept: run the same "
                "command again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_manifest(out: Path, rows: Mapping[str, Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_text(out / "manifest.csv", text.getvalue())


def _write_contact_sheet(
    out: Path, rows: Mapping[str, Row], cells: Sequence[tuple[str, str]]
) -> None:
    """Show a few images of each split and class, reduced or enlarged by a whole number."""
    chosen = {
        cell: sorted(
            (name for name, row in rows.items() if (row["split"], row["label"]) == cell),
            key=lambda name: rows[name]["sha256"],
        )
        for cell in cells
    }
    gap, line, edge = 4, 16, CELL
    lines = []
    for cell, names in chosen.items():
        pictures = []
        for name in names[:SHOWN]:
            with Image.open(out / name) as image:
                larger = max(1, CELL // max(image.size))
                smaller = max(1, round(max(image.size) / CELL))
                shown = image.convert("RGB").reduce(smaller)
                shown = shown.resize((shown.width * larger, shown.height * larger), 0)
            pictures.append(shown)
            edge = max(edge, *shown.size)
        lines.append((f"{cell[0]} / {cell[1]}: {len(pictures)} of {len(names)}", pictures))
    if not rows:
        return
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wide = max(
        max(len(pictures) * (edge + gap), int(ruler.textlength(title))) for title, pictures in lines
    )
    sheet = Image.new("RGB", (wide + 2 * gap, len(lines) * (edge + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (title, pictures) in enumerate(lines):
        y = gap + r * (edge + line + gap)
        draw.text((gap, y), title, fill="black")
        for c, shown in enumerate(pictures):
            sheet.paste(shown, (gap + c * (edge + gap), y + line))
    text = PngInfo()
    text.add_text("medbudget", json.dumps({"sheet": "contact sheet of a preparation"}))
    with atomic_path(out / SHEET) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)


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
