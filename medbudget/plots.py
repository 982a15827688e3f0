"""Figures: everything decorative, so that notebooks show only ideas. Computes nothing.

All have an opaque white face; a `note` names what the figure was made with. In charts, phantoms and
real images are gray or black, synthetic images blue, those of a rival orange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure

from medbudget.panels import (
    DPI,
    GRAY,
    SEQUENCES,
    show_images,
    show_panels,
    show_rows,
    split_channels,
)

if TYPE_CHECKING:
    from medbudget.metrics.scores import Score

__all__ = [
    "GRAY", "PALETTE", "SEQUENCES", "plot_curves", "plot_histograms", "plot_scores",
    "show_images", "show_panels", "show_rows", "split_channels", "use_style",
]  # fmt: skip

# Okabe and Ito 2008: told apart with all common kinds of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

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
    """Set the defaults of figures and tables; in a notebook also keep figures uncropped.

    IPython crops figures to their ink by default, which shifts images off whole screen pixels.
    """
    mpl.rcParams.update(STYLE)  # type: ignore[arg-type]
    pd.set_option("display.max_colwidth", None)  # tables wrap: none is cut off by dots
    from IPython import get_ipython

    if hasattr(get_ipython(), "kernel"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("png", bbox_inches=None, facecolor="white")


def plot_scores(
    scores: Mapping[str, Any],
    *,
    marks: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Plot scores of one kind with their intervals, one below the other.

    `scores` map a label to a `Score`, or a group's heading to such a mapping; all must come from the
    same extractor, resize rule and normalisation. `marks` name vertical lines of reference, e.g. the
    floor. `colours` are those of scores (otherwise blue) and of marks (gray), by label.
    """
    groups = scores if isinstance(next(iter(scores.values())), Mapping) else {"": scores}
    lines = [(head, label, score) for head, part in groups.items() for label, score in part.items()]
    every: list[Score] = [score for *_, score in lines]
    kinds = {(s.extractor or s.name, s.extractor_hash, s.resize, s.normalisation) for s in every}
    if len(kinds) > 1:
        raise ValueError(f"scores of several kinds cannot be compared: {sorted(kinds)}")
    marks, colours = marks or {}, colours or {}
    rows = len(lines) + 0.5 * (len(groups) - 1)  # half a row between two groups
    figure, axes = _axes(title, note, height=0.9 + 0.4 * rows + 0.25 * bool(marks))
    lowest, before = 0.0, {head: 0.5 * i for i, head in enumerate(groups)}
    places = [i + before[head] for i, (head, *_) in enumerate(lines)]
    for place, (_, label, score) in zip(places, lines):
        low, high = score.interval or (score.value, score.value)
        lowest = min(lowest, low)
        colour = colours.get(label, PALETTE[0])
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([score.value], [place], "o", color=colour)
        size = max(abs(low), abs(high))
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        interval = f" ({low:.{digits}f} to {high:.{digits}f})" if score.interval else ""
        axes.annotate(
            f"{score.value:.{digits}f}{interval}", (high, place), xytext=(8, 0), color=GRAY,
            textcoords="offset points", va="center", bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
    names = [f"{head}: {label}" if head else label for head, label, _ in lines]
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + 0.6, -1.2 if marks else -0.6)
    for label, x in marks.items():
        colour, place = colours.get(label, GRAY), axes.get_xaxis_transform()
        axes.axvline(x, color=colour, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(x, 0.99, f" {label}", transform=place, va="top", color=colour, size=9)
    if lowest < 0:
        axes.axvline(0, color=GRAY, linewidth=1)
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.35)
    n = f", n = {every[0].sizes}" if len({score.sizes for score in every}) == 1 else ""
    axes.set_xlabel(every[0].name + n + ("" if title else "; lower is closer"))
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

    `curves` map a label to ``{"x": […], "y": […]}``, with ``"low"`` and ``"high"`` if wanted, or to the
    `Score` at each x. `log` gives a logarithmic x axis with a tick at every x. `marks` name
    horizontal lines of reference, e.g. guessing; `colours` are by label, as in `plot_scores`.
    """
    figure, axes = _axes(title, note, height=3.2)
    drawn = dict(curves)
    for label, scores in curves.items():
        if "x" not in scores:
            limits = [score.interval or (score.value,) * 2 for score in scores.values()]
            values = [score.value for score in scores.values()]
            low, high = zip(*limits)
            drawn[label] = {"x": list(scores), "y": values, "low": low, "high": high}
    for i, (label, curve) in enumerate(drawn.items()):
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


def plot_histograms(
    values: Mapping[str, Any],
    *,
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Figure:
    """Plot histograms over common bins, as shares of each set, with labelled vertical lines.

    `marks` name vertical lines, e.g. what was observed; `colours` are those of `values`, by label.
    """
    figure, axes = _axes(title, note, height=2.6)
    bins = np.histogram_bin_edges(np.concatenate([*map(np.asarray, values.values())]), 24)
    for label, part in values.items():
        shares = [1 / len(part)] * len(part)
        colour = (colours or {}).get(label)
        axes.hist(np.asarray(part), bins, weights=shares, alpha=0.55, label=label, color=colour)
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
