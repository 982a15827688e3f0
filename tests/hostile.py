"""Files that try to do harm, and a process in which they are read: nothing of them is run here.

``python tests/hostile.py FOLDER`` makes the corpus in FOLDER, reads every file with the library
under a limit of memory, and prints one JSON line each: name, error's type, message, MiB taken.
"""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

CANARY = "ran"


def op(name, *parts):
    """Pickle of a call: GLOBAL name, arguments, REDUCE."""
    module, _, function = name.rpartition(".")
    arguments = b"".join(pickle.dumps(part, 3)[2:-1] for part in parts)
    return b"c" + f"{module}\n{function}\n".encode() + b"(" + arguments + b"tR"


def whole(body):
    """Complete a pickle."""
    return b"\x80\x02" + body + b"."


def make_pickles(folder):
    """Return name -> pickle: what would run code, then what would take memory or time."""
    canary = str(folder / CANARY)
    touch = f"touch '{canary}'"
    source = f"open({canary!r}, 'w')"
    import_os = op("builtins.__import__", "os")
    chain = (
        b"cbuiltins\ngetattr\n(" + import_os + b"X\x06\x00\x00\x00systemtR("
        + pickle.dumps(touch, 2)[2:-1] + b"tR"
    )  # fmt: skip
    inner = whole(op("posix.system", touch))
    nested = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(100))
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    huge = storage + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"tQ"
    small = storage + b"K\x04tQ"
    big = pickle.dumps(2**40, 2)[2:-1]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n("
    order = b"ccollections\nOrderedDict\n)R"
    return {
        "posix.system": inner,
        "subprocess.Popen": whole(op("subprocess.Popen", ["touch", canary])),
        "builtins.eval": whole(op("builtins.eval", source)),
        "builtins.exec": whole(op("builtins.exec", source)),
        "getattr of an import": whole(chain),
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c"
        + bytes([len(touch)]) + touch.encode() + b"\x85R.",
        "INST": b"(" + f"S{touch!r}\n".encode() + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + f"S{touch!r}\n".encode() + b"o.",
        "NEWOBJ_EX": whole(b"csubprocess\nPopen\n(X\x01\x00\x00\x00at}\x92"),
        "EXT1": whole(b"\x82\x01"),
        "torch.load": whole(op("torch.load", canary)),
        "torch.hub.load": whole(op("torch.hub.load", "a/b", "c")),
        "nested pickle": whole(op("torch.storage._load_from_bytes", inner)),
        "hooks of a tensor": whole(
            tensor + small + b"K\x00K\x04\x85K\x01\x85\x89" + op("builtins.eval", source) + b"tR"
        ),
        "state of a function": whole(b"ctorch._utils\n_rebuild_parameter\n}X\x01\x00\x00\x00aK\x01sb"),
        "wrapper subclass": whole(op("torch._utils._rebuild_wrapper_subclass", canary, 1)),
        "type with state": whole(op("torch._tensor._rebuild_from_type_v2", 1, 2, 3)),
        "functools.partial": whole(op("functools.partial", 1)),
        "numpy.load": whole(op("numpy.load", canary)),
        # memory and time
        "memo at 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "frame of 2**62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        "bytes of 2**40": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
        "bytearray of 2**34": b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"abc.",
        "text of 2**32": b"\x80\x02X\xff\xff\xff\xffabc.",
        "call of bytearray": whole(op("builtins.bytearray", 2**34)),
        "hash of nested tuples": whole(b"}K\x01q\x000" + nested + b"h\x64K\x01s"),
        "two million lists": whole(b"(" + b"]" * 2_000_000 + b"l"),
        "array of 2**40": whole(op("numpy.core.multiarray._reconstruct", 1, (2**40,), b"b") + b"("
                                + b"K\x01" + big + b"tb"),
        "storage of 2**40": whole(tensor + huge + b"K\x00" + big + b"\x85K\x01\x85\x89" + order + b"tR"),
        "shape of 2**40": whole(tensor + small + b"K\x00" + big + b"\x85K\x01\x85\x89" + order + b"tR"),
        "shape of 2**40, stride 0": whole(
            tensor + small + b"K\x00" + big + b"\x85K\x00\x85\x89" + order + b"tR"
        ),
        "negative stride": whole(
            tensor + small + b"K\x00K\x04\x85J\xff\xff\xff\xff\x85\x89" + order + b"tR"
        ),
    }  # fmt: skip


def archive(text, *, method=zipfile.ZIP_STORED, more=()):
    """Return an archive as `torch.save` writes it, around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("archive/data.pkl", text)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/data/0", bytes(16))
        for name, content in more:
            file.writestr(name, content)
    return out.getvalue()


def make_archives():
    """Return name -> archive that is one only by half."""
    plain = whole(b"}")
    overlapping = bytearray(
        archive(plain, more=[(f"archive/data/{i}", b"x") for i in range(1, 40)])
    )
    place = overlapping.rfind(b"PK\x01\x02")
    overlapping[place + 20 : place + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    return {
        "deflated zeros": archive(bytes(2**26), method=zipfile.ZIP_DEFLATED),
        "archive in an archive": archive(archive(plain)),
        "entry larger than the file": bytes(overlapping),
        "two descriptions": archive(plain, more=[("other/data.pkl", plain)]),
        "a path that leaves": archive(plain, more=[("../../etc/x", b"")]),
    }


def make_safetensors(key="<x>"):
    """Return name -> file whose header lies."""

    def file(header, data=bytes(64), length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def one(**entry):
        usual = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
        return {key: {**usual, **entry}}

    return {
        "length beyond the file": file(one(), length=2**31),
        "length of 2**63": file(one(), length=2**63),
        "offsets beyond the file": file(one(data_offsets=[0, 2**40], shape=[2**38])),
        "offsets backwards": file(one(data_offsets=[64, 0])),
        "overlap": file({"a": one()[key], "b": one()[key]}),
        "hole": file(one(data_offsets=[16, 64], shape=[3, 4])),
        "unknown dtype": file(one(dtype="F999")),
        "shape of 2**40": file(one(shape=[2**40, 4])),
        "shape that overflows": file(one(shape=[2**33, 2**33, 4])),
        "negative shape": file(one(shape=[-4, -4])),
        "deep JSON": file(b"[" * 100_000),
        "deep JSON in our metadata": file({"__metadata__": {"medbudget": "[" * 100_000}, **one()}),
        "text for the number of steps": file(
            {"__metadata__": {"medbudget": json.dumps({"step": "x"})}, **one()}
        ),
        "header of 16 MiB of names": file({"k" * 2**24: one()[key]}),
        "no header": b"",
    }


def make_corpus(folder):
    """Write every file; return (name, reader, path)."""
    jobs = []

    def add(name, reader, suffix, content):
        path = folder / f"{len(jobs):03d}{suffix}"
        path.write_bytes(content)
        jobs.append((name, reader, path))

    for name, text in make_pickles(folder).items():
        add(f"{name}, embedding", "embedding", ".pt", archive(text))
        add(f"{name}, bare embedding", "embedding", ".bin", text)
        add(f"{name}, checkpoint", "base", ".ckpt", archive(text))
        add(f"{name}, StyleGAN3", "official", ".pkl", text)
    for name, content in make_archives().items():
        add(f"{name}, embedding", "embedding", ".pt", content)
        add(f"{name}, checkpoint", "base", ".ckpt", content)
    for name, content in make_safetensors().items():
        add(f"{name}, embedding", "embedding", ".safetensors", content)
        add(f"{name}, checkpoint", "base", ".safetensors", content)
        add(f"{name}, StyleGAN3", "stylegan3", ".safetensors", content)
    for name, content in make_safetensors("lora_unet_conv_in.diff").items():
        add(f"{name}, adapter", "adapter", ".safetensors", content)
    for name in ("posix.system", "nested pickle", "storage of 2**40"):
        add(f"{name}, adapter", "adapter", ".safetensors", archive(make_pickles(folder)[name]))
    add("zipped zeros, embedding", "embedding", ".pt", gzip.compress(bytes(2**24)))
    for name, text in make_official().items():
        add(f"{name}, StyleGAN3", "official", ".pkl", text)
    add("huge networks, StyleGAN3", "stylegan3", ".safetensors", make_huge_networks())
    return jobs


def make_official():
    """Return name -> pickle as official files are, with tensors larger than their bytes."""
    import torch

    out = io.BytesIO()
    torch.save(torch.ones(4).storage(), out, _use_new_zipfile_serialization=False)
    stored = out.getvalue()

    def tensor(size, stride, data=stored):
        head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + op("torch.storage._load_from_bytes", data)
        rest = [pickle.dumps(value, 3)[2:-1] for value in (0, size, stride, False)]
        return head + b"".join(rest) + b"ccollections\nOrderedDict\n)RtR"

    huge = stored.replace(pickle.dumps(4)[-2:-1], b"\xff")  # 4 numbers are said to be 255
    shared = {"_parameters": {}}
    for _ in range(60):
        shared = {"_modules": {"a": shared, "b": shared}}
    return {
        "shape of 2**40 on 4 numbers": whole(tensor((2**40,), (1,))),
        "stride 0 on 4 numbers": whole(tensor((2**40,), (0,))),
        "255 numbers in 4": whole(tensor((4,), (1,), huge)),
        "cut storage": whole(tensor((4,), (1,), stored[:-3])),
        "modules of modules": pickle.dumps({"G_ema": shared, "D": shared}),
    }


def make_huge_networks():
    """Return networks of a file that claims to be of 8192 px and 10,000 channels."""
    import torch
    from safetensors.torch import save

    sizes = {"size": 8192, "channel_base": 2**30, "channel_max": 10_000, "width": 100_000}
    about = {"architecture": sizes, "discriminator": sizes, "record": {}}
    tensors = {"generator.mapping.mean": torch.ones(8), "discriminator.x": torch.ones(1)}
    return save(tensors, metadata={"medbudget_stylegan3": json.dumps(about)})


def main(folder):
    """Read the corpus and print what came of it."""
    import diffusers.loaders.single_file_utils  # before the limit
    import torch

    from medbudget import Adapter, Embedding
    from medbudget.checkpoints import load_single_file
    from medbudget.stylegan3 import StyleGAN3, import_official

    torch.set_num_threads(1)
    readers = {
        "embedding": Embedding.load,
        "adapter": Adapter.load,
        "base": load_single_file,
        "official": import_official,
        "stylegan3": StyleGAN3.load,
    }
    assert diffusers
    jobs = make_corpus(folder)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for name, reader, path in jobs:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 4 * path.stat().st_size + 256 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = os.times()
        try:
            found = readers[reader](path)
            error = None
        except Exception as caught:
            found, error = None, caught
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        now = os.times()
        line = {
            "name": name,
            "error": type(error).__name__ if error else "",
            "message": str(error) if error else repr(found)[:80],
            "ours": isinstance(error, ValueError | RuntimeError) and bool(str(error)),
            "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
            "file_mib": path.stat().st_size / 2**20,
            "seconds": now.user + now.system - start.user - start.system,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
