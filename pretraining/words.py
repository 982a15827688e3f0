"""Train the embeddings that ship with the package, on phantoms.

``python -m pretraining.words`` trains those that are missing or stale with the ``tiny`` preset.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from medbudget.data.phantoms import make_phantoms
from medbudget.loading import load_base
from medbudget.tiny import FOLDER, SPECS, load_trained, path_of
from medbudget.training.inversion import InversionSettings, invert


def _train(spec: tuple[str, str, int, int]) -> str:
    kind, label, n_vectors, cases = spec
    path = path_of(*spec)
    embedding = invert(
        load_base("tiny", device="cpu"),
        make_phantoms(kind, label, cases).images,
        token=f"<{label}>",
        settings=InversionSettings.preset("tiny", n_vectors=n_vectors),
        data=f"{cases} {kind} phantoms ({label}, train, seed 0)",
    )
    embedding.save(path)
    return path.stem


def main() -> None:
    """Train what is missing or stale, several at a time on one thread each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    workers = parser.parse_args().workers
    base = load_base("tiny")
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for spec in SPECS:
        kind, label, n_vectors, cases = spec
        try:
            load_trained(kind, label, base, n_vectors=n_vectors, cases=cases)
        except ValueError as reason:
            print(reason)
            stale.append(spec)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:  # small matrices: one thread each is faster than many on one
        for done in pool.map(_train, stale):
            print(f"{done}: trained", flush=True)


if __name__ == "__main__":
    main()
