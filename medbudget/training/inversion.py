"""Textual Inversion: find the vectors that make a frozen base draw given images.

Gal et al. 2022 (arXiv 2208.01618), as AUTOMATIC1111's web UI did it for the paper (section 3.1):
every image is encoded once, and AdamW changes the ``n x d`` vectors and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from medbudget.base import Base, choose_speed
from medbudget.embeddings import MAX_VECTORS, Embedding, check_token
from medbudget.files import hash_tensors
from medbudget.images import check_images, check_square
from medbudget.progress import tqdm
from medbudget.settings import SEEDS, Settings, check_counts
from medbudget.training.loop import InversionError, Run, describe_data, name_origin, train


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


def compare_noise(
    base: Base, context: torch.Tensor, latents: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return ``||eps - eps_theta(z_t, t, c)||^2``, the mean over all (TI, equation 2).

    `context` c is the encoded prompt ``(1, 77, d)``. `latents` (scaled) and `noise` are
    ``(B, c, h, w) float32``, `t` ``(B,)`` integers 0..999, `weights` ``(1000,)``, one a timestep.
    """
    alpha = base.device_alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted = base.predict_noise(noisy, t, context.expand(len(latents), -1, -1))
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


def choose_weights(base: Base, loss: str) -> torch.Tensor | None:
    """Return the weights of timesteps that a setting ``loss`` stands for."""
    if loss == "plain":
        return None
    return min_snr_weights(base.alphas_cumprod).to(base.device)


def invert(
    base: Base,
    images: torch.Tensor,
    *,
    token: str,
    settings: InversionSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    fast: bool | None = None,
    data: str = "",
) -> Embedding:
    """Train an embedding for `token` on images, everything else frozen (paper, section 3.1).

    Parameters
    ----------
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
    fast : bool, optional
        Compile the U-Net first; default: on a GPU for 300 steps and more.
    data : str
        A note on the images, kept in the file.

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
    start = make_init(base, settings)
    base = choose_speed(base, fast, settings.steps)
    weights = choose_weights(base, settings.loss)
    vectors = start.to(base.device, copy=True)
    run = Run({"vectors": vectors}, {"vectors": settings.lr}, base.dtype == torch.float16)

    def tell(state: dict[str, Any]) -> None:
        if state["step"] == min(100, settings.steps) and vectors.detach().cpu().equal(start):
            raise InversionError(
                f"after {run.step} steps the vectors have not moved: the gradient is zero; use "
                "dtype float32, or a higher learning rate"
            )
        if callback is not None:
            callback(state | {"vectors": vectors.detach()})

    record = train(
        base, run, images, settings,
        lambda z, t, noise: compare_noise(base, base.text(vectors), z, t, noise, weights),
        checkpoint=checkpoint, identity={"start": hash_tensors({"start": start})},
        desc=f"invert {token}", callback=tell,
    )  # fmt: skip
    return Embedding(
        vectors.detach(), token, run.step, name_origin(base), base.hash,
        describe_data(images, data), record,
    )  # fmt: skip


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
