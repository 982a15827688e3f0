"""Adapter: a trained change to a base's U-Net, of low rank (LoRA) or full, and its word.

A base is never changed: `adapt` returns another one, whose U-Net shares every weight that stays as
it was.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from medbudget.adapter_files import (
    META,
    PREFIX,
    AdapterError,
    Change,
    check_change,
    describe_word,
    is_sd2,
    read_adapter,
)
from medbudget.base import Base, speed_up
from medbudget.embeddings import Embedding, EmbeddingError, check_record
from medbudget.files import check_writable, hash_settings, hash_tensors, write_tensors
from medbudget.known import compare_origin
from medbudget.settings import check_number

AnyAdapter: TypeAlias = "Adapter | str | os.PathLike[str]"
Adapters: TypeAlias = "AnyAdapter | Iterable[AnyAdapter]"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Changes to a U-Net. NaN, infinity and numbers beyond 10,000 raise AdapterError."""

    tensors: dict[str, torch.Tensor]  # as kohya-ss names them: lora_unet_LAYER.lora_up.weight …
    word: Embedding | None = (
        None  # parts of a prompt that name it have the changes; None: all parts
    )
    weight: float = 1.0  # how much of the changes is applied
    step: int = 0  # training steps done
    base: str = ""  # that it was trained on; "" where the file does not tell
    base_hash: str = ""
    data: str = ""  # a note on the training images
    record: dict[str, Any] = field(default_factory=dict)  # settings, history, image hashes: JSON

    def __post_init__(self) -> None:
        check_number("an adapter's weight", self.weight)
        check_record(self.record)
        if not self.tensors:
            raise AdapterError("it holds no changes to any layer")
        for layer, change in self.changes().items():
            check_change(layer, change)

    @property
    def token(self) -> str:
        """What a prompt writes to use it; "" if it applies to all parts of a prompt."""
        return self.word.token if self.word else ""

    @property
    def rank(self) -> int | str:
        """The largest rank of its changes, or ``"full"``."""
        ranks = [len(v) for k, v in self.tensors.items() if k.endswith("lora_down.weight")]
        return max(ranks, default="full")

    @property
    def hash(self) -> str:
        """12 hex digits over the changes."""
        return hash_tensors(self.tensors)

    def weighted(self, weight: float) -> Adapter:
        """Return the same adapter, applied `weight` times."""
        return replace(self, weight=weight)

    def renamed(self, token: str) -> Adapter:
        """Return the same adapter under another token."""
        if self.word is None:
            raise AdapterError("an adapter without a word has no token to rename")
        return replace(self, word=self.word.renamed(token))

    def changes(self) -> dict[str, Change]:
        """Return the tensors of each layer by what they are."""
        layers: dict[str, Change] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            layer, _, part = name.partition(".")
            layers[layer][part] = tensor
        return dict(layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read a LoRA of ours, kohya-ss', A1111's or diffusers', as ``.safetensors``.

        What is no LoRA of a U-Net alone, truncated, or of a kind that is not known raises
        AdapterError.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no adapter file {path}")
        try:
            return cls(**read_adapter(path))
        except (AdapterError, EmbeddingError) as error:
            raise AdapterError(f"{path.name}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.safetensors`` atomically, as A1111, ComfyUI and diffusers read it.

        The word stands in the metadata, which those programs pass over; ``adapter.word.save(…)``
        writes it for them. diffusers reads ranks, not full changes, and A1111 passes over the
        last norm of a full change.
        """
        if self.weight != 1:
            raise AdapterError(
                f"its weight is {self.weight:g}, which a file does not keep: save "
                "adapter.weighted(1), and give the weight where the adapter is used"
            )
        path = check_writable(path)
        if path.suffix != ".safetensors":
            raise AdapterError(f"cannot write {path.name}: an adapter's file ends in .safetensors")
        about = {k: v for k, v in vars(self).items() if k not in ("tensors", "word", "weight")}
        if self.word is not None:
            about["word"] = describe_word(self.word)
        metadata = {META: json.dumps(about, ensure_ascii=False)}
        if is_sd2(self.tensors):  # else A1111 takes it for one of SD 1, and hides it in its list
            metadata["ss_v2"] = "True"
        write_tensors(path, self.tensors, metadata)
        return path


# ------------------------------------------------------------------------------------- on a base


def load_adapters(base: Base, adapters: Adapters) -> list[Adapter]:
    """Return adapters (or those in files) that fit this base."""
    given = [adapters] if isinstance(adapters, Adapter | str | os.PathLike) else [*adapters]
    loaded = [one if isinstance(one, Adapter) else Adapter.load(one) for one in given]
    layers = _find_layers(base.unet)
    for adapter in loaded:
        for layer, change in adapter.changes().items():
            _check_fit(adapter, layer, change, layers.get(layer), base)
        same, reason = compare_origin(adapter, base)
        if same is False:
            warnings.warn(
                f"adapter {adapter.token or 'without a word'} was {reason}: images will differ from "
                "those it was trained for",
                stacklevel=4,
            )
    return loaded


def choose_adapters(adapters: Sequence[Adapter], text: str) -> tuple[Adapter, ...]:
    """Return the adapters that a part of a prompt has: those it names, and those without a word."""
    return tuple(a for a in adapters if a.weight and (not a.word or a.token in text))


def adapt(base: Base, adapters: Sequence[Adapter]) -> Base:
    """Return a base whose U-Net has the changes of fitting adapters; `base` stays as it is.

    Its hash is another one, so that what is made with it is not taken for the base's.
    """
    if not adapters:
        return base
    made_of = {"base": base.hash, "adapters": [[a.hash, a.weight] for a in adapters]}
    return replace(merge(base, adapters), hash=hash_settings(made_of))


def merge(base: Base, adapters: Sequence[Adapter]) -> Base:
    """Return a base with the changes of adapters under the base's own hash, as sampling uses it."""
    unet = copy_network(base.unet)
    layers = _find_layers(unet)
    changes = [(adapter.weight, adapter.changes()) for adapter in adapters]
    for layer in dict.fromkeys(layer for _, own in changes for layer in own):
        sums: dict[str, torch.Tensor] = {}  # in float32, rounded once
        for weight, own in changes:
            for part, delta in compute_change(own.get(layer, {}), base.device).items():
                old = sums[part] if part in sums else getattr(layers[layer], part).float()
                sums[part] = old + weight * delta.reshape(old.shape)
        for part, new in sums.items():
            new = new.to(getattr(layers[layer], part).dtype)
            setattr(layers[layer], part, nn.Parameter(new, requires_grad=False))
    adapted = replace(base, unet=unet, fast=False)
    return speed_up(adapted) if base.fast else adapted


def copy_network(network: nn.Module) -> Any:
    """Return a network of new modules, not compiled, that share all weights with those of another."""
    network = getattr(network, "_orig_mod", network)
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def compute_change(
    change: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return what is added to a layer's ``weight`` and ``bias``: B A alpha / r (LoRA, equation 3).

    Hu et al. 2021 (arXiv 2106.09685). A is ``lora_down``, B ``lora_up``; alpha is r where a file
    does not tell. A full change is ``diff``.
    """
    own = {name: tensor.to(device, torch.float32) for name, tensor in change.items()}
    found = {
        name: own[part] for name, part in (("weight", "diff"), ("bias", "diff_b")) if part in own
    }
    if "lora_down.weight" in own:
        down, up = own["lora_down.weight"], own["lora_up.weight"]
        scale = float(own["alpha"]) / len(down) if "alpha" in own else 1.0
        found["weight"] = scale * (up.flatten(1) @ down.flatten(1))
    return found


def _find_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Return a U-Net's layers that have weights, by kohya-ss' names."""
    modules = getattr(unet, "_orig_mod", unet).named_modules()
    return {
        PREFIX + name.replace(".", "_"): module
        for name, module in modules
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def _check_fit(
    adapter: Adapter, layer: str, change: Change, module: nn.Module | None, base: Base
) -> None:
    """Raise AdapterError unless a change fits its layer."""
    own: Any = module
    problem = f"which base {base.name} does not have" if module is None else ""
    if module is not None:
        down, up = change.get("lora_down.weight"), change.get("lora_up.weight")
        if down is not None and up is not None:
            shape, wanted = (len(up), *down.shape[1:]), tuple(own.weight.shape)
            flat = math.prod(shape) == math.prod(wanted) and shape[:2] == wanted[:2]
            problem = "" if flat else f"{shape}, which base {base.name} has as {wanted}"
        for part, name in (("diff", "weight"), ("diff_b", "bias")):
            old = getattr(own, name, None)
            if part in change and (old is None or old.shape != change[part].shape):
                there = "" if old is None else f" as {tuple(old.shape)}"
                problem = (
                    f"{tuple(change[part].shape)}, which base {base.name} has{there or ' not'}"
                )
    if problem:
        name = f"adapter {adapter.token}".rstrip()
        raise AdapterError(
            f"{name} changes a layer {layer.removeprefix(PREFIX)} {problem}: it was made for "
            f"{adapter.base or 'another base'}; load it on that one, or train one for this base"
        )
