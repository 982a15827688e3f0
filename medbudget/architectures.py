"""Stable Diffusion's networks, tokenizer and noise schedule, from configurations in the package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

SD = Path(__file__).parent / "sd"


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
