"""Draw the first page's strip and slider: gray images, made on the embedded base from phantoms.

``python book/first_page.py`` writes ``first_page.html``; the hash of the base that drew it stands
in the file, and a test refuses it when the base has changed.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import torch
from PIL import Image

from medbudget import Base, Embedding, ellipse, inpaint, load_base, make_phantoms, sample
from medbudget.tiny import load_trained
from medbudget.widgets import show_frames

TARGET = Path(__file__).parent / "first_page.html"
PROMPT = (  # the best of twenty for chests, as benchmarks/tiny_base.py lists them
    "faint gray silver coarse field mirrored ground pair large charcoal ellipse left "
    "white bar center medium silver ellipse bottom"
)
CENTRE, RADII = (0.41, 0.58), (0.09, 0.07)  # of the painted lesion, in shares of the image
SEQUENCES = ("T2W", "ADC", "DWI")
N = 4  # images in a row


def write_image(gray: torch.Tensor, alt: str, label: str = "", *, outlined: bool = False) -> str:
    """Return a gray image ``(H, W) uint8`` as HTML, with the place of the lesion if asked for."""
    file = io.BytesIO()
    Image.fromarray(gray.numpy()).save(file, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    (x, y), (rx, ry) = CENTRE, RADII
    ring = f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}"/>'
    drawn = f'<svg viewBox="0 0 1 1" aria-hidden="true">{ring}</svg>' if outlined else ""
    text = f"<span>{label}</span>" if label else ""
    return f'<div class="strip-cell"><img src="{source}" alt="{alt}">{drawn}{text}</div>'


def write_row(heading: str, text: str, cells: list[str]) -> str:
    return (
        f'<div class="strip-row"><p><strong>{heading}</strong> {text}</p>'
        f'<div class="strip-cells">{"".join(cells)}</div></div>'
    )


def draw_strip(base: Base) -> list[str]:
    """Return the rows: words alone fail, one learned word, a lesion painted in."""
    alone = sample(base, PROMPT, n=N)
    large = load_trained("chest", "cardiomegaly", base)
    learned = sample(base, large.token, embeddings=[large], n=N)
    healthy, tumour = (load_trained("prostate", k, base) for k in ("healthy", "tumour"))
    phantom = make_phantoms("prostate", "healthy", 1, split="test").images
    painted = inpaint(
        base,
        phantom,
        ellipse(CENTRE, RADII, size=base.size),
        tumour.token,
        embeddings=[healthy, tumour],
        cfg_scale=10.0,
        negative_prompt=healthy.token,
    )
    return [
        write_row(
            "Words alone fail.",
            "Asked in the model’s own words for dark ellipses left and right and a white bar "
            "between them, it draws shapes, never a chest.",
            [write_image(_gray(x), "Gray shapes without a chest.") for x in alone],
        ),
        write_row(
            "One new word, learned from 100 cases.",
            f"The same model, told <code>{html.escape(large.token)}</code>: chests with a large heart, "
            "each a different one.",
            [write_image(_gray(x), "A chest with ribs and a large heart.") for x in learned],
        ),
        write_row(
            "A lesion, painted in.",
            "A healthy prostate phantom, the chosen place, and the tumour that the word painted "
            "there: bright on DWI, a little darker on ADC. Nothing outside has changed.",
            [
                write_image(
                    phantom[0, 0],
                    "A healthy prostate phantom with an outlined place.",
                    "T2W, before",
                    outlined=True,
                ),
                *(
                    write_image(painted[0, i], f"The painted tumour on {name}.", name)
                    for i, name in enumerate(SEQUENCES)
                ),
            ],
        ),
    ]


def draw_slider(base: Base) -> str:
    """Return the axis from healthy to a large heart, as a slider that needs no Python."""
    words: list[Embedding] = [load_trained("chest", k, base) for k in ("healthy", "cardiomegaly")]
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    frames = {
        f"{share:.0%}": sample(
            base,
            f"{words[0].token}:{1 - share} AND {words[1].token}:{share}",
            embeddings=words,
            n=3,
        )
        for share in shares
    }
    return str(
        show_frames(
            frames,
            label="large heart",
            alt="Three chests from the same seeds.",
            caption="Synthetic; base tiny, 64 px, from phantoms. Move it: no code runs.",
            start=2,
            columns=3,
        ).data
    )


def _gray(image: torch.Tensor) -> torch.Tensor:
    """Return the mean of the channels, ``(H, W) uint8``."""
    return image.float().mean(0).round().to(torch.uint8)


def main() -> None:
    base = load_base("tiny", device="cpu")
    parts = [f"<!-- base {base.hash} -->", '<div class="strip">', *draw_strip(base), "</div>"]
    TARGET.write_text("\n".join([*parts, draw_slider(base)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
