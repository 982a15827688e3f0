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
    lines: list[tuple[str, list[Image.Image]]] = []
    for cell in cells:
        names = [name for name, row in rows.items() if (row["split"], row["label"]) == cell]
        names.sort(key=lambda name: rows[name]["sha256"])
        pictures = [_scale(out / name) for name in names[:SHOWN]]
        lines.append((f"{cell[0]} / {cell[1]}: {len(pictures)} of {len(names)}", pictures))
    edge = max([CELL, *(max(shown.size) for _, pictures in lines for shown in pictures)])
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wide = max(
        max(len(pictures) * (edge + GAP), int(ruler.textlength(title))) for title, pictures in lines
    )
    sheet = Image.new("RGB", (wide + 2 * GAP, len(lines) * (edge + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (title, pictures) in enumerate(lines):
        y = GAP + r * (edge + LINE + GAP)
        draw.text((GAP, y), title, fill="black")
        for c, shown in enumerate(pictures):
            sheet.paste(shown, (GAP + c * (edge + GAP), y + LINE))
    text = PngInfo()
    text.add_text("medbudget", json.dumps({"sheet": "contact sheet of a preparation"}))
    with atomic_path(out / SHEET) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)


def _scale(file: Path) -> Image.Image:
    with Image.open(file) as image:
        shown = image.convert("RGB").reduce(max(1, round(max(image.size) / CELL)))
        larger = max(1, CELL // max(image.size))
    return shown.resize((shown.width * larger, shown.height * larger), Image.Resampling.NEAREST)
