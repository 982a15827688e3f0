"""Prove a base: its width, what it predicts, its autoencoder, and a golden picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.base import Base
from medbudget.data.phantoms import make_phantoms
from medbudget.known import BaseError, Golden, KnownBase, identify, known_base, record_verified
from medbudget.loading import correlate_with_noise, measure_prediction
from medbudget.sampling.sampler import Condition

GUIDANCE = 7.5
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@torch.no_grad()
def draw_golden(base: Base, golden: Golden, size: int = 512) -> npt.NDArray[np.float64]:
    """Draw what a test of diffusers draws, which is at 512 px; return its last 3 x 3 blue values."""
    shape = 1, *base.latent_shape(size)
    if golden.noise == "numpy":
        noise = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).float()
    else:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(base.device)
    if golden.sampler == "dpmpp_2m":
        condition = Condition.encode(base, golden.prompt, (), "", GUIDANCE)
        latents = sample_dpmpp_2m(base, noise, condition, golden.steps)
    else:
        latents = _sample_with_diffusers(base, noise, golden)
    image = base.vae.decode((latents / base.vae.config.scaling_factor).to(base.dtype)).sample
    blue = (image[0, -1, -3:, -3:].float() / 2 + 0.5).clamp(0, 1)
    return blue.flatten().cpu().double().numpy()


def _sample_with_diffusers(base: Base, noise: torch.Tensor, golden: Golden) -> torch.Tensor:
    from diffusers import LMSDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

    scheduler: Any
    if golden.sampler == "lms":
        scheduler = LMSDiscreteScheduler(**BETAS, prediction_type=base.prediction)
    else:
        scheduler = PNDMScheduler(
            **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
            prediction_type=base.prediction,
        )  # fmt: skip
    pipe: Any = StableDiffusionPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipe(
        prompt_embeds=base.text(golden.prompt),
        negative_prompt_embeds=base.text(""),
        latents=noise.to(base.dtype),
        num_inference_steps=golden.steps,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).images
    return latents


@torch.no_grad()
def sample_dpmpp_2m(
    base: Base, noise: torch.Tensor, condition: Condition, steps: int
) -> torch.Tensor:
    """Sample latents with DPM-Solver++(2M) (2211.01095) at the sigmas of Karras et al. (rho 7)."""
    trained = ((1 - base.alphas_cumprod) / base.alphas_cumprod).double().sqrt().numpy()
    low, high = trained[0] ** (1 / 7), trained[-1] ** (1 / 7)
    sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    x, previous, last = noise * sigmas[0], None, 0.0
    for sigma, after, t in zip(sigmas, [*sigmas[1:], 0.0], timesteps):
        denoised = condition.denoise(base, x, sigma, torch.tensor(t, dtype=torch.float32))
        guess = denoised
        if after > 0:
            step = np.log(sigma / after)
            if previous is not None:  # extrapolate from the two last predictions
                guess = denoised + step / (2 * last) * (denoised - previous)
            previous, last = denoised, step
        x = after / sigma * x + (1 - after / sigma) * guess
    return x


def verify_base(base: Base, name: str = "") -> dict[str, tuple[str, bool]]:
    """Measure whether a base is what it should be: each check's result, and whether it passed.

    `base` is in float32; `name` is the known base that it should be (``sd20``), by default what its
    name or its file's hash says. Its golden picture, which diffusers' tests hold of all but
    ``sd21``, takes one to four minutes on a CPU. The hash of what passes is kept, so that embeddings
    can be compared with it.
    """
    checks: dict[str, tuple[str, bool]] = {}
    kinds = {96: "tiny", 768: "SD 1.x", 1024: "SD 2.x"}
    kind = kinds.get(base.width, "no known kind; embeddings of others do not fit")
    checks["width"] = (f"{base.width}: {kind}", base.width in kinds)
    try:
        predicted = measure_prediction(base)
        passed = predicted == base.prediction
        stated = "" if passed else f", but {base.prediction} is stated"
        correlation = correlate_with_noise(base)[0]
        checks["prediction"] = (f"{predicted}{stated}, correlation {correlation:.3f}", passed)
    except BaseError as error:
        checks["prediction"] = (str(error), False)
    images = make_phantoms("chest", "healthy", 2, size=base.size).images
    mse = ((base.decode(base.encode(images)).float() - images.float()) ** 2).mean()
    psnr = float(10 * (255**2 / mse).log10())
    said = f"returns a phantom with {psnr:.1f} dB (15 and more wanted)"
    checks["autoencoder"] = (said, psnr > 15)
    row = known_base(name) if name else identify(base)[0]
    if name and row is None:
        raise BaseError(f"{name} is no known base: `medbudget base list` names them")
    if row is not None:
        checks["identity"] = _identify(base, row)
        if all(passed for _, passed in checks.values()) and row.golden:
            record_verified(base.hash, row.name)
    return checks


def _identify(base: Base, row: KnownBase) -> tuple[str, bool]:
    """Compare a base with a row of the table of known ones."""
    wanted, found = (row.width, row.prediction), (base.width, base.prediction)
    if wanted != found:
        return f"not {row.title}: width and prediction are {found}, not {wanted}", False
    if row.golden:
        difference = float(np.abs(draw_golden(base, row.golden) - row.golden.values).max())
        allowed = f"{difference:.4f} ({row.golden.tolerance:g} allowed)"
        if difference < row.golden.tolerance:
            return f"this is {row.title}: its picture differs from diffusers' by {allowed}", True
        return (
            f"not {row.title}: the picture of diffusers' {row.golden.test} differs by {allowed}; a "
            "mirror with other weights, or a fine-tune",
            False,
        )
    if base.checkpoint_hash in row.a1111:
        return f"this is {row.title}: A1111's hash of the file is {base.checkpoint_hash}", True
    return (
        f"called {row.title}; nothing proves it: diffusers' tests hold no picture of it in float32",
        True,
    )
