"""Tuning: train a change to the U-Net (LoRA, or all weights), with a word beside it if wanted.

The usual rivals of Textual Inversion: LoRA (Hu et al. 2021, arXiv 2106.09685) on the attention of
the U-Net, and DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) without images of the prior.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from medbudget.adapter_files import PREFIX
from medbudget.adapters import Adapter, copy_network
from medbudget.base import Base, choose_speed
from medbudget.embeddings import MAX_VECTORS, Embedding, check_token
from medbudget.files import hash_tensors
from medbudget.images import check_square
from medbudget.settings import SEEDS, Settings, check_number
from medbudget.training.inversion import InversionSettings, choose_weights, compare_noise, make_init
from medbudget.training.loop import InversionError, Run, describe_data, name_origin, train

FULL = "full"
MAX_RANK = 64
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # layers that a rank is given to
RATES = {"tiny": 1e-3, "colab": 5e-6, "paper": 5e-6}  # of full tuning; 5e-6: DreamBooth's


@dataclass(frozen=True)
class TuneSettings(Settings):
    """Settings of `tune`. What is not given follows the preset of the base.

    The paper tunes no U-Net: ``paper`` has its steps and batch, and the learning rates that are
    usual for Stable Diffusion.
    """

    rank: int | str = 16  # of the change of each attention layer, 1 to 64; or "full": all weights
    n_vectors: int = 0  # rows of a word that is trained beside it, to 74; 0: the word stays init
    steps: int = 50_000  # optimizer steps
    lr: float = 1e-4  # of AdamW for the U-Net, without weight decay; "full" has another default
    word_lr: float = 0.005  # of the word
    batch_size: int = 1  # images a step
    schedule: str = "constant"  # or "linear": falls to zero at the last step
    loss: str = "plain"  # epsilon MSE; or "min_snr": see min_snr_weights
    init: str = "*"  # the text trained on; with n_vectors, spread over them as by `invert`
    latents: str = "once"  # one posterior sample an image (A1111); or "mean", or "resample"
    seed: int = 0
    checkpoint_every: int = 500  # steps

    CHOICES = InversionSettings.CHOICES
    LIMITS = {
        "n_vectors": (0, MAX_VECTORS), "steps": (1, None), "batch_size": (1, None),
        "lr": (1e-12, 1e3), "word_lr": (1e-12, 1e3), "checkpoint_every": (1, None), "seed": SEEDS,
    }  # fmt: skip
    PRESETS = {
        "tiny": {
            "steps": 1000, "lr": 0.01, "word_lr": 0.01, "batch_size": 8, "schedule": "linear",
        },
        "colab": {"steps": 5000},
        "paper": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, str) and self.rank != FULL:
            raise ValueError(f"rank must be 1 to {MAX_RANK}, or {FULL!r}, got {self.rank!r}")
        if self.rank != FULL:
            check_number("rank", self.rank, 1, MAX_RANK, whole=True)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the settings called `name`, with changes; those that are None are ignored."""
        if changes.get("rank") == FULL and changes.get("lr") is None and name in RATES:
            changes["lr"] = RATES[name]
        return super().preset(name, **changes)


def tune(
    base: Base,
    images: torch.Tensor,
    *,
    token: str | None = None,
    settings: TuneSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    init_vectors: torch.Tensor | None = None,
    fast: bool | None = None,
    data: str = "",
) -> Adapter:
    """Train an adapter on images; the base stays as it is.

    Parameters
    ----------
    token : str, optional
        ``<name>`` of the adapter's word: parts of a prompt that name it have the changes. Without
        one all parts have them, and the prompt says ``settings.init``.
    init_vectors : torch.Tensor, optional
        ``(n, d)``: the word to train with, e.g. one that `invert` found; trained further where
        ``settings.n_vectors`` is not 0. The other parameters are those of `invert`; the callback
        gets no vectors.

    Examples
    --------
    >>> from medbudget import load_base, make_phantoms
    >>> base = load_base("tiny", device="cpu")
    >>> images = make_phantoms("chest", "cardiomegaly", 4).images
    >>> settings = TuneSettings(rank=4, steps=2, batch_size=2)
    >>> adapter = tune(base, images, token="<heart>", settings=settings)
    >>> adapter.token, adapter.rank, adapter.step, len(adapter.tensors) // 3
    ('<heart>', 4, 2, 56)
    """
    if token is not None:
        base.check_token(check_token(token))
    check_square(images)
    base.latent_shape(images.shape[2])
    settings = (settings or TuneSettings()).complete(base.preset)
    start = _make_word(base, settings, init_vectors)
    if settings.n_vectors and token is None:
        raise ValueError("a word is trained under a token: give one, or n_vectors=0 for no word")
    if settings.n_vectors:
        settings = replace(settings, n_vectors=len(start))
    tuned, tensors = _prepare(base, settings)
    tuned = choose_speed(tuned, fast, settings.steps)
    rates = dict.fromkeys(tensors, settings.lr)
    vectors = start.to(base.device, copy=True)
    if settings.n_vectors:
        tensors["vectors"], rates["vectors"] = vectors, settings.word_lr
    run = Run(tensors, rates, base.dtype == torch.float16)
    weights = choose_weights(base, settings.loss)
    fixed = None if settings.n_vectors else base.text(vectors).detach()
    mixed = settings.rank == FULL and base.dtype != torch.float32  # weights in training are float32
    grown: list[float] = []

    def compute(z: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast(base.device.type, base.dtype, enabled=mixed):
            context = base.text(vectors) if fixed is None else fixed
            return compare_noise(tuned, context, z, t, noise, weights)

    def tell(state: dict[str, Any]) -> None:
        if callback is not None:
            callback(state)
        grown.append(state["grad_norm"])
        if state["step"] == min(100, settings.steps) and not any(grown):
            raise InversionError(
                f"after {run.step} steps nothing has changed: the gradient is zero; use dtype "
                "float32, or a higher learning rate"
            )

    record = train(
        tuned, run, images, settings, compute, checkpoint=checkpoint,
        identity={"start": hash_tensors({"start": start})}, desc=f"tune {token or ''}".rstrip(),
        callback=tell,
    )  # fmt: skip
    origin = run.step, name_origin(base), base.hash, describe_data(images, data)
    word = None if token is None else Embedding(vectors.detach(), token, *origin)
    return Adapter(_collect(base, tensors), word, 1.0, *origin, record)


def _make_word(base: Base, settings: TuneSettings, given: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of the training prompt, ``(n, d) float32``."""
    if given is not None:
        start = torch.as_tensor(given).float()
    elif settings.n_vectors:
        start = make_init(base, InversionSettings(
            n_vectors=settings.n_vectors, init=settings.init, seed=settings.seed,
        ))  # fmt: skip
    else:
        start = base.token_rows(settings.init)
    Embedding(start, "<init>").check_fits(base.width, base.name)
    return start


def _prepare(base: Base, settings: TuneSettings) -> tuple[Base, dict[str, torch.Tensor]]:
    """Return a base whose U-Net can be trained, and the tensors to train, float32, by name."""
    unet = copy_network(base.unet)
    tensors: dict[str, torch.Tensor] = {}
    if settings.rank == FULL:
        for name, layer in unet.named_modules():
            for part in ("weight", "bias"):
                if isinstance(old := getattr(layer, part, None), nn.Parameter):
                    tensors[f"{name}.{part}"] = nn.Parameter(old.detach().float().clone())
                    setattr(layer, part, tensors[f"{name}.{part}"])
        return replace(base, unet=unet, fast=False), tensors
    from peft import LoraConfig, inject_adapter_in_model

    rank = int(settings.rank)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION))
    # on the meta device, so that peft neither moves nor draws anything; both follow here
    inject_adapter_in_model(config, unet, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(settings.seed)
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        bound = 1 / math.sqrt(down.in_features)  # as PyTorch draws a linear layer
        drawn = torch.rand(down.weight.shape, generator=generator) * 2 * bound - bound
        start = {"down": (down, drawn), "up": (up, torch.zeros(up.weight.shape))}
        for part, (linear, value) in start.items():
            linear.weight = nn.Parameter(value.to(base.device))
            tensors[f"{name}.lora_{part}.weight"] = linear.weight
    return replace(base, unet=unet, fast=False), tensors


def _collect(base: Base, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return trained tensors as changes to the base, by kohya-ss' names."""
    changes: dict[str, torch.Tensor] = {}
    unet = getattr(base.unet, "_orig_mod", base.unet)
    for name, value in tensors.items():
        if name == "vectors":
            continue
        value = value.detach().cpu()
        if ".lora_" in name:
            head, kind = name.split(".lora_")
            part = f"lora_{kind}"
            if kind == "down.weight":
                changes[f"{_name(head)}.alpha"] = torch.tensor(float(len(value)))
        else:
            head, kind = name.rsplit(".", 1)
            part = {"weight": "diff", "bias": "diff_b"}[kind]
            value = value - unet.get_parameter(name).detach().float().cpu()
        changes[f"{_name(head)}.{part}"] = value.contiguous()
    return changes


def _name(layer: str) -> str:
    return PREFIX + layer.replace(".", "_")
