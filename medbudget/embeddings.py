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
from safetensors.torch import save as save_safetensors

from medbudget.files import check_writable, write_bytes
from medbudget.torchfiles import RefusedError, check_tensors, read_torch, recognise, write_torch

MAX_VECTORS = 74
_TOKEN = re.compile(r"<[^<>\s/\\]+>")
MAX_BYTES = 64 * 2**20


META = "medbudget"


class EmbeddingError(ValueError):
    """An embedding, or an embedding file, that cannot be used."""


def check_token(token: str) -> str:
    """Return `token` if it is ``<name>`` without spaces or path separators, else raise."""
    if not _TOKEN.fullmatch(token) or not token.isprintable() or len(token) > 200:
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

    Attributes
    ----------
    vectors : torch.Tensor
        ``(n, d) float32``, 1 <= n <= 74; d is the text encoder's width (96 tiny, 768 SD 1, 1024 SD 2).
    token : str
        ``<name>``, what a prompt writes to use the vectors.
    step : int
        Training steps done.
    base, base_hash : str
        Name and hash of the base it was trained on ("" where the file does not tell).
    data : str
        A note on the training images.
    record : dict
        Settings, seed, library version and the loss history, as JSON values.

    Raises
    ------
    EmbeddingError
        Wrong shape, no or too many vectors, NaN or infinity, all-zero rows, a token not in <>.
    """

    vectors: torch.Tensor
    token: str
    step: int = 0
    base: str = ""
    base_hash: str = ""
    data: str = ""
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_token(self.token)
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

        Nothing in the file is executed; see `medbudget.torchfiles`.

        Parameters
        ----------
        token : str, optional
            Use this token in place of the file's own.

        Raises
        ------
        FileNotFoundError
        EmbeddingError
            Not an embedding, truncated, or with code in it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no embedding file {path}")
        if path.stat().st_size > MAX_BYTES:
            raise EmbeddingError(
                f"{path} has {path.stat().st_size / 2**20:.0f} MiB; an embedding has under 1: "
                "this looks like a checkpoint of a whole model"
            )
        if path.suffix == ".safetensors":
            tensors, meta = _read_safetensors(path)
        elif path.suffix in (".pt", ".bin", ".pth"):
            tensors, meta = _read_pickle(path), {}
        else:
            raise EmbeddingError(
                f"{path.name}: unknown ending {path.suffix!r}; allowed are .safetensors, .pt, .bin"
            )
        try:
            return _from_tensors(tensors, meta, path, token)
        except EmbeddingError as error:
            raise EmbeddingError(f"{path.name}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.safetensors`` (vectors and provenance), A1111 ``.pt`` or diffusers ``.bin``.

        Written atomically. Only safetensors keeps the whole provenance.

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
        writers = {
            ".safetensors": _write_safetensors,
            ".pt": _write_a1111,
            ".bin": _write_diffusers,
        }
        if path.suffix not in writers:
            raise EmbeddingError(
                f"cannot write {path.name}: allowed endings are {', '.join(writers)}"
            )
        write_bytes(path, writers[path.suffix](self))
        return path

    def renamed(self, token: str) -> Embedding:
        """Return the same vectors under another token."""
        return replace(self, token=token)

    def check_finite(self) -> None:
        """Raise `EmbeddingError` if the vectors hold NaN or infinity."""
        if not torch.isfinite(self.vectors).all():
            rows = (~torch.isfinite(self.vectors)).any(1).nonzero().flatten().tolist()
            raise EmbeddingError(
                f"embedding {self.token} holds NaN or infinity in vectors {rows[:5]}: the training "
                "that made it diverged; train again with a lower learning rate, in bfloat16 or "
                "float32"
            )

    def check_fits(self, width: int, base: str) -> None:
        """Raise `EmbeddingError` if the vectors' width is not the base's, or they are not finite."""
        self.check_finite()
        if self.vectors.shape[1] != width:
            kinds = {96: "tiny", 768: "SD 1.x", 1024: "SD 2.x"}
            made = kinds.get(self.vectors.shape[1], "another base")
            fits = kinds.get(width, f"{width}-wide")
            raise EmbeddingError(
                f"embedding {self.token} has width {self.vectors.shape[1]}, which does not fit base "
                f"{base} ({width}): it was made for {made}; load a {fits} embedding or another base"
            )


def _write_safetensors(e: Embedding) -> bytes:
    about = {
        "token": e.token,
        "step": e.step,
        "base": e.base,
        "base_hash": e.base_hash,
        "data": e.data,
        "record": e.record,
    }
    # One metadata key: safetensors writes several in random order, and equal embeddings should be
    # equal files. diffusers' load_textual_inversion takes the one tensor's key as the token.
    meta = {META: json.dumps(about, ensure_ascii=False)}
    return save_safetensors({e.token: e.vectors}, metadata=meta)


def _write_a1111(e: Embedding) -> bytes:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": e.vectors},
        "name": e.token.strip("<>"),
        "step": e.step,
        "sd_checkpoint": e.base_hash,
        "sd_checkpoint_name": e.base,
    }
    return write_torch(content)


def _write_diffusers(e: Embedding) -> bytes:
    return write_torch({e.token: e.vectors})


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as file:
            head = file.read(1024)
        if head.startswith((b"PK", b"\x80")):
            raise EmbeddingError(
                f"{path.name} holds what a .pt or .bin file holds: give it that ending"
            ) from None
        reason = recognise(head) or f"it is no whole safetensors file ({error})"
        raise EmbeddingError(f"{path.name} is refused: {reason}; fetch or train it again") from None


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = read_torch(path)
    except RefusedError as error:
        raise EmbeddingError(
            f"{path.name} is refused: {error}. Only tensors are read, code in a file is never run; "
            "fetch or train it again, or get it as .safetensors"
        ) from None
    if not isinstance(content, dict):
        raise EmbeddingError(f"{path.name} holds a {type(content).__name__}, not an embedding")
    return content


def _from_tensors(
    content: dict[str, Any], meta: Mapping[str, str], path: Path, token: str | None
) -> Embedding:
    about = _read_about(meta)
    base, base_hash = str(about.get("base", "")), str(about.get("base_hash", ""))
    step = int(about.get("step", 0))
    if "string_to_param" in content:  # A1111
        params = content["string_to_param"]
        if isinstance(params, Mapping):  # the original repository stored a ParameterDict
            params = params.get("_parameters", params)
        if not isinstance(params, Mapping) or len(params) != 1:
            raise EmbeddingError("an A1111 embedding must hold exactly one token")
        vectors = next(iter(params.values()))
        keys = ("name", "sd_checkpoint_name", "sd_checkpoint")
        name, base, base_hash = (_read_text(content, key) for key in keys)
        name = name or path.stem
        step = content.get("step") or 0
        if not isinstance(step, int) or not 0 <= step < 2**53:
            raise EmbeddingError(
                f"its step count is {step!r:.60}, not a whole number; fetch or train it again"
            )
    elif "emb_params" in content:  # A1111's safetensors layout
        vectors, name = content["emb_params"], path.stem
    elif len(content) == 1:  # ours, and diffusers' learned_embeds
        name, vectors = next(iter(content.items()))
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
        raise EmbeddingError(f"it is refused: {error}") from None
    if vectors.ndim == 1:
        vectors = vectors[None]
    if not isinstance(name, str):
        raise EmbeddingError(f"its token is a {type(name).__name__}, not text")
    if token is None:
        bare = re.sub(r"[<>\s/\\]+", "-", name).strip("-")
        token = name if _TOKEN.fullmatch(name) else f"<{bare}>"
    return Embedding(
        vectors=vectors.detach().float(),
        token=token,
        step=step,
        base=base,
        base_hash=base_hash,
        data=str(about.get("data", "")),
        record=about.get("record", {}),
    )


def _read_text(content: Mapping[str, Any], key: str) -> str:
    value = content.get(key) or ""
    if not isinstance(value, str) or len(value) > 500:
        raise EmbeddingError(f"its {key} is no short text; fetch or train it again")
    return value


def _read_about(meta: Mapping[str, str]) -> dict[str, Any]:
    """Return what `_write_safetensors` wrote beside the vectors; empty for other programs' files."""
    try:
        about = json.loads(meta.get(META, "{}"))
        if isinstance(about, dict) and isinstance(about.get("record", {}), dict):
            int(about.get("step", 0))
            return about
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass
    raise EmbeddingError("its metadata is damaged; fetch or train it again")
