"""Claim: Stable Diffusion 2.0 at full size runs through every step here, in the memory counted.

Seeded random weights of the exact architecture (`sd2-random`), 512 px, on the CPU in float32: two
steps of Textual Inversion with checkpointing, one image in two sampling steps. Says nothing about
speed on a GPU, and nothing about quality.

    python benchmarks/full_size.py [--base sd2-random] [--out benchmarks/results/full_size.json]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from medbudget import InversionSettings, invert, load_base, make_phantoms, sample
from medbudget.files import write_json
from medbudget.results import describe_device


def peak() -> float:
    """Return the most memory that this process has had, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(name: str) -> dict[str, Any]:
    """Load, train two steps, draw one image; return times, losses and the peak after each."""
    rows: dict[str, Any] = {"peak before loading, GiB": peak()}
    start = time.perf_counter()
    base = load_base(name, device="cpu")
    rows["load, s"] = time.perf_counter() - start
    rows["peak after loading, GiB"] = peak()
    images = make_phantoms("prostate", "tumour", 2, size=base.size).images
    base.unet.enable_gradient_checkpointing()
    losses: list[float] = []
    start = time.perf_counter()
    word = invert(
        base,
        images,
        token="<x>",
        settings=InversionSettings.preset("paper", steps=2),
        callback=lambda state: losses.append(state["loss"]),
    )
    rows["two TI steps and encoding two images, s"] = time.perf_counter() - start
    rows["losses"] = [round(loss, 5) for loss in losses]
    rows["peak after training, GiB"] = peak()
    base.unet.disable_gradient_checkpointing()
    start = time.perf_counter()
    image = sample(base, "<x>", embeddings=[word], n=1, steps=2)
    rows["one image in two steps, s"] = time.perf_counter() - start
    rows["peak after sampling, GiB"] = peak()
    rows["image"] = {"shape": list(image.shape), "std": round(float(image.float().std()), 2)}
    rows["base hash"] = base.hash
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print what was measured, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sd2-random")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    rows = run(args.base)
    rows = {name: round(v, 3) if isinstance(v, float) else v for name, v in rows.items()}
    for name, value in rows.items():
        print(f"{name:<55}{value}")
    if args.out:
        versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
        record = {
            "date": date.today().isoformat(),
            "device": describe_device(),
            "command": f"python benchmarks/full_size.py --base {args.base} --out {args.out}",
            "versions": versions,
            "rows": rows,
        }
        write_json(args.out, record)
    return rows


if __name__ == "__main__":
    main()
