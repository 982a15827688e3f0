"""Files that are whole or absent: atomic writes, checkpoints, locks, hashes, recorded results."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import os
import platform
import secrets
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class InUseError(RuntimeError):
    """Another process writes the same output; the message names it."""


# --------------------------------------------------------------------------- locks of the system


_held: set[int] = set()  # descriptors of this process's locks


def _let_go_in_child() -> None:
    """Close what a fork copied: a lock must end with its owner, not with its owner's workers."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _open_locked(path: Path, *, wait: bool) -> tuple[int, bool]:
    """Open or make a file and lock it: (descriptor, False where the file system has no locks).

    The lock is the operating system's, so it vanishes with the process, however that ends.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if sys.platform == "win32":  # a byte beyond the content, which others read
                os.lseek(descriptor, 1 << 30, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                return descriptor, False
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held.add(descriptor)
                return descriptor, True
        os.close(descriptor)  # its owner has removed or renamed it meanwhile


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def lock_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that `hold` locks for an output: in a folder, or beside a file."""
    path = Path(path)
    return path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")


@contextmanager
def hold(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep other processes from writing an output as long as the block runs.

    Parameters
    ----------
    path : path or None
        A file, there or not, or a folder that is there. None: nothing to hold.

    Raises
    ------
    InUseError
        Another process holds it. One that was killed does not, whatever it has left behind.
    """
    if path is None:
        yield
        return
    file = lock_file(path)
    try:
        descriptor, locked = _open_locked(file, wait=False)
    except (BlockingIOError, PermissionError) as error:
        if isinstance(error, PermissionError) and sys.platform != "win32":
            raise
        raise InUseError(
            f"{path} is being written by {_read_owner(file)}: wait until it has ended, or choose "
            "another place"
        ) from None
    if not locked:
        warnings.warn(
            f"the file system of {path} has no locks: see to it that no other process writes there",
            stacklevel=3,
        )
    mine = os.getpid()
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps({"pid": mine, "host": socket.gethostname()}).encode())
        yield
    finally:
        if os.getpid() == mine:  # not in a fork of the owner
            if sys.platform == "win32":  # which removes no open file
                _close(descriptor)
            with suppress(OSError):
                file.unlink()
            if sys.platform != "win32":
                _close(descriptor)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a file that is added to, and wait while another process does; it is made if missing."""
    descriptor, _ = _open_locked(Path(path), wait=True)
    try:
        yield
    finally:
        if os.fstat(descriptor).st_size == 0:  # nothing was added after all
            with suppress(OSError):
                os.unlink(path)
        _close(descriptor)


def _read_owner(file: Path) -> str:
    for _ in range(10):  # it writes its name just after it has the lock
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(file.read_text(encoding="utf-8"))
            return f"process {int(owner['pid'])} on {owner['host']}"
        time.sleep(0.01)
    return "another process"


# ----------------------------------------------------------------------------- whole or absent


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    On any exception the temporary file is removed and `path` is as it was. Whoever writes the same
    file at the same time waits. What a killed process left is overwritten by the next one to write
    this file.

    Raises
    ------
    OSError
        The disk is full, read-only or broken.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor, locked = None, False
    if sys.platform != "win32":  # which renames no open file
        descriptor, locked = _open_locked(temporary, wait=True)
    if not locked:
        if descriptor is not None:
            _close(descriptor)
            temporary.unlink(missing_ok=True)
        descriptor = None
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                error.errno, f"cannot write {path}: {os.strerror(error.errno)}; it is as it was"
            ) from None
        raise
    finally:
        if descriptor is not None:
            _close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    write_bytes(path, text.encode("utf-8"))


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
        with tempfile.TemporaryFile(dir=path.parent, prefix="."):
            pass  # without a name, where the system can: nothing is left by one who is killed
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


# -------------------------------------------------------------------------------- checkpoints


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


# --------------------------------------------------------------------------- recorded results


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
        `Base.hash` of the base on whose weights the values depend; None where they depend on none
        (speed, memory, what survives a kill).
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
