"""Sampling: one denoising loop with Euler ancestral steps, guidance and AND composition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from medbudget.base import Base
from medbudget.embeddings import Embedding
from medbudget.memory import GIB, largest_batch, plan_memory
from medbudget.progress import tqdm
from medbudget.prompts import parse_prompt

BLOCK = 16
STEPS = {"tiny": 25, "paper": 100}


def make_sigmas(alphas_cumprod: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigmas ``(steps + 1,)``, the last 0, and their (fractional) timesteps ``(steps,)``.

    ``t = linspace(999, 0, steps)``, log-linear between the 1000 trained sigmas
    (k-diffusion's ``DiscreteSchedule``, as A1111 used it).
    """
    trained = ((1 - alphas_cumprod) / alphas_cumprod).double().sqrt().log()
    t = torch.linspace(len(trained) - 1, 0, steps, dtype=torch.float64)
    low = t.floor().long()
    high = t.ceil().long()
    part = t - low
    sigmas = ((1 - part) * trained[low] + part * trained[high]).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float(), t.float()


def ancestral_step(
    x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor
) -> torch.Tensor:
    """One Euler ancestral step from `sigma` to `sigma_next` with eta 1 (k-diffusion)."""
    up = 0.0
    if sigma_next > 0:
        up = min(sigma_next, math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    down = math.sqrt(sigma_next**2 - up**2)
    x = x + (x - denoised) / sigma * (down - sigma)
    return x + noise * up if sigma_next > 0 else x


def guide(
    unconditional: torch.Tensor | None,
    conditional: Sequence[torch.Tensor],
    weights: Sequence[float],
    cfg_scale: float,
) -> torch.Tensor:
    """Return ``D = D_u + sum_i w_i * scale * (D_i - D_u)`` (composable diffusion, 2206.01714).

    `unconditional` may be None where its total weight ``1 - scale * sum(w)`` is zero.
    """
    rest = 1 - cfg_scale * sum(weights)
    terms = [cfg_scale * w * d for w, d in zip(weights, conditional)]
    if unconditional is not None and rest != 0:
        terms.insert(0, rest * unconditional)
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def total_guidance(prompt: str, cfg_scale: float) -> float:
    """Return ``scale * sum_i w_i``: how far a composed prompt goes from the unconditional image.

    The paper's three diseases at 0.5 each with scale 3 make 4.5, the guidance of a single prompt
    with scale 4.5; weights that sum to 1 leave the scale as it is.

    Examples
    --------
    >>> total_guidance("<cardiomegaly>:0.5 AND <pleural_effusion>:0.5 AND <pneumonia>:0.5", 3)
    4.5
    """
    return cfg_scale * sum(weight for _, weight in parse_prompt(prompt))


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """One draw per image, on the CPU, so that neither batch nor device changes it."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


@torch.inference_mode()
def denoise(
    base: Base,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    contexts: Sequence[torch.Tensor],
    weights: Sequence[float],
    negative: torch.Tensor,
    cfg_scale: float,
    generators: Sequence[torch.Generator],
    blend: Callable[[torch.Tensor], torch.Tensor] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> torch.Tensor:
    """Run the loop from latents ``x (n, c, h, w) float32`` at ``sigmas[0]`` to the end.

    `contexts` and `negative` are text states ``(1, 77, d)``; `blend` maps the denoised prediction
    (inpainting). Terms of weight zero are skipped. All conditions of a step go through the U-Net
    in one batch, or, from the first time that the memory does not suffice for it, one by one.
    """
    n = len(x)
    active = [(c, w) for c, w in zip(contexts, weights) if w != 0 and cfg_scale != 0]
    rest = 1 - cfg_scale * sum(w for _, w in active)
    texts = [c for c, _ in active] + ([negative] if rest != 0 or not active else [])
    context = torch.cat([text.expand(n, -1, -1) for text in texts])
    steps = len(sigmas) - 1
    together = len(texts)  # conditions in one batch of the U-Net
    for i in range(steps):
        sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
        scaled = x / math.sqrt(sigma**2 + 1)
        try:
            eps = _predict(base, scaled, timesteps[i], context, together)
        except torch.cuda.OutOfMemoryError:
            if together == 1:
                raise
            together = 1
            eps = _predict(base, scaled, timesteps[i], context, together)
        predictions = [x - sigma * e for e in eps]
        unconditional = predictions.pop() if len(texts) > len(active) else None
        if active:
            denoised = guide(unconditional, predictions, [w for _, w in active], cfg_scale)
        else:
            assert unconditional is not None
            denoised = unconditional
        if blend is not None:
            denoised = blend(denoised)
        noise = torch.zeros(()) if sigma_next == 0 else draw_noise(generators, x.shape[1:])
        x = ancestral_step(x, denoised, sigma, sigma_next, noise.to(x.device))
        if callback is not None:
            callback({"step": i + 1, "steps": steps, "sigma": sigma, "denoised": denoised, "x": x})
    return x


def _predict(
    base: Base, scaled: torch.Tensor, t: torch.Tensor, context: torch.Tensor, together: int
) -> list[torch.Tensor]:
    """One noise prediction for each text of `context`, `together` texts in one U-Net batch."""
    n = len(scaled)
    out: list[torch.Tensor] = []
    for texts in context.split(n * together):
        times = len(texts) // n
        eps = base.predict_noise(scaled.repeat(times, 1, 1, 1), t.expand(len(texts)), texts)
        out += eps.split(n)
    return out


def sample(
    base: Base,
    prompt: str,
    *,
    embeddings: Iterable[Embedding] = (),
    negative_prompt: str = "",
    n: int = 16,
    steps: int | None = None,
    cfg_scale: float = 2.0,
    seed: int = 0,
    size: int | None = None,
    batch_size: int | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> torch.Tensor:
    """Generate images from a prompt (paper, section 3.3).

    Parameters
    ----------
    prompt : str
        Text with ``<tokens>``, or several parts: ``"<a>:0.5 AND <b>:0.5"``.
    embeddings : iterable of Embedding
        Those whose tokens the prompt uses.
    n : int
        Number of images; image i has the seed ``seed + i`` and is the same in every batch up to
        1 gray level, and to the byte for equal `batch_size` on one machine.
    steps : int, optional
        Default 25 on ``tiny``, else the paper's 100.
    cfg_scale : float
        Classifier-free guidance; the paper's 2. With 1 the unconditional pass is skipped.
    size : int, optional
        Pixels, default the base's own.
    batch_size : int, optional
        Default 16, on a GPU less where memory is short. A batch that does not fit after all is
        halved, with a warning.
    callback : callable, optional
        Called after every step with ``{"step", "steps", "sigma", "denoised", "x", "first"}``.

    Returns
    -------
    torch.Tensor
        ``(n, 3, size, size) uint8``.

    Examples
    --------
    >>> from medbudget import load_base
    >>> from medbudget.tiny import load_trained
    >>> base = load_base("tiny", device="cpu")
    >>> word = load_trained("prostate", "tumour", base)
    >>> made = sample(base, f"{word.token}:0.7 AND red ground:0.3", embeddings=[word], n=2, steps=2)
    >>> tuple(made.shape), made.dtype
    ((2, 3, 64, 64), torch.uint8)
    """
    steps = default_steps(base) if steps is None else steps
    check_numbers(n=n, steps=steps, batch_size=batch_size or 1, cfg_scale=cfg_scale)
    shape = base.latent_shape(size)
    conditions = encode_prompt(base, prompt, negative_prompt, embeddings)
    sigmas, timesteps = make_sigmas(base.alphas_cumprod, steps)
    batch_size = batch_size or fitting_batch(base, size)

    def draw(first: int, count: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(count)]
        latents = denoise(
            base,
            draw_noise(generators, shape).to(base.device) * sigmas[0],
            sigmas,
            timesteps,
            **conditions,
            cfg_scale=cfg_scale,
            generators=generators,
            callback=add_first(callback, first),
        )
        return base.decode(latents)

    return draw_in_batches(draw, n, batch_size, desc="sample")


def draw_in_batches(
    draw: Callable[[int, int], torch.Tensor], n: int, batch_size: int, *, desc: str
) -> torch.Tensor:
    """Return what ``draw(first, count)`` makes of 0 to `n`; a batch that does not fit is halved."""
    out: list[torch.Tensor] = []
    first = 0
    with tqdm(total=n, desc=desc, unit="image") as bar:
        while first < n:
            count = min(batch_size, n - first)
            made = None
            try:
                made = draw(first, count)
            except torch.cuda.OutOfMemoryError as error:
                if count == 1:
                    raise torch.cuda.OutOfMemoryError(
                        "not even one image at a time fits the GPU's memory: close other programs, "
                        f"choose a smaller size, or device='cpu' ({str(error).splitlines()[0]})"
                    ) from None
            if made is None:  # only now has the exception let go of the tensors
                batch_size = count // 2
                torch.cuda.empty_cache()
                warnings.warn(
                    f"a batch of {count} images does not fit the GPU's memory: going on with "
                    f"{batch_size} (the same images up to 1 gray level)",
                    stacklevel=3,
                )
                continue
            out.append(made)
            first += count
            bar.update(count)
    return torch.cat(out)


def interpolate(
    base: Base,
    a: Embedding,
    b: Embedding,
    *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    method: str = "and",
    seed: int = 0,
    **options: Any,
) -> dict[float, torch.Tensor]:
    """Draw images on the way from `a` to `b`, with the same noise at every weight.

    Parameters
    ----------
    weights : sequence of float
        Shares of `b`, usually 0 to 1; the share of `a` is the rest to 1.
    method : {"and", "vectors"}
        ``"and"`` composes the predictions, ``<a>:0.75 AND <b>:0.25`` (paper, section 4.4);
        ``"vectors"`` draws with ``0.75 a + 0.25 b``, linear between the embeddings themselves,
        which must have equally many vectors.
    **options
        For `sample`: n, steps, cfg_scale, …

    Returns
    -------
    dict of float to torch.Tensor
        Each share of `b` with its images, ``(n, 3, size, size) uint8``; image i has the same seed
        in each.

    Examples
    --------
    >>> from medbudget import load_base
    >>> from medbudget.tiny import load_trained
    >>> base = load_base("tiny", device="cpu")
    >>> a, b = (load_trained("chest", label, base) for label in ("healthy", "pneumonia"))
    >>> axis = interpolate(base, a, b, weights=(0, 0.5, 1), n=1, steps=2)
    >>> {share: tuple(images.shape) for share, images in axis.items()}
    {0.0: (1, 3, 64, 64), 0.5: (1, 3, 64, 64), 1.0: (1, 3, 64, 64)}
    """
    if method not in ("and", "vectors"):
        raise ValueError(f"unknown method {method!r}; allowed are 'and', 'vectors'")
    if not weights or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights must be finite numbers such as 0.25, got {list(weights)}")
    if method == "vectors" and a.vectors.shape != b.vectors.shape:
        raise ValueError(
            f"{a.token} has shape {tuple(a.vectors.shape)}, {b.token} {tuple(b.vectors.shape)}: "
            "only embeddings of equal shape can be mixed; use method='and'"
        )
    axis = {}
    for w in tqdm(weights, desc=f"{a.token} to {b.token}", unit="weight"):
        if method == "and":
            prompt, embeddings = f"{a.token}:{1 - w!r} AND {b.token}:{w!r}", [a, b]
        else:
            mixed = Embedding((1 - w) * a.vectors + w * b.vectors, "<mixed>")
            prompt, embeddings = mixed.token, [mixed]
        axis[float(w)] = sample(base, prompt, embeddings=embeddings, seed=seed, **options)
    return axis


def add_first(
    callback: Callable[[dict[str, Any]], None] | None, first: int
) -> Callable[[dict[str, Any]], None] | None:
    """Return a callback of `denoise` that also tells the index of the batch's first image."""
    if callback is None:
        return None
    return lambda state: callback({**state, "first": first})


def default_steps(base: Base) -> int:
    """Return the number of steps where none is given: 25 on ``tiny``, else the paper's 100."""
    return STEPS["tiny" if base.preset == "tiny" else "paper"]


def check_numbers(*, cfg_scale: float, **counts: int) -> None:
    """Raise ValueError for a count below 1 or a guidance that is not finite."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a finite number such as 2, got {cfg_scale}")


@torch.inference_mode()
def encode_prompt(
    base: Base, prompt: str, negative_prompt: str, embeddings: Iterable[Embedding]
) -> dict[str, Any]:
    """Return what `denoise` takes of a prompt: contexts, weights and the negative context."""
    embeddings = [embeddings] if isinstance(embeddings, Embedding) else list(embeddings)
    tokens = [e.token for e in embeddings]
    parts = parse_prompt(prompt, tokens=tokens)
    return {
        "contexts": [base.text(text, embeddings=embeddings) for text, _ in parts],
        "weights": [weight for _, weight in parts],
        "negative": base.text(negative_prompt, embeddings=embeddings),
    }


def fitting_batch(base: Base, size: int | None = None) -> int:
    """Return how many images to draw at once: 16, on a GPU fewer where memory is short."""
    if base.device.type != "cuda":
        return BLOCK
    free = torch.cuda.mem_get_info(base.device)[0] / GIB
    networks = (base.vae, base.unet, base.text_encoder)
    loaded = plan_memory("sample", networks=networks, size=base.size, dtype=base.dtype)
    free += (loaded.weights + loaded.overhead) / GIB  # those are in place already
    options = {"networks": networks, "size": size or base.size, "dtype": base.dtype}
    return max(1, min(BLOCK, largest_batch("sample", free, **options)))
