"""Composition: the way from one word to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from medbudget.adapter_files import AdapterError, is_adapter
from medbudget.adapters import Adapter, Adapters, AnyAdapter, load_adapters
from medbudget.base import Base, Word
from medbudget.embeddings import Embedding
from medbudget.progress import tqdm
from medbudget.sampling.sampler import sample
from medbudget.settings import check_number


def interpolate(
    base: Base,
    a: Word | AnyAdapter,
    b: Word | AnyAdapter,
    *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    method: str = "and",
    **options: Any,
) -> dict[float, torch.Tensor]:
    """Draw images on the way from `a` to `b`, with the same noise at every weight.

    `a` and `b` are embeddings, adapters with a word, or files; `weights` are the shares of `b`, usually
    0 to 1, and the share of `a` is the rest to 1. The method ``"and"`` composes the predictions,
    ``<a>:0.75 AND <b>:0.25`` (paper, section 4.4); ``"vectors"`` draws with ``0.75 a + 0.25 b``, linear
    between embeddings of equally many vectors. Adapters are weighted likewise. The `options` are
    those of `sample`.

    Returns each share of `b` with its images, ``(n, 3, size, size) uint8``.

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
    axis = axis_prompts(base, a, b, weights, method, options.pop("adapters", ()))
    return {
        share: sample(base, prompt, embeddings=words, adapters=own, **options)
        for share, (prompt, words, own) in tqdm(axis.items(), desc="axis", unit="weight")
    }


def axis_prompts(
    base: Base, a: Word | AnyAdapter, b: Word | AnyAdapter, weights: Sequence[float], method: str,
    adapters: Adapters = (),
) -> dict[float, tuple[str, list[Embedding], list[Adapter]]]:  # fmt: skip
    """Return the prompt, the embeddings and the adapters of each share of `b`."""
    if method not in ("and", "vectors"):
        raise ValueError(f"unknown method {method!r}; allowed are 'and', 'vectors'")
    if not weights:
        raise ValueError("weights must be numbers such as 0, 0.5, 1, got none")
    for weight in weights:
        check_number("a weight", weight)
    common, ends = load_adapters(base, adapters), [read_end(one) for one in (a, b)]
    own = [end for end in ends if isinstance(end, Adapter)]
    if any(adapter.word is None for adapter in own):
        raise AdapterError(
            "an adapter at the end of an axis has no word: train it with a token, or use it at all "
            "shares (adapters=…, --adapter)"
        )
    words = [end.word if isinstance(end, Adapter) else end for end in ends]
    first, last = base.load_words(words)  # type: ignore[arg-type]
    if method == "and":
        return {
            float(w): (
                f"{first.token}:{1 - w!r} AND {last.token}:{w!r}", [first, last], [*common, *own]
            )
            for w in weights
        }  # fmt: skip
    if first.vectors.shape != last.vectors.shape:
        raise ValueError(
            f"{first.token} has shape {tuple(first.vectors.shape)}, {last.token} "
            f"{tuple(last.vectors.shape)}: only embeddings of equal shape can be mixed; use "
            "method='and'"
        )
    hashes = [e.record["image_hashes"] for e in (first, last) if "image_hashes" in e.record]
    record = {"image_hashes": " ".join(hashes)} if hashes else {}
    axis = {}
    for w in map(float, weights):
        vectors = (1 - w) * first.vectors + w * last.vectors
        mixed = [
            replace(end, word=None, weight=share * end.weight)
            for share, end in zip((1 - w, w), ends)
            if isinstance(end, Adapter)
        ]
        axis[w] = "<mixed>", [Embedding(vectors, "<mixed>", record=record)], [*common, *mixed]
    return axis


def read_end(end: Word | AnyAdapter) -> Embedding | Adapter:
    """Return an embedding or an adapter, or what of both is in a file."""
    if isinstance(end, Embedding | Adapter):
        return end
    return Adapter.load(end) if is_adapter(end) else Embedding.load(end)
