"""Figures keep gray levels, carry their note, and refuse what cannot be compared."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from medbudget import Score, panels, plots


def render(figure: plots.Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    return np.asarray(Image.open(buffer).convert("RGBA"))


def texts(figure: plots.Figure) -> str:
    found = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [t.get_text() for t in axes.texts]
        found += [t.get_text() for t in axes.get_yticklabels()]
    return "\n".join(found)


def test_images_are_enlarged_without_getting_brighter_or_darker() -> None:
    columns = torch.tensor([0, 255, 60, 60], dtype=torch.uint8).repeat_interleave(16)
    images = columns.expand(5, 3, 64, 64).contiguous()
    picture = render(plots.show_images(images, columns=5))  # the gray window is fixed
    row = picture[panels.MARGIN + 9, panels.MARGIN : panels.MARGIN + panels.CELL, 0].astype(int)
    centres = row[panels.CELL // 8 :: panels.CELL // 4]
    assert centres.tolist() == [0, 255, 60, 60] and set(row[:28]) == {0}
    assert (np.diff(row[28:40]) >= 0).all(), "an edge is soft, and has no halo"
    assert (picture[..., 3] == 255).all()
    assert render(plots.show_images(images[:2])).shape[0] > 1.5 * picture.shape[0], "few are large"
    large = torch.zeros((2, 3, 512, 512), dtype=torch.uint8)
    assert render(plots.show_images(large)).shape[1] < 600, "large images are shown smaller"


def test_panels_show_each_channel_as_gray_with_the_lesion_outlined() -> None:
    images = torch.tensor([10, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    gray = plots.split_channels(images)
    assert gray[:, :, 0, 0].tolist() == [[v] * 3 for v in (10, 100, 200)] * 2
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[1, 20:40, 20:40] = True
    figure = plots.show_panels({"a": images, "b": images}, outlines={"b": masks})
    assert len(figure.axes) == 12 and "T2W" in texts(figure) and "DWI" in texts(figure)
    outlined = [bool(axes.collections) for axes in figure.axes]
    assert outlined == [False] * 9 + [True] * 3, "an empty mask draws nothing"
    border = figure.axes[-1].collections[0].get_paths()[0].vertices
    assert border.min() == 19.5 and border.max() == 39.5
    with pytest.raises(ValueError, match="outlines of no row: c; rows: a, b"):
        plots.show_panels({"a": images, "b": images}, outlines={"c": masks})


def test_rows_are_labelled_and_cut_to_the_columns() -> None:
    images = torch.zeros((5, 3, 64, 64), dtype=torch.uint8)
    figure = plots.show_rows(
        {"real": images, "synthetic": images[:2]}, columns=3, title="Both", note="tiny base"
    )
    assert len(figure.axes) == 3 + 2
    assert all(word in texts(figure) for word in ("real", "synthetic", "Both", "tiny base"))


def test_other_images_and_wrong_numbers_are_refused() -> None:
    images = torch.zeros((2, 3, 8, 8), dtype=torch.uint8)
    for call in (plots.show_images, lambda x: plots.show_rows({"a": x})):
        with pytest.raises(TypeError, match=r"torch\.uint8"):
            call(images.float())
    with pytest.raises(ValueError, match="3 titles for 2 places"):
        plots.show_images(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="different sizes"):
        plots.show_rows({"a": images, "b": torch.zeros((1, 3, 9, 9), dtype=torch.uint8)})


def score(value: float, interval=None, name: str = "FD (EfficientNet-Lite0)") -> Score:
    return Score(name=name, value=value, interval=interval, n=100)


def test_scores_show_value_interval_and_a_common_n() -> None:
    figure = plots.plot_scores({"TI": score(480, (450, 510)), "floor": score(37)}, note="phantoms")
    assert "480 (450 to 510)" in texts(figure) and "n = 100" in texts(figure)
    assert "phantoms" in str(figure._supxlabel)
    assert list(figure.axes[0].lines[0].get_xdata()) == [450, 510]
    few = dataclasses.replace(score(2), n=(5, 40))
    assert "n = 5 vs 40" in texts(plots.plot_scores({"a": few}))
    assert "n =" not in texts(plots.plot_scores({"a": score(1), "b": few}))
    with pytest.raises(ValueError, match="cannot be compared"):
        plots.plot_scores({"a": score(1), "b": score(1, name="FID")})


def test_lines_of_reference_stand_where_they_are_named() -> None:
    colours = {"floor": "#123456", "TI": "#D55E00"}
    figure = plots.plot_scores(
        {"TI": score(480, (450, 510)), "other": score(37)}, marks={"floor": 40}, colours=colours
    )
    first, _, second, *rest = figure.axes[0].lines
    assert (first.get_color(), second.get_color()) == ("#D55E00", plots.PALETTE[0])
    assert list(rest[-1].get_xdata()) == [40, 40] and rest[-1].get_color() == "#123456"
    assert "floor" in texts(figure)
    curves = {"AUC": {"x": [5, 100], "y": [1, 0.7]}}
    figure = plots.plot_curves(
        curves, xlabel="cases", ylabel="AUC", marks={"guessing": 0.5}, colours={"AUC": "#111111"}
    )
    curve, line = figure.axes[0].lines
    assert curve.get_color() == "#111111" and list(line.get_ydata()) == [0.5, 0.5]
    assert "guessing" in texts(figure)


def test_scores_stand_in_groups_with_half_a_row_between_them() -> None:
    figure = plots.plot_scores({"steps": {"10": score(3), "25": score(2)}, "": {"floor": score(1)}})
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["steps: 10", "steps: 25", "floor"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(line.get_ydata()[0]) for line in points] == [0, 1, 2.5]


def test_curves_have_bars_and_a_tick_for_each_n() -> None:
    curve = {"x": [8, 16, 64], "y": [3, 2, 1], "low": [2, 1, 0], "high": [4, 3, 2]}
    figure = plots.plot_curves({"floor": curve}, xlabel="n", ylabel="FD", log=True, note="phantoms")
    (axes,) = figure.axes
    assert list(axes.lines[0].get_ydata()) == [3, 2, 1] and len(axes.collections) == 1
    assert [t.get_text() for t in axes.get_xticklabels()] == ["8", "16", "64"]
    assert "phantoms" in str(figure._supxlabel)


def test_histograms_are_shares_over_common_bins() -> None:
    figure = plots.plot_histograms(
        {"a": [0, 0, 1, 1], "b": [1]}, xlabel="difference", marks={"observed": 0.25},
        colours={"a": "#123456"},
    )  # fmt: skip
    (axes,) = figure.axes
    first, second = axes.containers
    assert [bar.get_height() for bar in first if bar.get_height()] == [0.5, 0.5]
    assert first[0].get_x() == second[0].get_x() == pytest.approx(0)
    assert second[-1].get_height() == 1
    assert to_hex(first[0].get_facecolor()) == "#123456"
    assert list(axes.lines[0].get_xdata()) == [0.25, 0.25]


def test_the_palette_stays_apart_for_colour_blind_readers() -> None:
    # Machado 2009, deuteranopia: full strength, linear RGB
    deutan = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in plots.PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for seen in (linear, linear @ deutan.T):
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[np.triu_indices(len(rgb), 1)].min() > 0.08


def test_axis_shows_every_curve_with_its_intervals():
    curves = {
        name: {x: Score("s", x + shift, (x + shift - 1, x + shift + 1), 5) for x in (0.0, 0.5, 1.0)}
        for name, shift in (("one", 0), ("two", 3))
    }
    figure = plots.plot_curves(curves, xlabel="share", ylabel="score")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in lines] == [[0, 0.5, 1], [3, 3.5, 4]]
    assert axes.get_xlabel() == "share"
    bars = [[segment[:, 1].tolist() for segment in c.get_segments()] for c in axes.collections]
    assert bars == [[[-1, 1], [-0.5, 1.5], [0, 2]], [[2, 4], [2.5, 4.5], [3, 5]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
