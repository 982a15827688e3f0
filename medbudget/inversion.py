"""Textual Inversion: find token vectors that make a frozen base generate given images.

Gal et al. 2022 (arXiv 2208.01618) as AUTOMATIC1111's web UI did it for the paper (section 3.2):
all weights frozen, latents cached, AdamW on the ``n x d`` vectors and nothing else.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medbudget._version import __version__
from medbudget.artifacts import load_checkpoint, save_checkpoint
from medbudget.base import Base
from medbudget.embeddings import MAX_VECTORS, Embedding, check_token
from medbudget.files import check_writable, hash_tensors, hold
from medbudget.images import check_images, hash_images
from medbudget.memory import GIB, plan_memory
from medbudget.processes import stoppable
from medbudget.progress import tqdm

LATENT_POLICIES = ("once", "mean", "resample")
SCHEDULES = ("constant", "linear")
LOSSES = ("plain", "min_snr")


class InversionError(RuntimeError):
    """Training that cannot go on; the message explains."""


@dataclass(frozen=True)
class InversionSettings:
    """Settings of `invert`; make one with `InversionSettings.preset`.

    Attributes
    ----------
    n_vectors : int
        1 to 74 rows.
    steps, batch_size : int
        Optimizer steps, and images in each.
    lr : float
        Learning rate of AdamW (no weight decay).
    schedule : str
        ``constant`` (the paper) or ``linear`` (falls to zero at the last step).
    loss : str
        ``plain`` epsilon MSE (the paper), or ``min_snr`` (`min_snr_weights`).
    init : str
        Text whose token embeddings are spread over the rows (default ``*``, as A1111), or
        ``mean``: the mean token embedding plus noise of the table's spread / 10.
    latents : str
        ``once``: one posterior sample per image, frozen (A1111's default); ``mean``: the posterior
        mean; ``resample``: a new posterior sample at each access.
    checkpoint_every : int
        Steps between checkpoints, where `invert` is given a path for them.
    """

    n_vectors: int = 64
    steps: int = 50_000
    lr: float = 0.005
    batch_size: int = 1
    schedule: str = "constant"
    loss: str = "plain"
    init: str = "*"
    latents: str = "once"
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if not 1 <= self.n_vectors <= MAX_VECTORS:
            raise ValueError(
                f"n_vectors must be 1 to {MAX_VECTORS} (a prompt has 77 positions and A1111 breaks "
                f"it up from 75 on), got {self.n_vectors}"
            )
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number such as 0.005, got {self.lr}")
        choices = (("schedule", SCHEDULES), ("loss", LOSSES), ("latents", LATENT_POLICIES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> InversionSettings:
        """Return the settings called ``tiny``, ``colab`` or ``paper``, with overrides.

        Overrides that are None are ignored, so that command-line options can be passed through.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; allowed are {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        unknown = set(overrides) - known
        if unknown:
            raise TypeError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        return replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})


PRESETS = {
    "tiny": InversionSettings(steps=1000, lr=0.01, batch_size=8, schedule="linear"),
    "colab": InversionSettings(steps=5000, batch_size=1),
    "paper": InversionSettings(),
}


def min_snr_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Loss weights over timesteps that raise high noise: min(1 + SNR, 5)/SNR, at most 40, mean 1.

    After Hang et al. 2023 (arXiv 2303.09556); epsilon loss alone hardly sees the layout.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = ((1 + snr).clamp(max=5) / snr).clamp(max=40)
    return weight / weight.mean()


def compute_loss(
    base: Base,
    vectors: torch.Tensor,
    latents: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the epsilon-prediction MSE, ``||eps - eps_theta(z_t, t, c(v))||^2`` (TI, equation 2).

    Parameters
    ----------
    vectors : torch.Tensor
        ``(n, d)``; the prompt is these rows and nothing else.
    latents, noise : torch.Tensor
        ``(B, c, h, w) float32``, scaled latents and unit noise.
    t : torch.Tensor
        ``(B,)`` integer timesteps 0..999.
    weights : torch.Tensor, optional
        ``(1000,)`` weight of each timestep, on the base's device.
    """
    alpha = base.device_alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    context = base.text(vectors).expand(len(latents), -1, -1)
    predicted = base.predict_noise(noisy, t, context)
    if weights is None:
        return F.mse_loss(predicted, noise)
    error = ((predicted - noise) ** 2).mean((1, 2, 3))
    return (error * weights[t]).mean()


def make_init(base: Base, settings: InversionSettings) -> torch.Tensor:
    """Return the starting vectors ``(n, d) float32`` for ``settings.init``."""
    n = settings.n_vectors
    if settings.init == "mean":
        table = base.text_encoder.get_input_embeddings().weight.detach().float().cpu()
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(n, table.shape[1], generator=generator)
        return table.mean(0) + 0.1 * table.std(0) * noise
    rows = base.token_rows(settings.init)
    # A1111 spreads the text's tokens over the vectors
    return rows[[int(i) * len(rows) // n for i in range(n)]].clone()


def _draw(settings: InversionSettings, step: int, n_images: int, shape: tuple[int, ...]):
    """Images, timesteps and noises of one step: a function of seed and step alone.

    That makes a resumed run equal to one that was never stopped. Images come in a new random order
    each epoch, as in A1111.
    """
    batch = settings.batch_size
    order: list[int] = []
    first = step * batch
    while len(order) < batch:
        epoch, start = divmod(first + len(order), n_images)
        shuffle = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order += torch.randperm(n_images, generator=shuffle)[start:].tolist()[: batch - len(order)]
    generator = torch.Generator().manual_seed((settings.seed + 1) * 15_485_863 + step)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    noise = torch.randn((batch, *shape), generator=generator)
    posterior = torch.randn((batch, *shape), generator=generator)
    return torch.tensor(order), t, noise, posterior


def invert(
    base: Base,
    images: torch.Tensor,
    *,
    token: str,
    settings: InversionSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    init_vectors: torch.Tensor | None = None,
    data: str = "",
) -> Embedding:
    """Train an embedding for `token` on images, everything else frozen (paper, section 3.2).

    Parameters
    ----------
    base : Base
    images : torch.Tensor
        ``(N, 3, H, W) uint8``, square, of the base's size or another multiple of its grid.
    token : str
        ``<name>``.
    settings : InversionSettings, optional
        Default: the preset of the base.
    checkpoint : path, optional
        Saved there every ``settings.checkpoint_every`` steps, and at Ctrl-C or SIGTERM after the
        step. If it exists, the run goes on from it and ends with the same vectors as an undisturbed
        one. The one before is kept beside it, for the case that it is damaged. Removed by nobody.
    callback : callable, optional
        Called after every step, before that is saved, with ``{"step", "steps", "loss", "lr",
        "grad_norm", "vectors"}``.
    init_vectors : torch.Tensor, optional
        Rows ``(n, d)`` to start from, in place of ``settings.init``.
    data : str
        A note on the images, kept in the file.

    Returns
    -------
    Embedding
        Vectors with provenance and the loss history.

    Raises
    ------
    InversionError
        Loss or gradient not finite, or vectors that do not move.
    ValueError
        Images, token, settings or checkpoint that do not fit.
    InUseError
        Another process writes the same checkpoint.

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
    check_images(images)
    check_token(token)
    base.check_token(token)
    settings = settings or InversionSettings.preset(base.preset)
    if images.shape[2] != images.shape[3]:
        raise ValueError(
            f"images must be square, got {tuple(images.shape[2:])} (H, W); load them with size=…"
        )
    base.latent_shape(images.shape[2])
    if init_vectors is None:
        start = make_init(base, settings)
    else:
        start = Embedding(init_vectors, token).vectors.clone()
        start_width = Embedding(start, token)
        start_width.check_fits(base.width, base.name)
        settings = replace(settings, n_vectors=len(start))
    if checkpoint is not None:
        checkpoint = check_writable(checkpoint)
    for module in (base.vae, base.unet, base.text_encoder):
        module.requires_grad_(False)

    device = base.device
    mean, std = base.encode_posterior(images)
    if settings.latents == "once":
        generator = torch.Generator().manual_seed(settings.seed)
        mean = mean + std * torch.randn(mean.shape, generator=generator).to(device)
    vectors = start.clone().to(device).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [vectors], lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    identity: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(settings).items() if k != "checkpoint_every"},
        "base": base.hash,
        "images": hash_tensors({"images": images}),
        "start": hash_tensors({"start": start}),
    }
    if settings.schedule == "constant":
        identity["settings"].pop("steps")  # a longer run may go on from a shorter one
    state = _State(vectors, optimizer, MAX_SCALE if base.dtype == torch.float16 else 1.0)
    losses = state.losses
    weights = None
    if settings.loss == "min_snr":
        weights = min_snr_weights(base.alphas_cumprod).to(device)
    seconds = time.monotonic()
    with (
        stoppable() as stopped,
        hold(checkpoint),
        base.vae_offloaded() if device.type == "cuda" else nullcontext(),
        _fitting(base) as fit,
    ):
        saved = None
        if checkpoint is not None and _resume(checkpoint, identity, state):
            saved = len(losses)
        done = len(losses)
        bar = tqdm(total=settings.steps, initial=done, desc=f"invert {token}", unit="step")
        if device.type == "cuda" and not fit.is_on:
            fit.plan(images.shape[2], settings.batch_size)
        compute: Callable[..., Any] | None = None
        try:
            while len(losses) < settings.steps and not stopped():
                step = len(losses)
                pick, t, noise, posterior = _draw(settings, step, len(images), mean.shape[1:])
                latents = mean[pick]
                if settings.latents == "resample":
                    latents = latents + std[pick] * posterior.to(device)
                inputs = (latents, t.to(device), noise.to(device))
                rate = settings.lr
                if settings.schedule == "linear":
                    rate *= 1 - step / settings.steps
                short = False
                try:
                    if compute is None:
                        compute = _prepare_step(base, vectors, inputs, weights)
                    loss, norm = _step(compute, state, inputs, rate)
                except torch.cuda.OutOfMemoryError:
                    if fit.is_on:
                        raise InversionError(
                            f"out of GPU memory at step {step + 1} in spite of checkpointing: close "
                            f"other programs, lower batch_size ({settings.batch_size}) or the size "
                            f"({images.shape[2]} px). The last checkpoint is untouched"
                        ) from None
                    short = True
                if short:  # only now has the exception let go of the tensors
                    compute = None
                    fit.turn_on(f"out of GPU memory at step {step + 1}")
                    continue
                bar.update()
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
                if callback is not None:
                    callback(
                        {
                            "step": step + 1,
                            "steps": settings.steps,
                            "loss": loss,
                            "lr": rate,
                            "grad_norm": norm,
                            "vectors": vectors.detach(),
                        }
                    )
                first = min(done + 100, settings.steps)
                if step + 1 == first and torch.equal(vectors.detach().cpu(), start):
                    raise InversionError(
                        f"after {first} steps the vectors have not moved at all: the gradient is "
                        "zero; use dtype float32, or a higher learning rate"
                    )
                if checkpoint is not None and len(losses) % settings.checkpoint_every == 0:
                    _save(checkpoint, identity, state)
                    saved = len(losses)
        finally:
            bar.close()
        if checkpoint is not None and saved != len(losses):
            _save(checkpoint, identity, state)
        if stopped() and len(losses) < settings.steps:
            kept = (
                f"the same command goes on from {checkpoint}" if checkpoint else "nothing is kept"
            )
            bar.write(f"stopped at step {len(losses)}; {kept}")
    if len(losses) < settings.steps:
        raise KeyboardInterrupt  # if the signal's own handler has not
    return Embedding(
        vectors=vectors.detach(),
        token=token,
        step=len(losses),
        base=Path(base.name).name if Path(base.name).exists() else base.name,
        base_hash=base.hash,
        data=data or f"{len(images)} images of {images.shape[2]} px",
        record={
            "settings": asdict(settings),
            "images": len(images),
            "images_hash": identity["images"],
            "image_hashes": " ".join(hash_images(images)),  # tells a score that it is no test
            "medbudget": __version__,
            "device": device.type,
            "seconds": round(time.monotonic() - seconds, 1),
            "history": _history(losses),
        },
    )


MAX_SCALE = 2.0**16
GROW_EVERY = 2000


@dataclass
class _State:
    """What a run changes: vectors, optimizer, losses, and the loss scale of float16."""

    vectors: torch.Tensor
    optimizer: torch.optim.Optimizer
    max_scale: float
    losses: list[float] = field(default_factory=list)
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.scale = self.max_scale


class _fitting:
    """Checkpointing of the U-Net, turned on where memory is short and off again at the end."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.is_on = self.was_on = bool(base.unet.is_gradient_checkpointing)

    def __enter__(self) -> _fitting:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.is_on and not self.was_on:
            self.base.unet.disable_gradient_checkpointing()

    def plan(self, size: int, batch_size: int) -> None:
        """Turn it on if a step without it will not fit the free memory."""
        base = self.base
        networks = (base.vae, base.unet, base.text_encoder)
        needed = plan_memory(
            "invert", networks=networks, size=size, batch_size=batch_size, dtype=base.dtype
        )
        free = torch.cuda.mem_get_info(base.device)[0]
        if needed.activations > free:
            self.turn_on(
                f"a step takes about {needed.activations / GIB:.1f} GiB beside the weights, "
                f"{free / GIB:.1f} GiB are free"
            )

    def turn_on(self, reason: str) -> None:
        """Say why, and recompute activations from now on: about a third slower, same results."""
        self.base.unet.enable_gradient_checkpointing()
        self.is_on = True
        torch.cuda.empty_cache()
        warnings.warn(
            f"{reason}: checkpointing is on from here (slower, equal up to rounding)", stacklevel=3
        )


def _prepare_step(
    base: Base,
    vectors: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    weights: torch.Tensor | None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return ``compute(latents, t, noise, scale) -> (loss, gradient)``.

    On a GPU with a fast base it is a CUDA graph: recorded once, then replayed without Python.
    """

    def compute(
        latents: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, scale: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = compute_loss(base, vectors, latents, t, noise, weights)
        (gradient,) = torch.autograd.grad(loss * scale, vectors)
        return loss.detach(), gradient / scale

    if not (base.fast and base.device.type == "cuda"):
        return compute
    held = [x.clone() for x in (*inputs, torch.ones((), device=base.device))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills every cache
            compute(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(*held)

    def replay(*values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        for place, value in zip(held[:-1], values):
            place.copy_(value)
        held[-1].fill_(values[-1])
        graph.replay()
        return out

    return replay


def _step(
    compute: Callable[..., Any], state: _State, inputs: tuple[torch.Tensor, ...], rate: float
) -> tuple[float, float]:
    """One optimizer step; in float16 the loss scale is halved until the gradient is finite."""
    step = len(state.losses)
    if step and step % GROW_EVERY == 0:
        state.scale = min(state.max_scale, 2 * state.scale)
    while True:
        scale = state.scale
        loss, gradient = compute(*inputs, scale)
        if not torch.isfinite(loss):
            raise InversionError(
                f"the loss became {loss.item()} at step {step + 1}: this happens with a too high "
                "learning rate or in float16; lower lr, or use bfloat16 or float32. The last "
                "checkpoint is untouched"
            )
        norm = gradient.norm()
        if torch.isfinite(norm):
            break
        if scale <= 1:
            raise InversionError(
                f"the gradient became {norm.item()} at step {step + 1} though the loss is finite; "
                "use float32, or a lower learning rate. The last checkpoint is untouched"
            )
        state.scale /= 2
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.vectors.grad = gradient
    state.optimizer.step()
    state.losses.append(float(loss))
    return state.losses[-1], float(norm)


def _history(losses: list[float], points: int = 200) -> dict[str, list[float]]:
    """Thin a loss curve to block means, so that a file stays small."""
    block = max(1, math.ceil(len(losses) / points))
    ends = range(block, len(losses) + block, block)
    means = [losses[end - block : end] for end in ends]
    return {
        "step": [min(end, len(losses)) for end in ends],
        "loss": [round(sum(part) / len(part), 5) for part in means if part],
    }


def _save(path: Path, identity: dict[str, Any], state: _State) -> None:
    content = {
        "identity": identity,
        "vectors": state.vectors.detach().cpu(),
        "optimizer": state.optimizer.state_dict(),
        "losses": state.losses,
        "scale": state.scale,
    }
    save_checkpoint(path, content)


def _resume(path: Path, identity: dict[str, Any], state: _State) -> bool:
    """Go on from a checkpoint, if there is one."""
    stored = load_checkpoint(path, identity, detail="settings")
    if stored is None:
        return False
    with torch.no_grad():
        state.vectors.copy_(stored["vectors"])
    state.optimizer.load_state_dict(stored["optimizer"])
    state.losses[:] = stored["losses"]
    state.scale = stored.get("scale", state.max_scale)
    return True


__all__ = ["PRESETS", "InversionError", "InversionSettings", "compute_loss", "invert"]


@torch.inference_mode()
def compute_image_losses(
    base: Base,
    prompt: str | torch.Tensor,
    images: torch.Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """Return the training loss of every image under a prompt: what membership inference looks at.

    Draw k has the same noise for all images, and the time ``(k + 1/2) / draws`` of the schedule,
    so that two sets of images, or two prompts, can be compared.

    Parameters
    ----------
    prompt : str or torch.Tensor
        A plain prompt, "" for none, or an embedding's vectors ``(n, d)``.
    images : torch.Tensor
        ``(N, 3, H, W) uint8``.
    draws : int
        Times and noises for each image.

    Returns
    -------
    torch.Tensor
        ``(N, draws) float32`` on the CPU.
    """
    check_images(images)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    latents = base.encode(images)
    context = base.text(prompt.to(base.device) if isinstance(prompt, torch.Tensor) else prompt)
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn((draws, *latents.shape[1:]), generator=generator).to(base.device)
    losses = torch.empty(len(images), draws)
    with tqdm(total=draws, desc="losses", unit="draw") as bar:
        for k in range(draws):
            t = int((k + 0.5) * len(base.alphas_cumprod) / draws)
            alpha = float(base.alphas_cumprod[t])
            parts = []
            for z in latents.split(16):
                noise = noises[k].expand_as(z)
                noisy = alpha**0.5 * z + (1 - alpha) ** 0.5 * noise
                times = torch.full((len(z),), t, device=base.device)
                guess = base.predict_noise(noisy, times, context.expand(len(z), -1, -1))
                parts.append(((guess - noise) ** 2).mean((1, 2, 3)))
            losses[:, k] = torch.cat(parts).cpu()
            bar.update()
    return losses
