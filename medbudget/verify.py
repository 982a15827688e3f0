"""Prove a base: widths, finite weights, what it predicts, its autoencoder, and a golden picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medbudget.base import Base
from medbudget.data.phantoms import make_phantoms
from medbudget.known import BaseError, KnownBase, identify, known_base, record_verified
from medbudget.loading import correlate_with_noise, measure_prediction

PROMPT = "a photograph of an astronaut riding a horse"
TOLERANCE = 7e-3


@torch.no_grad()
def draw_golden(base: Base) -> npt.NDArray[np.float64]:
    """Draw what diffusers' slow tests of Stable Diffusion draw; return its last 3 x 3 blue values.

    Noise of NumPy's seed 0, three steps of PNDM, guidance 7.5, 512 px whatever the base's size:
    ``get_inputs`` of tests/pipelines/stable_diffusion_2/test_stable_diffusion.py.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1, prediction_type=base.prediction,
    )  # fmt: skip
    pipe: Any = StableDiffusionPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    cells = base.latent_shape()[0], 512 // base.factor, 512 // base.factor
    noise = np.random.RandomState(0).standard_normal((1, *cells))
    image = pipe(
        prompt_embeds=base.text(PROMPT),
        negative_prompt_embeds=base.text(""),
        latents=torch.from_numpy(noise).to(base.device, base.dtype),
        num_inference_steps=3,
        guidance_scale=7.5,
        output_type="np",
    ).images[0]
    return image[-3:, -3:, -1].flatten().astype(np.float64)


def verify_base(base: Base, name: str = "") -> dict[str, tuple[str, bool]]:
    """Measure whether a base is what it should be: each check's result, and whether it passed.

    Parameters
    ----------
    base : Base
        In float32.
    name : str
        The known base that it should be (``sd20``); default: what its name or its file's hash
        says. Its golden picture, where diffusers publishes one, takes a minute on a CPU. The hash
        of what passes is kept, so that embeddings can be compared with it.
    """
    checks: dict[str, tuple[str, bool]] = {}
    modules = (base.vae, base.unet, base.text_encoder)
    finite = all(bool(torch.isfinite(p).all()) for m in modules for p in m.parameters())
    checks["weights"] = ("all finite" if finite else "NaN or infinity among them", finite)
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
    images = make_phantoms("prostate", "healthy", 2, size=base.size).images
    mse = ((base.decode(base.encode(images)).float() - images.float()) ** 2).mean()
    psnr = float(10 * (255**2 / mse).log10())
    checks["autoencoder"] = (
        f"returns a phantom with {psnr:.1f} dB (20 and more wanted)",
        psnr > 20,
    )
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
        difference = float(np.abs(draw_golden(base) - row.golden).max())
        if difference < TOLERANCE:
            return (
                f"this is {row.title}: its picture differs by {difference:.4f} from diffusers'",
                True,
            )
        return (
            f"not {row.title}: the picture that diffusers' test draws differs by {difference:.4f} "
            f"({TOLERANCE} allowed); a mirror with other weights, or a fine-tune",
            False,
        )
    if base.checkpoint_hash in row.a1111:
        return f"this is {row.title}: A1111's hash of the file is {base.checkpoint_hash}", True
    return (
        f"called {row.title}; nothing published to prove it: diffusers has no golden values",
        True,
    )
