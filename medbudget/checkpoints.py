"""Single files in the layout of Stable Diffusion's authors (``.ckpt``, ``.safetensors``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from medbudget.architectures import (
    Parts,
    build_networks,
    build_tokenizer,
    noise_schedule,
    read_architectures,
)
from medbudget.bases import CHANNELS, refuse, refuse_distilled
from medbudget.known import BaseError, known_base
from medbudget.torchfiles import RefusedError, check_tensors, read_torch, recognise

FILES = (".ckpt", ".safetensors")


def compute_a1111_hash(path: str | os.PathLike[str]) -> str:
    """Return A1111's old hash of a checkpoint file: 8 hex digits over 64 KiB at offset 1 MiB.

    It stands in its embeddings as ``sd_checkpoint``. The same weights in another file have another.
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
_OTHER_KEYS: dict[str | tuple[str, ...], str] = {  # starts of a file's keys, and what they say
    "conditioner.embedders.": "is Stable Diffusion XL: it has two text encoders, for each of which a "
    "word would need vectors of its own",
    f"{UNET_KEY}joint_blocks.": "is Stable Diffusion 3: a transformer that predicts a flow",
    (f"{UNET_KEY}double_blocks.", "double_blocks."): "is Flux: a transformer that predicts a flow",
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
    refuse(name, CHANNELS.get(first.shape[1], ""))
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
    refuse_doubles(text, path.name)
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
    for module in text_encoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            assert name == "position_ids", name  # the one that no checkpoint stores
            numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.register_buffer(name, numbers, persistent=False)
    tokenizer = build_tokenizer(architecture["pad_token"])
    found = compute_a1111_hash(path)
    row = known_base(found)
    if row:
        unet.register_to_config(sample_size=row.size // 8)
    stated = row.prediction if row else ""
    return Parts(vae, unet, text_encoder, tokenizer, noise_schedule(), stated, found)


def refuse_doubles(keys: Iterable[str], name: str) -> None:
    """Refuse tensors of a text encoder that stand there with and without transformers' prefix."""
    keys = set(keys)
    if doubles := sorted(key for key in keys if f"text_model.{key}" in keys):
        raise BaseError(
            f"{name} holds {len(doubles)} tensors of its text encoder twice, e.g. {doubles[0]} and "
            f"text_model.{doubles[0]}: which of them counts is not known. Remove one kind, or get "
            "the base from its source again"
        )
