"""Embeddings that ship with the package, trained on phantoms: chapters load them.

``python -m medbudget.tiny.trained`` trains those that are missing or stale with the ``tiny``
preset and writes them beside this file: the eight classes, on healthy prostates the vectors and
cases of the paper's Table 1, and prostates with a tumour from 10 cases for its Table 2.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from medbudget.base import Base
from medbudget.data.phantoms import KINDS, make_phantoms
from medbudget.embeddings import Embedding
from medbudget.inversion import InversionSettings, invert
from medbudget.loading import load_base

FOLDER = Path(__file__).parent / "embeddings"
VECTORS, CASES = 64, 100
SHIPPED = tuple((kind, label) for kind, labels in KINDS.items() for label in labels)
SPECS = (
    *((kind, label, VECTORS, CASES) for kind, label in SHIPPED),
    *(("prostate", "healthy", n, CASES) for n in (8, 16, 32)),
    *(("prostate", "healthy", VECTORS, cases) for cases in (5, 10, 50)),
    ("prostate", "tumour", VECTORS, 10),  # Table 2's rows with an asterisk
)


def _path(kind: str, label: str, n_vectors: int, cases: int) -> Path:
    name = f"{kind}_{label}"
    if (n_vectors, cases) != (VECTORS, CASES):
        name += f"_{n_vectors}vectors_{cases}cases"
    return FOLDER / f"{name}.safetensors"


def find_trained(kind: str, label: str, *, n_vectors: int = VECTORS, cases: int = CASES) -> Path:
    """Return the file of a shipped embedding.

    Raises
    ------
    ValueError
        None for this class.
    """
    path = _path(kind, label, n_vectors, cases)
    if not path.exists():
        have = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors"))) or "none"
        raise ValueError(f"no trained embedding {path.stem}; there are: {have}")
    return path


def load_trained(
    kind: str, label: str, base: Base, *, n_vectors: int = VECTORS, cases: int = CASES
) -> Embedding:
    """Return the shipped embedding of a phantom class, with its training record.

    Raises
    ------
    ValueError
        Another base than `tiny`, none for this class, or one trained on other weights than `base`
        has.
    """
    if base.name != "tiny":
        raise ValueError(
            f"the embeddings in the package are for the base 'tiny', this one is {base.name!r}: "
            "learn a word with medbudget.invert, load one with Embedding.load(file), or use the "
            "paper's with medbudget.hub.load_word"
        )
    path = find_trained(kind, label, n_vectors=n_vectors, cases=cases)
    embedding = Embedding.load(path)
    if embedding.base_hash != base.hash:
        raise ValueError(
            f"{path.name} was trained on a base with hash {embedding.base_hash}, this one has "
            f"{base.hash}; train it again with python -m medbudget.tiny.trained"
        )
    return embedding


def _train(spec: tuple[str, str, int, int]) -> str:
    kind, label, n_vectors, cases = spec
    path = _path(*spec)
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
