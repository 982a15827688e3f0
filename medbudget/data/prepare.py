"""What all data preparations share: image sets with a manifest, made in parallel, resumable.

A preparation is a list of `Item` (which images, of whom) and a function that makes one of them.
Each image is written whole, with its row of the manifest in it; a second run makes what is missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from medbudget._version import __version__
from medbudget.data.items import BrokenCase, Cells, Item, Made, Report, check_settings
from medbudget.data.splits import SPLITS
from medbudget.files import (
    STALE,
    atomic_path,
    check_writable,
    describe_difference,
    hash_file,
    hash_settings,
    hold,
    read_json,
    write_json,
    write_text,
)
from medbudget.images import SHEET, ImageError, load_image, read_record, save_images
from medbudget.processes import run_parallel

__all__ = [
    "BrokenCase", "Item", "Made", "Report", "check_settings", "load_manifest", "prepare_items",
]  # fmt: skip

RECORD = ("sources", "slice_index", "spacing", "crop", "window", "masks", "note", "pixels")
COLUMNS = ("file", "split", "label", "patient", *RECORD[:-1], "sha256")
ORDER = {split: i for i, split in enumerate((*SPLITS, "reference"))}
CELL, SHOWN = 128, 10  # pixels of an image, about; images of each split and class
GAP, LINE = 4, 16  # pixels between images; of a title
Row = dict[str, str]


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

    `make` can be pickled, for the `workers`, and raises for a case that cannot be used. The
    `settings` decide what the images look like: JSON, and a later run must have the same. `spares`
    replace broken items of their class, in this order; `broken` are cases known to be unusable.
    """
    if not items and not broken:
        raise ValueError("nothing to prepare: no case was selected")
    out, failures, said = Path(out), [*broken], [*notes]
    check_writable(out / "settings.json")
    with hold(out):
        _settle(out, settings, items)
        for stray in out.rglob(".*.tmp"):
            if STALE.fullmatch(stray.name):  # of a run that was killed
                stray.unlink()
        work = partial(_make_one, make=make, out=out)
        rows, kept, short = _make_all(items, work, out, spares or {}, workers, failures)
        _remove_others(out, rows)
        cells = sorted({(i.split, i.label) for i in items}, key=lambda c: (ORDER.get(c[0], 9), c))
        patients: dict[tuple[str, str], list[str]] = {cell: [] for cell in cells}
        for row in rows.values():
            patients[row["split"], row["label"]].append(row["patient"])
        if padded := sum("padded" in row["note"] for row in rows.values()):
            said.append(
                f"{padded} of {len(rows)} images are not square: padded with black to a square, "
                "which a model learns too; crop them first where that matters"
            )
        _write_manifest(out, rows)
        if rows:
            _draw_sheet(out, rows, cells)
    return Report(
        out,
        {cell: len(names) for cell, names in patients.items()},
        len(rows) - kept,
        kept,
        tuple(failures),
        short,
        tuple(said),
        {cell: len(set(names)) for cell, names in patients.items()},
        int(settings.get("size", 0)),
    )


def _settle(out: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write the settings into a new folder, or check that they are those of the old one."""
    chosen = [[i.file, i.patient, i.source] for i in sorted(items, key=lambda i: i.file)]
    now = {"medbudget": __version__, **settings, "selection": hash_settings({"items": chosen})}
    now = json.loads(json.dumps(now))
    before = read_json(out / "settings.json")
    if before:
        same_cases = before.pop("selection", "") == now.pop("selection")
        reason = describe_difference(before | {"medbudget": __version__}, now)
        if reason or not same_cases:
            raise ValueError(
                f"{out} was prepared earlier, differently: {reason or 'the cases are others'}; "
                "choose another --out, or delete that folder"
            )
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty, and no earlier run's; choose a new folder")
    else:
        write_json(out / "settings.json", now)


def _make_all(
    items: Sequence[Item],
    work: Callable[[Item], tuple[Row | None, str]],
    out: Path,
    spares: Mapping[str, Sequence[Item]],
    workers: int,
    broken: list[tuple[str, str]],
) -> tuple[dict[str, Row], int, Cells]:
    """Make what is missing, and spares for what fails; return rows, kept ones, and what is short."""
    queues = {label: list(queue) for label, queue in spares.items()}
    rows: dict[str, Row] = {}
    kept: set[str] = set()
    short: Cells = Counter()
    wanted, todo = {item.file: item for item in items}, list(items)
    while todo:
        there = {item.file: row for item in todo if (row := _read_row(out, item))}
        rows, kept = rows | there, kept | there.keys()
        missing = [item for item in todo if item.file not in rows]
        failed: dict[str, str] = {}
        for item, (row, reason) in run_parallel(work, missing, workers=workers, desc="preparing"):
            if row is None:
                failed[item.file] = reason
            else:
                rows[item.file] = row
        failed |= _refuse_twins(rows)
        todo = []
        for file in [file for file in wanted if file in failed]:
            item = wanted.pop(file)
            rows.pop(file, None)
            broken.append((item.name, failed[file]))
            if queues.get(item.label):
                todo.append(replace(queues[item.label].pop(0), split=item.split))
            else:
                short[item.split, item.label] += 1
        wanted |= {item.file: item for item in todo}
    return rows, len(kept & rows.keys()), dict(short)


def _make_one(item: Item, *, make: Callable[[Item], Made], out: Path) -> tuple[Row | None, str]:
    """Make and write one image; what is wrong with a case comes back as the reason."""
    try:
        made = make(item)
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        return None, " ".join(str(error).split()) or type(error).__name__
    for name, mask in made.masks.items():
        image = (mask.to(torch.uint8) * 255).expand(1, 3, -1, -1)
        save_images(image, (out / _mask_file(name, item.file)).parent, names=[item.name])
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


def _mask_file(name: str, file: str) -> str:
    return f"masks/{name}/{file}"


def _fill_row(out: Path, item: Item, record: Mapping[str, Any]) -> Row:
    """Join an item and the record in its image to a row of the manifest."""
    return {
        "file": item.file,
        "split": item.split,
        "label": item.label,
        "patient": item.patient,
        **{key: record[key] for key in RECORD},
        "masks": " | ".join(f"{name}={_mask_file(name, item.file)}" for name in record["masks"]),
        "note": "; ".join(filter(None, (item.note, record["note"]))),
        "sha256": hash_file(out / item.file),
    }


def _read_row(out: Path, item: Item) -> Row | None:
    """Return the row of an image that an earlier run has made, None if it has to be made."""
    record = read_record(out / item.file)
    if record is None or record.get("prepared") != item.patient:
        return None
    try:
        for file in (item.file, *(_mask_file(name, item.file) for name in record["masks"])):
            load_image(out / file)
    except (ImageError, OSError):
        return None
    return _fill_row(out, item, record)


def _refuse_twins(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return the images to leave out, and why, as another split or class has the same pixels."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows.values(), key=lambda r: (ORDER.get(r["split"], 9), r["file"])):
        groups.setdefault(row["pixels"], []).append(row)
    groups.pop("", None)
    refused = {}
    for group in groups.values():
        first = group[0]
        for row in group:
            other = next((r for r in group if r["label"] != row["label"]), None)
            if other is not None:
                reason = f"{other['file']} have the same pixels, in two classes: keep it in the right one"
            elif row["split"] != first["split"] and not row["note"].startswith("also in"):
                reason = f"{first['file']} have the same pixels: kept in {first['split']} alone"
            else:
                continue
            refused[row["file"]] = f"{row['file']} and {reason}"
    return refused


def _remove_others(out: Path, rows: Mapping[str, Row]) -> None:
    """Remove images of earlier runs that are of this set no more, e.g. of a spare."""
    for path in out.glob("*/*/*.png"):
        file = path.relative_to(out).as_posix()
        record = None if file in rows else read_record(path)
        if record is not None and "prepared" in record:
            for name in record["masks"]:
                (out / _mask_file(name, file)).unlink(missing_ok=True)
            path.unlink()


def _write_manifest(out: Path, rows: Mapping[str, Row]) -> None:
    import pandas as pd

    table = pd.DataFrame([rows[name] for name in sorted(rows)], columns=[*COLUMNS])
    write_text(out / "manifest.csv", table.to_csv(index=False, lineterminator="\n"))


def _draw_sheet(out: Path, rows: Mapping[str, Row], cells: Sequence[tuple[str, str]]) -> None:
    """Show a few images of each split and class, reduced or enlarged by a whole number."""
    lines: dict[str, list[Image.Image]] = {}
    for split, label in cells:
        own = [row for row in rows.values() if (row["split"], row["label"]) == (split, label)]
        own.sort(key=lambda row: row["sha256"])
        shown = [_scale(out / row["file"]) for row in own[:SHOWN]]
        lines[f"{split} / {label}: {len(shown)} of {len(own)}"] = shown
    edge = max([CELL, *(max(image.size) for shown in lines.values() for image in shown)])
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(len(s) * (edge + GAP), int(ruler.textlength(t))) for t, s in lines.items()]
    high = len(lines) * (edge + LINE + GAP) + GAP
    sheet = Image.new("RGB", (max(widths) + 2 * GAP, high), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (title, shown) in enumerate(lines.items()):
        y = GAP + r * (edge + LINE + GAP)
        draw.text((GAP, y), title, fill="black")
        for c, image in enumerate(shown):
            sheet.paste(image, (GAP + c * (edge + GAP), y + LINE))
    text = PngInfo()
    text.add_text("medbudget", json.dumps({"sheet": "contact sheet of a preparation"}))
    with atomic_path(out / SHEET) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)


def _scale(file: Path) -> Image.Image:
    with Image.open(file) as image:
        shown = image.convert("RGB").reduce(max(1, round(max(image.size) / CELL)))
        larger = max(1, CELL // max(image.size))
    return shown.resize((shown.width * larger, shown.height * larger), Image.Resampling.NEAREST)


def load_manifest(out: str | os.PathLike[str]) -> Any:
    """Return the manifest of a prepared folder as a pandas table, all values as text."""
    import pandas as pd

    file = Path(out) / "manifest.csv"
    if not file.is_file():
        raise FileNotFoundError(f"no manifest.csv in {out}: run `medbudget prepare` to its end")
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def find_patients(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """Return each file's patient by the manifest of `medbudget prepare`, or nothing."""
    root = root.resolve()
    for folder in (root, *list(root.parents)[:2]):
        if (folder / "manifest.csv").is_file():
            table = load_manifest(folder)
            if not {"file", "patient"} <= set(table.columns):
                return ()
            owner = {folder / file: one for file, one in zip(table["file"], table["patient"])}
            patients = [owner.get(file.resolve(), "") for file in files]
            # numbers of patients mean nothing beyond their manifest
            return tuple(f"{folder}|{one}" for one in patients) if all(patients) else ()
    return ()
