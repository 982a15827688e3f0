"""Pretrain the networks that ship, on the corpus of the tiny base:

``python -m pretraining.train corpus --work DIR --images 2``, then
``python -m pretraining.gan --work DIR``. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medbudget.images import save_images
from medbudget.stylegan3.model import PRETRAINED, TINY, WEIGHTS, make_stylegan3
from medbudget.stylegan3.training import StyleGAN3Settings, train_stylegan3

SETTINGS = StyleGAN3Settings(
    batch_size=16, gamma=0.1, ema_kimg=5, ema_rampup=0.05, magnitude_kimg=5, ada_target=0,
    mbstd_group=4, snapshot_kimg=2,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of images.npy")
    parser.add_argument("--kimg", type=float, default=100, help="thousands of images to see")
    parser.add_argument("--out", type=Path, default=WEIGHTS / f"{PRETRAINED}.safetensors")
    args = parser.parse_args()
    images = torch.from_numpy(np.load(args.work / "images.npy"))

    def look(state: dict[str, Any]) -> None:
        if state["snapshot"] is not None:
            name = f"{state['images_seen']:08d}"
            made = state["snapshot"].sample(64)
            rows = [torch.cat(list(made[i : i + 8]), 2) for i in range(0, 64, 8)]
            save_images(torch.cat(rows, 1)[None], args.work / "snapshots", names=[name])
            print(name, state["snapshot"].record["history"][-1], flush=True)

    model = train_stylegan3(
        images,
        replace(SETTINGS, kimg=args.kimg),
        start=make_stylegan3(TINY, replace(TINY, channel_max=128)),
        checkpoint=args.work / "stylegan3.ckpt",
        callback=look,
        data=f"{len(images)} images of the tiny base's corpus",
    )
    model.save(args.out)
    print(f"wrote {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
