"""Read and write PyTorch's files: no code in them is run, and other programs accept what we write."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

MAX_INSTRUCTIONS = 1_000_000  # a checkpoint of Stable Diffusion has about 50,000
MAX_SHARED_TUPLES = 32
_FIRST = 1024  # bytes that tell what a file is
_lock = threading.Lock()  # safe_globals holds for the whole process


class RefusedError(ValueError):
    """A file that is damaged, is something else, or holds more than tensors and plain values."""


class Inert(dict):
    """The state of an object whose class is not loaded."""

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class _Dtype(Inert):
    """NumPy's dtype: numbers and truth values of at most 8 bytes, else no code."""

    def __init__(self, code: Any = "", *args: Any) -> None:
        super().__init__()
        self.code = code if isinstance(code, str) and re.fullmatch("[bfiu][1-8]", code) else ""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.code = f">{self.code}" if self.code else ""


def _read_scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a NumPy scalar as a plain number; None for anything else."""
    if not isinstance(dtype, _Dtype) or not dtype.code or not isinstance(data, bytes):
        return None
    return np.frombuffer(data, dtype.code, count=1)[0].item()


# Named in embeddings of the original repository and in official checkpoints; stand-ins for all.
_STAND_INS: list[Any] = [
    (Inert, "torch.nn.modules.container.ParameterDict"),
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    *((_read_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((Inert, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def read_torch(source: str | os.PathLike[str] | io.BytesIO, *, mapped: bool = False) -> Any:
    """Return what ``torch.save`` wrote: plain containers, numbers, text and tensors on the CPU.

    The reader is ``torch.load(weights_only=True)``. Of objects that known files contain (a
    ParameterDict, NumPy scalars, a callback of PyTorch Lightning), only the state is read.

    `mapped` leaves the tensors of an archive on the disk until they are used. RefusedError gives the
    reason, without the file's name.
    """
    try:
        if isinstance(source, io.BytesIO):
            check_content(source, len(source.getbuffer()))
            source.seek(0)
        else:
            with open(source, "rb") as file:
                mapped = check_content(file, os.fstat(file.fileno()).st_size) and mapped
        with _lock, torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle protocol
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except RefusedError:
        raise
    except MemoryError:
        raise RefusedError("it claims more data than there is memory for") from None
    except pickle.UnpicklingError as error:
        message = str(error)
        if name := re.search(r"GLOBAL (\S+) was not|GLOBAL (\S+) whose", message):
            known = f"it names {name[1] or name[2]}, which is not on the list"
            raise RefusedError(known) from None
        reason = message.split("WeightsUnpickler error:")[-1].strip().split("\n")[0][:200]
        raise RefusedError(
            f"it is damaged, or holds more than tensors and plain values ({reason})"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise RefusedError(
            f"it is truncated or damaged ({type(error).__name__}: {reason})"
        ) from None


class _Bounded:
    """A file of which no more is asked for than it holds: `read` allocates what it is asked for."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, self.size - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(1000)

    def tell(self) -> int:
        return self.file.tell()


def check_content(file: Any, size: int) -> bool:
    """Refuse what is no file of ``torch.save``; return whether it is an archive."""
    if reason := recognise(first := file.read(_FIRST)):
        raise RefusedError(reason)
    if not first:
        raise RefusedError("it is empty")
    if not zipfile.is_zipfile(file):
        if first.startswith(b"PK"):
            raise RefusedError("it is truncated: an archive without its end")
        file.seek(0)
        for _ in range(5):  # PyTorch's older format: five pickles, then the numbers
            check_instructions(_Bounded(file, size))
        return False
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if sum(name.endswith("/data.pkl") for name in names) != 1:
            raise RefusedError("it is no archive of torch.save")
        if any(e.compress_type or e.file_size != e.compress_size for e in entries):
            raise RefusedError("its data are compressed: an archive bomb, or no PyTorch file")
        if sum(e.file_size for e in entries) > size:
            raise RefusedError("its parts overlap: together they are larger than the file")
        text = archive.read(next(name for name in names if name.endswith("/data.pkl")))
        check_instructions(io.BytesIO(text))
    return True


def recognise(first: bytes) -> str:
    """Return what a file is by its first bytes, where that is a known mistake; else ""."""
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:300].lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            "it is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`, or through "
            "the site's download button"
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return (
            "it is a web page, not the file itself: the address leads to a page about the file, or "
            "asks for a login; take the address behind its download button"
        )
    if re.match(rb'[{\[]\s*["{\[\]}]', start):
        said = " ".join(first.decode(errors="replace").split())[:80]
        return f"it is a message of a server ({said}), not the file itself: read it, fetch again"
    return ""


_NO_TUPLES = set(
    """BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES GLOBAL STACK_GLOBAL EMPTY_DICT EMPTY_LIST
    REDUCE NEWOBJ BINPERSID""".split()  # noqa: SIM905
)


def check_instructions(file: Any) -> None:
    """Refuse a pickle that would take memory or time beyond its size; `file` ends up behind it.

    These are: too many instructions, a far memo, and tuples of shared tuples, whose hash takes for
    ever.
    """
    previous, memo, shared = "", 0, 0
    safe: set[int] = set()
    try:
        for count, (op, argument, _) in enumerate(pickletools.genops(file)):
            if op.name == "MEMOIZE" or "PUT" in op.name:
                place = memo if argument is None else int(argument)
                memo += 1
                (safe.add if previous in _NO_TUPLES else safe.discard)(place)
                if place > MAX_INSTRUCTIONS:
                    raise RefusedError(f"it numbers its objects up to {place}: an attack")
            elif "GET" in op.name:
                shared += argument not in safe
            if count > MAX_INSTRUCTIONS or shared > MAX_SHARED_TUPLES:
                raise RefusedError("its instructions take for ever: an attack, or no PyTorch file")
            previous = op.name
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"it is truncated or no pickle ({error})") from None


def check_tensors(tensors: Iterable[Any], size: int) -> None:
    """Refuse tensors that are not plain numbers on the CPU, or together exceed `size` numbers."""
    total = 0
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized:
            raise RefusedError(f"it holds a {type(tensor).__name__}, not a plain tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise RefusedError("it holds a tensor without numbers")
        total += tensor.numel()
    if total > size:
        raise RefusedError(f"its tensors claim {total} numbers, and the file has {size} bytes")


def write_torch(content: dict[str, Any]) -> bytes:
    """Return `content` as a ``torch.save`` archive that AUTOMATIC1111's web UI accepts.

    Its ``modules/safe.py`` allows ``data.pkl``, ``version`` and ``data/N`` and refuses a file with
    any other entry; PyTorch adds ``byteorder``, ``.format_version`` and more.
    """
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            if re.fullmatch(r"[^/]+/(data\.pkl|version|data/\d+)", name):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return out.getvalue()
