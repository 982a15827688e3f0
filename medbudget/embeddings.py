"""Embedding: the vectors that Textual Inversion found, their token and where they come from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from medbudget.files import check_writable, write_bytes, write_tensors
from medbudget.prompts import TOKEN
from medbudget.torchfiles import RefusedError, check_tensors, read_torch, recognise, write_torch

MAX_VECTORS = 74
LARGEST = 1e4  # that a trained vector may hold; words of the vocabulary are under 1
MAX_BYTES = 64 * 2**20
META = "medbudget"  # key of what we note beside the vectors, in .safetensors and .pt
WIDTHS = {96: "tiny", 768: "SD 1.x", 1024: "SD 2.x"}


class EmbeddingError(ValueError):
    """An embedding, or an embedding file, that cannot be used."""


def check_record(record: Mapping[str, Any]) -> None:
    """Raise EmbeddingError unless what a file says of its making can be read on."""
    for key, kind in (("image_hashes", str), ("settings", dict), ("history", dict)):
        if not isinstance(record.get(key, kind()), kind):
            found = type(record[key]).__name__
            raise EmbeddingError(
                f"its metadata is damaged ({key} is a {found}, not a {kind.__name__}); fetch or "
                "train it again"
            )


def check_token(token: str) -> str:
    """Return `token` if it is ``<name>`` without spaces or path separators, else raise."""
    if not TOKEN.fullmatch(token) or not token.isprintable() or len(token) > 200:
        plain = "".join(c for c in token[:60] if c.isprintable())
        bare = re.sub(r"[<>\s/\\]+", "-", plain).strip("-") or "name"
        raise EmbeddingError(
            f"token {token[:200]!r} is not of the form <name> (angle brackets, no spaces or "
            f"slashes, at most 200 signs); write <{bare}>"
        )
    return token


@dataclass(frozen=True)
class Embedding:
    """Vectors for one token.

    Shapes without vectors or with more than 74, NaN, infinity, numbers beyond 10,000, rows of zeros
    and a token that is not ``<name>`` raise EmbeddingError.
    """

    vectors: torch.Tensor  # (n, d) float32; d is 96 for tiny, 768 for SD 1.x, 1024 for SD 2.x
    token: str  # <name>, what a prompt writes to use the vectors
    step: int = 0  # training steps done
    base: str = ""  # that it was trained on; "" where the file does not tell
    base_hash: str = ""
    data: str = ""  # a note on the training images
    record: dict[str, Any] = field(default_factory=dict)  # settings, history, image hashes: JSON

    def __post_init__(self) -> None:
        check_token(self.token)
        check_record(self.record)
        v = self.vectors
        if not isinstance(v, torch.Tensor) or v.ndim != 2 or 0 in v.shape:
            shape = tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__
            raise EmbeddingError(f"vectors must have shape (n, d) with n, d >= 1, got {shape}")
        if len(v) > MAX_VECTORS:
            raise EmbeddingError(
                f"{len(v)} vectors do not fit a prompt of 77 positions; at most {MAX_VECTORS} do"
            )
        if not v.is_floating_point():
            raise EmbeddingError(f"vectors must be floating-point numbers, got {v.dtype} integers")
        object.__setattr__(self, "vectors", v.detach().to("cpu", torch.float32).contiguous())
        self.check_finite()
        if (self.vectors == 0).all(1).any():
            rows = (self.vectors == 0).all(1).nonzero().flatten().tolist()
            raise EmbeddingError(f"vectors {rows[:5]} are all zero: they were never trained")

    @property
    def history(self) -> dict[str, list[float]]:
        """Recorded training curves, e.g. ``{"step": […], "loss": […]}``."""
        return self.record.get("history", {})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, token: str | None = None) -> Embedding:
        """Read safetensors (ours, diffusers', A1111's), A1111 ``.pt`` or diffusers ``.bin``.

        Nothing in the file is executed; see `medbudget.torchfiles`. `token` replaces the file's
        own. What is no embedding, truncated, or has code in it raises EmbeddingError.
        """
        path = Path(path)
        if not path.is_file():
            hint = ", which is the name of a word: pass its file" if TOKEN.match(path.name) else ""
            raise FileNotFoundError(f"no embedding file {path}{hint}")
        if path.stat().st_size > MAX_BYTES:
            raise EmbeddingError(
                f"{path} has {path.stat().st_size / 2**20:.0f} MiB; an embedding has under 1: "
                "this looks like a checkpoint of a whole model"
            )
        if path.suffix not in (".safetensors", ".pt", ".bin", ".pth"):
            raise EmbeddingError(
                f"{path.name}: unknown ending {path.suffix!r}; allowed are .safetensors, .pt, .bin"
            )
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        try:
            return _from_tensors(*read(path), path, token)
        except EmbeddingError as error:
            raise EmbeddingError(f"{path.name}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.safetensors`` (vectors and provenance), A1111 ``.pt`` or diffusers ``.bin``.

        Written atomically. A ``.bin`` keeps no provenance: it can hold nothing but the vectors.

        Examples
        --------
        >>> import tempfile
        >>> word = Embedding(torch.ones(2, 96), "<mine>", data="phantoms")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = Embedding.load(word.save(f"{folder}/mine.safetensors"))
        >>> again.token, again.data, torch.equal(again.vectors, word.vectors)
        ('<mine>', 'phantoms', True)
        """
        path = check_writable(path)
        about = {key: value for key, value in vars(self).items() if key != "vectors"}
        noted = json.dumps(about, ensure_ascii=False)
        if path.suffix == ".safetensors":
            # diffusers' load_textual_inversion takes the one tensor's key as the token
            write_tensors(path, {self.token: self.vectors}, {META: noted})
        elif path.suffix == ".pt":
            content = {
                "string_to_token": {"*": 265}, "string_to_param": {"*": self.vectors},
                "name": self.token.strip("<>"), "step": self.step, "sd_checkpoint": self.base_hash,
                "sd_checkpoint_name": self.base, META: noted,
            }  # fmt: skip
            write_bytes(path, write_torch(content))
        elif path.suffix == ".bin":
            write_bytes(path, write_torch({self.token: self.vectors}))
        else:
            raise EmbeddingError(
                f"cannot write {path.name}: allowed endings are .safetensors, .pt, .bin"
            )
        return path

    def renamed(self, token: str) -> Embedding:
        """Return the same vectors under another token."""
        return replace(self, token=token)

    def check_finite(self) -> None:
        """Raise `EmbeddingError` if the vectors hold NaN, infinity or numbers of no trained word."""
        if not self.vectors.abs().max() <= LARGEST:
            rows = (~(self.vectors.abs() <= LARGEST)).any(1).nonzero().flatten().tolist()
            raise EmbeddingError(
                f"embedding {self.token} holds NaN, infinity or numbers beyond {LARGEST:g} in "
                f"vectors {rows[:5]}: its training diverged; train again with a lower learning "
                "rate, in bfloat16 or float32"
            )

    def check_fits(self, width: int, base: str) -> None:
        """Raise `EmbeddingError` if the vectors' width is not the base's, or they are not finite."""
        self.check_finite()
        own = self.vectors.shape[1]
        if own != width:
            raise EmbeddingError(
                f"embedding {self.token} has width {own}, which does not fit base {base} ({width}): "
                f"it was made for {WIDTHS.get(own, 'another base')}; load a "
                f"{WIDTHS.get(width, f'{width}-wide')} embedding or another base"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(META)
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as file:
            head = file.read(1024)
        reason = recognise(head) or f"it is no whole safetensors file ({error})"
        advice = "fetch or train it again"
        if head.startswith((b"PK", b"\x80")):
            reason, advice = "it holds what a .pt or .bin file holds", "give it that ending"
        raise EmbeddingError(f"{reason}; {advice}") from None


def _read_pickle(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        content = read_torch(path)
    except RefusedError as error:
        raise EmbeddingError(
            f"{error}. Only tensors are read, code in a file is never run; fetch or train it again, "
            "or get it as .safetensors"
        ) from None
    if not isinstance(content, dict):
        raise EmbeddingError(f"it holds a {type(content).__name__}, not an embedding")
    return content, content.pop(META, None)


def _from_tensors(content: dict[str, Any], noted: Any, path: Path, token: str | None) -> Embedding:
    about = read_about(noted)
    if "string_to_param" in content:  # A1111
        params = content["string_to_param"]
        if isinstance(params, Mapping):  # the original repository stored a ParameterDict
            params = params.get("_parameters", params)
        if not isinstance(params, Mapping) or len(params) != 1:
            raise EmbeddingError("an A1111 embedding must hold exactly one token")
        vectors = next(iter(params.values()))
        name = content.get("name") or path.stem
        keys = {"base": "sd_checkpoint_name", "base_hash": "sd_checkpoint", "step": "step"}
        about = {own: content.get(key) for own, key in keys.items()} | about
    elif "emb_params" in content:  # A1111's safetensors layout
        vectors, name = content["emb_params"], path.stem
    elif len(content) == 1:  # ours, and diffusers' learned_embeds
        name, vectors = next(iter(content.items()))
    elif any(str(key).startswith(("lora_", "unet.")) for key in content):
        raise EmbeddingError("it is an adapter (LoRA), not an embedding: pass it with --adapter")
    else:
        raise EmbeddingError(
            f"found the keys {sorted(str(key)[:60] for key in content)[:5]}; an embedding holds one "
            "token's tensor (ours, diffusers), `emb_params` or `string_to_param` (A1111)"
        )
    if not isinstance(vectors, torch.Tensor):
        raise EmbeddingError(f"the vectors are a {type(vectors).__name__}, not a tensor")
    try:
        check_tensors([vectors], path.stat().st_size)
    except RefusedError as error:
        raise EmbeddingError(str(error)) from None
    step = about.get("step") or 0
    if not isinstance(step, int) or not 0 <= step < 2**53:
        raise EmbeddingError(f"its step count is {step!r:.60}, not a whole number")
    base, base_hash, data = (_read_text(about, key) for key in ("base", "base_hash", "data"))
    if token is None:
        name = _read_text({"token": name}, "token")
        bare = re.sub(r"[<>\s/\\]+", "-", name).strip("-")
        token = name if TOKEN.fullmatch(name) else f"<{bare}>"
    if vectors.is_complex():
        raise EmbeddingError(f"vectors must be real numbers, got {vectors.dtype}")
    vectors = vectors.detach().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    return Embedding(vectors, token, step, base, base_hash, data, about.get("record", {}))


def _read_text(about: Mapping[str, Any], key: str) -> str:
    value = about.get(key) or ""
    if not isinstance(value, str):
        raise EmbeddingError(f"its {key} is a {type(value).__name__}, not text")
    return value


def read_about(noted: Any) -> dict[str, Any]:
    """Return what we wrote beside the vectors; empty for other programs' files."""
    try:
        about = {} if noted is None else json.loads(noted)
        if isinstance(about, dict) and isinstance(about.get("record", {}), dict):
            return about
    except (TypeError, ValueError, RecursionError):
        pass
    raise EmbeddingError("its metadata is damaged; fetch or train it again")
