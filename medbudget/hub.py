"""Sharing: model cards, the Hugging Face hub, and the eight embeddings that the authors released."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medbudget.base import Base
from medbudget.bases import ID, is_offline
from medbudget.embeddings import Embedding, EmbeddingError
from medbudget.files import cache_folder, check_writable, write_bytes, write_text
from medbudget.known import known_base
from medbudget.tiny import load_trained

PAPER_URL = (
    "https://github.com/brambozz/medical-diffusion-on-a-budget/raw/"
    "719d493caf46a45cf8f52b6853148bbb7964924d/embeddings/{name}.pt"
)
PAPER_CHECKPOINT = "09dd2ae4"


@dataclass(frozen=True)
class PaperEmbedding:
    """One of the authors' files."""

    name: str
    kind: str  # as in `make_phantoms`
    label: str
    steps: int
    sha256: str


# Three of the 50,000 steps are stored as 49,999 (see the book's paper_vs_artifacts).
PAPER_EMBEDDINGS = (
    PaperEmbedding(
        "chexpert_cardiomegaly", "chest", "cardiomegaly", 50_000,
        "354671688a79e28e674d9604f01654f3f5342b55579ec5de112410f7c45ace21",
    ),
    PaperEmbedding(
        "chexpert_healthy", "chest", "healthy", 50_000,
        "36e45ca1442a7c98dc920bf2a1e06b3ac529657bc037e6bc4c7cd2a96ade3f1c",
    ),
    PaperEmbedding(
        "chexpert_pleural_effusion", "chest", "pleural_effusion", 50_000,
        "d04020ca56888a16d33c443d26a5574a724bd104ae1982c13c8eba0954b32e47",
    ),
    PaperEmbedding(
        "chexpert_pneumonia", "chest", "pneumonia", 50_000,
        "9f3bf0299b6e03a1c84d484989b452d2c045c2311fc237b7b2fd5179dfd85d37",
    ),
    PaperEmbedding(
        "pcam_neg", "histology", "normal", 50_000,
        "9a6fbf3b12b8b25838dd421808f6e79b921dbc4f4cb9f9975f4605587763d0ff",
    ),
    PaperEmbedding(
        "pcam_pos", "histology", "metastasis", 50_000,
        "919ce80bf1bf7c59ce514e34a2d3f4aadf6534510e3e94e348689fc531611960",
    ),
    PaperEmbedding(
        "prostate_neg", "prostate", "healthy", 100_000,
        "e5bb3837fb8a8705dda35ed47fa8c29033c260e950b73d5e762efc1a45ef661f",
    ),
    PaperEmbedding(
        "prostate_pos", "prostate", "tumour", 100_000,
        "b17cb11905e511122fb56cd9a1f244567b09ebabbb11e03bddc573dd65314ab7",
    ),
)  # fmt: skip
# Prompts without a learned word, as on the authors' slides (presentation/slides.qmd of the same
# repository, which shows what Stable Diffusion draws of them). The wording of the paper's
# Appendix C was not at hand; for X-rays and histopathology the authors' files show none.
TEXT_PROMPTS = ("a prostate MRI scan", "a T2-weighted MRI scan of a prostate")


def fetch_paper_embedding(name: str, folder: str | os.PathLike[str]) -> Path:
    """Fetch one of the authors' embeddings into `folder`, unless it is there; return its path.

    ValueError: an unknown name, no network, or a file that is not the authors' by its SHA-256.
    """
    known = {e.name: e.sha256 for e in PAPER_EMBEDDINGS}
    if name not in known:
        raise ValueError(f"unknown embedding {name!r}; the authors' are {', '.join(known)}")
    path, url = check_writable(Path(folder) / f"{name}.pt"), PAPER_URL.format(name=name)
    there = path.exists()
    if there:
        content = path.read_bytes()
    elif is_offline():
        raise ValueError(f"HF_HUB_OFFLINE is set; fetch {url} elsewhere and put it at {path}")
    else:
        print(f"fetching {url}")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # a fixed https address
                content = answer.read(2**22)
        except OSError as error:
            raise ValueError(f"{url} cannot be reached ({error}); put it at {path}") from None
    if (found := hashlib.sha256(content).hexdigest()) != known[name]:
        raise EmbeddingError(
            f"{name} has SHA-256 {found[:12]}…, the authors' has {known[name][:12]}…; remove it and "
            "fetch it again"
        )
    if not there:
        write_bytes(path, content)
    return path


CARD = """---
license: {licence}
library_name: medbudget
tags: [textual-inversion, medical, stable-diffusion, synthetic-data]
{base_model}---

# {token}: a Textual Inversion embedding

**Not for clinical use.** Every image drawn with this embedding is synthetic.

| | |
|---|---|
{facts}

## Scores

{scores}

## Intended use

Research on and teaching about synthetic medical images, with the base named above. An \
embedding fits no base of another kind.

## Limits

- Learned from few images of one class: it shows what these show, with their scanner, \
population and labels, and nothing rarer.
- A file this small can still give training images away, most of all after few images or \
many steps; whether one case was among them can be tested. Share it as you would share \
the images' descriptions, within the terms of the data.
- Distances between image sets are no evidence of clinical value.

## Use

```bash
medbudget sample "{token}" --embeddings FILE --base {base} --out made
```
"""


def make_card(
    embedding: Embedding, *, scores: list[dict[str, Any]] | None = None, licence: str = "other"
) -> str:
    """Return a model card: Markdown under the hub's metadata header.

    `scores` are what ``medbudget evaluate --out`` wrote; the `licence` is the embedding's, as the hub
    spells it, e.g. ``mit``: the training images' terms decide.
    """
    e = embedding
    named = known_base(e.base_hash or "-")
    row = named or known_base(e.base)
    base = e.base or (row.title if row else "unknown")
    repo = next((repo for repo, revision in row.ids if revision), "") if row else ""
    if not repo and ID.fullmatch(e.base):
        repo = e.base.split("@")[0]
    settings = e.record.get("settings", {})
    facts = {
        "token": f"`{e.token}`",
        "vectors": f"{e.vectors.shape[0]} x {e.vectors.shape[1]}",
        "training images": e.data or "not recorded",
        "steps": f"{e.step:,}",
        "base": f"{base} (hash {e.base_hash or 'not recorded'}{f', {named.title}' if named else ''})",
        "mean norm of a vector": f"{float(e.vectors.norm(dim=1).mean()):.1f}",
    }
    for key in ("lr", "batch_size", "schedule", "loss", "init", "latents", "seed"):
        if key in settings:
            facts[key] = str(settings[key])
    table = ["None recorded: `medbudget evaluate real made --out scores.json` makes them."]
    if scores:
        table = ["| score | value | 95 % interval | n | notes |", "|---|---|---|---|---|"]
    for score in scores or ():
        interval = " to ".join(f"{x:.3g}" for x in score.get("interval") or ())
        value, note = f"{score['value']:.4g}", score.get("note", "")
        table.append(f"| {score['name']} | {value} | {interval} | {score['n']} | {note} |")
    return CARD.format(
        licence=licence,
        base_model=f"base_model: {repo}\n" if repo else "",
        token=e.token,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        scores="\n".join(table),
        base=row.name if row else e.base or "sd20",
    )


def push_embedding(
    embedding: Embedding,
    repo: str,
    *,
    scores: list[dict[str, Any]] | None = None,
    licence: str = "other",
    private: bool = True,
) -> str:
    """Upload an embedding and its card to the Hugging Face hub; return the address.

    Needs ``hf auth login`` or ``HF_TOKEN`` first. Private unless you say otherwise.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise ValueError("HF_HUB_OFFLINE is set; unset it to push")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        embedding.save(Path(folder) / f"{embedding.token.strip('<>')}.safetensors")
        card = make_card(embedding, scores=scores, licence=licence)
        write_text(Path(folder) / "README.md", card)
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    return f"https://huggingface.co/{repo}"


def read_scores(path: str | os.PathLike[str] | None) -> list[dict[str, Any]] | None:
    """Read what ``medbudget evaluate --out`` wrote."""
    if path is None:
        return None
    scores = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(scores, list) or not all("name" in s and "value" in s for s in scores):
        raise ValueError(f"{path} holds no scores; write them with medbudget evaluate --out")
    return scores


def find_word(kind: str, label: str, base: Base, place: str | os.PathLike[str] = "") -> Embedding:
    """Return the word for a class of phantoms or of the paper, on a base.

    With a `place`, yours: a file, or a folder with its ``chest_cardiomegaly.safetensors``. Else the
    package's for ``tiny``, and the authors' for other bases, fetched into ``~/.cache/medbudget`` (or
    ``MEDBUDGET_CACHE``), as ``<label>``.
    """
    if place and Path(place).is_file():
        return Embedding.load(place)
    if place:
        return Embedding.load(Path(place) / f"{kind}_{label}.safetensors", token=f"<{label}>")
    if base.name == "tiny":
        return load_trained(kind, label, base)
    names = {f"{e.kind} {e.label}": e.name for e in PAPER_EMBEDDINGS}
    if (name := names.get(f"{kind} {label}")) is None:
        known = ", ".join(names)
        raise ValueError(f"the authors released no embedding of {kind} {label}; they have: {known}")
    path = fetch_paper_embedding(name, cache_folder() / "embeddings")
    return Embedding.load(path, token=f"<{label}>")
