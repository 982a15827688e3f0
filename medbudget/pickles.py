"""Read tensors from pickles of strangers: nothing in them is called, and no size is believed.

`torch.load(weights_only=True)` runs no code either, but it allocates what a file claims to hold.
Here every tensor must lie within the bytes that are there, opcodes and names come from short lists,
and whatever else a file holds is refused. Read are PyTorch's archives (``torch.save`` since 1.6) and
its older format.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

MAX_OPS = 1_000_000  # a checkpoint of Stable Diffusion has about 50,000
MAX_PICKLE = 16 * 2**20
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format
OPS = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINGET
LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID
""".split()  # noqa: SIM905
DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class RefusedError(ValueError):
    """A file that names what it must not, or that claims more than it holds."""


@dataclass(frozen=True)
class Named:
    """Something that a pickle names: never looked up, imported or called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of tensors, and the type of what they are."""

    data: torch.UntypedStorage
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.data.nbytes() // self.dtype.itemsize


class Box(dict):
    """State of an object whose class is not looked at."""


def _fill(*args: Any) -> dict[Any, Any]:
    return dict(args[0]) if args and isinstance(args[0], dict) else {}


# what a pickle may name, and what is done instead; None: it may be named, not called
TORCH: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _fill,
    "collections.Counter": _fill,
    "builtins.set": lambda *args: set(),
    "torch.Size": lambda *args: tuple(args[0]) if args and isinstance(args[0], list) else (),
    "torch.device": lambda *args: "cpu",
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    # official checkpoints hold this class of PyTorch Lightning as a key
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": None,
    **{f"torch.{name}": None for name in DTYPES},
    **{str(dtype): None for dtype in DTYPES.values()},
}


class _Bounded:
    """A file of which no more is asked for than it holds: `read` allocates what it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def read(self, n: int = -1) -> bytes:
        left = self.size - self.file.tell()
        return self.file.read(left if n < 0 else min(n, left))

    def readline(self) -> bytes:
        return self.file.readline(1000)


class TensorUnpickler(pickle._Unpickler):  # the one written in Python: its opcodes can be chosen
    """Rebuild plain containers and tensors.

    Parameters
    ----------
    file : binary file
    size : int
        Bytes of the whole file. All tensors together have at most as many elements.
    names : mapping
        Dotted name to what is called in its place, or None.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, file: IO[bytes], size: int, names: Mapping[str, Callable[..., Any] | None] = TORCH
    ) -> None:
        super().__init__(_Bounded(file, size))
        self.names: dict[str, Callable[..., Any] | None] = {
            **names,
            "torch._utils._rebuild_tensor_v2": self.rebuild,
        }
        self.left, self.ops = size, 0

    def find_class(self, module: str, name: str) -> Named:
        found = Named(module, name)
        if str(found) not in self.names:
            raise RefusedError(f"it names {found}, which is not on the list")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("it refers to objects outside of the file")

    def rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        """Return a tensor on a storage, if it lies within it."""
        numbers = [offset, *size, *stride]
        if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 8:
            raise RefusedError("it holds a tensor of no shape")
        if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise RefusedError("it holds a tensor whose sizes are no numbers")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if count and (last >= storage.numel or count > storage.numel):
            raise RefusedError(
                f"it claims a tensor of shape {tuple(size)}, and holds {storage.numel} numbers for it"
            )
        self.left -= count
        if self.left < 0:
            raise RefusedError("its tensors are larger than the file")
        empty = torch.empty(0, dtype=storage.dtype)
        if not count:
            return empty.reshape(size)
        return empty.set_(storage.data, offset, tuple(size), tuple(stride))

    # ---- opcodes that would call, change or hash whatever the file says

    def load_reduce(self) -> None:
        args, what = self.stack.pop(), self.stack[-1]
        function = self.names.get(str(what)) if isinstance(what, Named) else None
        if function is None or not isinstance(args, tuple):
            raise RefusedError(
                f"it calls {what}" if isinstance(what, Named) else "it calls a value"
            )
        self.stack[-1] = function(*args)

    def load_newobj(self) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        if args or not isinstance(what, Named) or self.names.get(str(what)) not in (Box, _fill):
            raise RefusedError("it makes an object that is no plain container")
        self.append({} if self.names[str(what)] is _fill else Box())

    def load_build(self) -> None:
        state, what = self.stack.pop(), self.stack[-1]
        if not isinstance(what, dict):
            raise RefusedError("it changes a function or a value")
        if isinstance(what, Box) and isinstance(state, dict):
            what.update(state)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise RefusedError("it sets items of what has none")
        self.stack[-1].update(zip(map(_check_key, items[::2]), items[1::2]))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise RefusedError("it sets items of what has none")
        self.stack[-1][_check_key(key)] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        if type(self.stack[-1]) is not list:
            raise RefusedError("it appends to what is no list")
        self.stack[-1].append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not list:
            raise RefusedError("it appends to what is no list")
        self.stack[-1].extend(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise RefusedError("it adds to what is no set")
        self.stack[-1].update(map(_check_key, items))


def _check_key(key: Any) -> Any:
    """Refuse keys whose hash can be made to take for ever: nested tuples, colliding integers."""
    if not isinstance(key, str | bytes | Named | None) and not (
        isinstance(key, int) and abs(key) < 2**48
    ):
        raise RefusedError(f"it has a {type(key).__name__} as a key")
    return key


def _make_handlers() -> dict[int, Callable[[Any], None]]:
    """Return opcode -> method: allowed ones are counted, all others refused."""

    def make(name: str, code: int) -> Callable[[Any], None]:
        inherited: Any = pickle._Unpickler.dispatch[code]
        method = getattr(TensorUnpickler, f"load_{name.lower()}", inherited)

        def run(self: TensorUnpickler) -> None:
            self.ops += 1
            if self.ops > MAX_OPS:
                raise RefusedError(f"it has more than {MAX_OPS:,} instructions")
            method(self)

        return run

    def refuse(name: str) -> Callable[[Any], None]:
        def run(self: TensorUnpickler) -> None:
            raise (
                RefusedError(f"it has the instruction {name}, which tensors do not need")
                if name
                else pickle.UnpicklingError("no pickle")
            )

        return run

    known = {ord(op.code): op.name for op in pickletools.opcodes}
    return {
        code: make(known[code], code) if known.get(code) in OPS else refuse(known.get(code, ""))
        for code in range(256)
    }


TensorUnpickler.dispatch = _make_handlers()


# ------------------------------------------------------------------------------ PyTorch's files


class _Archive(TensorUnpickler):
    """The pickle in an archive of ``torch.save``, whose storages are files beside it."""

    find: Callable[[str, int], torch.UntypedStorage]

    def persistent_load(self, pid: Any) -> Any:
        kind, key, numel = _parse_id(pid)
        nbytes = numel * kind.itemsize
        data = self.find(key, nbytes)
        if data.nbytes() != nbytes:
            raise RefusedError(f"it claims {nbytes} bytes of data and holds {data.nbytes()}")
        return Storage(data, kind)


def _parse_id(pid: Any) -> tuple[torch.dtype, str, int]:
    match pid:
        case ("storage", Named(module="torch", name=name), str(key), str(), int(numel), *rest):
            if name in DTYPES and 0 <= numel < 2**48 and rest in ([], [None]):
                return DTYPES[name], key, numel
    raise RefusedError("it refers to what is no storage of numbers")


def read_torch(path: str | os.PathLike[str], *, mapped: bool = False) -> Any:
    """Return what ``torch.save`` wrote: plain containers, numbers, text and tensors on the CPU.

    Parameters
    ----------
    mapped : bool
        Leave the tensors on the disk until they are used; the file must stay as it is.

    Raises
    ------
    RefusedError
        Truncated, no such file, or with anything else in it; the reason, without the file's name.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file, _refused():
        if zipfile.is_zipfile(file):
            return _read_archive(path, file, size, mapped)
        file.seek(0)
        if file.read(2) == b"PK":
            raise RefusedError("it is truncated: an archive without its end")
        file.seek(0)
        return read_legacy(file, size)


class _refused:
    """Turn whatever a damaged file raises into `RefusedError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, RefusedError):
            raise RefusedError(f"it is truncated or damaged ({type(error).__name__})") from None


def _read_archive(path: Path, file: IO[bytes], size: int, mapped: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        found = {entry.filename: entry for entry in entries}
        roots = [name.removesuffix("data.pkl") for name in found if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(found) < len(entries):
            raise RefusedError("it is no archive of torch.save")
        root = roots[0]
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise RefusedError("its data are compressed: an archive bomb, or no PyTorch file")
        if sum(entry.file_size for entry in entries) > size:
            raise RefusedError("its parts overlap: together they are larger than the file")
        order = found.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise RefusedError("it was written on a big-endian machine")
        if found[f"{root}data.pkl"].file_size > MAX_PICKLE:
            raise RefusedError("its description alone has more than 16 MiB")
        text = archive.read(f"{root}data.pkl")
        whole = torch.UntypedStorage.from_file(os.fspath(path), False, size) if mapped else None
        cache: dict[str, torch.UntypedStorage] = {}

        def find(key: str, nbytes: int) -> torch.UntypedStorage:
            entry = found.get(f"{root}data/{key}")
            if entry is None or entry.file_size < nbytes:
                raise RefusedError(f"it claims {nbytes} bytes of data that are not there")
            if key not in cache:
                if whole is None:
                    cache[key] = _from_bytes(archive.read(entry))
                else:
                    start = _data_offset(file, entry)
                    cache[key] = whole[start : start + entry.file_size]
            return cache[key]

        unpickler = _Archive(io.BytesIO(text), len(text))
        unpickler.left, unpickler.find = size, find
        return unpickler.load()


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Return where an entry's bytes begin: behind its own header, whose length is in it."""
    file.seek(entry.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise RefusedError("its parts are not where it says")
    start = entry.header_offset + 30
    return start + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _from_bytes(data: bytes) -> torch.UntypedStorage:
    if not data:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()


def read_legacy(file: IO[bytes], size: int) -> Any:
    """Read PyTorch's older format: four pickles, then the bytes of the storages in their order."""
    storages: dict[str, Storage] = {}

    class Legacy(TensorUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            kind, key, numel = _parse_id(pid)
            if key not in storages:
                taken = sum(s.data.nbytes() for s in storages.values())
                if taken + numel * kind.itemsize > size - file.tell():
                    raise RefusedError(f"it claims {numel} numbers and has not the bytes for them")
                storages[key] = Storage(torch.UntypedStorage(numel * kind.itemsize), kind)
            known = storages[key]
            if known.dtype != kind or known.numel != numel:
                raise RefusedError("it describes one storage in two ways")
            return known

    def load() -> Any:
        return Legacy(file, size).load()

    if load() != MAGIC or load() != PROTOCOL:
        raise RefusedError("it is no file of torch.save")
    about = load()
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise RefusedError("it was written on a big-endian machine")
    content, keys = load(), load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise RefusedError("its data do not belong to its description")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(storage.data.nbytes())
        if count != storage.numel or len(data) != storage.data.nbytes():
            raise RefusedError("its data are cut short")
        if data:
            storage.data.copy_(_from_bytes(data))
    return content
