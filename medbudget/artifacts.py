"""Checkpoints with a checksum, and the one before the last."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medbudget.files import atomic_path

MARK = b"medbudget checkpoint, SHA-256 "  # before the 64 digits at the end of the file


def previous_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return where `save_checkpoint` keeps the checkpoint before the last."""
    return Path(f"{os.fspath(path)}.previous")


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint with its checksum, and keep the one before as ``PATH.previous``.

    Parameters
    ----------
    content : mapping
        What `torch.save` writes and loads with ``weights_only``; ``identity`` says which run it is.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.seek(0, os.SEEK_END)
    buffer.write(MARK + digest.encode())
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if Path(path).exists():
            os.replace(path, previous_checkpoint(path))


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint and the one before, if they are there."""
    for file in (Path(path), previous_checkpoint(path)):
        file.unlink(missing_ok=True)


def _read_checkpoint(path: Path, device: str | torch.device) -> dict[str, Any] | str:
    """Return a checkpoint's content, or in words what is wrong with it."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return "it is missing"
    body, end = content[: -len(MARK) - 64], bytes(content[-len(MARK) - 64 :])
    if not end.startswith(MARK):
        return "it is cut short, or none of this version"
    if hashlib.sha256(body).hexdigest().encode() != end[len(MARK) :]:
        return "its checksum is wrong"
    try:
        stored = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
        return stored if "identity" in stored else "it names no run"
    except Exception as error:
        return f"{type(error).__name__} in it"


def load_checkpoint(
    path: str | os.PathLike[str],
    identity: Mapping[str, Any],
    *,
    device: str | torch.device = "cpu",
    detail: str = "",
) -> dict[str, Any] | None:
    """Return a checkpoint's content, None if there is none, or refuse one of another run.

    Where the last one is damaged, that before it takes its place, with a warning.

    Parameters
    ----------
    identity : mapping
        What the run is; the file must have the same under ``identity``.
    detail : str
        A key of it whose own entries are named where they differ.

    Raises
    ------
    ValueError
        Damaged without a good one before it, or of another run; says what differs.
    """
    path = Path(path)
    before = previous_checkpoint(path)
    if not path.exists() and not before.exists():
        return None
    stored = _read_checkpoint(path, device)
    problem = ""
    if isinstance(stored, str):
        problem, stored = stored, _read_checkpoint(before, device)
    if isinstance(stored, str):
        raise ValueError(
            f"{path} is no readable checkpoint ({problem}; {before.name}: {stored}); remove "
            f"{'it' if not before.exists() else 'both'} to start anew"
        )
    found = stored["identity"]
    if found != identity:
        differs = [key for key in identity if found.get(key) != identity[key]]
        if detail in differs:
            differs.remove(detail)
            old, new = found.get(detail, {}), identity[detail]
            differs += [
                f"{key} ({old.get(key)} there, {new.get(key)} now)"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
        raise ValueError(
            f"checkpoint {path} belongs to another run: {', '.join(differs)} differ; name another "
            "checkpoint, or remove this one to start anew"
        )
    if problem:
        os.replace(before, path)  # or the next one saved would push the damaged one over it
        warnings.warn(
            f"checkpoint {path} cannot be used ({problem}): going on from the one before it",
            stacklevel=3,
        )
    return stored
