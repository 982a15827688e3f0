"""Files that are whole or absent: atomic writes, content hashes, recorded results."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    On any exception the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically: indented, in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return `path` if a file can be created there, else raise before any work is done.

    Missing parent folders are made.

    Raises
    ------
    IsADirectoryError, PermissionError, NotADirectoryError
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}-probe.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(
            f"cannot write {path} ({error.strerror}); choose another place with --out"
        ) from None
    return path


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the first 12 hex digits of SHA-256 over names, shapes, dtypes and bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return 12 hex digits that name the settings, independent of the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


# --------------------------------------------------------------------------- recorded results


def load_checkpoint(
    path: Path, identity: Mapping[str, Any], *, device: str | torch.device = "cpu", detail: str = ""
) -> dict[str, Any]:
    """Return a checkpoint's content, or refuse one of another run.

    Parameters
    ----------
    identity : mapping
        What the run is; the file must have the same under ``identity``.
    detail : str
        A key of it whose own entries are named where they differ.

    Raises
    ------
    ValueError
        Unreadable, or of another run; says what differs.
    """
    try:
        stored: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = stored["identity"]
    except Exception as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({type(error).__name__}); remove it to start anew"
        ) from None
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
    return stored


RESULT_KEYS = ("date", "command", "base_hash", "device", "values")


class StaleResultError(ValueError):
    """A recorded result that belongs to another base; the message names the command to repeat."""


def results_folder() -> Path:
    """Return the folder of recorded results: ``results/`` of the checkout, else the package's."""
    checkout = Path(__file__).resolve().parents[1] / "results"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parent / "results"


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> str:
    """Return cores and threads in words."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"CPU, {count_cores()} cores ({platform.machine()}), OMP_NUM_THREADS {threads}"


def describe_device() -> str:
    """Return cores, threads and load in words: what a measured time depends on."""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{describe_machine()}{load}"


def write_result(
    name: str,
    values: Mapping[str, Any],
    *,
    command: str,
    base_hash: str | None = None,
    device: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Record measured values as ``results/NAME.json``, with what is needed to measure them again.

    Parameters
    ----------
    values : mapping
        JSON types only.
    command : str
        The line that makes this file, from the repository's root.
    base_hash : str, optional
        `Base.hash` of the base that was used; None where none was.
    device : str, optional
        Default `describe_device`.
    folder : path, optional
        Default `results_folder`.
    """
    path = check_writable(Path(folder or results_folder()) / f"{name}.json")
    record = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "base_hash": base_hash,
        "device": device or describe_device(),
        "values": dict(values),
    }
    write_json(path, record)
    return path


def load_result(
    name: str, *, base_hash: str | None = None, folder: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Return the values recorded as ``results/NAME.json``, or refuse them.

    Parameters
    ----------
    base_hash : str, optional
        `Base.hash` of the base at hand: needed for results that depend on one.

    Raises
    ------
    FileNotFoundError
        No such result; the message lists those there are.
    StaleResultError
        Measured on another base than the one at hand.
    ValueError
        A file that is not a recorded result.
    """
    path = Path(folder or results_folder()) / f"{name}.json"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no recorded result {name!r} in {path.parent}; there are: {have}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or tuple(record) != RESULT_KEYS:
        found = list(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{path} is not a recorded result: it must have the keys {', '.join(RESULT_KEYS)} in "
            f"this order, and has {found}; write it with medbudget.artifacts.write_result"
        )
    if record["base_hash"] is not None and record["base_hash"] != base_hash:
        raise StaleResultError(
            f"{path.name} was measured on a base with hash {record['base_hash']}, the one at hand "
            f"has {base_hash}; measure it again: {record['command']}"
        )
    values: dict[str, Any] = record["values"]
    return values
