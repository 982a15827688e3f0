"""Claim: the same seed gives the same result, and where it does not, the difference is known.

Equal bytes are counted on the CPU in float32 for equal blocks; elsewhere the difference of the
images is measured in gray levels (0 to 255), over all pixels and channels.

    python benchmarks/determinism.py [--images 16] [--steps 25] [--no-ray] [--record]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from medbudget import (
    Embedding,
    InversionSettings,
    invert,
    load_base,
    make_phantoms,
    sample,
    save_images,
)
from medbudget.base import Base
from medbudget.data.folder import prepare_folder
from medbudget.files import hash_file
from medbudget.progress import quiet
from medbudget.results import write_result

SETTINGS = InversionSettings(n_vectors=4, steps=12, lr=0.01, batch_size=2, checkpoint_every=3)
BATCHES = (1, 2, 3, 5)
THREADS = (2, 4)
UNMEASURED = "not measured: no such machine at hand"


def same(a: Any, b: Any) -> str:
    """Say whether two results have the same bytes."""
    equal = a.equal(b) if isinstance(a, torch.Tensor) else a == b
    return "equal bytes" if equal else "DIFFERENT"


def gray_levels(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Return the largest and the mean difference of images, and the share of unequal values."""
    difference = (a.int() - b.int()).abs().float()
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "unequal": float((difference > 0).float().mean()),
    }


def describe(found: dict[str, float]) -> str:
    """Write a difference in words."""
    return (
        f"largest {found['largest']:g}, mean {found['mean']:.2g} gray levels; "
        f"{found['unequal']:.2%} of the values differ"
    )


def train(base: Base, **options: Any) -> Embedding:
    """Train a small word."""
    images = make_phantoms("prostate", "tumour", 6, size=base.size).images
    return invert(base, images, token="<x>", settings=SETTINGS, **options)


def resume(base: Base, folder: Path) -> Embedding:
    """Train the same word, stopped in the middle."""

    def stop(state: dict[str, Any]) -> None:
        if state["step"] == 7:
            raise KeyboardInterrupt

    path = folder / "run.ckpt"
    try:
        train(base, checkpoint=path, callback=stop)
    except KeyboardInterrupt:
        return train(base, checkpoint=path)
    raise AssertionError("the run was not stopped")


def tree(folder: Path, pattern: str) -> dict[str, str]:
    """Return file -> hash of its bytes."""
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob(pattern))}


def run_study(base: Base, folder: Path, **options: Any) -> dict[str, str]:
    """Run a small study; return its results."""
    from medbudget.studies import Store, StudySettings, in_order, make_study, run

    settings = StudySettings.preset(
        "tiny", n=20, steps=2, grid={"CFG scale": (1, 2)}, extractors=("layout",),
        overrides={"steps": 2, "batch_size": 1},
    )  # fmt: skip
    study = make_study("table1", "tiny", base_hash=base.hash, settings=settings)
    blocks = [task for task in in_order(study.tasks) if task.kind == "block"]
    run(blocks, Store(folder), **options)
    return tree(folder, "*.safetensors")


def measure(
    base: Base, folder: Path, *, images: int, steps: int, ray: bool
) -> list[dict[str, str]]:
    """Return one row for each promise."""
    rows: list[dict[str, str]] = []

    def add(what: str, promise: str, measured: str, met: bool | None) -> None:
        word = "not measured" if met is None else "met" if met else "NOT met"
        rows.append({"what": what, "promise": promise, "measured": measured, "": word})
        print(f"{what:<58}{measured}  ({word})", flush=True)

    def add_same(what: str, a: Any, b: Any) -> None:
        add(what, "equal bytes", same(a, b), same(a, b) == "equal bytes")

    word = train(base)
    add_same("a word, trained twice", word.vectors, train(base).vectors)
    add_same("a word, stopped and resumed", word.vectors, resume(base, folder).vectors)
    draw = {"embeddings": [word], "steps": steps}
    whole = sample(base, "<x>", n=images, **draw)
    add_same("images, drawn twice", whole, sample(base, "<x>", n=images, **draw))
    two = sample(base, "<x>", n=2 * images, batch_size=images, **draw)
    parts = [sample(base, "<x>", n=images, seed=s, **draw) for s in (0, images)]
    add_same("images, in one call or block by block", two, torch.cat(parts))
    for name in "ab":
        save_images(make_phantoms("chest", "healthy", 6).images, folder / "in" / name)
    for workers in (1, 2):
        prepare_folder(folder / "in", folder / f"out{workers}", size=32, workers=workers)
    add_same(
        "prepared images and manifest, one process or two",
        tree(folder / "out1", "*.*"),
        tree(folder / "out2", "*.*"),
    )
    one = run_study(base, folder / "one")
    add_same("a study, one process or two", one, run_study(base, folder / "two", workers=2))
    for count in BATCHES:
        found = gray_levels(whole, sample(base, "<x>", n=images, batch_size=count, **draw))
        add(f"images in batches of {count}, not {images}", "1 gray level at most",
            describe(found), found["largest"] <= 1)  # fmt: skip
    before = torch.get_num_threads()
    for count in THREADS:
        torch.set_num_threads(count)
        found = gray_levels(whole, sample(base, "<x>", n=images, **draw))
        add(f"images on {count} threads, not {before}", "1 gray level at most",
            describe(found), found["largest"] <= 1)  # fmt: skip
    torch.set_num_threads(before)
    half = load_base("tiny", device="cpu", dtype=torch.bfloat16)
    found = gray_levels(whole, sample(half, "<x>", n=images, **draw))
    add("images in bfloat16, not float32", "4 gray levels in the mean at most",
        describe(found), found["mean"] <= 4)  # fmt: skip
    cosine = torch.cosine_similarity(word.vectors, train(half).vectors).min()
    add("a word trained in bfloat16: smallest cosine to float32", "0.99 at least",
        f"{cosine:.4f}", bool(cosine >= 0.99))  # fmt: skip
    if ray:
        import ray as cluster

        os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves them

        add_same("a study, here or on Ray", one, run_study(base, folder / "ray", engine="ray"))
        cluster.shutdown()
    else:
        add("a study, here or on Ray", "equal bytes", "not measured: no Ray here", None)
    add("images on a GPU, float32", "2 gray levels in the mean at most", UNMEASURED, None)
    add("images on another make of CPU", "2 gray levels in the mean at most", UNMEASURED, None)
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    """Print the table; record it if --record says so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--record", action="store_true", help="write results/determinism.json")
    args = parser.parse_args(arguments)
    base = load_base("tiny", device="cpu")
    with tempfile.TemporaryDirectory() as folder, quiet():
        rows = measure(
            base, Path(folder), images=args.images, steps=args.steps, ray=not args.no_ray
        )
    if args.record:
        command = (
            f"python benchmarks/determinism.py --images {args.images} --steps {args.steps} --record"
        )
        path = write_result("determinism", {"rows": rows}, command=command, base_hash=base.hash)
        print(f"wrote {path}")
    return rows


if __name__ == "__main__":
    main()
