"""Claim under test: TI on real chest X-rays that nobody here drew beats words on the tiny base.

For each class: 100 images to learn from, 200 others to compare with; Frechet distances of 100
synthetic images from Textual Inversion, from the described mean of the 100 and from plain words,
beside the real-versus-real floor.

    python benchmarks/real_xrays.py FOLDER [--steps 1000] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from medbudget import InversionSettings, describe, evaluate, invert, load_base, load_images, sample
from medbudget.images import find_images, make_grid, to_pil

PLAIN = "grainy silver ground pair large charcoal ellipse left medium white bar center"


def main() -> None:
    """Print a score a line; write a grid of real and synthetic images where --grid says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with one folder for each class")
    parser.add_argument("--classes", nargs="*", default=["normal", "pneumonia"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    base = load_base("tiny")
    rows = []
    for label in args.classes:
        files = find_images(args.folder / label)
        train = load_images(files[:100], size=base.size)
        real = load_images(files[100:300], size=base.size)
        start = time.perf_counter()
        settings = InversionSettings.preset("tiny", steps=args.steps)
        embedding = invert(base, train, token=f"<{label}>", settings=settings)
        print(f"{label}: {args.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
        prompts = {
            "TI": embedding.token,
            "described mean": describe(base, train),
            "plain words": PLAIN,
        }
        rows.append(real[:10])
        for name, prompt in prompts.items():
            made = sample(base, prompt, embeddings=[embedding], n=args.n)
            rows.append(made[:10])
            for score in evaluate(real, made):
                if name == "TI" or "real vs real" not in score.name:
                    print(f"{label}, {name}: {score}", flush=True)
    if args.grid:
        to_pil(make_grid(torch.cat(rows), columns=10)).save(args.grid)


if __name__ == "__main__":
    main()
