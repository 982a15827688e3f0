"""Which settings of `inpaint` put a lesion under every mask? Measured by the phantom's own rule.

One setting at a time is changed. Each healthy phantom is painted at two places in three sizes; a
lesion is found where `find_tumours` holds in a third of the mask. Beside it: the border's
steepness, and how far the painted colour is from that of true tumours.

    python benchmarks/inpainting.py [--n 16] [--seed 0] [--record]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from medbudget import ellipse, inpaint, load_base, make_phantoms
from medbudget.base import Base
from medbudget.data.phantoms import find_tumours
from medbudget.results import write_result
from medbudget.sampling.masks import check_masks, seam_ratio
from medbudget.tiny import load_trained

PLACES = {"left": (0.4, 0.57), "right": (0.6, 0.57)}  # of the peripheral zone
RADII = (0.07, 0.09, 0.11)  # phantoms' tumours: 0.036 to 0.11
FINAL: dict[str, Any] = {
    "cfg_scale": 10.0, "away from": "healthy", "strength": 0.75, "content": "original", "steps": 25,
    "mask_blur": 4.0,
}  # fmt: skip
GRID: dict[str, tuple[Any, ...]] = {
    "cfg_scale": (2.0, 4.0, 6.0, 10.0, 15.0, 20.0),
    "away from": ("healthy", "nothing"),
    "strength": (0.3, 0.4, 0.5, 0.75, 1.0),
    "content": ("original", "fill", "noise", "zeros"),
    "steps": (10, 25, 50),
    "mask_blur": (0.0, 4.0, 8.0),
}


def make_masks(size: int) -> torch.Tensor:
    """Return the six masks ``(6, H, H)``: three sizes at the first place, then at the second."""
    drawn = [ellipse(place, (r, 0.8 * r)) for place in PLACES.values() for r in RADII]
    return check_masks(torch.stack(drawn), size)


def colour(images: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    """Return the mean colour under each mask, ``(N, 3)`` gray levels."""
    share = masks.float()[:, None]
    return ((images * share).sum((2, 3)) / share.sum((2, 3))).numpy()


def is_found(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Tell in which images the rule holds in a third of the mask, ``(N,) bool``."""
    return (find_tumours(images) & masks).sum((1, 2)) / masks.sum((1, 2)) > 1 / 3


def measure(base: Base, settings: dict[str, Any], *, n: int, seed: int) -> dict[str, Any]:
    """Paint `n` healthy phantoms under six masks each; return what was found."""
    words = [load_trained("prostate", label, base) for label in ("tumour", "healthy")]
    held = {"size": base.size, "split": "test"}  # neither word has learned from these
    healthy = make_phantoms("prostate", "healthy", n, seed=seed, **held).images
    true = make_phantoms("prostate", "tumour", 100, **held)
    masks = make_masks(base.size)
    options = dict(settings)
    if options.pop("away from") == "healthy":
        options["negative_prompt"] = words[1].token
    made = inpaint(
        base, healthy.repeat_interleave(len(masks), 0), masks.repeat(n, 1, 1), words[0].token,
        embeddings=words, seed=seed, **options,
    )  # fmt: skip
    under = masks.repeat(n, 1, 1) >= 0.5
    found = is_found(made, under).view(n, -1)
    cells = [f"{place} {radius:g}" for place in PLACES for radius in RADII]
    shades = colour(made, under) - colour(true.images, true.masks).mean(0)
    return {
        "found": {cell: int(k) for cell, k in zip(cells, found.sum(0))},
        "share": float(found.float().mean()),
        "all": int(found.all(1).sum()),
        "n": n,
        "seam": float(seam_ratio(made, masks.repeat(n, 1, 1)).mean()),
        "off_colour": float(np.linalg.norm(shades.reshape(n, -1, 3).mean(0), axis=1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16, help="healthy phantoms, each under six masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/inpainting.json")
    args = parser.parse_args()
    base = load_base("tiny")
    rows: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for name, tried in GRID.items():
        for value in tried:
            settings = FINAL | {name: value}
            key = repr(sorted(settings.items()))
            if key not in done:
                done[key] = measure(base, settings, n=args.n, seed=args.seed)
            rows.append({"setting": name, "value": value, **done[key]})
            print(rows[-1], flush=True)
    if args.record:
        command = f"python benchmarks/inpainting.py --n {args.n} --seed {args.seed} --record"
        true = make_phantoms("prostate", "tumour", 100, size=base.size, split="test")
        seam = float(seam_ratio(true.images, true.masks).mean())
        found = float(is_found(true.images, true.masks).float().mean())
        values = {"final": FINAL, "true_seam": seam, "true_found": found, "rows": rows}
        print(f"wrote {write_result('inpainting', values, command=command, base_hash=base.hash)}")


if __name__ == "__main__":
    main()
