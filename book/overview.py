"""Draw the book's overview in gray: cases, a word, an axis between words, a lesion painted in.

``python book/overview.py`` writes ``_static/overview.png``; the hash of the base that drew it
stands in the file, and a test refuses it when the base has changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from medbudget import Base, ellipse, inpaint, load_base, make_phantoms, sample
from medbudget.images import make_grid
from medbudget.tiny import load_trained

TARGET = Path(__file__).parent / "_static" / "overview.png"
GRAY, BLUE = "#555555", "#0072B2"
SHARES = (0.0, 0.5, 1.0)


def draw_parts(base: Base) -> list[tuple[str, str, torch.Tensor]]:
    """Return heading, explanation and image ``(3, H, W)`` of each panel."""
    words = {k: load_trained("chest", k, base) for k in ("healthy", "cardiomegaly", "pneumonia")}
    cases = make_phantoms("chest", "cardiomegaly", 6).images
    drawn = sample(base, words["cardiomegaly"].token, embeddings=[words["cardiomegaly"]], n=6)
    pair = [words["healthy"], words["cardiomegaly"]]
    rows = [
        sample(
            base,
            f"{pair[0].token}:{1 - share} AND {pair[1].token}:{share}",
            embeddings=pair,
            n=2,
        )
        for share in SHARES
    ]
    axis = torch.stack(rows, 1).flatten(0, 1)  # shares across, seeds down
    plain = make_phantoms("chest", "healthy", 2, split="test").images
    mask = ellipse((0.72, 0.5), (0.11, 0.14), size=base.size)
    painted = inpaint(
        base,
        plain,
        mask,
        words["pneumonia"].token,
        embeddings=[words["healthy"], words["pneumonia"]],
        seed=3,
        cfg_scale=5.0,
        negative_prompt=words["healthy"].token,
    )
    tint = torch.tensor([213.0, 94.0, 0.0])[:, None, None]
    shade = (mask[None, None] > 0.5) * 0.55
    marked = (plain * (1 - shade) + tint * shade).to(torch.uint8)
    lesion = torch.stack([plain, marked, painted], 1).flatten(0, 1)
    size = words["cardiomegaly"].vectors.numel() * 4 // 1024
    learned = f"{len(words['cardiomegaly'].vectors)} vectors, {size} kB: new images"
    return [
        ("1  collect", "100 images of one class", make_grid(cases, columns=3)),
        ("2  learn a word", learned, make_grid(drawn, columns=3)),
        ("3  mix words", "healthy → half → large heart", make_grid(axis, columns=3)),
        ("4  paint it in", "healthy, mask, pneumonia painted", make_grid(lesion, columns=3)),
    ]


def main() -> None:
    base = load_base("tiny", device="cpu")
    panels = draw_parts(base)
    figure = Figure(figsize=(8, 6.6), dpi=110, facecolor="white")
    for i, (head, text, image) in enumerate(panels):
        left, low = 0.015 + (i % 2) * 0.5, 0.545 - (i // 2) * 0.475
        axes = figure.add_axes((left, low, 0.47, 0.36))
        axes.imshow(image.permute(1, 2, 0), interpolation="bicubic")
        axes.set_anchor("W")
        axes.set_axis_off()
        figure.text(left, low + 0.415, head, weight="bold", size=14, color=BLUE)
        figure.text(left, low + 0.372, text, size=11, color="black")
    note = (
        "Panel 1: phantoms. Panels 2 and 3, and the right column of 4: synthetic, tiny base, 64 px."
    )
    figure.text(0.015, 0.015, f"{note} Not for clinical use.", size=8.5, color=GRAY)
    figure.savefig(TARGET, metadata={"base_hash": base.hash})


if __name__ == "__main__":
    main()
