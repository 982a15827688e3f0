"""Make the embedded base of 128 px: ``python -m pretraining.all --work DIR --device cuda --minutes 25``.

Three parts, each within ten minutes of a GPU if the whole takes 25, and each resumable:

1. The corpus, drawn by all cores, and an autoencoder of 128 px around the latents of the base that
   is in the package (`pretraining.decoder`).
2. The U-Net and the text encoder, which go on from the package's, on the latents of the corpus.
3. The decoder again, on latents as the new U-Net leaves them; then the weights go into the package.

``--part`` takes one part alone. ``--pieces DIR`` puts what a part has made into files of at most
15 MiB, and takes up what it finds there before it begins. On a CPU the same program runs with more
minutes, at low priority.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from medbudget import load_base
from medbudget.files import atomic_path
from medbudget.progress import tqdm
from medbudget.runs import Steps, Stopped
from pretraining import train
from pretraining.decoder import SIZE, DecoderRun
from pretraining.export import WEIGHTS, export, export_decoder
from pretraining.pictures import draw_siblings

SHARES = (9 / 25, 9 / 25, 7 / 25)  # of the minutes, for each part
SIBLINGS = 4  # images of each scene or concept
SHARD = 512  # scenes in a file of pictures
PIECE = 15 * 2**20  # bytes
KEPT = ("decoder.ckpt", "unet.ckpt", "scale.json", "unet.csv", "decoder.csv")


def draw_shard(folder: Path, clipart: str, number: int) -> None:
    """Draw ``pictures-NNN.npy``, ``(SHARD * SIBLINGS, 3, 128, 128) uint8``, unless it is there."""
    path = folder / f"pictures-{number:03}.npy"
    if not path.exists():
        scenes = range(number * SHARD, (number + 1) * SHARD)
        drawn = np.concatenate([draw_siblings(i, SIBLINGS, SIZE, clipart) for i in scenes])
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, drawn)


def draw_pictures(work: Path, args: argparse.Namespace) -> ProcessPoolExecutor:
    """Let processes draw the shards, and return once the first is there."""
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"))
    futures = [pool.submit(draw_shard, work, args.clipart, i) for i in range(args.shards)]
    futures[0].result()
    return pool


def load_shards(work: Path, device: torch.device, taken: list[torch.Tensor], limit: int) -> None:
    """Add the shards of pictures that are complete to `taken`, on the device."""
    for path in sorted(work.glob("pictures-*.npy"))[len(taken) : limit]:
        array = torch.from_numpy(np.load(path, mmap_mode="c"))
        taken.append(array if device.type == "cpu" else array.to(device))


def train_decoder(work: Path, args: argparse.Namespace, minutes: float, unet: Any = None) -> None:
    """Train the autoencoder of 128 px for some minutes, of which the last third fades out."""
    base = load_base("tiny", device=args.device)
    if unet is not None:
        base.unet.load_state_dict(unet)
    run = DecoderRun(base, args.batch, args.lr)
    identity = {"base": base.hash, "batch": args.batch, "lr": args.lr}
    shards: list[torch.Tensor] = []
    started = time.monotonic()
    steps = Steps(run, 10**9, checkpoint=work / "decoder.ckpt", identity=identity, every=500,
                  desc="decoder")  # fmt: skip
    try:
        for step in steps:
            if step % 100 == 0 or not shards:
                load_shards(work, run.device, shards, args.shards)
            spent = (time.monotonic() - started) / (60 * minutes)
            pictures = shards[np.random.default_rng([17, step]).integers(len(shards))]
            run.train(pictures, fade=min(1.0, max(0.0, 3 * (1 - spent))))
            if spent >= 1:
                steps.signals.append(signal.SIGALRM)  # saves, and ends the loop
    except Stopped as stopped:
        if stopped.number != signal.SIGALRM:
            raise
        print(f"decoder: {run.step} steps", flush=True)


def mix_corpus(work: Path, args: argparse.Namespace) -> None:
    """Write ``images.npy`` of 64 px and captions: captioned concepts, then pictures without words."""
    if (work / "mixed").exists():
        return
    train.draw_corpus(work, concepts=args.concepts, images=SIBLINGS, seed=0, workers=args.workers)
    parts = [np.load(work / "images.npy", mmap_mode="r")]
    for path in tqdm(sorted(work.glob("pictures-*.npy"))[: args.shards], desc="halve"):
        pictures = torch.from_numpy(np.load(path, mmap_mode="c"))
        halved = [F.avg_pool2d(batch.float(), 2) for batch in pictures.split(256)]
        parts.append(torch.cat(halved).round().byte().numpy())
    captions = json.loads((work / "captions.json").read_text(encoding="utf-8"))
    captions += [""] * (sum(map(len, parts[1:])) // SIBLINGS)
    # scenes and concepts in a random order, so that the held-out first part has both
    order = np.random.default_rng(5).permutation(len(captions))
    images = np.concatenate(parts).reshape(-1, SIBLINGS, 3, 64, 64)[order]
    with atomic_path(work / "images.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, images.reshape(-1, 3, 64, 64))
    (work / "captions.json").write_text(json.dumps([captions[i] for i in order]))
    (work / "mixed").touch()


def run_decoder(work: Path, args: argparse.Namespace, minutes: float) -> None:
    """Part 1: the corpus, and the autoencoder beside it."""
    started = time.monotonic()
    pool = draw_pictures(work, args)
    train_decoder(work, args, minutes - (time.monotonic() - started) / 60)
    pool.shutdown()


def run_unet(work: Path, args: argparse.Namespace, minutes: float) -> None:
    """Part 2: latents of the corpus, then U-Net and text encoder."""
    started = time.monotonic()
    draw_pictures(work, args).shutdown()
    mix_corpus(work, args)
    settings = SimpleNamespace(
        device=args.device, bf16=True, seed=0, steps=0, decay=1, batch=args.unet_batch, lr=1e-3,
        low=0.5, ema=0.998, save_every=1000, start=True, minutes=None,
    )  # fmt: skip
    if not (work / "latents.npy").exists():
        train.encode_corpus(work, settings)
    settings.minutes = max(0.1, minutes - (time.monotonic() - started) / 60)
    train.train_unet(work, settings)


def run_export(work: Path, args: argparse.Namespace, minutes: float) -> None:
    """Part 3: the decoder behind the new U-Net, and the weights into the package."""
    state = torch.load(work / "unet.ckpt", map_location="cpu", weights_only=True)
    train_decoder(work, args, minutes, unet=state["ema"]["unet"])
    export_decoder(work / "decoder.ckpt")  # first: it belongs to the base that the package has
    export(work)


PARTS: tuple[Callable[[Path, argparse.Namespace, float], None], ...] = (
    run_decoder, run_unet, run_export,
)  # fmt: skip


def take_pieces(pieces: Path, work: Path) -> None:
    """Join the files that `put_pieces` has cut, unless the folder has them already."""
    for name in KEPT:
        cut = sorted(pieces.glob(f"{name}.[0-9][0-9]"))
        if cut and not (work / name).exists():
            with atomic_path(work / name) as temporary, open(temporary, "wb") as file:
                for piece in cut:
                    file.write(piece.read_bytes())


def put_pieces(work: Path, pieces: Path) -> None:
    """Cut what a later part or a longer training needs into files of at most 15 MiB."""
    pieces.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (work / name).exists():
            content = (work / name).read_bytes()
            for number, start in enumerate(range(0, len(content), PIECE)):
                (pieces / f"{name}.{number:02}").write_bytes(content[start : start + PIECE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=25, help="of all three parts together")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="only this one")
    parser.add_argument("--pieces", type=Path, help="folder for what has been made, in small files")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the corpus")
    parser.add_argument("--shards", type=int, default=24, help="files of 2048 pictures")
    parser.add_argument("--concepts", type=int, default=16_000, help="captioned ones, 64 px")
    parser.add_argument("--batch", type=int, default=16, help="decoder")
    parser.add_argument("--unet-batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4, help="decoder")
    parser.add_argument("--clipart", default="", help="folder of public-domain clip art")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pieces:
        take_pieces(args.pieces, args.work)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    for number, (part, share) in enumerate(zip(PARTS, SHARES), 1):
        if args.part in (None, number):
            print(f"part {number} of 3: {share * args.minutes:.1f} minutes", flush=True)
            part(args.work, args, share * args.minutes)
            if args.pieces:
                put_pieces(args.work, args.pieces)
    if args.pieces and args.part in (None, 3):
        shutil.copytree(WEIGHTS, args.pieces / "weights", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
