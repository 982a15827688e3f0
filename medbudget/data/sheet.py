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


def write_contact_sheet(
    out: Path, rows: Mapping[str, dict[str, str]], cells: Sequence[tuple[str, str]]
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
