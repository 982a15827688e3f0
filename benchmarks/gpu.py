"""Claims: on a GPU our steps cost little more than the networks, and less than diffusers' way.

One table in one run: Textual Inversion and sampling with Stable Diffusion 2.0's architecture at
512 px (random weights: speed and memory do not depend on them), ours beside diffusers' way, beside
the floor (the same networks, nothing else), with peak memory and the share of the matrix-multiply
ceiling measured in the same run. Needs no download.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json            # under 8 minutes
    python benchmarks/gpu.py --device cpu --small                         # dry run, seconds
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

from medbudget import Embedding, InversionSettings, invert, load_base, make_phantoms, sample
from medbudget.architectures import build_networks, read_architectures
from medbudget.base import Base
from medbudget.files import write_json
from medbudget.results import describe_device

GOALS = {
    "50,000 steps at batch 1, minutes": "under 15",
    "diffusers' loop / ours": "at least 1.8",
    "1000 images of 100 steps, minutes": "under 12",
    "diffusers' pipeline / ours": "at least 1.3",
    "invert at batch 1, GiB": "under 8",
    "invert with checkpointing, GiB": "under 6",
    "sample at batch 1, GiB": "under 5",
}


class Bench:
    """Rows of one table; each measurement warms up, then times until `seconds` have passed."""

    def __init__(self, device: torch.device, seconds: float, deadline: float) -> None:
        self.device, self.seconds, self.deadline = device, seconds, deadline
        self.rows: list[dict[str, Any]] = []
        self.ceiling = 0.0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / 2**30

    def time(self, step: Callable[[], Any], *, warm: int = 2, most: int = 200) -> float:
        """Return seconds a step."""
        for _ in range(warm):
            step()
        self.synchronize()
        start, done = time.perf_counter(), 0
        while done < most and (done < 2 or time.perf_counter() - start < self.seconds):
            step()
            self.synchronize()
            done += 1
        return (time.perf_counter() - start) / done

    def add(
        self, name: str, batch: int, measure: Callable[[], float], flops: float | None = None
    ) -> float | None:
        """Measure one row, unless the time is up or the memory does not suffice: it says which."""
        row: dict[str, Any] = {"name": name, "batch": batch}
        self.rows.append(row)
        if time.perf_counter() > self.deadline:
            row["note"] = "skipped: time was up"
            return None
        self.reset()
        try:
            seconds = measure()
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
            return None
        row["ms"] = round(seconds * 1e3, 3)
        row["images per s"] = round(batch / seconds, 3)
        peak = self.peak()
        row["peak GiB"] = None if peak is None else round(peak, 3)
        if flops and self.ceiling:
            row["share of ceiling"] = round(flops / seconds / self.ceiling, 3)
        return seconds


def measure_ceiling(bench: Bench, dtype: torch.dtype, size: int) -> float:
    """Return FLOP/s of one large matrix product: what no network exceeds."""
    a, b = torch.randn(2, size, size, device=bench.device).to(dtype)
    return 2 * size**3 / bench.time(lambda: a @ b, most=50)


def make_inputs(base: Base, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, times and a context of the text encoder's shape."""
    z = torch.randn(batch, *base.latent_shape(), device=base.device)
    t = torch.randint(0, 1000, (batch,), device=base.device)
    return z, t, torch.randn(batch, 77, base.width, device=base.device, dtype=base.dtype)


def make_floor_step(base: Base, batch: int) -> Callable[[], Any]:
    """Return text encoder and U-Net, forward and backward to the vectors, on fixed inputs."""
    vectors = torch.randn(64, base.width, device=base.device, requires_grad=True)
    z, t, _ = make_inputs(base, batch)

    def step() -> Any:
        context = base.text(vectors).expand(batch, -1, -1)
        return torch.autograd.grad(F.mse_loss(base.predict_noise(z, t, context), z), vectors)

    return step


def make_diffusers_step(base: Base, images: torch.Tensor, batch: int) -> Callable[[], None]:
    """Return the step of diffusers' example: the whole token table, and the VAE each time.

    As its mixed precision does: the text encoder in float32 under autocast, the rest in half.
    """
    text = copy.deepcopy(base.text_encoder).float()
    table = text.get_input_embeddings().weight
    table.requires_grad_(True)
    keep = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=1e-3, weight_decay=1e-2)
    tok = base.tokenizer
    places = torch.arange(1000, 1064, device=base.device)
    row = [tok.bos_token_id, *places.tolist(), tok.eos_token_id, *[tok.pad_token_id] * 11]
    tokens = torch.tensor([row], device=base.device)
    frozen = torch.ones(len(table), dtype=torch.bool, device=base.device)
    frozen[places] = False
    alphas = base.alphas_cumprod.to(base.device)
    half = base.dtype != torch.float32
    cast = torch.autocast(base.device.type, base.dtype) if half else nullcontext()

    def step() -> None:
        pick = torch.randint(len(images), (batch,))
        pixels = images[pick].to(base.device, base.dtype) / 127.5 - 1
        with torch.no_grad():
            z = base.vae.encode(pixels).latent_dist.sample() * base.vae.config.scaling_factor
        noise = torch.randn_like(z)
        t = torch.randint(0, 1000, (batch,), device=base.device)
        a = alphas[t].view(-1, 1, 1, 1)
        with cast:
            context = text(tokens.expand(batch, -1)).last_hidden_state.to(base.dtype)
            noisy = a.sqrt() * z + (1 - a).sqrt() * noise
            loss = F.mse_loss(base.predict_noise(noisy, t, context), noise.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[frozen] = keep[frozen]

    return step


def time_inversion(bench: Bench, base: Base, images: torch.Tensor, batch: int, steps: int) -> float:
    """Return seconds a step of `invert` itself, after the first ten (compiling, recording)."""
    times: list[float] = []
    warm = max(2, steps // 4)
    settings = InversionSettings.preset("paper", steps=steps + warm, batch_size=batch)
    invert(
        base,
        images,
        token="<x>",
        settings=settings,
        callback=lambda state: times.append(time.perf_counter()),
    )
    return (times[-1] - times[warm - 1]) / steps


def make_pipeline(base: Base) -> Any:
    """Return diffusers' pipeline on the same parts, with its Euler ancestral sampler."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=base.vae,
        unet=base.unet,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def count_flops(step: Callable[[], Any]) -> float:
    """Return the floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def share_of_context() -> float:
    """Return how much of a U-Net call recomputes keys and values of the unchanging text.

    So little that they are not kept from step to step.
    """
    with torch.device("meta"):
        _, unet, _ = build_networks(read_architectures()["sd2"], "meta")
        x, t, context = torch.randn(2, 4, 64, 64), torch.zeros(2), torch.randn(2, 77, 1024)
        with torch.no_grad():
            whole = count_flops(lambda: unet(x, t, encoder_hidden_states=context))
    maps = [m for k, m in unet.named_modules() if k.endswith(("attn2.to_k", "attn2.to_v"))]
    return round(sum(4 * 77 * m.in_features * m.out_features for m in maps) / whole, 4)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; return the record."""
    device = torch.device(args.device)
    start = time.perf_counter()
    seconds, steps = (0.2, 3) if args.small else (args.seconds, int(15 * args.seconds))
    bench = Bench(device, seconds, start + args.budget)
    name = "small-random" if args.small else "sd2-random"
    base = load_base(name, device=device)
    images = make_phantoms("prostate", "tumour", 8, size=base.size).images
    bench.ceiling = measure_ceiling(bench, base.dtype, 256 if args.small else 8192)
    batches = (1, 2) if args.small else (1, 2, 4, 8)
    seen: dict[str, float | None] = {}
    flops = {}
    for batch in batches:
        floor = make_floor_step(base, batch)
        flops[batch] = count_flops(floor)
        seen[f"floor {batch}"] = bench.add(
            "TI: floor (networks only)", batch, lambda f=floor: bench.time(f), flops[batch]
        )
        seen[f"ours {batch}"] = bench.add(
            "TI: ours, eager", batch,
            lambda b=batch: time_inversion(bench, base, images, b, steps), flops[batch],
        )  # fmt: skip
    seen["theirs"] = bench.add(
        "TI: diffusers' loop", 1,
        lambda: bench.time(make_diffusers_step(base, images, 1)), flops[1],
    )  # fmt: skip
    base.unet.enable_gradient_checkpointing()
    bench.add(
        "TI: ours, checkpointing", 1, lambda: time_inversion(bench, base, images, 1, steps)
    )  # fmt: skip
    base.unet.disable_gradient_checkpointing()
    measured = {row["name"]: row.get("peak GiB") for row in bench.rows if row["batch"] == 1}

    word = Embedding(torch.randn(64, base.width), "<x>")
    few = 3 if args.small else 20  # of sampling steps; the paper's 100 are projected from them
    for batch in (1, 2) if args.small else (1, 8, 16):
        sample_batch(bench, base, word, batch, few, "eager", seen)
        if batch != 1:
            pipeline = make_pipeline(base)
            seen[f"pipeline {batch}"] = bench.add(
                "sampling: diffusers' pipeline, a batch of 100 steps", batch,
                lambda p=pipeline, b=batch: time_pipeline(bench, p, base.text(""), b, few),
            )  # fmt: skip
            seen["last"] = batch
    measured["sample"] = next(
        (r.get("peak GiB") for r in bench.rows if r["name"].startswith("sampling: ours")), None
    )

    if args.fast:
        if args.out:  # compiling takes minutes: what is measured is kept
            write_json(args.out, finish(args, bench, seen, measured, time.perf_counter() - start))
        for network in (base.vae, base.unet, base.text_encoder):
            network.to("cpu")  # or it would count in the next rows' peak
        fast = load_base(name, device=device, fast=True)
        seen["fast"] = bench.add(
            "TI: ours, fast (compiled, CUDA graph)", 1,
            lambda: time_inversion(bench, fast, images, 1, 4 * steps), flops[1],
        )  # fmt: skip
        sample_batch(bench, fast, word, int(seen["last"] or 1), few, "fast", seen)
    return finish(args, bench, seen, measured, time.perf_counter() - start)


def sample_batch(
    bench: Bench, base: Base, word: Embedding, batch: int, few: int, way: str, seen: dict[str, Any]
) -> None:
    """Time our sampling at one batch, with guidance, as seconds a batch of 100 steps."""
    z, t, context = make_inputs(base, 2 * batch)

    def floor() -> Any:
        with torch.inference_mode():
            return base.predict_noise(z, t, context)

    flops = count_flops(floor)
    if way == "eager":
        bench.add("sampling: floor (U-Net only), a step", batch, lambda: bench.time(floor), flops)

    def ours() -> float:
        def draw(steps: int) -> float:
            bench.synchronize()
            start = time.perf_counter()
            sample(base, word.token, embeddings=[word], n=batch, steps=steps, batch_size=batch)
            bench.synchronize()
            return time.perf_counter() - start

        draw(2)
        part, whole = draw(few), draw(2 * few)
        return whole + (whole - part) / few * (100 - 2 * few)

    name = f"sampling: ours, {way}, a batch of 100 steps"
    seen[f"{way} sampling {batch}"] = bench.add(name, batch, ours, 100 * flops)


def time_pipeline(
    bench: Bench, pipeline: Any, context: torch.Tensor, batch: int, few: int
) -> float:
    """Return seconds a batch of 100 steps takes diffusers' pipeline, from two shorter ones."""
    contexts = context.detach().expand(batch, -1, -1)
    both = {"prompt_embeds": contexts, "negative_prompt_embeds": contexts}

    def draw(steps: int) -> float:
        bench.synchronize()
        start = time.perf_counter()
        pipeline(**both, num_inference_steps=steps, guidance_scale=2.0, output_type="pt")
        bench.synchronize()
        return time.perf_counter() - start

    draw(2)
    part, whole = draw(few), draw(2 * few)
    return whole + (whole - part) / few * (100 - 2 * few)


def finish(
    args: argparse.Namespace,
    bench: Bench,
    seen: dict[str, Any],
    measured: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the record: rows, and what they mean against the goals."""

    def ratio(a: Any, b: Any, factor: float = 1.0) -> float | None:
        return round(factor * a / b, 3) if a and b else None

    best = min((s for s in (seen.get("ours 1"), seen.get("fast")) if s), default=None)
    last = seen.get("last")
    draws = [seen.get(f"{way} sampling {last}") for way in ("eager", "fast")]
    drawn = min((s for s in draws if s), default=None)
    values = {
        "50,000 steps at batch 1, minutes": ratio(best, 60, 50_000),
        "diffusers' loop / ours": ratio(seen.get("theirs"), best),
        "1000 images of 100 steps, minutes": ratio(drawn, 60 * (last or 1), 1000),
        "diffusers' pipeline / ours": ratio(seen.get(f"pipeline {last}"), drawn),
        "invert at batch 1, GiB": measured.get("TI: ours, eager"),
        "invert with checkpointing, GiB": measured.get("TI: ours, checkpointing"),
        "sample at batch 1, GiB": measured.get("sample"),
    }
    device = describe_device()
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name()
    counted = {}
    if not args.small:
        counted["keys and values of the text, share of a sampling step"] = share_of_context()
    options = " --small" * args.small + " --no-fast" * (not args.fast)
    options += f" --seconds {args.seconds:g}" * (args.seconds != 4)
    return {
        "date": date.today().isoformat(),
        "device": device,
        "command": f"python benchmarks/gpu.py --device {args.device}{options}",
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        "seconds": round(seconds, 1),
        "matmul ceiling, TFLOP/s": round(bench.ceiling / 1e12, 3),
        "rows": bench.rows,
        "goals": {k: {"measured": v, "goal": GOALS[k]} for k, v in values.items()},
        "counted": counted,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a miniature: dry run")
    parser.add_argument("--no-fast", dest="fast", action="store_false", help="do not compile")
    parser.add_argument("--budget", type=float, default=400, help="seconds; later rows are skipped")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    record = run(args)
    print(f"{record['device']}, ceiling {record['matmul ceiling, TFLOP/s']} TFLOP/s")
    columns = ("batch", "ms", "images per s", "peak GiB", "share of ceiling")
    print(f"{'':<56}" + "".join(f"{name:>18}" for name in columns))
    for row in record["rows"]:
        cells = "".join(f"{'-' if row.get(c) is None else row[c]:>18}" for c in columns)
        print(f"{row['name']:<56}{cells}  {row.get('note', '')}")
    for name, found in record["goals"].items():
        value = "-" if found["measured"] is None else found["measured"]
        print(f"{name:<56}{value:>18}  goal: {found['goal']}")
    for name, value in record["counted"].items():
        print(f"{name:<56}{value:>18}")
    if args.out:
        write_json(args.out, record)
    return record


if __name__ == "__main__":
    main()
