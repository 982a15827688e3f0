"""Draw the book's overview: cases, a word, images, a composition and a lesion painted in.

``python book/overview.py`` writes ``_static/overview.png``; the hash of the base that drew it
stands in the file, and a test refuses it when the base has changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from medbudget import Base, ellipse, inpaint, load_base, make_phantoms, sample
from medbudget.images import make_grid
from medbudget.tiny.trained import load_trained

TARGET = Path(__file__).parent / "_static" / "overview.png"
GRAY, BLUE = "#555555", "#0072B2"


def draw_parts(base: Base) -> list[tuple[str, str, torch.Tensor]]:
    """Return heading, explanation and image ``(3, H, W)`` of each panel."""
    healthy, tumour = (load_trained("prostate", label, base) for label in ("healthy", "tumour"))
    cases = make_phantoms("prostate", "tumour", 9).images
    made = sample(base, tumour.token, embeddings=[tumour], n=9)
    mixed = [
        sample(
            base,
            f"{healthy.token}:{1 - weight} AND {tumour.token}:{weight}",
            embeddings=[healthy, tumour],
            n=3,
        )
        for weight in (0.0, 0.5, 1.0)
    ]
    axis = torch.stack(mixed, 1).flatten(0, 1)  # weights across, seeds down
    plain = make_phantoms("prostate", "healthy", 3, split="test").images
    mask = ellipse((0.4, 0.52), (0.11, 0.11), size=base.size)
    away = {"cfg_scale": 10.0, "negative_prompt": healthy.token}
    filled = inpaint(base, plain, mask, tumour.token, embeddings=[healthy, tumour], seed=3, **away)
    shade = (mask[None, None] > 0.5) * 0.6
    marked = (plain * (1 - shade) + 255 * shade).to(torch.uint8)
    lesion = torch.stack([plain, marked, filled], 1).flatten(0, 1)
    kilobytes = tumour.vectors.numel() * 4 // 1024
    learned = f"{len(tumour.vectors)} vectors, {kilobytes} kB: new images"
    return [
        ("1  collect", "100 images of one class", make_grid(cases, columns=3)),
        ("2  learn a word", learned, make_grid(made, columns=3)),
        ("3  compose words", "healthy → half → tumour", make_grid(axis, columns=3)),
        ("4  paint it in", "healthy, mask, painted", make_grid(lesion, columns=3)),
    ]


def main() -> None:
    base = load_base("tiny", device="cpu")
    panels = draw_parts(base)
    figure = Figure(figsize=(11, 3.6), dpi=110, facecolor="white")
    for i, (head, text, image) in enumerate(panels):
        axes = figure.add_axes((0.015 + i * 0.25, 0.1, 0.22, 0.22 * 11 / 3.6))
        axes.imshow(image.permute(1, 2, 0), interpolation="nearest")
        axes.set_axis_off()
        figure.text(0.015 + i * 0.25, 0.93, head, weight="bold", size=13, color=BLUE)
        figure.text(0.015 + i * 0.25, 0.84, text, size=10.5, color="black")
    note = "Panel 1: phantoms. Panels 2 and 3, and the right column of 4: synthetic, tiny base."
    figure.text(0.015, 0.03, f"{note} Not for clinical use.", size=9, color=GRAY)
    figure.savefig(TARGET, metadata={"base_hash": base.hash})


if __name__ == "__main__":
    main()
