"""Load a base: the embedded one, a known name, a repository of the hub, a folder, a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from medbudget.architectures import (
    Parts,
    build_tokenizer,
    make_random_parts,
    noise_schedule,
    read_architectures,
)
from medbudget.base import Base, speed_up
from medbudget.bases import ID, PARTS, choose_weights, find_base, list_missing, refuse_others
from medbudget.checkpoints import FILES, load_single_file, refuse_doubles
from medbudget.files import hash_tensors
from medbudget.known import BaseError, known_base, unknown_base
from medbudget.torchfiles import read_torch, recognise

TINY = Path(__file__).parent / "weights" / "tiny"
RANDOM = "-random"
PREDICTIONS = ("epsilon", "v_prediction")


def load_base(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    fast: bool = False,
) -> Base:
    """Load a frozen Stable Diffusion 1.x or 2.x.

    Parameters
    ----------
    name_or_path : str or path
        ``tiny`` (in the package); ``sd20`` (or ``sd2``), ``sd21-base``, ``sd21``, ``sd15``,
        ``sd14``: from the hub's cache or the hub; any repository of the hub,
        ``owner/name[@revision]``; a folder in diffusers' layout; a ``.ckpt`` or ``.safetensors``
        file; or ``sd2-random``, ``sd1-random``: the exact architecture with seeded random weights,
        for trials of speed and memory.
    device : optional
        Default: CUDA if there is one, else the CPU.
    dtype : optional
        Default: float32 on a CPU and for ``tiny``; on a GPU bfloat16, or float16 where the GPU has
        no bfloat16.
    fast : bool
        Lay the U-Net out channels-last and compile it (a minute at the first step of each shape);
        training on a GPU then replays each step as a CUDA graph. Equal up to rounding.

    Examples
    --------
    >>> base = load_base("tiny", device="cpu")
    >>> base.size, base.width, base.latent_shape()
    (64, 96, (8, 16, 16))
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseError("no CUDA device is available here; use device='cpu' (CLI: --device cpu)")
    if not isinstance(name_or_path, (str, os.PathLike)) or not str(name_or_path):
        raise unknown_base(str(name_or_path))
    name = os.fspath(name_or_path)
    parts = load_parts(name)
    if dtype is None:
        dtype = torch.float32
        if device.type == "cuda" and not parts.words:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if native else torch.float16
    base = _assemble(parts, name, device, dtype)
    if not parts.prediction:
        base.prediction = measure_prediction(base)
    if (row := known_base(name)) and (row.width, row.prediction) != (base.width, base.prediction):
        raise BaseError(
            f"{name} should be {row.title}, with words of width {row.width} and {row.prediction}; "
            f"what was found has {base.width} and {base.prediction}: it is another model"
        )
    return speed_up(base) if fast else base


def load_parts(name: str) -> Parts:
    """Return the parts of a base by what its name stands for."""
    kind = name.removesuffix(RANDOM)
    if name == "tiny":
        return load_folder(TINY, name)
    if name.endswith(RANDOM) and kind in read_architectures():
        return make_random_parts(read_architectures()[kind])
    path = Path(name).expanduser()
    if known_base(name) or (not path.exists() and ID.fullmatch(name) and path.suffix not in FILES):
        path = find_base(name)
    if path.is_file():
        return load_single_file(path)
    if path.is_dir():
        return load_folder(path, name)
    if path.suffix in FILES or len(path.parts) > 1:
        raise BaseError(f"no such file or folder: {name}")
    raise unknown_base(name)


def load_folder(folder: Path, name: str) -> Parts:
    """Load a folder in diffusers' layout: safetensors or ``.bin``, float32 or float16."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel
    from transformers.utils import logging as transformers_logging

    refuse_others(folder, name)
    if missing := list_missing(folder):
        raise BaseError(f"{folder} lacks {', '.join(missing)}; a base needs {', '.join(PARTS)}")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # float32: the hash must not depend on the dtype in use
        ours = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        vae = _load_network(AutoencoderKL, folder / "vae", **ours)
        unet = _load_network(UNet2DConditionModel, folder / "unet", **ours)
        text_encoder = _load_network(CLIPTextModel, folder / "text_encoder", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        if len(tokenizer) == 49408:  # CLIP's: the same words from every source
            tokenizer = build_tokenizer(tokenizer.pad_token or "<|endoftext|>")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        config = folder / "scheduler" / "scheduler_config.json"
        stated = json.loads(config.read_text(encoding="utf-8")).get("prediction_type") or ""
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, BaseError):
            raise
        raise BaseError(f"{folder} cannot be loaded ({error})") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if stated not in ("", *PREDICTIONS):
        raise BaseError(f"{name} predicts {stated}; allowed are {' and '.join(PREDICTIONS)}")
    alphas = scheduler.alphas_cumprod.float()
    if alphas.shape != (1000,) or not torch.allclose(alphas, noise_schedule(), rtol=1e-4):
        raise BaseError(
            f"{name} was trained with another noise schedule than Stable Diffusion's (scaled "
            "linear, .00085 to .012, 1000 steps); it cannot serve as a base"
        )
    parts = Parts(vae, unet, text_encoder, tokenizer, alphas, stated)
    if (folder / "words.safetensors").exists():
        from safetensors.torch import load_file

        parts.words = load_file(folder / "words.safetensors")
        parts.note = "tiny base"
    return parts


# stored in some folders, used by no text encoder of Stable Diffusion
_UNUSED = ("position_ids", "text_projection.weight", "logit_scale")


def _load_network(kind: Any, folder: Path, **options: Any) -> Any:
    """Load one network of a folder, and refuse it if a part of it kept its random start."""
    weights = choose_weights((p.name for p in folder.iterdir()), folder.name)
    assert weights is not None
    file, variant = weights
    if (folder / file).is_file():
        with open(folder / file, "rb") as opened:
            if reason := recognise(opened.read(1024)):
                raise BaseError(f"{folder / file}: {reason}")
    safe = file.endswith(".safetensors")
    if kind.__name__ == "CLIPTextModel":
        refuse_doubles(_list_tensors(folder / file), str(folder))
    options |= {"variant": variant, "use_safetensors": safe, "local_files_only": True}
    network, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(k for k in map(str, info["unexpected_keys"]) if not k.endswith(_UNUSED))
    for keys, problem in ((missing, "lacks"), (unexpected, "has unknown tensors,")):
        if keys:
            raise BaseError(
                f"{folder} {problem} {len(keys)} of {kind.__name__}'s tensors, e.g. {keys[0]}: a "
                "part of the network would stay random. The folder is damaged, belongs to another "
                "model, or was written by another version of its library"
            )
    return network


def _list_tensors(path: Path) -> list[str]:
    """Return the names of the tensors in a file of weights, or in its parts by their index."""
    if not path.is_file():
        index = path.with_name(f"{path.name}.index.json").read_text(encoding="utf-8")
        return list(json.loads(index)["weight_map"])
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    return list(read_torch(path, mapped=True))


class _Halved(dict[str, torch.Tensor]):
    """Weights as float16, one at a time: a whole copy of Stable Diffusion would take 2.6 GB."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).to("cpu", torch.float16)


def hash_weights(*modules: nn.Module) -> str:
    """Return 12 hex digits over the modules' weights, read as float16.

    It depends on no device, dtype or version: transformers 5.6 dropped a prefix of names.
    """
    return hash_tensors(
        _Halved(
            (f"{i}.{name.removeprefix('text_model.')}", value)
            for i, module in enumerate(modules)
            for name, value in module.state_dict().items()
            if value.is_floating_point()
        )
    )


def _assemble(parts: Parts, name: str, device: torch.device, dtype: torch.dtype) -> Base:
    """Check that the parts fit each other, and put them on the device."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    vae, unet, text_encoder = parts.vae, parts.unet, parts.text_encoder
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseError(
            f"{name}: the U-Net takes {unet.config.in_channels} channels, the VAE has "
            f"{vae.config.latent_channels}; these parts are of different models"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise BaseError(
            f"{name}: the U-Net reads texts of width {unet.config.cross_attention_dim}, the text "
            f"encoder writes {text_encoder.config.hidden_size} (768: SD 1.x, 1024: SD 2.x); these "
            "parts are of different models"
        )
    # Plain attention is faster on a CPU for small latents. Elsewhere fused attention: it keeps the
    # scores in float32, which overflow in float16 with SD 2.
    plain = device.type == "cpu" and dtype == torch.float32 and unet.config.sample_size <= 16
    unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
    digest = hash_weights(vae, unet, text_encoder)
    for part, module in (("VAE", vae), ("U-Net", unet), ("text encoder", text_encoder)):
        if not all(torch.stack(p.aminmax()).isfinite().all() for p in module.parameters()):
            raise BaseError(
                f"{name}: weights of the {part} are NaN or infinity, which would draw black images: "
                "fetch or train it again"
            )
        nn.Module.to(module, device, dtype)  # diffusers' own warns of any cast
        module.eval().requires_grad_(False)
    return Base(
        name=name,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=parts.tokenizer,
        alphas_cumprod=parts.alphas_cumprod,
        preset="tiny" if parts.words else "paper",
        hash=digest,
        prediction=parts.prediction or "epsilon",
        note=parts.note,
        words=parts.words,
        checkpoint_hash=parts.checkpoint_hash,
    )


@torch.no_grad()
def measure_prediction(base: Base, seed: int = 0) -> str:
    """Measure what the U-Net predicts: ``epsilon`` or ``v_prediction``.

    At the last timestep the latents are nearly all noise. An epsilon model returns them; a v model
    returns minus the image, which hardly correlates with them. It is told from an untrained network
    by latents of .5 everywhere: far from noise, they stand for a bright image, whose v lies below
    -1, as A1111 found.

    What predicts neither raises BaseError.
    """
    noise, flat = correlate_with_noise(base, seed)
    if noise >= 0.5:
        return "epsilon"
    if flat < -1:
        return "v_prediction"
    raise BaseError(
        f"{base.name} predicts neither epsilon nor v: given noise, its output correlates "
        f"{noise:.2f} with it (epsilon: close to 1); given .5 everywhere, its mean is {flat:.2f} "
        "(v: below -1). It is untrained, damaged, or another kind of model"
    )


@torch.no_grad()
def correlate_with_noise(base: Base, seed: int = 0) -> tuple[float, float]:
    """Return the output's correlation with noise, and its mean for .5 everywhere, both at t = 999."""
    channels, cells, _ = base.latent_shape()
    cells = min(32, cells)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, channels, cells, cells), generator=generator)
    x = torch.cat([x, torch.full_like(x, 0.5)])
    context = base.text("").expand(2, -1, -1)
    t = torch.tensor([999, 999], device=base.device)
    out = base.unet(x.to(base.device, base.dtype), t, encoder_hidden_states=context).sample
    out = out.float().cpu()
    correlation = torch.corrcoef(torch.stack([x[0].flatten(), out[0].flatten()]))[0, 1]
    return float(correlation), float(out[1].mean())
