"""Files of adapters: LoRA of kohya-ss, A1111, ComfyUI, diffusers and peft, read without code."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from medbudget.embeddings import LARGEST, META, Embedding, EmbeddingError, read_about
from medbudget.torchfiles import recognise

PREFIX = "lora_unet_"
PEFT_CONFIG = "adapter_config.json"
Change: TypeAlias = "dict[str, torch.Tensor]"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b")
_OTHERS: dict[str | tuple[str, ...], str] = {  # signs of other files, and what to do with them
    "lora_unet_input_blocks": "it is for Stable Diffusion XL, whose layers have other names",
    ("lora_te", "text_encoder."): "it changes the text encoder too, and only changes of the U-Net "
    "can be used here: train or export it for the U-Net alone",
    "transformer.": "it is for a transformer (Stable Diffusion 3, Flux), not for a U-Net",
    "model.diffusion_model.": "it is a whole base: pass it with --base",
    "emb_params": "it is an embedding: pass it with --embeddings",
    "<": "it is an embedding: pass it with --embeddings",
    "bundle_emb": "it bundles words of A1111: save them as embeddings of their own",
}
_KINDS = {
    "token": str, "step": int, "base": str, "base_hash": str, "data": str, "record": dict,
    "word": dict,
}  # fmt: skip


class AdapterError(ValueError):
    """An adapter, or a file of one, that cannot be used."""


def check_change(layer: str, change: Change) -> None:
    """Raise AdapterError unless a layer's tensors are a change of a known kind, and finite."""
    parts = set(change)
    if unknown := sorted(parts - set(_PARTS)):
        raise AdapterError(
            f"layer {layer[:100]} has {unknown[0][:60]}: only LoRA (lora_down, lora_up, alpha) and "
            "full changes (diff, diff_b) are read, not LoHa, LoKr, DoRA and others"
        )
    down, up = change.get("lora_down.weight"), change.get("lora_up.weight")
    for name, tensor in change.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise AdapterError(
                f"layer {layer[:100]} holds {kind} in {name}, and only tensors of floating-point "
                "numbers are read, which quantized files do not have: get it in float16 or float32"
            )
        if not (tensor.abs() <= LARGEST).all():
            raise AdapterError(
                f"layer {layer[:100]} holds NaN, infinity or numbers beyond 10,000 in {name}: its "
                "training diverged, or it is damaged; train it again with a lower learning rate"
            )
    lora = {"lora_down.weight", "lora_up.weight"}
    if bool(parts & lora) == bool(parts & {"diff", "diff_b"}) or 0 < len(parts & lora) < 2:
        raise AdapterError(
            f"layer {layer[:100]} has {', '.join(sorted(parts))}: either lora_down and lora_up, or "
            "diff and diff_b make a change"
        )
    if down is None or up is None:
        return
    if (
        down.ndim not in (2, 4)
        or up.ndim not in (2, 4)
        or up.shape[1] != len(down)
        or math.prod(up.shape[2:]) != 1
        or not down.numel()
    ):
        raise AdapterError(
            f"layer {layer[:100]}: lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} make "
            "no product"
        )
    if (alpha := change.get("alpha")) is not None and alpha.numel() != 1:
        raise AdapterError(f"layer {layer[:100]}: alpha has {alpha.numel()} numbers, not one")


_DIFFUSERS = re.compile(
    r"(?:unet\.|base_model\.model\.|(?=(?:down_blocks|mid_block|up_blocks)\.))(?P<layer>.+?)(?:\.processor)?[._]lora(?:_(?P<ab>[AB])|\.(?P<du>down|up))\.weight"
)


def _rename(key: str) -> str:
    """Return kohya-ss' name of a tensor that diffusers or peft names, or the name as it is."""
    match = _DIFFUSERS.fullmatch(key)
    if not match:
        return key
    layer = match["layer"].replace(".processor.", ".")
    layer = f"{layer}.0" if layer.endswith(".to_out") else layer
    part = {"A": "down", "B": "up"}.get(match["ab"], match["du"])
    return f"{PREFIX}{layer.replace('.', '_')}.lora_{part}.weight"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file holds changes to a U-Net; False if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(_rename(key).startswith(PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def read_adapter(path: Path) -> dict[str, Any]:
    """Return what an `Adapter` is made of; raise AdapterError for any other file."""
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"unknown ending {path.suffix!r}; adapters are read from .safetensors alone, as other "
            "files can hold code"
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            if not any(_rename(key).startswith(PREFIX) for key in keys):
                raise AdapterError(_recognise(keys))
            for sign, reason in _OTHERS.items():
                if any(key.startswith(sign) for key in keys):
                    raise AdapterError(reason)
            tensors = {_rename(key): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as opened:
            reason = recognise(opened.read(1024)) or f"it is no whole safetensors file ({error})"
        raise AdapterError(f"{reason}; fetch or train it again") from None
    if strange := sorted(key for key in tensors if not key.startswith(PREFIX)):
        raise AdapterError(f"it holds {strange[0][:100]}, which is no change to a U-Net's layer")
    if len(tensors) < len(keys):
        raise AdapterError("it holds a layer twice, under two names")
    about = read_about(metadata.get(META))
    if not all(isinstance(value, _KINDS.get(key, ())) for key, value in about.items()):
        raise AdapterError("its metadata are damaged; fetch or train it again")
    word = about.pop("word", None)
    if META not in metadata:
        config = _read_config(metadata.get("lora_adapter_metadata"), "unet.")
        if any(key.startswith("base_model.") for key in keys):
            config = _read_peft_config(path)
        tensors |= _read_alphas(config, tensors)
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and tensor.numel() == 1:
            tensors[name] = tensor.float().reshape(())
        elif tensor.is_floating_point():
            tensors[name] = tensor.float()
    return {**about, "tensors": tensors, "word": None if word is None else _read_word(word)}


def _recognise(keys: Sequence[str]) -> str:
    """Say what a file without changes to a U-Net is."""
    for sign, reason in _OTHERS.items():
        if any(key.startswith(sign) for key in keys):
            return reason
    if len(keys) == 1:
        return "it holds one tensor, as an embedding does: pass it with --embeddings"
    return f"it is no LoRA of a U-Net; it holds {', '.join(sorted(k[:60] for k in keys)[:3]) or 'nothing'}"


def _read_config(noted: str | None, prefix: str) -> dict[str, Any]:
    """Return the settings of an adapter as peft writes them."""
    try:
        config = json.loads(noted or "{}")
        return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    except (AttributeError, ValueError, RecursionError):
        raise AdapterError("its metadata are damaged; fetch or train it again") from None


def _read_peft_config(path: Path) -> dict[str, Any]:
    """Return the settings that peft writes beside a file of its own."""
    try:
        return _read_config((path.parent / PEFT_CONFIG).read_text(encoding="utf-8"), "")
    except (OSError, UnicodeDecodeError):
        raise AdapterError(
            f"peft wrote it, and the scale of its changes stands in {PEFT_CONFIG}: put that file "
            "beside it"
        ) from None


def _read_alphas(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return each layer's alpha by the settings; none where they do not tell."""
    for key in ("alpha_pattern", "use_rslora", "use_dora", "lora_bias"):
        if config.get(key):
            raise AdapterError(f"its {key} is {config[key]!r:.60}, which is not read here")
    if config.get("lora_alpha") is None:
        return {}
    try:
        found = torch.tensor(float(config["lora_alpha"]))
    except (TypeError, ValueError):
        raise AdapterError("its metadata are damaged; fetch or train it again") from None
    end = "lora_down.weight"
    return {f"{key.removesuffix(end)}alpha": found for key in tensors if key.endswith(end)}


def is_sd2(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether changes are to a U-Net of Stable Diffusion 2, by the width of its texts."""
    ends = ("attn2_to_k.lora_down.weight", "attn2_to_k.diff")
    return any(v.ndim > 1 and v.shape[1] == 1024 for k, v in tensors.items() if k.endswith(ends))


def describe_word(word: Embedding) -> dict[str, Any]:
    """Return a word as JSON, its vectors as base64 of float32."""
    vectors = base64.b64encode(word.vectors.numpy().astype("<f4").tobytes()).decode()
    return vars(word) | {"vectors": vectors, "width": word.vectors.shape[1]}


def _read_word(noted: dict[str, Any]) -> Embedding:
    """Return the word that stands in the metadata."""
    try:
        width = noted.pop("width")
        data = bytearray(base64.b64decode(noted.pop("vectors"), validate=True))
        vectors = torch.frombuffer(data, dtype=torch.float32).reshape(-1, width)
        if any(not isinstance(value, _KINDS[key]) for key, value in noted.items()):
            raise TypeError
        return Embedding(vectors, **noted)
    except EmbeddingError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise AdapterError("its word is damaged; fetch or train it again") from None
