"""Claim: StyleGAN3 out of ordinary PyTorch operations trains at a useful speed.

Images per second of the generator and of a whole training iteration (both networks, lazy R1
spread over its 16 iterations), and the share of the generator's time that goes into its filtered
non-linearities. On a GPU also channels_last, bfloat16 and torch.compile; there the goal is at most
twice the published 90 s per 1000 images (A100, batch 32, 512 px, configuration T, mixed precision,
their own kernels). `--memory` counts, without a GPU, how much memory an iteration takes on one: the
largest sum of all tensors that are alive at the same time, on PyTorch's device without numbers.

    python benchmarks/stylegan3.py [--size 64] [--batch 8] [--device cpu] [--record]
    python benchmarks/stylegan3.py --size 512 --batch 32 --device cuda --record
    python benchmarks/stylegan3.py --size 512 --batch 4 --memory
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import MemoryCounter

from medbudget.results import describe_device, write_result
from medbudget.stylegan3 import (
    TINY,
    Architecture,
    Discriminator,
    Generator,
    StyleGAN3,
    StyleGAN3Settings,
    make_stylegan3,
)
from medbudget.stylegan3.training import Trainer

PUBLISHED = 90.0  # seconds per 1000 images, one A100: the table in StyleGAN3's own documentation
VARIANTS = {
    "cpu": ("float32",),
    "cuda": ("float32", "channels_last", "bfloat16", "bfloat16, generator compiled"),
}


def seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Time a call after two to warm up."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        run()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def filter_share(generator: Generator, batch: int, repeats: int, device: str) -> float:
    """Return the filtered non-linearities' share of the generator's forward and backward time."""
    z = torch.randn(batch, generator.architecture.width, device=device)
    whole = seconds(lambda: generator(z).square().mean().backward(), repeats, device)
    canvas, part = generator.input.canvas, 0.0
    for layer in generator.layers:
        x = torch.randn(
            batch, layer.weight.shape[0], canvas, canvas, device=device, requires_grad=True
        ).to(memory_format=torch.channels_last)

        def run(layer: Any = layer, x: torch.Tensor = x) -> None:
            layer.activate(x).square().mean().backward()

        part += seconds(run, repeats, device)
        canvas = layer.canvas
    return part / whole


def measure(trainer: Trainer, variant: str, batch: int, repeats: int, device: str) -> dict:
    """Return the speed of one variant."""
    if "compiled" in variant:
        trainer.generator.compile()  # R1 differentiates the discriminator twice: not compiled
    if variant != "float32":
        trainer.generator.to(memory_format=torch.channels_last)
        trainer.discriminator.to(memory_format=torch.channels_last)
    context = (
        torch.autocast(device, torch.bfloat16)
        if "bfloat16" in variant
        else contextlib.nullcontext()
    )
    z = torch.randn(batch, trainer.generator.architecture.width, device=device)
    with context:
        with torch.no_grad():
            forward = seconds(lambda: trainer.generator(z), repeats, device)
        every = trainer.settings.r1_every
        step = seconds(lambda: trainer.iterate(), max(1, round(repeats / every)) * every, device)
    return {
        "forward, images/s": batch / forward,
        "training, images/s": batch / step,
        "training, s per 1000 images": 1000 * step / batch,
    }


def count_memory(size: int, batch: int) -> int:
    """Return the bytes that an iteration with R1 takes: networks, moments, gradients, activations."""
    with torch.device("meta"):
        networks = Generator(Architecture(size)), Discriminator(Architecture(size))
    settings = StyleGAN3Settings.preset("paper", batch_size=batch, ada_target=0)
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
    trainer = Trainer(images, StyleGAN3(*networks, {}), settings, "meta")
    with MemoryCounter() as counter:
        for network in (trainer.generator, trainer.discriminator, trainer.average):
            for tensor in network.state_dict().values():
                counter.add(tensor)
        for _ in range(2):  # the moments are there after the first
            trainer.step = 0
            trainer.iterate()
    return counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=64, choices=(64, 256, 512, 1024))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--record", action="store_true", help="write results/stylegan3_speed_….json"
    )
    parser.add_argument("--memory", action="store_true", help="count memory, and end")
    args = parser.parse_args()
    if args.memory:
        peak = count_memory(args.size, args.batch) / 2**30
        print(f"{args.size} px, batch {args.batch}: {peak:.2f} GiB beside the driver's own")
        if args.record:
            values = {"size": args.size, "batch": args.batch, "gib": round(peak, 2)}
            command = f"python benchmarks/stylegan3.py --size {args.size} --batch {args.batch}"
            write_result(
                "stylegan3_memory", values, command=f"{command} --memory --record", device="meta"
            )
        return
    architecture = TINY if args.size == 64 else Architecture(size=args.size)
    images = torch.randint(0, 256, (100, 3, args.size, args.size), dtype=torch.uint8)
    settings = StyleGAN3Settings.preset(
        "tiny" if args.size == 64 else "paper", batch_size=args.batch
    )
    rows: dict[str, dict[str, float]] = {}
    for variant in VARIANTS[args.device]:
        trainer = Trainer(images, make_stylegan3(architecture), settings, args.device)
        trainer.p = 0.3  # augmentation as in a run under way
        rows[variant] = measure(trainer, variant, args.batch, args.repeats, args.device)
        print(variant, {k: round(v, 2) for k, v in rows[variant].items()}, flush=True)
    generator = make_stylegan3(architecture).generator.to(args.device)
    share = filter_share(generator, args.batch, args.repeats, args.device)
    print(f"filtered non-linearities: {share:.0%} of the generator's forward and backward time")
    values = {"size": args.size, "batch": args.batch, "variants": rows, "filter share": share}
    if args.size == 512:
        best = min(row["training, s per 1000 images"] for row in rows.values())
        values["published A100, s per 1000 images"] = PUBLISHED
        values["ratio to published (goal 2)"] = best / PUBLISHED
        print(f"best / published: {best / PUBLISHED:.2f} (goal 2, on comparable hardware)")
    if args.record:
        command = (
            f"python benchmarks/stylegan3.py --size {args.size} --batch {args.batch} "
            f"--repeats {args.repeats} --device {args.device} --record"
        )
        device = describe_device()
        if args.device == "cuda":
            device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        name = f"stylegan3_speed_{args.size}_{args.device}"
        print(f"wrote {write_result(name, values, command=command, device=device)}")


if __name__ == "__main__":
    main()
