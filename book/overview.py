"""Draw the book's overview in gray: cases, a word, an axis between words, a lesion painted in.

``python book/overview.py`` writes ``_static/overview.png``, and ``_static/link.png`` for sites that
show links with a picture. The hash of the base that drew them stands in the files, and a test
refuses them when the base has changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from first_page import CENTRE, PROMPT, RADII
from matplotlib.figure import Figure

from medbudget import Base, ellipse, inpaint, load_base, make_phantoms, sample
from medbudget.images import make_grid
from medbudget.tiny import load_trained

TARGET = Path(__file__).parent / "_static" / "overview.png"
LINK = TARGET.with_name("link.png")
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


def draw_link(base: Base) -> Figure:
    """Return the picture for links, 1200 x 630: words alone, a learned word, a painted lesion."""
    large = load_trained("chest", "cardiomegaly", base)
    words = [load_trained("prostate", label, base) for label in ("tumour", "healthy")]
    case = make_phantoms("prostate", "healthy", 1, split="test").images
    painted = inpaint(
        base,
        case,
        ellipse(CENTRE, RADII, size=base.size),
        words[0].token,
        embeddings=words,
        cfg_scale=10.0,
        negative_prompt=words[1].token,
    )
    t2w = torch.cat([case[:, :1], painted[:, :1], painted[:, 1:2], painted[:, 2:]])
    alone = sample(base, PROMPT, n=4).float().mean(1, keepdim=True).to(torch.uint8)
    panels = {
        "words alone fail": alone,
        "one learned word": sample(base, large.token, embeddings=[large], n=4),
        "a lesion, painted in": t2w,
    }
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    figure.text(
        0.03, 0.885, "Teach Stable Diffusion a disease with 100 images", size=27, weight="bold"
    )
    for i, (head, images) in enumerate(panels.items()):
        left = 0.03 + i * 0.325
        figure.text(left, 0.8, head, size=19, color=BLUE, weight="bold")
        axes = figure.add_axes((left, 0.1, 0.3, 0.66))
        grid = make_grid(images.expand(-1, 3, -1, -1), columns=2)
        axes.imshow(grid.permute(1, 2, 0), interpolation="bicubic")
        axes.set_anchor("W")
        axes.set_axis_off()
    note = "Synthetic images and one phantom, base tiny. Not for clinical use."
    figure.text(0.03, 0.03, note, size=13, color=GRAY)
    return figure


def main() -> None:
    base = load_base("tiny", device="cpu")
    draw_link(base).savefig(LINK, metadata={"base_hash": base.hash})
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
