"""Textual Inversion: find the vectors that make a frozen base draw given images.

Gal et al. 2022 (arXiv 2208.01618), as AUTOMATIC1111's web UI did it for the paper (section 3.1):
every image is encoded once, and AdamW changes the ``n x d`` vectors and nothing else.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medbudget._version import __version__
from medbudget.base import Base
from medbudget.embeddings import MAX_VECTORS, Embedding, check_token
from medbudget.files import hash_tensors
from medbudget.gpu import Stepper, choose_speed
from medbudget.images import check_images, hash_images
from medbudget.progress import tqdm
from medbudget.runs import Steps, draw_indices
from medbudget.settings import SEEDS, Settings, check_counts


class InversionError(RuntimeError):
    """Training that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class InversionSettings(Settings):
    """Settings of `invert`. What is not given follows the preset of the base; here: the paper's."""

    n_vectors: int = 64  # rows, 1 to 74
    steps: int = 50_000  # optimizer steps
    lr: float = 0.005  # of AdamW, without weight decay
    batch_size: int = 1  # images a step
    schedule: str = "constant"  # or "linear": falls to zero at the last step
    loss: str = "plain"  # epsilon MSE; or "min_snr": see min_snr_weights
    init: str = "*"  # text whose rows are spread over the vectors; or "mean" of all, plus noise
    latents: str = "once"  # one posterior sample an image (A1111); or "mean", or "resample"
    seed: int = 0
    checkpoint_every: int = 500  # steps

    CHOICES = {
        "schedule": ("constant", "linear"),
        "loss": ("plain", "min_snr"),
        "latents": ("once", "mean", "resample"),
    }
    LIMITS = {
        "n_vectors": (1, MAX_VECTORS), "steps": (1, None), "batch_size": (1, None),
        "lr": (1e-12, 1e3), "checkpoint_every": (1, None), "seed": SEEDS,
    }  # fmt: skip
    PRESETS = {
        "tiny": {"steps": 1000, "lr": 0.01, "batch_size": 8, "schedule": "linear"},
        "colab": {"steps": 5000},
        "paper": {},
    }


def min_snr_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return loss weights that raise high noise: min(1 + SNR, 5) / SNR, at most 40, of mean 1.

    After Hang et al. 2023 (arXiv 2303.09556); plain epsilon loss hardly sees the layout.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = ((1 + snr).clamp(max=5) / snr).clamp(max=40)
    return weight / weight.mean()


def compute_loss(
    base: Base, vectors: torch.Tensor, latents: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return ``||eps - eps_theta(z_t, t, c(v))||^2``, the mean over all (TI, equation 2).

    The prompt is the `vectors` ``(n, d)`` and nothing else. `latents` (scaled) and `noise` are
    ``(B, c, h, w) float32``, `t` ``(B,)`` integers 0..999, `weights` ``(1000,)``, one a timestep.
    """
    alpha = base.device_alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    context = base.text(vectors).expand(len(latents), -1, -1)
    predicted = base.predict_noise(noisy, t, context)
    if weights is None:
        return F.mse_loss(predicted, noise)
    return (((predicted - noise) ** 2).mean((1, 2, 3)) * weights[t]).mean()


def make_init(base: Base, settings: InversionSettings) -> torch.Tensor:
    """Return the vectors to start from, ``(n, d) float32``."""
    n = settings.n_vectors
    if settings.init == "mean":
        table = base.vocabulary()
        generator = torch.Generator().manual_seed(settings.seed)
        return table.mean(0) + 0.1 * table.std(0) * torch.randn(n, base.width, generator=generator)
    rows = base.token_rows(settings.init)  # A1111 spreads a text's tokens over the vectors
    return rows[[i * len(rows) // n for i in range(n)]].clone()


class _Run:
    """Vectors, their optimizer, and the losses so far: all that a checkpoint holds."""

    def __init__(self, start: torch.Tensor, lr: float, half: bool) -> None:
        self.vectors = start.clone().requires_grad_(True)
        self.optimizer = torch.optim.AdamW([self.vectors], lr=lr, weight_decay=0)
        # float16 gradients underflow without a scale; a step whose gradient overflows is skipped
        self.scaler = torch.amp.GradScaler(start.device.type, enabled=half)
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def note(self) -> str:
        """What a bar says beside the step."""
        recent = self.losses[-50:]
        return f"loss={sum(recent) / len(recent):.4f}" if recent else ""

    def update(self, loss: torch.Tensor, gradient: torch.Tensor, lr: float) -> float:
        """Do one optimizer step with a scaled gradient, and return the norm of the true one."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.vectors.grad = gradient
        self.scaler.step(self.optimizer)
        self.scaler.update()
        norm, value = float(self.vectors.grad.norm()), float(loss)
        if not math.isfinite(value) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise InversionError(
                f"loss {value} and gradient {norm} at step {self.step + 1}: lower the learning "
                "rate, or use bfloat16 or float32. The last checkpoint is intact"
            )
        self.losses.append(value)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "vectors": self.vectors.detach(), "losses": self.losses,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.vectors.copy_(state["vectors"])
        self.losses[:] = state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def invert(
    base: Base,
    images: torch.Tensor,
    *,
    token: str,
    settings: InversionSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    init_vectors: torch.Tensor | None = None,
    fast: bool | None = None,
    data: str = "",
) -> Embedding:
    """Train an embedding for `token` on images, everything else frozen (paper, section 3.1).

    Parameters
    ----------
    base : Base
    images : torch.Tensor
        ``(N, 3, H, H) uint8``, of the base's size or another multiple of its grid.
    token : str
        ``<name>``.
    settings : InversionSettings, optional
        What is not given follows the preset of the base.
    checkpoint : path, optional
        See `Steps`. A run that goes on from it ends with the same vectors as an undisturbed one.
    callback : callable, optional
        Called after every step, before that is saved, with ``{"step", "steps", "loss", "lr",
        "grad_norm", "vectors"}``.
    init_vectors : torch.Tensor, optional
        ``(n, d)`` to start from, in place of ``settings.init``.
    fast : bool, optional
        Compile the U-Net first; default: on a GPU for 300 steps and more.
    data : str
        A note on the images, kept in the file.

    Returns
    -------
    Embedding
        Vectors with their provenance and the loss history.

    Examples
    --------
    >>> from medbudget import load_base, make_phantoms
    >>> base = load_base("tiny", device="cpu")
    >>> images = make_phantoms("chest", "cardiomegaly", 4).images
    >>> settings = InversionSettings(n_vectors=4, steps=2, batch_size=2)
    >>> word = invert(base, images, token="<heart>", settings=settings)
    >>> word.token, tuple(word.vectors.shape), word.step, len(word.history["loss"])
    ('<heart>', (4, 96), 2, 2)
    """
    base.check_token(check_token(token))
    check_square(images)
    base.latent_shape(images.shape[2])
    settings = (settings or InversionSettings()).complete(base.preset)
    start = (
        make_init(base, settings) if init_vectors is None else torch.as_tensor(init_vectors).float()
    )
    Embedding(start, token).check_fits(base.width, base.name)
    settings = replace(settings, n_vectors=len(start))
    identity = {
        "settings": settings.without("checkpoint_every", *settings.open_end),
        "base": base.hash,
        "images": hash_tensors({"images": images}),
        "start": hash_tensors({"start": start}),
    }
    mean, std = base.encode_posterior(images)
    if settings.latents == "once":
        generator = torch.Generator().manual_seed(settings.seed)
        mean = mean + std * torch.randn(mean.shape, generator=generator).to(base.device)
    weights = None
    if settings.loss == "min_snr":
        weights = min_snr_weights(base.alphas_cumprod).to(base.device)
    base = choose_speed(base, fast, settings.steps)
    run = _Run(start.to(base.device), settings.lr, base.dtype == torch.float16)

    def compute(z: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, scale: torch.Tensor):
        loss = compute_loss(base, run.vectors, z, t, noise, weights)
        return loss.detach(), *torch.autograd.grad(loss * scale, run.vectors)

    began = time.monotonic()
    with Stepper(base, compute) as stepper:
        for step in Steps(
            run, settings.steps, checkpoint=checkpoint, identity=identity,
            every=settings.checkpoint_every, desc=f"invert {token}",
        ):  # fmt: skip
            which, t, noise, posterior = _draw(settings, step, len(images), mean.shape[1:])
            z = mean[which]
            if settings.latents == "resample":
                z = z + std[which] * posterior.to(base.device)
            scale = run.scaler.scale(torch.ones((), device=base.device))
            loss, gradient = stepper(z, t.to(base.device), noise.to(base.device), scale)
            lr = settings.lr
            if settings.schedule == "linear":
                lr *= 1 - step / settings.steps
            norm = run.update(loss, gradient, lr)
            if callback is not None:
                state = {"step": run.step, "steps": settings.steps, "loss": run.losses[-1]}
                callback(state | {"lr": lr, "grad_norm": norm, "vectors": run.vectors.detach()})
            if run.step == min(100, settings.steps) and run.vectors.detach().cpu().equal(start):
                raise InversionError(
                    f"after {run.step} steps the vectors have not moved: the gradient is zero; use "
                    "dtype float32, or a higher learning rate"
                )
    record = {
        "settings": asdict(settings), "images": len(images), "images_hash": identity["images"],
        "image_hashes": " ".join(hash_images(images)),  # tells a score that it is no test
        "medbudget": __version__, "device": base.device.type,
        "seconds": round(time.monotonic() - began, 1), "history": _thin(run.losses),
    }  # fmt: skip
    data = data or f"{len(images)} images of {images.shape[2]} px"
    name = Path(base.name).name if Path(base.name).exists() else base.name
    return Embedding(run.vectors.detach(), token, run.step, name, base.hash, data, record)


def check_square(images: torch.Tensor) -> None:
    """Raise unless `images` are square."""
    if check_images(images).shape[2] != images.shape[3]:
        raise ValueError(
            f"images must be square, got {tuple(images.shape[2:])} (H, W); load them with size=…, "
            "which pads with black"
        )


def _draw(settings: InversionSettings, step: int, n: int, shape: tuple[int, ...]):
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


@torch.inference_mode()
def compute_image_losses(
    base: Base, prompt: str | torch.Tensor | Embedding, images: torch.Tensor, *, draws: int = 8,
    seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Return the training loss of every image under a prompt: what membership inference looks at.

    Draw k has the same noise for all images, and the time ``(k + 1/2) / draws`` of the schedule,
    so that two sets of images, or two prompts, can be compared.

    `prompt` is a plain one, "" for none, or an embedding or its vectors ``(n, d)``. For images
    ``(N, 3, H, W) uint8``, ``(N, draws) float32`` on the CPU is returned.
    """
    check_images(images)
    check_counts(draws=draws)
    if isinstance(prompt, Embedding):
        prompt = prompt.vectors
    latents = base.encode(images)
    context = base.text(prompt.to(base.device) if isinstance(prompt, torch.Tensor) else prompt)
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn((draws, *latents.shape[1:]), generator=generator).to(base.device)
    losses = torch.empty(len(images), draws)
    for k in tqdm(range(draws), desc="losses", unit="draw"):
        t = int((k + 0.5) * len(base.alphas_cumprod) / draws)
        alpha = float(base.alphas_cumprod[t])
        parts = []
        for z in latents.split(16):
            noise = noises[k].expand_as(z)
            noisy = alpha**0.5 * z + (1 - alpha) ** 0.5 * noise
            times = torch.full((len(z),), t, device=base.device)
            predicted = base.predict_noise(noisy, times, context.expand(len(z), -1, -1))
            parts.append(((predicted - noise) ** 2).mean((1, 2, 3)))
        losses[:, k] = torch.cat(parts).cpu()
    return losses
