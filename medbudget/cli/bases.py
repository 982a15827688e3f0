"""medbudget base and doctor: where bases come from, and what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from cyclopts import App

from medbudget._version import __version__
from medbudget.cli.options import Text

app = App(name="base", help="Where bases come from; fetch and verify them.")


@app.command(name="list")
def list_bases() -> None:
    """List the bases by name, and which of them are on this machine."""
    from medbudget.architectures import read_architectures
    from medbudget.bases import list_sources
    from medbudget.known import KNOWN
    from medbudget.loading import RANDOM, TINY

    print(f"tiny          {'ready' if (TINY / 'unet').is_dir() else 'missing'}, in the package")
    for row in KNOWN:
        sources = list_sources(row.name)
        path = next((path for _, path, _ in sources if path), None)
        print(f"{row.name:<14}{'ready' if path else 'not here'}: {row.title}; {row.expect}")
        for source, path, note in sources:
            print(f"{'':<14}  {source}: {path or note}")
    for name, kind in read_architectures().items():
        print(f"{name + RANDOM:<14}random weights, for trials of speed and memory: {kind['title']}")
    print("or any Stable Diffusion 1.x or 2.x of the hub (owner/name[@revision]), a folder in")
    print("diffusers' layout, or a .ckpt or .safetensors file: give its path")


@app.command
def fetch(name: Text = "sd20", /) -> None:
    """Fetch a base into the hub's cache; a broken download goes on.

    Args:
        name: sd20, sd21-base, sd21, sd15, sd14, or owner/name[@revision]
    """
    from medbudget.bases import ID, find_base
    from medbudget.known import known_base, unknown_base

    if not known_base(name) and not ID.fullmatch(name):
        raise unknown_base(name)
    print(f"ready: {find_base(name)}")


@app.command
def verify(name: Text, /, *, known: Text = "", device: Text | None = None) -> int:
    """Measure whether a base is what it should be; exit code 1 if not.

    Args:
        name: tiny, sd20 …, owner/name, a folder or a file
        known: the known base that it should be, e.g. sd20: draws its golden picture, one to four
            minutes on a CPU
        device: cpu or cuda; default: cuda if there is one
    """
    import torch

    from medbudget.loading import load_base
    from medbudget.verify import verify_base

    base = load_base(name, device=device, dtype=torch.float32)
    checks = verify_base(base, known)
    print(f"{'hash':<13}{base.hash}, {base.size} px, {base.note or 'no note'}")
    for check, (measured, passed) in checks.items():
        print(f"{check:<13}{'ok' if passed else 'FAILED'}: {measured}")
    return 0 if all(passed for _, passed in checks.values()) else 1


def cache(*, clear: bool = False) -> None:
    """Print where features and downloads are kept, and how much they take.

    Args:
        clear: delete medbudget's own; whatever is needed again is made or fetched again
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from medbudget.files import cache_folder

    for name, folder in (("features, weights", cache_folder()), ("hub", Path(HF_HUB_CACHE))):
        files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        size = sum(p.stat().st_size for p in files)
        print(f"{name:<18} {size / 2**20:>8.0f} MiB  {folder}")
    if clear:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        print(f"deleted {cache_folder()}")
    else:
        print("--clear deletes the first; hf cache rm deletes parts of the second")


def doctor() -> None:
    """Print versions, device, memory, reachable bases, and what fits this machine."""
    import torch

    from medbudget.bases import list_sources
    from medbudget.loading import load_base

    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(f"  medbudget {__version__}")
    for name in ("torch", "torchvision", "diffusers", "transformers", "timm", "numpy"):
        print(f"  {name} {version(name)}")
    if torch.cuda.is_available():
        free, total = (part / 2**30 for part in torch.cuda.mem_get_info())
        print(f"GPU {torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free")
        print(
            "  Stable Diffusion 2.0 at 512 px takes 3.1 GiB in bfloat16, for invert and for sample"
        )
    else:
        print("GPU none: everything runs on the CPU; --base tiny is made for that")
    print(f"CPU {os.cpu_count()} cores, threads: {torch.get_num_threads()}")
    print(f"disk {shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    tiny = load_base("tiny", device="cpu")
    print(f"base tiny: ready, hash {tiny.hash}, {tiny.size} px; training takes 2 GiB of memory")
    here = next((f"{s}, {p}" for s, p, _ in list_sources("sd20") if p is not None), None)
    print(f"base sd20: {here or 'not here; medbudget base fetch gets it (5 GB)'}")
