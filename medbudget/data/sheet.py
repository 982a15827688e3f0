"""Draw the contact sheet of a prepared folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from medbudget.files import atomic_path
from medbudget.images import SHEET

CELL, SHOWN = 128, 10  # pixels of an image, about; images of each split and class
GAP, LINE = 4, 16  # pixels between images; of a title


def write_contact_sheet(
    out: Path, rows: Mapping[str, dict[str, str]], cells: Sequence[tuple[str, str]]
) -> None:
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
