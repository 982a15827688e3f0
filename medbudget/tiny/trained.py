"""Embeddings that ship with the package, trained on phantoms: chapters load them.

``python -m medbudget.tiny.trained`` trains those that are missing or stale with the ``tiny``
preset (64 vectors, 100 cases) and writes them beside this file.
"""

from __future__ import annotations

from pathlib import Path

from medbudget.base import Base, load_base
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.inversion import InversionSettings, invert

FOLDER = Path(__file__).parent / "embeddings"
SHIPPED = (("prostate", "tumour"),)
CASES = 100


def load_trained(kind: str, label: str, base: Base) -> Embedding:
    """Return the shipped embedding of a phantom class, with its training record.

    Raises
    ------
    ValueError
        None for this class, or one trained on other weights than `base` has.
    """
    path = FOLDER / f"{kind}_{label}.safetensors"
    if not path.exists():
        have = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors"))) or "none"
        raise ValueError(f"no trained embedding for {kind} {label}; there are: {have}")
    embedding = Embedding.load(path)
    if embedding.base_hash != base.hash:
        raise ValueError(
            f"{path.name} was trained on a base with hash {embedding.base_hash}, this one has "
            f"{base.hash}; train it again with python -m medbudget.tiny.trained"
        )
    return embedding


def main() -> None:
    """Train what is missing or stale."""
    base = load_base("tiny")
    FOLDER.mkdir(exist_ok=True)
    for kind, label in SHIPPED:
        try:
            load_trained(kind, label, base)
            print(f"{kind} {label}: up to date")
            continue
        except ValueError as reason:
            print(reason)
        images = make_phantoms(kind, label, CASES).images
        embedding = invert(
            base,
            images,
            token=f"<{label}>",
            settings=InversionSettings.preset("tiny"),
            data=f"{CASES} {kind} phantoms ({label}, train, seed 0)",
        )
        embedding.save(FOLDER / f"{kind}_{label}.safetensors")


if __name__ == "__main__":
    main()
