"""Figures of images: rows and panels, with lesions outlined.

Images have the fixed gray window 0..255 and are enlarged bilinearly, as medical viewers do: nothing
gets brighter or darker than its pixels. A `note` names what the figure was made with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from medbudget.images import check_images

GRAY = "#595959"  # 7:1 on white
OUTLINE = "#ffb000"  # of a lesion or mask: bright on gray
DPI = 128
WIDTH, CELL, GAP, MARGIN = 640, 128, 4, 6  # figure pixels: of a row, its cells, and around them
LARGEST = 208  # edge of a cell where a row has few
SEQUENCES = ("T2W", "ADC", "DWI")


def split_channels(images: torch.Tensor) -> torch.Tensor:
    """Return each channel as a gray image: ``(N, 3, H, W)`` to ``(3 N, 3, H, W)``, in order."""
    return check_images(images).flatten(0, 1)[:, None].expand(-1, 3, -1, -1)


def show_images(
    images: torch.Tensor,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    outlines: torch.Tensor | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Show images ``(N, 3, H, W) uint8`` in reading order, up to 5 in a row on a page.

    `titles` stand above each image, `title` and `note` above and below the whole; the note says what
    the images are, e.g. "synthetic; tiny base". `outlines` are masks ``(N, H, W)`` whose border is
    drawn on the images; an empty one draws nothing.
    """
    check_images(images)
    masks = [None] * len(images) if outlines is None else outlines.split(columns)
    rows = [(None, part, mask) for part, mask in zip(images.split(columns), masks)]
    return _draw(rows, titles, title, note)


def show_rows(
    rows: Mapping[str, torch.Tensor],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    outlines: Mapping[str, torch.Tensor] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Show one labelled row of images for each entry, as in the paper's Figure 5.

    At most `columns` images of each row are shown, with `titles` above the columns. `outlines` map
    the label of any row to its masks; see `show_images` for the rest.
    """
    masks = outlines or {}
    if unknown := set(masks) - set(rows):
        raise ValueError(f"outlines of no row: {', '.join(unknown)}; rows: {', '.join(rows)}")
    cut = [
        (label, check_images(part, name=label)[:columns], masks.get(label))
        for label, part in rows.items()
    ]
    sizes = {tuple(part.shape[2:]) for _, part, _ in cut}
    if len(sizes) > 1:
        raise ValueError(
            f"the rows have images of different sizes {sorted(sizes)}; resize them to one"
        )
    return _draw(cut, titles, title, note)


def show_panels(
    rows: Mapping[str, torch.Tensor],
    *,
    outlines: Mapping[str, torch.Tensor] | None = None,
    sequences: Sequence[str] = SEQUENCES,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Show each image as gray panels side by side, one for each channel: T2W, ADC, DWI.

    All rows have equally many images, 1 or 2 on a page. `outlines` are drawn on all panels of an
    image.
    """
    images = max(map(len, rows.values()))
    masks = {label: mask.repeat_interleave(3, 0) for label, mask in (outlines or {}).items()}
    gray = {label: split_channels(part) for label, part in rows.items()}
    titles = [*sequences] * images
    return show_rows(gray, titles, columns=3 * images, outlines=masks, title=title, note=note)


def _draw(
    rows: Sequence[tuple[str | None, torch.Tensor, torch.Tensor | None]],
    titles: Sequence[str] | None,
    title: str | None,
    note: str | None,
) -> Figure:
    """Place every image at whole figure pixels; text gets margins sized to it."""
    height, width = rows[0][1].shape[2:]
    across = max(len(part) for _, part, _ in rows)
    each_row = titles is not None and rows[0][0] is None  # a title above each image
    places = sum(len(part) for _, part, _ in rows) if each_row else across
    if titles is not None and len(titles) != places:
        raise ValueError(f"{len(titles)} titles for {places} places; give one for each")
    edge = min(max(WIDTH // across, CELL), LARGEST)
    edge = max(edge, min(2 * CELL, height, width))  # of large images, more of their pixels
    cell_w, cell_h = (round(edge * x / max(height, width)) for x in (width, height))
    size = mpl.rcParams["font.size"]
    line = round(DPI / 72 * size * 1.45)
    upright = across < 5  # else labels are turned, so that the images can be larger
    labels = [textwrap.wrap(label or "", 16) for label, *_ in rows]
    letters = max((len(text) for lines in labels for text in lines), default=0)
    left = round(0.42 * line * letters) if upright else line * max(map(len, labels))
    left += MARGIN + (2 * GAP if left else 0)
    total_w = max(left + across * (cell_w + GAP) - GAP, 3 * CELL) + MARGIN
    title_lines, note_lines = _wrap(title, total_w, line * 1.25), _wrap(note, total_w, line * 0.95)
    above = line if each_row else 0
    top = MARGIN + len(title_lines) * round(1.1 * line) + (GAP if title_lines else 0)
    top += line if titles is not None and not each_row else 0
    bottom = top + len(rows) * (above + cell_h + GAP) - GAP
    total_h = bottom + MARGIN + (len(note_lines) * line + 2 * GAP if note_lines else 0)
    figure = Figure(figsize=(total_w / DPI, total_h / DPI), dpi=DPI, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / total_w, 1 - y / total_h, text, **{"va": "top", **style})

    for i, text in enumerate(title_lines):
        write(MARGIN, MARGIN + i * round(1.1 * line), text, weight="bold", size=size * 1.1)
    index = 0
    for r, (lines, (_, part, masks)) in enumerate(zip(labels, rows)):
        y = top + r * (above + cell_h + GAP) + above
        if lines:
            turn = {"ha": "right", "va": "center"} | ({} if upright else {"rotation": 90})
            write(left - 2 * GAP, y + cell_h / 2, "\n".join(lines), **turn)
        for c, image in enumerate(part):
            x = left + c * (cell_w + GAP)
            box = (x / total_w, 1 - (y + cell_h) / total_h, cell_w / total_w, cell_h / total_h)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            axes.imshow(
                image.permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=255, aspect="auto",
                interpolation="bilinear" if edge > max(height, width) else "antialiased",
            )  # fmt: skip
            if masks is not None and masks[c].any():
                axes.contour(masks[c].float().cpu(), [0.5], colors=OUTLINE, linewidths=1.3)
            if titles is not None and (each_row or r == 0):
                write(x + cell_w / 2, y - GAP / 2, titles[index], ha="center", va="bottom")
            index += 1
    for i, text in enumerate(note_lines):
        write(MARGIN, bottom + 2 * GAP + i * line, text, color=GRAY, size=size * 0.9)
    return figure


def _wrap(text: str | None, pixels: float, line: float) -> list[str]:
    """Break text to a width; a letter is about 0.38 lines wide."""
    return textwrap.wrap(text, max(20, int(pixels / (0.38 * line)))) if text else []
