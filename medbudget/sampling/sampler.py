"""Sampling: one denoising loop with Euler ancestral steps, guidance and AND composition."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medbudget.adapters import Adapter, Adapters, choose_adapters, load_adapters, merge
from medbudget.base import Base, Words, choose_speed, speed_up
from medbudget.embeddings import Embedding
from medbudget.files import hash_tensors
from medbudget.gpu import draw_in_batches
from medbudget.prompts import parse_prompt, plain_text, unused_tokens
from medbudget.settings import check_counts, check_number, list_seeds

BATCH = 16
DIFFUSERS = {
    "num_inference_steps": "steps", "guidance_scale": "cfg_scale", "generator": "seed",
    "num_images_per_prompt": "n", "height": "size", "width": "size", "image": "the second argument",
    "mask_image": "the third argument",
}  # fmt: skip
USUAL = 20  # total guidance beyond which a word is said
Callback = Callable[[dict[str, Any]], None]


def make_sigmas(alphas_cumprod: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigmas ``(steps + 1,)``, the last 0, and their fractional timesteps ``(steps,)``.

    ``t = linspace(999, 0, steps)``, log-linear between the 1000 trained sigmas (k-diffusion's
    ``DiscreteSchedule``, as A1111 used it).
    """
    trained = ((1 - alphas_cumprod) / alphas_cumprod).double().sqrt().log()
    t = torch.linspace(len(trained) - 1, 0, steps, dtype=torch.float64)
    low, high, share = t.floor().long(), t.ceil().long(), t.frac()
    sigmas = ((1 - share) * trained[low] + share * trained[high]).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float(), t.float()


def ancestral_step(
    x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor
) -> torch.Tensor:
    """Take one Euler ancestral step from `sigma` to `sigma_next`, eta 1 (k-diffusion)."""
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
    """Return ``D_u + sum_i w_i * cfg_scale * (D_i - D_u)`` (composable diffusion, 2206.01714).

    `unconditional` may be None where its total weight ``1 - cfg_scale * sum(w)`` is zero.
    """
    terms = [cfg_scale * w * d for w, d in zip(weights, conditional)]
    if unconditional is not None and (rest := 1 - cfg_scale * sum(weights)) != 0:
        terms.insert(0, rest * unconditional)
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def total_guidance(prompt: str, cfg_scale: float) -> float:
    """Return ``cfg_scale * sum_i w_i``: how far a prompt goes from the unconditional image.

    >>> total_guidance("<cardiomegaly>:0.5 AND <pleural_effusion>:0.5 AND <pneumonia>:0.5", 3)
    4.5
    """
    return cfg_scale * sum(weight for _, weight in parse_prompt(prompt))


@dataclass(frozen=True)
class Condition:
    """An encoded prompt: text states with weights, and what to guide away from."""

    contexts: Sequence[torch.Tensor]  # (1, 77, d) each
    weights: Sequence[float]
    negative: torch.Tensor | None  # None where its weight is zero
    cfg_scale: float
    tuned: Sequence[Base | None] = ()  # what reads each text, the negative one last; None: the base

    @classmethod
    @torch.no_grad()
    def encode(
        cls, base: Base, prompt: str, embeddings: Words, negative: str, cfg_scale: float,
        adapters: Adapters = (),
    ) -> Condition:  # fmt: skip
        """Encode a prompt; warn of embeddings that it does not use, and of extreme guidance.

        The negative text has the adapters that all parts of the prompt have.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt is one text, got {prompt!r}; call once for each")
        check_number("cfg_scale", cfg_scale)
        words, loaded = load_all(base, embeddings, adapters)
        for note in unused_tokens([e.token for e in words], prompt, negative):
            warnings.warn(note, stacklevel=4)
        parts = parse_prompt(prompt, tokens=[e.token for e in words])
        if abs(guidance := cfg_scale * sum(weight for _, weight in parts)) > USUAL:
            warnings.warn(
                f"the total guidance is {guidance:g} (cfg_scale times the sum of the weights): "
                f"beyond {USUAL} images are hardly more than glaring contrast; usual are 1 to 10",
                stacklevel=4,
            )
        active = [(text, weight) for text, weight in parts if weight and cfg_scale]
        contexts = [base.text(text, embeddings=words) for text, _ in active]
        weights = [weight for _, weight in active]
        # text without words, or an unknown token in it, is refused even where it is not needed
        away = base.text(plain_text(negative), embeddings=words)
        needed = not active or cfg_scale * sum(weights) != 1
        own = [choose_adapters(loaded, text) for text, _ in parts]
        shared = tuple(a for a in loaded if all(a in some for some in own))
        sets = [*(own[i] for i, (_, weight) in enumerate(parts) if weight and cfg_scale), shared]
        networks = {some: merge(base, some) if some else None for some in dict.fromkeys(sets)}
        tuned = [networks[some] for some in sets] if any(networks.values()) else []
        return cls(contexts, weights, away if needed else None, cfg_scale, tuned)

    def match(self, base: Base) -> Condition:
        """Return the condition, its tuned networks compiled where the base's is."""
        if not base.fast:
            return self
        networks = {id(tuned): speed_up(tuned) for tuned in self.tuned if tuned is not None}
        return replace(self, tuned=[networks.get(id(tuned)) for tuned in self.tuned])

    def denoise(self, base: Base, x: torch.Tensor, sigma: float, t: torch.Tensor) -> torch.Tensor:
        """Return the guided prediction D of the image, all texts of a U-Net in one batch."""
        texts = [*self.contexts, *([] if self.negative is None else [self.negative])]
        scaled = x / math.sqrt(sigma**2 + 1)
        networks = [tuned or base for tuned in self.tuned] or [base] * len(texts)
        predictions = list(texts)
        for network in {id(network): network for network in networks}.values():
            which = [i for i in range(len(texts)) if networks[i] is network]
            context = torch.cat([texts[i].expand(len(x), -1, -1) for i in which])
            many = scaled.repeat(len(which), 1, 1, 1)
            eps = network.predict_noise(many, t.expand(len(context)), context).split(len(x))
            for i, e in zip(which, eps):
                predictions[i] = x - sigma * e
        if not self.contexts:
            return predictions[0]
        unconditional = None if self.negative is None else predictions.pop()
        return guide(unconditional, predictions, self.weights, self.cfg_scale)


@torch.inference_mode()
def denoise(
    base: Base,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    noises: Iterator[torch.Tensor],
    *,
    blend: Callable[[torch.Tensor], torch.Tensor] = lambda denoised: denoised,
    callback: Callback | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Run the loop from latents ``x (n, c, h, w) float32`` at ``sigmas[0]`` to the end.

    `noises` yields one such tensor a step; `blend` maps the denoised prediction (inpainting); the
    `callback` is told the index of the batch's `first` image too.
    """
    for i, t in enumerate(timesteps):
        sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
        denoised = blend(condition.denoise(base, x, sigma, t))
        x = ancestral_step(x, denoised, sigma, sigma_next, next(noises) if sigma_next else x)
        if callback is not None:
            state = {"step": i + 1, "steps": len(timesteps), "sigma": sigma, "x": x}
            callback(state | {"denoised": denoised, "first": first})
    return x


def draw_noises(
    seeds: Iterable[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield noise ``(n, *shape)`` for ever; image i's depends on its own seed alone.

    It is drawn on the CPU, so that neither batch nor device changes it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def draw_images(
    base: Base, condition: Condition, steps: int, shape: Sequence[int], seeds: range,
    batch_size: int = BATCH, callback: Callback | None = None,
) -> torch.Tensor:  # fmt: skip
    """Draw one image for each seed."""
    sigmas, timesteps = make_sigmas(base.alphas_cumprod, steps)

    def draw(first: int, count: int) -> torch.Tensor:
        noises = draw_noises(seeds[first : first + count], shape, base.device)
        x = next(noises) * sigmas[0]
        x = denoise(base, x, sigmas, timesteps, condition, noises, callback=callback, first=first)
        return base.decode(x)

    return draw_in_batches(draw, len(seeds), batch_size, desc="sample")


def refuse_options(function: str, others: dict[str, Any]) -> None:
    """Raise TypeError for unknown options; those of diffusers are told the right name."""
    for name in others:
        right = f": write {DIFFUSERS[name]} in its place" if name in DIFFUSERS else ""
        raise TypeError(f"{function} has no option {name}{right}; see help(medbudget.{function})")


def sample(
    base: Base,
    prompt: str,
    *,
    embeddings: Words = (),
    adapters: Adapters = (),
    negative_prompt: str = "",
    n: int = 16,
    steps: int | None = None,
    cfg_scale: float = 2.0,
    seed: int = 0,
    size: int | None = None,
    batch_size: int = BATCH,
    fast: bool | None = None,
    callback: Callback | None = None,
    **others: Any,
) -> torch.Tensor:
    """Generate images ``(n, 3, size, size) uint8`` from a prompt (paper, section 3.1).

    Parameters
    ----------
    prompt : str
        Text with ``<tokens>``, or several parts: ``"<a>:0.5 AND <b>:0.5"``; see `parse_prompt`.
    embeddings : Embedding, path, or several of them
        Those whose tokens the prompt uses.
    adapters : Adapter, path, or several of them
        Each with its weight (`Adapter.weighted`). One with a word applies to the parts of the
        prompt that name its token, one without to all; the negative prompt has those that all
        parts have.
    n : int
        Number of images; image i has the seed ``seed + i`` and is the same in every batch up to
        1 gray level, and to the byte for equal `batch_size` on one machine.
    steps : int, optional
        Default 25 on ``tiny``, else the paper's 100.
    cfg_scale : float
        Classifier-free guidance; the paper's 2.
    size : int, optional
        Pixels, default the base's own.
    fast : bool, optional
        Compile the U-Net first; default: on a GPU for 300 images and more.
    callback : callable, optional
        Called after every step with ``{"step", "steps", "sigma", "denoised", "x", "first"}``, the
        last the index of the batch's first image.

    Examples
    --------
    >>> from medbudget import load_base
    >>> from medbudget.tiny import load_trained
    >>> base = load_base("tiny", device="cpu")
    >>> word = load_trained("prostate", "tumour", base)
    >>> images = sample(base, f"{word.token}:0.7 AND red ground:0.3", embeddings=word, n=2, steps=2)
    >>> tuple(images.shape), images.dtype
    ((2, 3, 64, 64), torch.uint8)
    """
    refuse_options("sample", others)
    steps = default_steps(base) if steps is None else steps
    check_counts(n=n, steps=steps, batch_size=batch_size)
    seeds, shape = list_seeds(seed, n), base.latent_shape(size)
    condition = Condition.encode(base, prompt, embeddings, negative_prompt, cfg_scale, adapters)
    base = choose_speed(base, fast, n)
    return draw_images(base, condition.match(base), steps, shape, seeds, batch_size, callback)


def load_all(
    base: Base, embeddings: Words, adapters: Adapters
) -> tuple[list[Embedding], list[Adapter]]:
    """Return embeddings, with the words of adapters, and adapters, all of which fit this base."""
    loaded = load_adapters(base, adapters)
    single = isinstance(embeddings, Embedding | str | os.PathLike)
    words: list[Any] = [embeddings] if single else [*embeddings]  # type: ignore[misc]
    for adapter in loaded:
        if adapter.word is not None and all(adapter.word is not word for word in words):
            words.append(adapter.word)
    return base.load_words(words), loaded


def make_record(
    base: Base, words: Iterable[Embedding], adapters: Sequence[Adapter] = (), **settings: Any
) -> dict[str, Any]:
    """Return what is written into every synthetic image's file."""
    words = list(words)
    record = {
        "synthetic": True,
        **settings,
        "base": Path(base.name).name,
        "base_hash": base.hash,
        "embeddings": {e.token: hash_tensors({"vectors": e.vectors}) for e in words},
    }
    if adapters:
        record["adapters"] = [[a.token, a.hash, a.weight] for a in adapters]
    sources = [e.record for e in words] + [a.record for a in adapters]
    hashes = [source["image_hashes"] for source in sources if "image_hashes" in source]
    return record | ({"training_images": " ".join(hashes)} if hashes else {})


def default_steps(base: Base) -> int:
    """Return the number of steps where none is given: 25 on ``tiny``, else the paper's 100."""
    return 25 if base.preset == "tiny" else 100
