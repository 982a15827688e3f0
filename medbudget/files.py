"""Write files that are whole or absent, lock outputs, hash contents, never replace by accident."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save

PathLike: TypeAlias = "str | os.PathLike[str]"
Record: TypeAlias = "Mapping[str, Any]"  # what a file says of its making
Reader: TypeAlias = "Callable[[Path], Record | None]"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
STALE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what `atomic_path` of a killed process leaves


class InUseError(RuntimeError):
    """Another process writes the same output."""


def lock_file(path: PathLike) -> Path:
    """Return the file that `hold` locks for an output: in a folder, or beside a file."""
    path = Path(path)
    return path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")


@contextmanager
def hold(path: PathLike | None, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing an output, and remove temporary files of killed ones.

    `path` is a file, there or not, a folder that is there, or None. With `wait`, wait while another
    process holds it, instead of raising InUseError.
    """
    if path is None:
        yield
        return
    file = lock_file(path)
    try:
        with FileLock(file, timeout=-1 if wait else 0):
            prefix = "." if Path(path).is_dir() else f".{Path(path).name}."
            for left in file.parent.iterdir():
                if left.name.startswith(prefix) and STALE.fullmatch(left.name):
                    left.unlink(missing_ok=True)
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no open file: filelock does it there
                    file.unlink()
    except Timeout:
        raise InUseError(
            f"{path} is being written by another process: wait until it has ended, or choose "
            "another place"
        ) from None


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`: on success it goes to disk and becomes `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = os.strerror(error.errno)
        raise OSError(error.errno, f"cannot write {path}: {reason}; it is as it was") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(
    path: PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors atomically, the same bytes each time: its own order of metadata varies."""
    content = memoryview(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:begin]))
    if metadata:
        header = {"__metadata__": dict(metadata)} | header
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.write(content[begin:])


def write_text(path: PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, value: Any) -> None:
    """Write JSON atomically: indented, in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cache_folder() -> Path:
    """Return the folder of features and downloads: ``$MEDBUDGET_CACHE`` or ``~/.cache/medbudget``."""
    system = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEDBUDGET_CACHE") or Path(system) / "medbudget")


def check_writable(path: PathLike, *, make: bool = True) -> Path:
    """Return `path` if a file can be created there, else raise; with `make`, make its folder."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        place = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=place, prefix="."):
            pass
    except OSError as error:
        reason = f"{path.parent} is a file" if path.parent.is_file() else error.strerror
        raise type(error)(f"cannot write {path} ({reason}); choose another place") from None
    return path


def check_output(
    path: PathLike, record: Record | None = None, read: Reader | None = None, *,
    overwrite: bool = False,
) -> bool:  # fmt: skip
    """Tell whether a file is there as this call would make it; refuse to replace any other.

    The one rule against overwriting, of all functions and commands that write. `record` is what
    this call notes about the file, and `read` returns what the file that is there says, or None.
    """
    path = Path(path)
    if overwrite or path.is_dir() or not os.path.lexists(path):
        check_writable(path)
        return False
    stored = read(path) if read is not None else None
    if stored is not None and stored == record:
        return True
    reason = "is there already"
    if stored and record:
        reason += f", made with other settings: {describe_difference(stored, record)}"
    raise FileExistsError(
        f"{path} {reason}; choose another place, or add --overwrite (overwrite=True) to replace it"
    )


def check_apart(out: PathLike, *inputs: PathLike | None) -> None:
    """Refuse an output folder, or an output's folder, that is an input or lies inside one."""
    place = Path(out).resolve()
    for source in inputs:
        if source is not None and Path(source).resolve() in (place, *place.parents):
            raise ValueError(
                f"output {out} lies inside the input {source}, where the next run would read it "
                "as an input: choose another place"
            )


def describe_difference(stored: Record, wanted: Record) -> str:
    """Say in words which entries differ: ``steps (25 there, 50 now)``."""
    return ", ".join(
        f"{key} ({stored.get(key)} there, {wanted.get(key)} now)"
        for key in dict.fromkeys([*wanted, *stored])
        if stored.get(key) != wanted.get(key)
    )


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the first 12 hex digits of SHA-256 over names, shapes, dtypes and bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def hash_settings(settings: Record) -> str:
    """Return 12 hex digits that name the settings, independent of the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_file(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
