"""Claim: a Textual Inversion step costs little more than the networks that it must run.

Side by side in one run, same base, same batch: our step; what diffusers' example does (AdamW over
the whole token table, the other rows restored after each step, the VAE at every step); and the
floor (text encoder and U-Net forward and backward, nothing else).

    python benchmarks/inversion.py [--steps 30] [--batch 8] [--record]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medbudget import InversionSettings, invert, load_base, make_phantoms, sample
from medbudget.base import Base
from medbudget.results import write_result


def make_diffusers_step(base: Base, images: torch.Tensor, batch: int) -> Callable[[], None]:
    """Return the step of diffusers' example script, on the same parts."""
    table = base.text_encoder.get_input_embeddings().weight
    table.requires_grad_(True)
    keep = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=1e-3, weight_decay=1e-2)
    tokens = torch.tensor([[0, *range(5, 69), 1, *[2] * 11]])
    trained = torch.zeros(len(table), dtype=torch.bool)
    trained[5:69] = True
    pixels = images.float() / 127.5 - 1

    def step() -> None:
        pick = torch.randint(len(images), (batch,))
        with torch.no_grad():
            z = base.vae.encode(pixels[pick]).latent_dist.sample() * base.vae.config.scaling_factor
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (batch,))
        a = base.alphas_cumprod[t].view(-1, 1, 1, 1)
        context = base.text_encoder(tokens.expand(batch, -1)).last_hidden_state
        predicted = base.predict_noise(a.sqrt() * z + (1 - a).sqrt() * noise, t, context)
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[~trained] = keep[~trained]

    return step


def make_floor_step(base: Base, batch: int) -> Callable[[], None]:
    """Return text encoder and U-Net, forward and backward to the vectors, on fixed inputs."""
    vectors = torch.randn(64, base.width, requires_grad=True)
    z, noise = torch.randn(2, batch, *base.latent_shape())
    t = torch.randint(0, 1000, (batch,))

    def step() -> None:
        context = base.text(vectors).expand(batch, -1, -1)
        loss = F.mse_loss(base.predict_noise(z, t, context), noise)
        torch.autograd.grad(loss, vectors)

    return step


def seconds_per_step(step: Callable[[], None], steps: int) -> float:
    """Time a step after three to warm up."""
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Print the table; record it if --record says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="write results/inversion.json")
    args = parser.parse_args()
    base = load_base("tiny", device="cpu")
    images = make_phantoms("prostate", "tumour", 100).images
    settings = InversionSettings.preset("tiny", steps=args.steps + 3, batch_size=args.batch)
    times: list[float] = []
    invert(
        base,
        images,
        token="<x>",
        settings=settings,
        callback=lambda state: times.append(time.perf_counter()),
    )
    ours = (times[-1] - times[2]) / args.steps
    floor = seconds_per_step(make_floor_step(base, args.batch), args.steps)
    theirs = seconds_per_step(make_diffusers_step(base, images, args.batch), args.steps)
    start = time.perf_counter()
    sample(base, "", n=100)
    sampling = time.perf_counter() - start
    rows = {
        "ours, ms per step": ours * 1e3,
        "diffusers' way, ms per step": theirs * 1e3,
        "floor, ms per step": floor * 1e3,
        "diffusers' way / ours (goal 1.3)": theirs / ours,
        "floor / ours (goal 0.95)": floor / ours,
        "1000 steps, s (goal 120 at batch 8)": ours * 1e3,
        "100 images of 25 steps, s (goal 30)": sampling,
        "peak memory of all, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(f"tiny base {base.hash}, batch {args.batch}, {torch.get_num_threads()} threads")
    for name, value in rows.items():
        print(f"{name:<40}{value:>10.2f}")
    if args.record:
        values = {
            "torch": torch.__version__,
            "rows": {name: round(value, 3) for name, value in rows.items()},
        }
        command = (
            f"python benchmarks/inversion.py --steps {args.steps} --batch {args.batch} --record"
        )
        print(f"wrote {write_result('inversion', values, command=command)}")


if __name__ == "__main__":
    main()
