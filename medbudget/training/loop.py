"""Training on latents: tensors, one optimizer step after another, and the checks on each."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medbudget._version import __version__
from medbudget.base import Base
from medbudget.files import hash_tensors
from medbudget.gpu import Stepper
from medbudget.images import hash_images
from medbudget.runs import Steps, draw_indices


class InversionError(RuntimeError):
    """Training that cannot go on; the message says why and what to do."""


class Run:
    """Tensors in training, their optimizer, and the losses so far: all that a checkpoint holds."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], rates: Mapping[str, float], half: bool
    ) -> None:
        self.tensors = {name: value.requires_grad_(True) for name, value in tensors.items()}
        groups: dict[float, list[torch.Tensor]] = {rate: [] for rate in rates.values()}
        for name, value in self.tensors.items():
            groups[rates[name]].append(value)
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "lr": rate} for rate, own in groups.items()], weight_decay=0,
            fused=len(self.tensors) > 1 or None,  # many small tensors take long one by one
        )  # fmt: skip
        self.rates = list(groups)
        # float16 gradients underflow without a scale; a step whose gradient overflows is skipped
        device = next(iter(self.tensors.values())).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=half)
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def note(self) -> str:
        """What a bar says beside the step."""
        recent = self.losses[-50:]
        return f"loss={sum(recent) / len(recent):.4f}" if recent else ""

    def update(self, loss: torch.Tensor, gradients: Sequence[torch.Tensor], share: float) -> float:
        """Do one optimizer step with scaled gradients, and return the norm of the true ones.

        The learning rates are `share` of those that the run began with.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * share
        for tensor, gradient in zip(self.tensors.values(), gradients):
            tensor.grad = gradient
        self.scaler.unscale_(self.optimizer)  # in place
        norm = float(torch.nn.utils.get_total_norm(gradients))
        value = float(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not math.isfinite(value) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise InversionError(
                f"loss {value} and gradient {norm} at step {self.step + 1}: lower the learning "
                "rate, or use bfloat16 or float32. The last checkpoint is intact"
            )
        self.losses.append(value)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: value.detach() for name, value in self.tensors.items()},
            "losses": self.losses, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.tensors.items():
                value.copy_(state[name])
        self.losses[:] = state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def train(
    base: Base, run: Run, images: torch.Tensor, settings: Any,
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], *,
    checkpoint: str | os.PathLike[str] | None, identity: Mapping[str, Any], desc: str,
    callback: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Train the tensors of a run on images by ``compute(latents, t, noise)``, a loss.

    Every image is encoded once. Return what a file of the result says of its making.
    """
    began = time.monotonic()
    mean, std = base.encode_posterior(images)
    if settings.latents == "once":
        generator = torch.Generator().manual_seed(settings.seed)
        mean = mean + std * torch.randn(mean.shape, generator=generator).to(base.device)
    tensors = list(run.tensors.values())

    def descend(z: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, scale: torch.Tensor):
        loss = compute(z, t, noise)
        return loss.detach(), *torch.autograd.grad(loss * scale, tensors)

    graph = base.fast and base.device.type == "cuda"
    with Stepper(base.unet, descend, graph=graph) as stepper:
        for step in Steps(
            run, settings.steps, checkpoint=checkpoint, every=settings.checkpoint_every, desc=desc,
            identity={
                "settings": settings.without("checkpoint_every", *settings.open_end),
                "base": base.hash, "images": hash_tensors({"images": images}), **identity,
            },
        ):  # fmt: skip
            which, t, noise, posterior = draw_batch(settings, step, len(images), mean.shape[1:])
            z = mean[which]
            if settings.latents == "resample":
                z = z + std[which] * posterior.to(base.device)
            scale = run.scaler.scale(torch.ones((), device=base.device))
            loss, *gradients = stepper(z, t.to(base.device), noise.to(base.device), scale)
            share = 1 - step / settings.steps if settings.schedule == "linear" else 1
            norm = run.update(loss, gradients, share)
            state = {"step": run.step, "steps": settings.steps, "loss": run.losses[-1]}
            callback(state | {"lr": run.rates[0] * share, "grad_norm": norm})
    return {
        "settings": asdict(settings), "images": len(images),
        "images_hash": hash_tensors({"images": images}),
        "image_hashes": " ".join(hash_images(images)),  # tells a score that it is no test
        "medbudget": __version__, "device": base.device.type,
        "seconds": round(time.monotonic() - began, 1), "history": _thin(run.losses),
    }  # fmt: skip


def name_origin(base: Base) -> str:
    """Return the base's name as files give it: of a folder or file, without where it lies."""
    return Path(base.name).name if Path(base.name).exists() else base.name


def describe_data(images: torch.Tensor, data: str) -> str:
    """Return `data`, a note on training images, or what can be said without it."""
    return data or f"{len(images)} images of {images.shape[2]} px"


def draw_batch(settings: Any, step: int, n: int, shape: tuple[int, ...]):
    """Draw images, timesteps and noises of one step: a function of seed and step alone."""
    batch = settings.batch_size
    seed = ((settings.seed + 1) * 15_485_863 + step) % 2**64
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    noise = torch.randn((batch, *shape), generator=generator)
    posterior = torch.randn((batch, *shape), generator=generator)
    return draw_indices(n, batch, step, settings.seed), t, noise, posterior


def _thin(losses: list[float], points: int = 200) -> dict[str, list[float]]:
    """Return means of blocks of a loss curve, so that a file stays small."""
    block = math.ceil(len(losses) / points)
    blocks = [losses[i : i + block] for i in range(0, len(losses), block)]
    return {
        "step": [min((i + 1) * block, len(losses)) for i in range(len(blocks))],
        "loss": [round(sum(part) / len(part), 5) for part in blocks],
    }
