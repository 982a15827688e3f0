"""Draw the book's diagrams, one for each mechanism, in one visual language.

``python book/diagrams.py`` writes ``_static/diagrams/*.svg``. Gray boxes are frozen, orange is what
is trained, blue is what is computed anew at every step.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch

TARGET = Path(__file__).parent / "_static" / "diagrams"
FROZEN, TRAINED, MADE = ("#e8e8e8", "#444444"), ("#fde3cf", "#b34700"), ("#d9ebf7", "#005b8f")
RED, BLUE, DARK = "#b34700", "#005b8f", "#222222"


class Canvas:
    """A white figure in which one unit is one inch."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(
        self,
        x: float,
        y: float,
        text: str,
        kind: tuple[str, str],
        *,
        w: float = 1.25,
        h: float = 0.6,
    ) -> None:
        """Draw a box around the point (x, y)."""
        shape = FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.02", fc=kind[0], ec=kind[1], lw=1.3
        )
        self.axes.add_patch(shape)
        self.say(x, y, text, color=DARK)

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        color: str = DARK,
        bend: float = 0,
    ) -> None:
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
        style["connectionstyle"] = f"arc3,rad={bend}"
        self.axes.annotate("", end, start, arrowprops=style)

    def say(
        self, x: float, y: float, text: str, *, color: str = DARK, size: float = 10, **how: str
    ) -> None:
        self.axes.text(
            x, y, text, size=size, color=color, **{"ha": "center", "va": "center", **how}
        )

    def save(self, name: str) -> None:
        """Write an SVG file that is the same at every run."""
        TARGET.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "medbudget"}):
            self.figure.savefig(TARGET / f"{name}.svg", metadata={"Date": None})


def draw_sampling() -> None:
    """Show the sampler's loop: guess, go down, add fresh noise."""
    c = Canvas(6.8, 2.5)
    c.box(0.75, 1.5, "noise\n$x$", MADE, w=1.0)
    c.box(2.55, 1.5, "network guesses\nthe image $D$", FROZEN, w=1.5)
    c.box(4.4, 1.5, "go part of the way,\nadd fresh noise", MADE, w=1.6)
    c.box(6.1, 1.5, "decoder:\nimage", FROZEN, w=1.0)
    c.box(2.55, 2.2, "prompt", FROZEN, w=1.0, h=0.35)
    for start, end in ((1.27, 1.78), (3.32, 3.58), (5.22, 5.58)):
        c.arrow((start, 1.5), (end, 1.5))
    c.arrow((2.55, 2.0), (2.55, 1.83))
    c.arrow((4.4, 1.17), (2.55, 1.17), color=BLUE, bend=-0.45)
    c.say(3.48, 0.42, "again, with less noise: 25 times (paper: 100)", color=BLUE)
    c.save("sampling")


def draw_words() -> None:
    """Show where words enter, and which vectors Textual Inversion trains."""
    c = Canvas(6.8, 2.6)
    c.box(0.85, 1.9, "prompt\n“<tumour>”", FROZEN, w=1.2)
    c.box(2.5, 1.9, "64 vectors\n(one per place)", TRAINED, w=1.35)
    c.box(4.2, 1.9, "text encoder:\n77 vectors", FROZEN, w=1.35)
    c.box(5.95, 1.9, "cross-attention\nin every layer", FROZEN, w=1.35)
    for start, end in ((1.47, 1.8), (3.2, 3.5), (4.9, 5.25)):
        c.arrow((start, 1.9), (end, 1.9))
    c.box(4.2, 0.7, "noisy latent", MADE, w=1.35, h=0.45)
    c.box(5.95, 0.7, "guess of noise", MADE, w=1.35, h=0.45)
    c.arrow((4.9, 0.7), (5.25, 0.7))
    c.arrow((5.95, 1.57), (5.95, 0.95))
    c.say(2.5, 1.25, "trained by\nTextual Inversion", color=RED)
    c.say(0.85, 0.5, "gray: frozen\norange: trained\nblue: new at every step", size=9)
    c.save("words")


def draw_guidance() -> None:
    """Show guidance as a step through two guesses, and beyond."""
    c = Canvas(6.0, 2.6)
    start, along = np.array([1.0, 0.8]), np.array([1.7, 0.45])
    places = {0: "$D_u$\nempty prompt", 1: "$D_c$\nthe word", 2: "scale 2\n(the paper’s)"}
    c.arrow(tuple(start), tuple(start + 2.45 * along), color=RED)
    for scale, label in places.items():
        x, y = start + scale * along
        c.axes.plot(x, y, "o", color=BLUE if scale < 2 else RED, markersize=9)
        c.say(x, y - 0.42, label)
    c.say(1.75, 1.5, "what the word adds:\n$D_c - D_u$", color=BLUE)
    c.arrow((1.75, 1.25), (1.87, 1.06), color=BLUE)
    c.say(4.55, 2.3, "$D = D_u + s\\,(D_c - D_u)$", color=RED, size=11)
    c.save("guidance")


def draw_inversion() -> None:
    """Redraw the paper's Figure 1: only the vectors of the new word are trained."""
    c = Canvas(6.8, 2.9)
    c.box(0.85, 2.3, "an image\nof 100", FROZEN, w=1.2)
    c.box(2.5, 2.3, "encoder:\nlatent $z$", FROZEN)
    c.box(4.2, 2.3, "add noise $\\varepsilon$\nof strength $\\sigma$", MADE, w=1.4)
    c.box(5.95, 2.3, "U-Net\nguesses $\\hat\\varepsilon$", FROZEN, w=1.3)
    c.box(2.5, 0.95, "vectors $v$\nof <tumour>", TRAINED)
    c.box(4.2, 0.95, "text\nencoder", FROZEN, w=1.4)
    c.box(5.95, 0.95, "loss\n$(\\varepsilon - \\hat\\varepsilon)^2$", MADE, w=1.3)
    for start, end in ((1.47, 1.85), (3.15, 3.48), (4.92, 5.28)):
        c.arrow((start, 2.3), (end, 2.3))
    c.arrow((3.15, 0.95), (3.48, 0.95))
    c.arrow((4.7, 1.28), (5.45, 1.97))
    c.arrow((6.2, 1.97), (6.2, 1.28))
    c.arrow((5.95, 0.62), (2.5, 0.62), color=RED, bend=-0.2)
    c.say(4.2, 0.14, "gradient: changes the vectors, and nothing else", color=RED)
    c.save("inversion")


def draw_inpainting() -> None:
    """Show inpainting: at every step the original returns outside the mask."""
    c = Canvas(6.8, 2.4)
    c.box(0.95, 1.7, "noisy latent", MADE, w=1.3)
    c.box(2.75, 1.7, "network’s\nguess $D$", FROZEN, w=1.3)
    c.box(4.75, 1.7, "inside the mask: $D$\noutside: the original", MADE, w=1.75)
    c.box(6.2, 0.6, "decoder", FROZEN, w=0.95, h=0.45)
    c.box(4.75, 0.6, "original, mask", FROZEN, w=1.3, h=0.45)
    c.arrow((1.62, 1.7), (2.08, 1.7))
    c.arrow((3.42, 1.7), (3.85, 1.7))
    c.arrow((4.75, 0.85), (4.75, 1.37))
    c.arrow((5.65, 1.5), (6.2, 0.85))
    c.arrow((4.75, 2.03), (0.95, 2.03), color=BLUE, bend=0.12)
    c.say(1.9, 0.75, "at every step, so that nothing\noutside the mask can change", color=BLUE)
    c.save("inpainting")


def draw_frechet() -> None:
    """Show the Frechet distance: two clouds of features, each reduced to centre and spread."""
    c = Canvas(6.0, 3.1)
    random = np.random.default_rng(0)
    clouds = (((1.9, 1.35), (0.45, 0.3), 20, BLUE), ((3.9, 1.5), (0.22, 0.4), -15, RED))
    for centre, spread, angle, color in clouds:
        turn = np.deg2rad(angle)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = random.normal(size=(60, 2)) * spread @ matrix.T + centre
        c.axes.plot(*points.T, ".", color=color, alpha=0.5)
        size = 4 * np.array(spread)
        c.axes.add_patch(Ellipse(centre, *size, angle=angle, fill=False, ec=color, lw=1.6))
        c.axes.plot(*centre, "+", color=color, markersize=12, mew=2)
    c.arrow((1.98, 1.36), (3.82, 1.49))
    c.say(2.95, 2.85, "FD = (distance of the centres)² + difference of the spreads")
    c.say(1.9, 0.35, "held-out cases", color=BLUE)
    c.say(3.9, 0.35, "synthetic images", color=RED)
    c.say(5.2, 1.35, "each point:\nfeatures of\none image", size=9)
    c.save("frechet")


def draw_mixing() -> None:
    """Show composition: an arrow for each word, and their weighted sum."""
    c = Canvas(6.0, 2.9)
    start = np.array([0.9, 0.75])
    healthy, diseased = np.array([1.9, 2.2]), np.array([3.0, 0.85])
    mixed = 0.25 * healthy + 0.75 * diseased
    c.axes.plot(*np.array([healthy, diseased]).T, "--", color="#888888")
    for end in (healthy, diseased):
        c.arrow(tuple(start), tuple(end), color=BLUE)
        c.axes.plot(*end, "o", color=BLUE, markersize=9)
    end = start + 2 * (mixed - start)
    c.arrow(tuple(start), tuple(end), color=RED)
    c.axes.plot(*start, "o", color=DARK, markersize=9)
    c.axes.plot(*np.array([mixed, end]).T, "o", color=RED, markersize=7)
    c.say(start[0], 0.4, "$D_u$, empty prompt")
    c.say(1.9, 2.5, "$D_1$, healthy", color=BLUE)
    c.say(3.1, 0.5, "$D_2$, diseased", color=BLUE)
    c.say(4.35, 2.0, "weights 0.25 and 0.75,\nscale 2", color=RED)
    c.save("mixing")


def draw_tuning() -> None:
    """Show what a word, a LoRA, full tuning and a GAN each train."""
    c = Canvas(6.8, 3.0)
    columns = {
        0.95: "a word", 2.6: "LoRA", 4.25: "full tuning", 5.9: "GAN",
    }  # fmt: skip
    shared = ("its vectors", "two thin\nmatrices for a layer", "all weights of\nthe U-Net",
              "a network\nof its own")  # fmt: skip
    for (x, name), what in zip(columns.items(), shared):
        c.say(x, 2.8, name, size=11, weight="bold")
        c.say(x, 0.4, f"trained: {what}", color=RED, size=9)
        if name == "GAN":
            c.box(x, 2.3, "random\nnumbers", MADE, w=1.2, h=0.45)
            c.box(x, 1.25, "generator", TRAINED, w=1.2, h=0.9)
        else:
            c.box(x, 2.3, "vectors\nof <tumour>", TRAINED if name == "a word" else FROZEN,
                  w=1.2, h=0.45)  # fmt: skip
            c.box(x, 1.25, "" if name == "LoRA" else "U-Net",
                  TRAINED if name == "full tuning" else FROZEN, w=1.2, h=0.9)  # fmt: skip
        c.arrow((x, 2.05), (x, 1.74))
    c.say(2.36, 1.25, "$W\\;+$")
    c.box(2.7, 1.25, "$B$", TRAINED, w=0.16, h=0.6)
    c.box(3.0, 1.42, "$A$", TRAINED, w=0.26, h=0.16)
    c.save("tuning")


if __name__ == "__main__":
    for draw in (
        draw_sampling, draw_words, draw_guidance, draw_inversion, draw_inpainting, draw_frechet,
        draw_mixing, draw_tuning,
    ):  # fmt: skip
        draw()
