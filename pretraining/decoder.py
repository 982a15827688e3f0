"""Train a decoder that draws sharper out of the latents of the embedded base.

``python -m pretraining.decoder --work DIR --size 64``, resumable, trains on the decoder of the base;
encoder, U-Net and words stay as they are. With ``--size 128`` it trains an autoencoder of 128 px
(f = 8) around the latents of a base of 64 px (f = 4): the new encoder learns to give the latents that
the old one gives for the image at half the size. The decoder sees latents as sampling leaves them:
noise of t = 10 to 200 is added to most, and the U-Net takes it away at once. A patch discriminator
asks for the texture that these latents no longer hold (Rombach et al. 2022, section 3.1; Isola et
al. 2017), and its first layers for equal local means of their features (Wang et al. 2018).
``python -m pretraining.export --decoder DIR/decoder.ckpt --share .5`` puts the mean of the weights
before and after into the package (Wortsman et al. 2022: it is sharper, without the dots of the end).
"""

from __future__ import annotations

import argparse
import csv
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from medbudget import load_base
from medbudget.results import describe_device
from medbudget.runs import Steps
from pretraining.pictures import draw_picture

SIZE = 128


def build_autoencoder(old: nn.Module, size: int = SIZE) -> nn.Module:
    """Build an AutoencoderKL of `size` px: `old` and one level more, or a copy if it has that size."""
    from diffusers import AutoencoderKL

    config: Any = old.config
    if config.sample_size == size:
        return deepcopy(old).float().requires_grad_(True)
    if size != 2 * config.sample_size:
        raise ValueError(
            f"an autoencoder of {size} px cannot be built around one of {config.sample_size} px, only "
            f"one of {config.sample_size} or {2 * config.sample_size}: choose --size"
        )
    channels = tuple(config.block_out_channels)
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    settings |= {
        "block_out_channels": (channels[0], *channels),
        "down_block_types": ("DownEncoderBlock2D",) * (len(channels) + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (len(channels) + 1),
        "sample_size": 2 * config.sample_size,
    }
    new = AutoencoderKL(**settings)
    state = new.state_dict()
    for name, tensor in old.state_dict().items():
        parts = name.split(".")
        if name.startswith("encoder.down_blocks."):  # the new level comes first
            parts[2] = str(int(parts[2]) + 1)
        target = ".".join(parts)
        if target in state and state[target].shape == tensor.shape:
            state[target] = tensor.float()
    new.load_state_dict(state)
    return new


class Discriminator(nn.Module):
    """Judge overlapping patches: ``(B, 3, H, W)`` to ``(B, 1, H / 8, W / 8)``, and all features.

    Layers are averaged down, not skipped through: that leaves the decoder fewer checkerboards.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width)
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 3, padding=1))
            for before, after in pairwise(channels)
        )
        self.last = spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), 0.2)
            features.append(x)
            x = F.avg_pool2d(x, 2)
        return self.last(x), features


class DecoderRun:
    """Networks, optimizers and counters of one training."""

    def __init__(self, base: Any, batch: int, lr: float, size: int = SIZE) -> None:
        torch.manual_seed(0)
        self.size = size
        self.base, self.batch, self.step, self.rate, self.seconds = base, batch, 0, lr, 0.0
        self.device = base.device
        self.new = build_autoencoder(base.vae, size).to(self.device)
        if size == base.vae.config.sample_size:  # its own encoder gives the latents
            self.new.encoder.requires_grad_(False)
            self.new.quant_conv.requires_grad_(False)
        self.average = build_autoencoder(base.vae, size).to(self.device).requires_grad_(False)
        self.average.load_state_dict(self.new.state_dict())
        self.critic = Discriminator().to(self.device)
        self.networks = {"new": self.new, "average": self.average, "critic": self.critic}
        self.optimizers = {
            "new": torch.optim.AdamW(
                [p for p in self.new.parameters() if p.requires_grad], lr, betas=(0.5, 0.99)
            ),
            "critic": torch.optim.AdamW(self.critic.parameters(), 2 * lr, betas=(0.5, 0.99)),
        }
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)
        self.old = base.vae
        self.empty = base.text("")

    def state_dict(self) -> dict[str, Any]:
        parts = {**self.networks, **self.optimizers_named()}
        cuda = self.device.type == "cuda"
        device = torch.cuda.get_device_name() if cuda else describe_device()
        record = {
            "step": self.step, "batch": self.batch, "seconds": self.seconds, "device": device
        }  # fmt: skip
        return {**record, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in {**self.networks, **self.optimizers_named()}.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state.get("seconds", 0.0)

    def optimizers_named(self) -> dict[str, torch.optim.Optimizer]:
        return {f"{name} optimizer": part for name, part in self.optimizers.items()}

    @torch.no_grad()
    def smooth(self, latents: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Add noise of t = 10 to 200 to scaled latents and let the U-Net take it away at once."""
        t = torch.from_numpy(rng.integers(10, 201, len(latents))).to(self.device)
        alpha = self.base.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn_like(latents)
        context = self.empty.expand(len(latents), -1, -1)
        noise = self.base.predict_noise(noisy, t, context)
        return (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()

    def train(self, pictures: np.ndarray | torch.Tensor, *, fade: float = 1.0) -> dict[str, float]:
        """Take one step at `fade` of the learning rate; draws depend on the step alone."""
        begun = time.monotonic()
        rng = np.random.default_rng([9, self.step])
        torch.manual_seed(int(rng.integers(2**62)))
        pick = np.sort(rng.integers(64, len(pictures), self.batch))
        x = self.draw(torch.as_tensor(pictures[pick]).to(self.device).float() / 127.5 - 1, rng)
        scale = self.old.config.scaling_factor
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                own = F.avg_pool2d(x, self.size // self.old.config.sample_size)
                target = self.old.encode(own).latent_dist.mean.float()
                most = 3 * self.batch // 4
                smoothed = self.smooth(target[:most] * scale, rng) / scale
                latents = torch.cat([smoothed, target[most:]])
            y = self.new.decode(latents).sample.float()
            l1 = (x - y).abs().mean()
            coarse = (F.avg_pool2d(x, 4) - F.avg_pool2d(y, 4)).abs().mean()
            self.critic.requires_grad_(False)
            judged, features = self.critic(y)
            with torch.no_grad():
                wanted = self.critic(x)[1]
            matched = torch.stack([
                (F.avg_pool2d(a.float(), 4) - F.avg_pool2d(b.float(), 4)).abs().mean()
                for a, b in zip(features[:2], wanted[:2])
            ]).sum()  # fmt: skip
            strength = 0.1 * min(1.0, self.step / 300)
            loss = 0.5 * l1 + coarse + matched - strength * judged.float().mean()
            losses = {"l1": l1, "coarse": coarse, "matched": matched}
            if self.size != self.old.config.sample_size:
                mean = self.new.encode(x).latent_dist.mean.float()
                losses["distilled"] = ((mean - target) * scale).square().mean()
                loss = loss + losses["distilled"]
        self.apply("new", loss, fade)
        self.critic.requires_grad_(True)
        with torch.autocast(self.device.type, torch.bfloat16):
            real, drawn = self.critic(x)[0].float(), self.critic(y.detach())[0].float()
            losses["hinge"] = F.relu(1 - real).mean() + F.relu(1 + drawn).mean()
        self.apply("critic", losses["hinge"], fade)
        keep = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = list(self.average.parameters()), list(self.new.parameters())
            torch._foreach_lerp_(*pairs, 1 - keep)
        self.step += 1
        values = {name: value.item() for name, value in losses.items()}
        self.seconds += time.monotonic() - begun
        return values

    def draw(self, x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Average half of the pictures down to the size, crop the others; turn some to gray."""
        half, (top, left) = len(x) // 2, rng.integers(0, x.shape[-1] - self.size + 1, 2)
        averaged = F.avg_pool2d(x[:half], x.shape[-1] // self.size)
        cropped = x[half:, :, top : top + self.size, left : left + self.size]
        x = torch.cat([averaged, cropped])[rng.permutation(len(x))][:, rng.permutation(3)]
        if rng.random() < 0.3:
            x = x[:, :1].expand(-1, 3, -1, -1)
        return x.contiguous(memory_format=torch.channels_last)

    def apply(self, name: str, loss: torch.Tensor, fade: float) -> None:
        network, optimizer = self.networks[name], self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = fade * self.rate * (2 if name == "critic" else 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], 1.0)
        optimizer.step()


def load_pictures(work: Path, n: int, clipart: str) -> np.ndarray:
    """Load ``(n, 3, 128, 128) uint8``, drawn on the first call."""
    path = work / f"pictures{SIZE}.npy"
    if not path.exists():
        pictures = np.stack(
            [draw_picture(np.random.default_rng([11, i]), SIZE, clipart) for i in range(n)]
        )
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pictures.transpose(0, 3, 1, 2))
        temporary.replace(path)
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--size", type=int, choices=(64, SIZE), default=SIZE)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--pictures", type=int, default=6_000)
    parser.add_argument("--clipart", default="", help="folder of public-domain clip art")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(options.work, options.pictures, options.clipart)
    base = load_base("tiny", device="cpu")
    run = DecoderRun(base, options.batch, options.lr, options.size)
    identity = {
        "base": base.hash, "batch": options.batch, "lr": options.lr, "size": options.size
    }  # fmt: skip
    log = options.work / "decoder.csv"
    for _ in Steps(run, options.steps, checkpoint=options.work / "decoder.ckpt", identity=identity,
                   every=200, desc="decoder"):  # fmt: skip
        losses = run.train(pictures)
        if run.step % 20 == 0:
            new = not log.exists()
            with open(log, "a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows(
                    ([["step", *losses]] if new else []) + [[run.step, *losses.values()]]
                )


if __name__ == "__main__":
    main()
