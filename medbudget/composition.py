"""Composition: the way from one word to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medbudget.base import Base, Word
from medbudget.embeddings import Embedding
from medbudget.progress import tqdm
from medbudget.sampling import sample
from medbudget.settings import check_number


def interpolate(
    base: Base,
    a: Word,
    b: Word,
    *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    method: str = "and",
    **options: Any,
) -> dict[float, torch.Tensor]:
    """Draw images on the way from `a` to `b`, with the same noise at every weight.

    Parameters
    ----------
    a, b : Embedding or path
    weights : sequence of float
        Shares of `b`, usually 0 to 1; the share of `a` is the rest to 1.
    method : {"and", "vectors"}
        ``"and"`` composes the predictions, ``<a>:0.75 AND <b>:0.25`` (paper, section 4.4);
        ``"vectors"`` draws with ``0.75 a + 0.25 b``, linear between the embeddings themselves,
        which must have equally many vectors.
    **options
        For `sample`: n, steps, cfg_scale, …

    Returns
    -------
    dict of float to torch.Tensor
        Each share of `b` with its images, ``(n, 3, size, size) uint8``; image i has the same seed
        in each.

    Examples
    --------
    >>> from medbudget import load_base
    >>> from medbudget.tiny import load_trained
    >>> base = load_base("tiny", device="cpu")
    >>> a, b = (load_trained("chest", label, base) for label in ("healthy", "pneumonia"))
    >>> axis = interpolate(base, a, b, weights=(0, 0.5, 1), n=1, steps=2)
    >>> {share: tuple(images.shape) for share, images in axis.items()}
    {0.0: (1, 3, 64, 64), 0.5: (1, 3, 64, 64), 1.0: (1, 3, 64, 64)}
    """
    return {
        share: sample(base, prompt, embeddings=words, **options)
        for share, (prompt, words) in tqdm(
            axis_prompts(base, a, b, weights, method).items(), desc="axis", unit="weight"
        )
    }


def axis_prompts(
    base: Base, a: Word, b: Word, weights: Sequence[float], method: str
) -> dict[float, tuple[str, list[Embedding]]]:
    """Return the prompt and the embeddings of each share of `b`."""
    if method not in ("and", "vectors"):
        raise ValueError(f"unknown method {method!r}; allowed are 'and', 'vectors'")
    if not weights:
        raise ValueError("weights must be numbers such as 0, 0.5, 1, got none")
    for weight in weights:
        check_number("a weight", weight)
    a, b = base.load_words([a, b])
    if method == "and":
        return {float(w): (f"{a.token}:{1 - w!r} AND {b.token}:{w!r}", [a, b]) for w in weights}
    if a.vectors.shape != b.vectors.shape:
        raise ValueError(
            f"{a.token} has shape {tuple(a.vectors.shape)}, {b.token} {tuple(b.vectors.shape)}: "
            "only embeddings of equal shape can be mixed; use method='and'"
        )
    hashes = [e.record["image_hashes"] for e in (a, b) if "image_hashes" in e.record]
    record = {"image_hashes": " ".join(hashes)} if hashes else {}
    mixed = {w: (1 - w) * a.vectors + w * b.vectors for w in map(float, weights)}
    return {w: ("<mixed>", [Embedding(v, "<mixed>", record=record)]) for w, v in mixed.items()}
