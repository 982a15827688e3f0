"""Figures: everything decorative, so that notebooks show only ideas. Computes nothing.

Pixels are shown as they are: nearest neighbour, a whole number of screen pixels each, and the fixed
gray window 0..255, on an opaque white face. A `note` names what the figure was made with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.figure import Figure

from medbudget.images import check_images

if TYPE_CHECKING:
    from medbudget.metrics.scores import Score

# Okabe and Ito 2008: told apart with all common kinds of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GRAY = "#595959"  # 7:1 on white
DPI = 128
CELL, GAP, MARGIN = 128, 4, 6  # figure pixels: target edge of an image, between and around them

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.facecolor": "white",
    "savefig.dpi": DPI,
    "savefig.transparent": False,
    "axes.facecolor": "white",
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
    "svg.hashsalt": "medbudget",
}


def use_style() -> None:
    """Set matplotlib's defaults for this session; in a notebook also keep figures uncropped.

    IPython crops figures to their ink by default, which shifts images off whole screen pixels.
    """
    mpl.rcParams.update(STYLE)  # type: ignore[arg-type]
    from IPython import get_ipython

    if hasattr(get_ipython(), "kernel"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("png", bbox_inches=None, facecolor="white")


def show_images(
    images: torch.Tensor,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Show images in reading order.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``.
    titles : sequence of str, optional
        One short line above each image.
    columns : int
        Images in a row, at least 1.
    title, note : str, optional
        Above and below the whole; the note says what the images are, e.g. "synthetic; tiny base".
    """
    check_images(images)
    _check_columns(columns, titles, len(images), "images")
    return _draw([(None, part) for part in images.split(columns)], titles, title, note)


def show_rows(
    rows: Mapping[str, torch.Tensor],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Show one labelled row of images for each entry, as in the paper's Figure 5.

    Parameters
    ----------
    rows : mapping of str to torch.Tensor
        Label to ``(N, 3, H, W) uint8``; at most `columns` images of each are shown.
    titles : sequence of str, optional
        One above each column.
    columns, title, note
        See `show_images`.
    """
    if not rows:
        raise ValueError("no rows to show; pass a mapping of label to images")
    cut = [(label, check_images(part, name=label)[:columns]) for label, part in rows.items()]
    _check_columns(columns, titles, max(len(part) for _, part in cut), "columns")
    sizes = {tuple(part.shape[2:]) for _, part in cut}
    if len(sizes) > 1:
        raise ValueError(
            f"the rows have images of different sizes {sorted(sizes)}; resize them to one"
        )
    return _draw(cut, titles, title, note)


def _check_columns(columns: int, titles: Sequence[str] | None, n: int, what: str) -> None:
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if titles is not None and len(titles) != n:
        raise ValueError(f"{len(titles)} titles for {n} {what}; give one for each")


def _draw(
    rows: Sequence[tuple[str | None, torch.Tensor]],
    titles: Sequence[str] | None,
    title: str | None,
    note: str | None,
) -> Figure:
    """Place every image at whole figure pixels; text gets margins sized to it."""
    height, width = rows[0][1].shape[2:]
    zoom = max(1, round(CELL / max(height, width)))
    shrink = min(1.0, 2 * CELL / max(height, width))  # large images are shown smaller
    cell_w, cell_h = round(width * zoom * shrink), round(height * zoom * shrink)
    size = mpl.rcParams["font.size"]
    line = round(DPI / 72 * size * 1.45)
    labels = [textwrap.wrap(label or "", 16) for label, _ in rows]
    left = max((len(text) for lines in labels for text in lines), default=0) * line // 2
    left += MARGIN + (2 * GAP if left else 0)
    across = max(len(part) for _, part in rows)
    total_w = max(left + across * (cell_w + GAP) - GAP, 3 * CELL) + MARGIN
    title_lines, note_lines = _wrap(title, total_w, line * 1.25), _wrap(note, total_w, line * 0.95)
    each_row = titles is not None and rows[0][0] is None  # a title above each image
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
    for r, (lines, (_, part)) in enumerate(zip(labels, rows)):
        y = top + r * (above + cell_h + GAP) + above
        if lines:
            write(left - 2 * GAP, y + cell_h / 2, "\n".join(lines), ha="right", va="center")
        for c, image in enumerate(part):
            x = left + c * (cell_w + GAP)
            box = (x / total_w, 1 - (y + cell_h) / total_h, cell_w / total_w, cell_h / total_h)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            axes.imshow(
                image.permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=255, aspect="auto",
                interpolation="nearest" if shrink == 1 else "antialiased",
            )  # fmt: skip
            if titles is not None and (each_row or r == 0):
                write(x + cell_w / 2, y - GAP / 2, titles[index], ha="center", va="bottom")
            index += 1
    for i, text in enumerate(note_lines):
        write(MARGIN, bottom + 2 * GAP + i * line, text, color=GRAY, size=size * 0.9)
    return figure


def _wrap(text: str | None, pixels: float, line: float) -> list[str]:
    """Break text to a width; a letter is about 0.38 lines wide."""
    return textwrap.wrap(text, max(20, int(pixels / (0.38 * line)))) if text else []


def plot_loss(
    history: Mapping[str, Any], *, title: str | None = None, note: str | None = None
) -> Figure:
    """Plot a loss curve, or several: the values faint, over them their mean over a tenth of the run.

    The loss of one batch depends mostly on the timesteps that were drawn; only its mean can fall.

    Parameters
    ----------
    history : mapping
        ``{"step": […], "loss": […]}`` as in `Embedding.history`, or label to such a mapping.
    """
    curves = {"": history} if "loss" in history else history
    figure, axes = _axes(title, note, height=2.6)
    for label, curve in curves.items():
        steps = curve.get("step", range(1, len(curve["loss"]) + 1))
        (line,) = axes.plot(steps, curve["loss"], linewidth=1, alpha=0.3)
        n = max(1, len(curve["loss"]) // 10)
        x, y = (np.convolve(v, np.full(n, 1 / n), "valid") for v in (steps, curve["loss"]))
        name = f"{label}, mean of {n}" if label else f"mean of {n}"
        axes.plot(x, y, label=name, linewidth=2, color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (noise MSE)")
    axes.legend()
    return figure


def plot_scores(
    scores: Mapping[str, Score],
    *,
    marks: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Plot scores of one kind with their intervals, one below the other.

    Parameters
    ----------
    scores : mapping of str to Score
        Label to score. All must come from the same extractor, resize rule and normalisation:
        others cannot be compared.
    marks : mapping of str to float, optional
        Label to the place of a vertical line of reference, e.g. the floor.
    colours : mapping of str to str, optional
        Label to colour, of `scores` and of `marks`; scores are blue otherwise, lines gray.
    """
    if not scores:
        raise ValueError("no scores to plot; pass a mapping of label to Score")
    every = scores.values()
    kinds = {(s.extractor or s.name, s.extractor_hash, s.resize, s.normalisation) for s in every}
    if len(kinds) > 1:
        raise ValueError(f"scores of several kinds cannot be compared: {sorted(kinds)}")
    marks, colours = marks or {}, colours or {}
    figure, axes = _axes(title, note, height=0.9 + 0.4 * len(scores) + 0.25 * bool(marks))
    lowest = 0.0
    for place, score in enumerate(scores.values()):
        low, high = score.interval or (score.value, score.value)
        lowest = min(lowest, low)
        colour = colours.get(list(scores)[place], PALETTE[0])
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([score.value], [place], "o", color=colour)
        interval = f" ({low:.3g} to {high:.3g})" if score.interval else ""
        axes.annotate(
            f"{score.value:.3g}{interval}", (high, place), xytext=(8, 0),
            textcoords="offset points", va="center", color=GRAY,
        )  # fmt: skip
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.4, -1.2 if marks else -0.6)
    for label, x in marks.items():
        colour, place = colours.get(label, GRAY), axes.get_xaxis_transform()
        axes.axvline(x, color=colour, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(x, 0.99, f" {label}", transform=place, va="top", color=colour, size=9)
    if lowest < 0:
        axes.axvline(0, color=GRAY, linewidth=1)
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.35)
    first, sizes = next(iter(scores.values())), {score.sizes for score in scores.values()}
    n = f", n = {first.sizes}" if len(sizes) == 1 else ""
    axes.set_xlabel(first.name + n + ("" if title else "; lower is closer"))
    axes.grid(axis="y", visible=False)
    return figure


def plot_curves(
    curves: Mapping[str, Mapping[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    marks: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Plot one line for each label, with a bar at each point where an interval is given.

    Parameters
    ----------
    curves : mapping
        Label to ``{"x": […], "y": […]}``, and optionally ``"low"`` and ``"high"`` of the same
        length; or label to the `Score` at each x, as of `medbudget.metrics.disease_axis`.
    log : bool
        Logarithmic x axis with a tick at every x.
    marks : mapping of str to float, optional
        Label to the height of a horizontal line of reference, e.g. guessing.
    colours : mapping of str to str, optional
        Label to colour, of `curves` and of `marks`.
    """
    if not curves or not all(curves.values()):
        raise ValueError("no curves to plot; pass a mapping of label to {'x': …, 'y': …}")
    figure, axes = _axes(title, note, height=3.2)
    drawn = {label: curve if "x" in curve else _unfold(curve) for label, curve in curves.items()}
    for i, (label, curve) in enumerate(drawn.items()):
        lengths = {key: len(values) for key, values in curve.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"curve {label!r} has parts of different lengths: {lengths}")
        colour = (colours or {}).get(label, PALETTE[i % len(PALETTE)])
        marker = "os^DvPX"[i % 7]  # told apart without colour too
        axes.plot(curve["x"], curve["y"], marker + "-", color=colour, label=label, markersize=5)
        if "low" in curve:
            axes.vlines(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.6)
    for label, y in (marks or {}).items():
        colour, place = (colours or {}).get(label, GRAY), axes.get_yaxis_transform()
        axes.axhline(y, color=colour, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(0.01, y, label, transform=place, va="bottom", color=colour, size=9)
    if log:
        ticks = sorted({x for curve in drawn.values() for x in curve["x"]})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        figure.legend(loc="outside upper right", ncols=3)
    return figure


def _unfold(scores: Mapping[float, Score]) -> dict[str, Any]:
    """Return the curve of scores along an axis."""
    values = [score.value for score in scores.values()]
    low, high = zip(*(score.interval or (score.value,) * 2 for score in scores.values()))
    return {"x": list(scores), "y": values, "low": low, "high": high}


def plot_histograms(
    values: Mapping[str, Any],
    *,
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Plot histograms over common bins, as shares of each set, with labelled vertical lines.

    Parameters
    ----------
    values : mapping of str to array_like
        Label to numbers.
    marks : mapping of str to float, optional
        Label to the place of a vertical line, e.g. what was observed.
    """
    if not values or any(len(part) == 0 for part in values.values()):
        raise ValueError("no values to plot; pass a mapping of label to one number or more")
    figure, axes = _axes(title, note, height=2.6)
    bins = np.histogram_bin_edges(np.concatenate([*map(np.asarray, values.values())]), 24)
    for label, part in values.items():
        shares = [1 / len(part)] * len(part)
        axes.hist(np.asarray(part), bins=bins, weights=shares, alpha=0.55, label=label)
    for place, (label, x) in enumerate((marks or {}).items()):
        axes.axvline(x, color=PALETTE[-1], linestyle=("-", "--", ":")[place % 3], label=label)
    axes.set(xlabel=xlabel, ylabel="share")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def _axes(title: str | None, note: str | None, *, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, height), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    if title:
        axes.set_title(title)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", color=GRAY, size=9)
    return figure, axes
