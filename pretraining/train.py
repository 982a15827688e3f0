"""Pretrain the embedded base: ``python -m pretraining.train STAGE --work DIR``.

Stages, in order: ``corpus`` (draws the images), ``vae``, ``latents`` (encodes the corpus),
``unet`` (U-Net and text encoder together), ``export`` (fp16 weights into the package).
``vae`` and ``unet`` resume from their checkpoint; a larger ``--steps`` prolongs them: the learning
rate is constant and falls to zero over the last ``--decay`` steps. ``--minutes`` plans both by the
speed that it finds, for a machine that one has for a while. ``--start`` begins a stage that has no checkpoint
with the weights in the package instead of random ones. Without a ``vae.ckpt`` in the folder,
``latents`` and ``export`` keep the package's autoencoder.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from medbudget.files import atomic_path
from medbudget.progress import tqdm
from medbudget.results import describe_device
from medbudget.tiny import N_WORDS, compute_numbers
from medbudget.training.inversion import min_snr_weights
from medbudget.weights import efficientnet_network
from pretraining import corpus, model
from pretraining.export import WEIGHTS

NEEDS = {  # files of earlier stages, and which stage writes them
    "vae": {"images.npy": "corpus"},
    "latents": {"images.npy": "corpus"},
    "unet": {"captions.json": "corpus", "latents.npy": "latents", "scale.json": "latents"},
    "export": {"unet.ckpt": "unet", "scale.json": "latents"},
}


def draw_corpus(work: Path, *, concepts: int, images: int, seed: int, workers: int) -> None:
    """Draw the corpus into ``images.npy`` (n, 3, 64, 64) uint8 and ``captions.json``."""
    size = (concepts * images, 3, corpus.SIZE, corpus.SIZE)
    captions = []
    with atomic_path(work / "images.npy") as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=size)
        with ProcessPoolExecutor(workers) as pool:
            draw = partial(corpus.make_concept, seed, images=images)
            drawn = pool.map(draw, range(concepts), chunksize=64)
            for i, (batch, caption) in enumerate(tqdm(drawn, total=concepts, desc="corpus")):
                array[i * images : (i + 1) * images] = batch.transpose(0, 3, 1, 2)
                captions.append(caption)
        array.flush()
        del array
    (work / "captions.json").write_text(json.dumps(captions))


def make_optimizer(modules: list[torch.nn.Module], lr: float) -> torch.optim.Optimizer:
    """Muon for weight matrices and convolutions, AdamW for the rest (timm's implementation)."""
    from timm.optim import Muon

    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    outer = ("conv_in", "conv_out", "quant_conv", "embedding", "map")
    for module in modules:
        for name, parameter in module.named_parameters():
            inner = parameter.ndim >= 2 and not any(part in name for part in outer)
            (matrices if inner else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "use_fallback": True}]
    return Muon(
        groups,
        lr=lr,
        adjust_lr_fn="match_rms_adamw",
        conv_mode="flatten",
        nesterov=True,
        fallback_lr_scale=0.5,
    )


class Run:
    """Step counter, learning rate, EMA, checkpoint and log of one training stage."""

    def __init__(self, work: Path, name: str, nets: dict[str, Any], args) -> None:
        self.path, self.log = work / f"{name}.ckpt", work / f"{name}.csv"
        self.nets, self.args, self.step, self.seconds = nets, args, 0, 0.0
        self.ema: dict[str, Any] = {
            key: copy.deepcopy(net).requires_grad_(False) for key, net in nets.items()
        }
        self.optimizer = make_optimizer(list(nets.values()), args.lr)
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            for key in nets:
                nets[key].load_state_dict(state["nets"][key])
                self.ema[key].load_state_dict(state["ema"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resumed {name} at step {self.step}", flush=True)
        cuda = args.device.startswith("cuda")
        self.device = torch.cuda.get_device_name() if cuda else describe_device()
        self.started = self.begun = time.time()
        self.first = self.step
        if args.minutes:
            args.steps, args.decay = 10**9, 1

    def save(self) -> None:
        now = time.time()
        self.seconds, self.started = self.seconds + now - self.started, now
        state = {
            "nets": {key: net.state_dict() for key, net in self.nets.items()},
            "ema": {key: net.state_dict() for key, net in self.ema.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "batch": self.args.batch,
            "start": self.args.start,
            "device": self.device,
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def advance(self, loss: torch.Tensor) -> None:
        """One optimizer step and one of the EMA."""
        warm = min(1.0, (self.step + 1) / 100)
        rate = (
            self.args.lr
            * warm
            * min(1.0, max(0.01, (self.args.steps - self.step) / self.args.decay))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for net in self.nets.values():
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, net in self.nets.items():
                averaged: list[torch.Tensor] = list(self.ema[key].parameters())
                torch._foreach_lerp_(averaged, [p.detach() for p in net.parameters()], 1 - keep)

    def pace(self) -> None:
        """With --minutes: plan as many steps as fit, of which the last 40 % decay."""
        args, done = self.args, self.step - self.first
        if args.minutes and self.step < args.steps - args.decay:
            seconds = time.time() - self.begun
            left = 60 * args.minutes - seconds
            args.steps = self.step + max(1, int(left * done / seconds))
            args.decay = int(0.4 * (args.steps - self.first))

    def record(self, **values: float) -> None:
        self.pace()
        new = not self.log.exists()
        with open(self.log, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([self.step, *(f"{value:.5f}" for value in values.values())])


def begin_draws(seed: int, step: int) -> np.random.Generator:
    """Seed torch and return a generator, so that a resumed run does not draw its noise again."""
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def load_array(path: Path, device: str) -> torch.Tensor:
    """Return an array's file as a tensor: mapped from disk on the CPU, in memory elsewhere."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def make_feature_loss(device: str):
    """Return a function of two batches in [-1, 1]: their distance in EfficientNet-Lite0.

    The squared distance of the pooled features bounds the Frechet distance of the two sets from
    above (the pairing is one coupling of them); the stages before it lead the way there.
    """
    network, _ = efficientnet_network(torch.device(device))
    blocks: Any = network.get_submodule("blocks")

    def stages(x: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hooks = [
            blocks[i].register_forward_hook(lambda *call: found.append(call[2].float()))
            for i in (0, 1, 2, 4)
        ]
        x = F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        pooled = network((x * 127.5 + 0.5) / 128)
        for hook in hooks:
            hook.remove()
        return [*found, pooled.float()]

    def loss(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            real = stages(x)
        made = stages(y)
        pooled = ((real[-1] - made[-1]) ** 2).sum(1).mean()
        near = sum((a - b).abs().mean() / a.abs().mean() for a, b in zip(real[:-1], made[:-1]))
        return near + pooled / 200, pooled

    return loss


def load_shipped(name: str, net: torch.nn.Module) -> None:
    """Load the weights of a part ("vae", "unet", "text_encoder") in the package into `net`."""
    file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
    net.load_state_dict(load_file(WEIGHTS / name / f"{file}.safetensors"))


def train_vae(work: Path, args) -> None:
    """L1 + half gradient L1 + 1e-4 KL (+ features), channels permuted."""
    torch.manual_seed(args.seed)
    images = load_array(work / "images.npy", args.device)
    held = len(images) // 100
    vae = model.build_vae().to(args.device)
    if args.start:
        load_shipped("vae", vae)
    feature_loss = make_feature_loss(args.device) if args.features else None
    run = Run(work, "vae", {"vae": vae}, args)
    rng = begin_draws(args.seed, run.step)
    bar = tqdm(total=args.steps, initial=run.step, desc="vae", mininterval=30)
    while run.step < args.steps:
        pick = np.sort(rng.integers(held, len(images), args.batch))
        x = to_float(images[pick][:, rng.permutation(3)])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        far = distance = torch.zeros((), device=args.device)
        if feature_loss is not None:
            far, distance = feature_loss(x[: args.feature_batch], y[: args.feature_batch])
        l1 = (x - y).abs().mean()
        edges = sum((torch.diff(x, dim=d) - torch.diff(y, dim=d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / x[0].numel()
        loss = l1 + 0.5 * edges + 1e-4 * kl + args.features * far
        run.advance(loss)
        bar.update()
        if run.step % 50 == 0:
            run.record(l1=l1.item(), edges=float(edges), kl=kl.item(), features=distance.item())
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
            test = to_float(images[:held:4][:128])
            with torch.no_grad():
                out = run.ema["vae"].decode(run.ema["vae"].encode(test).latent_dist.mode()).sample
            mse = ((out.clamp(-1, 1) - test) ** 2).mean((1, 2, 3)) / 4
            print(
                f"step {run.step} {(-10 * mse.log10()).mean():.2f} dB, {run.seconds:.0f} s",
                flush=True,
            )


def encode_corpus(work: Path, args) -> None:
    """Encode the corpus: ``latents.npy`` (n, 2, c, 16, 16) float16, mean and spread; numbers."""
    from diffusers import AutoencoderKL

    images = load_array(work / "images.npy", args.device)
    vae: Any
    scale = None
    if (work / "vae.ckpt").exists():
        vae = model.build_vae()
        state = torch.load(work / "vae.ckpt", map_location="cpu", weights_only=True)
        vae.load_state_dict(state["ema"]["vae"])
    else:
        vae = AutoencoderKL.from_pretrained(
            WEIGHTS / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        scale = vae.config.scaling_factor
    vae = vae.to(args.device)
    zoom = vae.config.sample_size / images.shape[-1]  # 2 if the autoencoder is one of 128 px
    latents = np.empty((len(images), 2, model.LATENTS, 16, 16), np.float16)
    numbers = np.empty((len(images), N_WORDS, 6), np.float16)
    with torch.inference_mode():
        for i in tqdm(range(0, len(images), 256), desc="latents", mininterval=30):
            batch = images[i : i + 256]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                x = F.interpolate(to_float(batch), scale_factor=zoom, mode="bilinear")
                posterior = vae.encode(x).latent_dist
            latents[i : i + 256] = (
                torch.stack([posterior.mean, posterior.std], 1).float().cpu().numpy()
            )
            numbers[i : i + 256] = compute_numbers(batch).cpu().numpy()
    scale = scale or 1 / latents[::16, 0].astype(np.float32).std()
    for name, array in (("latents", latents), ("numbers", numbers)):
        with atomic_path(work / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    (work / "scale.json").write_text(json.dumps({"scaling_factor": float(scale)}))
    print(f"scaling factor {scale:.5f}", flush=True)


def weigh_timesteps(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return loss weights ``(1000,)`` of mean 1: `min_snr_weights`, but no step below SNR = 5's.

    High noise decides the layout, low noise grain and edges, on which Frechet distances depend.
    """
    weights = min_snr_weights(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = weights.clamp(min=float(weights[(snr - 5).abs().argmin()]))
    return weights / weights.mean()


def draw_timesteps(n: int, low: float) -> torch.Tensor:
    """Draw ``(n,)`` timesteps: a share `low` of them below 250, the others from all 1000."""
    t = torch.randint(0, 1000, (n,))
    return torch.where(torch.rand(n) < low, t // 4, t)


def train_unet(work: Path, args) -> None:
    """Epsilon loss, weighted by timestep; visual, plain and empty sentences."""
    torch.manual_seed(args.seed)
    latents = load_array(work / "latents.npy", args.device)
    numbers = load_array(work / "numbers.npy", args.device)
    captions = json.loads((work / "captions.json").read_text(encoding="utf-8"))
    scale = json.loads((work / "scale.json").read_text(encoding="utf-8"))["scaling_factor"]
    device, per = args.device, len(latents) // len(captions)
    tokenizer = model.build_tokenizer()
    plain = torch.tensor(
        tokenizer(captions, padding="max_length", max_length=77, truncation=True)["input_ids"]
    ).to(device)
    unet = model.build_unet().to(device, memory_format=torch.channels_last)
    if device == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
    text = model.build_text_encoder(len(tokenizer)).to(device)
    maps = model.WordMap().to(device)
    if args.start:
        load_shipped("unet", unet)
        load_shipped("text_encoder", text)
        maps.load_state_dict(solve_maps(text, tokenizer))
    run = Run(work, "unet", {"unet": unet, "text": text, "map": maps}, args)
    predict: Any = torch.compile(unet) if device.startswith("cuda") else unet
    alphas = model.build_scheduler().alphas_cumprod.to(device)
    weights = weigh_timesteps(alphas)
    rng = begin_draws(args.seed, run.step)
    held = per * (len(captions) // 100)
    bar = tqdm(total=args.steps, initial=run.step, desc="unet", mininterval=30)
    sums: dict[str, list[torch.Tensor]] = {}
    while run.step < args.steps:
        pick = np.sort(rng.integers(held, len(latents), args.batch))
        sibling = pick // per * per + rng.integers(0, per, args.batch)
        source = np.where(rng.random(args.batch) < 0.7, sibling, pick)
        kind = rng.choice(3, args.batch, p=[0.65, 0.25, 0.10])
        context = embed_sentences(
            text,
            maps,
            tokenizer,
            numbers[source].float(),
            plain[pick // per],
            kind,
            rng,
        )
        stored = latents[pick].float()
        z = (stored[:, 0] + stored[:, 1] * torch.randn_like(stored[:, 1])) * scale
        drawn = draw_timesteps(args.batch, args.low)
        t = drawn.to(device)
        noise = torch.randn_like(z)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            predicted = predict(noisy, t, encoder_hidden_states=context).sample.float()
        error = ((predicted - noise) ** 2).mean((1, 2, 3))
        run.advance((error * weights[t]).mean())
        bar.update()
        with torch.no_grad():
            image_error = error * ((1 - a) / a).flatten()
            high = (drawn > 600).numpy()
            for name, part in (("words", kind == 0), ("plain", kind == 1), ("empty", kind == 2)):
                sums.setdefault(name, []).append(image_error[np.flatnonzero(high & part)])
            sums.setdefault("loss", []).append(error)
        if run.step % 100 == 0:
            run.record(
                **{
                    name: torch.cat(sums[name]).mean().item()
                    for name in ("loss", "words", "plain", "empty")
                }
            )
            sums = {}
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
            print(
                f"step {run.step} ({run.step * args.batch} images), {run.seconds:.0f} s", flush=True
            )


def solve_maps(text, tokenizer) -> dict[str, torch.Tensor]:
    """Recover the linear maps of the visual words from the table that they were written into."""
    centroids = load_file(WEIGHTS / "words.safetensors")
    table = text.embeddings.token_embedding.weight.detach().cpu().double()
    state = {}
    for name, first, key in (("grain_map", "g0000", "grain"), ("cell_map", "v0000", "cells")):
        numbers = F.pad(centroids[key].double(), (0, 1), value=1)
        start = tokenizer.convert_tokens_to_ids(first)
        solved = torch.linalg.lstsq(numbers, table[start : start + len(numbers)]).solution
        state[f"{name}.weight"], state[f"{name}.bias"] = solved[:-1].T.float(), solved[-1].float()
    return state


def embed_sentences(text, maps, tokenizer, numbers, plain, kind, rng) -> torch.Tensor:
    """Return text states (B, 77, 96): visual sentences cut, dropped and jittered; plain; empty."""
    n, device = len(kind), numbers.device
    numbers = numbers + 0.05 * torch.randn_like(numbers)
    ids = torch.full((n, 77), tokenizer.pad_token_id, device=device)
    ids[:, 0], ids[:, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    blank = tokenizer.convert_tokens_to_ids(model.BLANK)
    length = np.where(rng.random(n) < 0.5, 64, rng.integers(1, 65, n))[:, None]
    visual, place = (kind == 0)[:, None], np.arange(77)[None]
    inside = visual & (place >= 1) & (place <= length)
    dropped = rng.random((n, 77)) < rng.choice([0.0, 0.1, 0.5], n)[:, None]
    keep = inside & ~dropped & (place <= N_WORDS)
    for chosen, token in (
        (inside, blank),
        (visual & (place == length + 1), tokenizer.eos_token_id),
    ):
        ids = ids.masked_fill(torch.from_numpy(chosen).to(device), token)
    is_plain = torch.from_numpy(kind == 1).to(device)
    ids = torch.where(is_plain[:, None], plain, ids)
    rows = text.embeddings.token_embedding(ids)
    mapped = F.pad(maps(numbers), (0, 0, 1, 76 - N_WORDS))
    rows = torch.where(torch.from_numpy(keep).to(device)[..., None], mapped, rows)
    with model.replaced_rows(text, rows):
        return text(ids).last_hidden_state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("corpus", "vae", "latents", "unet", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of corpus and checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="corpus: processes")
    parser.add_argument("--concepts", type=int, default=16000, help="corpus: number of concepts")
    parser.add_argument("--images", type=int, default=4, help="corpus: images of a concept")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="instead of --steps and --decay")
    parser.add_argument("--decay", type=int, default=1000, help="last steps with falling rate")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--low", type=float, default=0.5, help="unet: share of steps at t < 250")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--start", action="store_true", help="begin with the package's weights")
    parser.add_argument("--features", type=float, default=0.0, help="vae: weight of feature loss")
    parser.add_argument("--feature-batch", type=int, default=8, help="vae: images it sees a step")
    args = parser.parse_args()
    for file, stage in NEEDS.get(args.stage, {}).items():
        if not (args.work / file).exists():
            parser.exit(2, f"{args.work / file} is missing: run the stage `{stage}` first\n")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if args.stage == "corpus":
        draw_corpus(
            args.work,
            concepts=args.concepts,
            images=args.images,
            seed=args.seed,
            workers=args.workers,
        )
    elif args.stage == "vae":
        train_vae(args.work, args)
    elif args.stage == "latents":
        encode_corpus(args.work, args)
    elif args.stage == "unet":
        train_unet(args.work, args)
    else:
        from pretraining.export import export

        export(args.work)


if __name__ == "__main__":
    main()
