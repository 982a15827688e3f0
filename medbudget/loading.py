"""Load a base: the embedded one, a known name, a repository of the hub, a folder, a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from medbudget.base import Base
from medbudget.bases import (
    ID,
    PARTS,
    BaseError,
    choose_weights,
    find_base,
    known_base,
    list_missing,
    refuse,
    refuse_channels,
    refuse_distilled,
    refuse_others,
    unknown_base,
)
from medbudget.files import hash_tensors
from medbudget.gpu import speed_up
from medbudget.torchfiles import RefusedError, check_tensors, read_torch, recognise

SD = Path(__file__).parent / "sd"
TINY = Path(__file__).parent / "weights" / "tiny"
RANDOM = "-random"
FILES = (".ckpt", ".safetensors")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass
class Parts:
    """What a source gives: networks in float32 on the CPU, tokenizer, noise schedule."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    alphas_cumprod: torch.Tensor
    prediction: str = ""  # "": not stated
    checkpoint_hash: str = ""
    note: str = ""
    words: dict[str, torch.Tensor] = field(default_factory=dict)


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

    Raises
    ------
    BaseError
        Nothing found under this name, another kind of model, or a damaged one; says what to do.

    Examples
    --------
    >>> base = load_base("tiny", device="cpu")
    >>> base.size, base.width, base.latent_shape()
    (64, 96, (8, 16, 16))
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseError("no CUDA device is available here; use device='cpu' (CLI: --device cpu)")
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


# --------------------------------------------------------------------------- architecture


@cache
def read_architectures() -> dict[str, Any]:
    """Return the shipped configurations: ``sd1``, ``sd2`` and ``small``."""
    return json.loads((SD / "architectures.json").read_text(encoding="utf-8"))


def noise_schedule() -> torch.Tensor:
    """Return Stable Diffusion's ``alphas_cumprod (1000,)``: scaled linear, .00085 to .012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def build_networks(architecture: Mapping[str, Any], device: str = "cpu") -> tuple[Any, Any, Any]:
    """Return VAE, U-Net and text encoder of an architecture; on ``meta`` they take no memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        vae = AutoencoderKL(**architecture["vae"])
        unet = UNet2DConditionModel(**architecture["unet"])
        return vae, unet, CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"]))


def make_random_parts(architecture: Mapping[str, Any], seed: int = 0) -> Parts:
    """Draw an architecture's weights: PyTorch's default init, which keeps activations finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = build_networks(architecture)
    tokenizer = build_tokenizer(architecture["pad_token"])
    return Parts(*networks, tokenizer, noise_schedule(), "epsilon", note="random weights")


@cache
def build_tokenizer(pad_token: str) -> Any:
    """Return CLIP's tokenizer from the shipped merges (OpenAI's CLIP, MIT).

    SD 1 and 2 share it but for padding: ``<|endoftext|>`` in SD 1, ``!`` (token 0) in SD 2.
    """
    from transformers import CLIPTokenizer

    with gzip.open(SD / "clip_bpe_merges.txt.gz", "rt", encoding="utf-8") as file:
        merges = [(a, b) for a, b in (line.split() for line in file)]
    # CLIP numbers bytes as GPT-2 does: the printable ones first, then the rest in order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]

    class Tokenizer(CLIPTokenizer):
        # named as a special token, "!" would no longer be tokenized as a word of a prompt
        pad_token_id = words.index(pad_token)

    vocabulary = {word: i for i, word in enumerate(words)}
    options: Any = {"vocab": vocabulary, "merges": merges, "model_max_length": 77}
    return Tokenizer(**options)


# --------------------------------------------------------------------------- folders


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
        _refuse_doubles(_list_tensors(folder / file), str(folder))
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
    if info.get("mismatched_keys"):
        raise BaseError(
            f"{folder}: {info['mismatched_keys']} have other shapes than its config says"
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


def _refuse_doubles(keys: Iterable[str], name: str) -> None:
    """Refuse tensors of a text encoder that stand there with and without transformers' prefix."""
    keys = set(keys)
    if doubles := sorted(key for key in keys if f"text_model.{key}" in keys):
        raise BaseError(
            f"{name} holds {len(doubles)} tensors of its text encoder twice, e.g. {doubles[0]} and "
            f"text_model.{doubles[0]}: which of them counts is not known. Remove one kind, or get "
            "the base from its source again"
        )


# --------------------------------------------------------------------------- single files


def compute_a1111_hash(path: str | os.PathLike[str]) -> str:
    """Return A1111's old hash of a checkpoint file: 8 hex digits over 64 KiB at offset 1 MiB.

    It stands in its embeddings as ``sd_checkpoint``; of Stable Diffusion 2.0's
    ``512-base-ema.ckpt`` it is 09dd2ae4. The same weights in another file have another one.
    """
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an LDM checkpoint, memory-mapped; nothing in the file is executed."""
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            if reason := recognise(file.read(1024)):
                raise RefusedError(reason)
        content = (
            load_file(path) if path.suffix == ".safetensors" else read_torch(path, mapped=True)
        )
        state = content.get("state_dict", content) if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping):
            raise RefusedError("it holds no state dict; a Stable Diffusion checkpoint has one")
        state = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        check_tensors(state.values(), path.stat().st_size)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise BaseError(
            f"{path.name} is truncated or no checkpoint of tensors alone ({error}); code in a file "
            "is never run: fetch it again, or get it as .safetensors"
        ) from None
    return state


UNET_KEY, TEXT_KEY = "model.diffusion_model.", "cond_stage_model.model."
CROSS_KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_OTHER_KEYS = {  # starts of a file's keys, and what they say
    "conditioner.embedders.": "is Stable Diffusion XL: it has two text encoders, for each of which a "
    "word would need vectors of its own",
    f"{UNET_KEY}joint_blocks.": "is Stable Diffusion 3: a transformer that predicts a flow",
    f"{UNET_KEY}double_blocks.": "is Flux: a transformer that predicts a flow",
    "double_blocks.": "is Flux: a transformer that predicts a flow",
    "control_model.": "is a ControlNet, which steers a base",
    "lora_": "is a LoRA: changes to a base, without the base itself",
    "string_to_param": "is an embedding: pass it with --embeddings",
    "emb_params": "is an embedding: pass it with --embeddings",
}


def _guess_architecture(state: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Find the shipped architecture whose text encoder and U-Net have the file's widths."""
    refuse_distilled(name, Path(name).stem)
    for start, reason in _OTHER_KEYS.items():
        refuse(name, reason if any(key.startswith(start) for key in state) else "")
    first, cross = state.get(f"{UNET_KEY}input_blocks.0.0.weight"), state.get(UNET_KEY + CROSS_KEY)
    if first is None or cross is None:
        raise BaseError(
            f"{name} is no whole Stable Diffusion 1 or 2 checkpoint: it has no "
            f"{UNET_KEY}{CROSS_KEY}. LoRA, SDXL and U-Net-only files cannot serve as a base"
        )
    refuse_channels(name, first.shape[1])
    kinds = read_architectures()
    for kind in kinds.values():
        unet = kind["unet"]
        if cross.shape == (unet["block_out_channels"][0], unet["cross_attention_dim"]):
            return kind
    widths = ", ".join(f"{k['unet']['cross_attention_dim']} ({k['title']})" for k in kinds.values())
    raise BaseError(
        f"{name} reads texts of width {cross.shape[1]}; known are {widths}. Convert it to a folder "
        "in diffusers' layout and load that"
    )


def load_single_file(path: Path) -> Parts:
    """Load an LDM checkpoint (``.ckpt``, ``.safetensors``) with shipped configurations, offline.

    SD 1 carries CLIP's text encoder, SD 2 OpenCLIP's, of which the last layer is not used.
    """
    # from_single_file would not say which tensors a file lacks, nor read Lightning's checkpoints
    from diffusers.loaders import single_file_utils as ldm

    if path.suffix not in FILES:
        raise BaseError(f"{path.name}: a single-file base ends in {' or '.join(FILES)}")
    state = read_checkpoint(path)
    architecture = _guess_architecture(state, path.name)
    vae, unet, text_encoder = build_networks(architecture, "meta")
    if any(key.startswith(TEXT_KEY) for key in state):
        text = ldm.convert_open_clip_checkpoint(text_encoder, state, prefix=TEXT_KEY)
    else:
        text = ldm.convert_ldm_clip_checkpoint(state)
    _refuse_doubles(text, path.name)
    if not hasattr(text_encoder, "text_model"):  # flat since transformers 5.6
        text = {key.removeprefix("text_model."): value for key, value in text.items()}
    converted = (
        (vae, ldm.convert_ldm_vae_checkpoint(state, vae.config)),
        (unet, ldm.convert_ldm_unet_checkpoint(state, unet.config)),
        (text_encoder, text),
    )
    for network, tensors in converted:
        wanted = network.state_dict()
        if missing := sorted(set(wanted) - set(tensors)):
            raise BaseError(
                f"{path.name} lacks {len(missing)} tensors of {type(network).__name__}, e.g. "
                f"{missing[0]}: it is not a whole {architecture['title']} checkpoint"
            )
        chosen = {key: tensors[key].to(torch.float32) for key in wanted}
        try:
            network.load_state_dict(chosen, assign=True)
        except RuntimeError as error:
            raise BaseError(f"{path.name} does not fit {architecture['title']}: {error}") from None
        _make_buffers(network)
    tokenizer = build_tokenizer(architecture["pad_token"])
    found = compute_a1111_hash(path)
    row = known_base(found)
    if row:
        unet.register_to_config(sample_size=row.size // 8)
    stated = row.prediction if row else ""
    return Parts(vae, unet, text_encoder, tokenizer, noise_schedule(), stated, found)


def _make_buffers(network: nn.Module) -> None:
    """Fill what a network computes itself and no checkpoint stores: position numbers."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", name
                numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                module.register_buffer(name, numbers, persistent=False)


# --------------------------------------------------------------------------- putting together


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
    size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    # Plain attention is faster on a CPU for small images. Elsewhere fused attention: it keeps the
    # scores in float32, which overflow in float16 with SD 2.
    plain = device.type == "cpu" and dtype == torch.float32 and size <= 64
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

    Raises
    ------
    BaseError
        It predicts neither.
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
