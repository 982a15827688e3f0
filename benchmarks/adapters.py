"""Claims: a LoRA step here is at least 1.2 times as fast as diffusers' example; 8 GB are enough.

Side by side in one run, in turns: a step of `tune`, and the loop of diffusers' own LoRA example
(examples/text_to_image/train_text_to_image_lora.py of 0.40), written anew from its reading: peft on
the U-Net's attention, VAE and text encoder in each step, AdamW with weight decay and a constant
schedule. Same base, images, batch, rank, number type and threads. In the example's favour, reading
and augmenting images, accelerate and logging are left out, and so is clipping, as the example hands
over an iterator that its optimizer has used up. The floor is the U-Net, forward and backward to the
adapter, and nothing else.

Memory is counted, not timed: two steps of `tune` with Stable Diffusion 2.0's architecture (random
weights), batch 1, bfloat16, 512 px; the largest sum of all tensors that are alive at the same time.
On a CPU that takes 6 GB and some minutes; --memory none leaves it out.

    python benchmarks/adapters.py --out benchmarks/results/adapters.json
    python benchmarks/adapters.py --device cuda --base sd2-random --batch 1 --out adapters_gpu.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from memory import MemoryCounter

from medbudget import TuneSettings, load_base, make_phantoms, tune
from medbudget.base import Base
from medbudget.files import write_json
from medbudget.results import describe_device

RANK = 16
WARM = 3  # steps before those that are timed
TEXT = "*"  # what `tune` trains on by default


def add_lora(base: Base) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return a copy of the U-Net with peft's adapter, as diffusers adds it, and what it trains."""
    unet = copy.deepcopy(base.unet).requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    ))  # fmt: skip
    return unet.train(), [p for p in unet.parameters() if p.requires_grad]


def make_diffusers_step(base: Base, images: torch.Tensor, batch: int) -> Callable[[], None]:
    """Return a step of diffusers' example, on the same networks and images."""
    unet, trained = add_lora(base)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    schedule = diffusers.optimization.get_scheduler("constant", optimizer=optimizer)
    noising = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    tok = base.tokenizer
    words = tok(TEXT, add_special_tokens=False)["input_ids"]
    row = [tok.bos_token_id, *words, tok.eos_token_id]
    row += [tok.pad_token_id] * (base.text_encoder.config.max_position_embeddings - len(row))
    tokens = torch.tensor([row] * batch, device=base.device)
    pixels = images.to(base.device, base.dtype) / 127.5 - 1

    def step() -> None:
        picked = pixels[torch.randint(len(pixels), (batch,))]
        z = base.vae.encode(picked).latent_dist.sample() * base.vae.config.scaling_factor
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (batch,), device=base.device)
        context = base.text_encoder(tokens)[0]
        predicted = unet(noising.add_noise(z, noise, t), t, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.item()  # as the example's progress bar reads it
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def make_floor_step(base: Base, batch: int) -> Callable[[], None]:
    """Return the U-Net, forward and backward to the adapter's tensors, on fixed inputs."""
    unet, trained = add_lora(base)
    z = torch.randn(batch, *base.latent_shape(), device=base.device, dtype=base.dtype)
    t = torch.randint(0, 1000, (batch,), device=base.device)
    context = torch.randn(batch, 77, base.width, device=base.device, dtype=base.dtype)

    def step() -> None:
        torch.autograd.grad(F.mse_loss(unet(z, t, context, return_dict=False)[0], z), trained)

    return step


def time_step(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the seconds of a step."""
    for _ in range(WARM):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - start) / steps


def time_tune(
    base: Base, images: torch.Tensor, steps: int, batch: int, fast: bool
) -> tuple[float, float]:
    """Return the seconds of a step of `tune`, and those before the first."""
    times = [time.perf_counter()]
    settings = TuneSettings.preset(
        "tiny", rank=RANK, steps=steps + WARM, batch_size=batch, init=TEXT
    )
    tune(
        base, images, settings=settings, fast=fast,
        callback=lambda state: times.append(time.perf_counter()),
    )  # fmt: skip
    one = (times[-1] - times[WARM]) / steps
    return one, max(0.0, times[WARM] - times[0] - WARM * one)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Return the times of a step, ours and theirs in turns, as rows."""
    base = load_base(args.base, device=args.device)
    images = make_phantoms("prostate", "tumour", 100, size=base.size).images
    step = make_diffusers_step(base, images, args.batch)
    floor = make_floor_step(base, args.batch)
    found: dict[str, list[float]] = {"ours": [], "theirs": [], "floor": [], "before": []}
    for _ in range(args.rounds):
        ours, before = time_tune(base, images, args.steps, args.batch, args.fast)
        found["ours"].append(ours)
        found["before"].append(before)
        found["theirs"].append(time_step(step, args.steps, base.device))
        found["floor"].append(time_step(floor, args.steps, base.device))
    ratios = [theirs / ours for theirs, ours in zip(found["theirs"], found["ours"])]
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "base, batch, number type": f"{args.base}, {args.batch}, {str(base.dtype)[6:]}",
        "ours, ms per step": middle["ours"] * 1e3,
        "diffusers' way, ms per step": middle["theirs"] * 1e3,
        "floor, ms per step": middle["floor"] * 1e3,
        "diffusers' way / ours (goal 1.2)": statistics.median(ratios),
        f"the same, lowest and highest of {len(ratios)} rounds": [min(ratios), max(ratios)],
        "floor / ours": middle["floor"] / middle["ours"],
        "ours, once: encoding 100 images, s": middle["before"],
    }


def count_memory(name: str, device: str) -> dict[str, Any]:
    """Return the GiB that two steps of `tune` take, as rows."""
    base = load_base(name, device=device, dtype=torch.bfloat16)
    images = make_phantoms("prostate", "tumour", 2, size=base.size).images
    settings = TuneSettings.preset("paper", rank=RANK, steps=2)
    losses: list[float] = []
    with MemoryCounter() as counter:
        for network in (base.vae, base.unet, base.text_encoder):
            for tensor in network.state_dict().values():
                counter.add(tensor)
        networks = counter.now
        tune(
            base, images, settings=settings, fast=False,
            callback=lambda state: losses.append(state["loss"]),
        )  # fmt: skip
    return {
        f"memory of rank {RANK} on {name}, batch 1, bfloat16: networks, GiB": networks / 2**30,
        "and all of two steps, GiB (goal: under 8)": counter.peak / 2**30,
        "losses of the two steps": losses,
    }


def shorten(value: Any) -> Any:
    if isinstance(value, list):
        return [round(one, 3) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print what was measured, and write it where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", default="tiny", help="of the times")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="compile ours, on a GPU")
    parser.add_argument("--memory", default="sd2-random", help="base of the count, or none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    rows = measure_speed(args)
    if args.memory != "none":
        rows |= count_memory(args.memory, args.device)
    rows = {name: shorten(value) for name, value in rows.items()}
    for name, value in rows.items():
        print(f"{name:<70}{value}")
    if args.out:
        options = (
            "".join(
                f" --{name} {getattr(args, name)}"
                for name in ("device", "base", "batch", "steps", "rounds", "memory")
                if getattr(args, name) != parser.get_default(name)
            )
            + " --fast" * args.fast
        )
        device = describe_device()
        if args.device != "cpu":
            device = torch.cuda.get_device_name()
        modules = (torch, diffusers, transformers, peft)
        record = {
            "date": date.today().isoformat(),
            "device": device,
            "command": f"python benchmarks/adapters.py{options} --out {args.out}",
            "versions": {module.__name__: module.__version__ for module in modules},
            "rows": rows,
        }
        write_json(args.out, record)
    return rows


if __name__ == "__main__":
    main()
