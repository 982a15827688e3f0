"""Sharing: model cards, the Hugging Face hub, and the eight embeddings that the authors released."""

from __future__ import annotations

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
from medbudget.files import atomic_path, cache_folder, check_writable, hash_file, write_text
from medbudget.known import known_base
from medbudget.tiny import load_trained

PAPER_URL = (
    "https://github.com/brambozz/medical-diffusion-on-a-budget/raw/"
    "719d493caf46a45cf8f52b6853148bbb7964924d/embeddings/{name}.pt"
)
PAPER_CHECKPOINT = "09dd2ae4"


@dataclass(frozen=True)
class PaperEmbedding:
    """One of the authors' files: what it draws, its steps, SHA-256."""

    name: str
    draws: str
    steps: int
    sha256: str


# Three of the 50,000 steps are stored as 49,999 (see the book's paper_vs_artifacts).
PAPER_EMBEDDINGS = (
    PaperEmbedding(
        "chexpert_cardiomegaly", "chest X-ray, cardiomegaly", 50_000,
        "354671688a79e28e674d9604f01654f3f5342b55579ec5de112410f7c45ace21",
    ),
    PaperEmbedding(
        "chexpert_healthy", "chest X-ray, no finding", 50_000,
        "36e45ca1442a7c98dc920bf2a1e06b3ac529657bc037e6bc4c7cd2a96ade3f1c",
    ),
    PaperEmbedding(
        "chexpert_pleural_effusion", "chest X-ray, pleural effusion", 50_000,
        "d04020ca56888a16d33c443d26a5574a724bd104ae1982c13c8eba0954b32e47",
    ),
    PaperEmbedding(
        "chexpert_pneumonia", "chest X-ray, pneumonia", 50_000,
        "9f3bf0299b6e03a1c84d484989b452d2c045c2311fc237b7b2fd5179dfd85d37",
    ),
    PaperEmbedding(
        "pcam_neg", "lymph node histopathology, normal", 50_000,
        "9a6fbf3b12b8b25838dd421808f6e79b921dbc4f4cb9f9975f4605587763d0ff",
    ),
    PaperEmbedding(
        "pcam_pos", "lymph node histopathology, metastasis", 50_000,
        "919ce80bf1bf7c59ce514e34a2d3f4aadf6534510e3e94e348689fc531611960",
    ),
    PaperEmbedding(
        "prostate_neg", "prostate MRI, no tumour", 100_000,
        "e5bb3837fb8a8705dda35ed47fa8c29033c260e950b73d5e762efc1a45ef661f",
    ),
    PaperEmbedding(
        "prostate_pos", "prostate MRI, tumour", 100_000,
        "b17cb11905e511122fb56cd9a1f244567b09ebabbb11e03bddc573dd65314ab7",
    ),
)  # fmt: skip
# Prompts without a learned word, as on the authors' slides (presentation/slides.qmd of the same
# repository, which shows what Stable Diffusion draws of them). The wording of the paper's
# Appendix C was not at hand; for X-rays and histopathology the authors' files show none.
TEXT_PROMPTS = ("a prostate MRI scan", "a T2-weighted MRI scan of a prostate")


def fetch_paper_embedding(name: str, folder: str | os.PathLike[str]) -> Path:
    """Fetch one of the authors' embeddings into `folder`, unless it is there; return its path.

    Its SHA-256 is checked before it gets its name. Nothing in it is executed.

    Raises
    ------
    ValueError
        Unknown name, offline, or a file that is not the authors'.
    """
    known = {e.name: e for e in PAPER_EMBEDDINGS}
    if name not in known:
        raise ValueError(f"unknown embedding {name!r}; the authors' are {', '.join(known)}")
    path = check_writable(Path(folder) / f"{name}.pt")
    if path.exists():
        check_paper_embedding(known[name], path)
        return path
    url = PAPER_URL.format(name=name)
    if is_offline():
        raise ValueError(f"HF_HUB_OFFLINE is set; fetch {url} elsewhere and put it at {path}")
    print(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # a fixed https address
            content = answer.read(2**22)
    except OSError as error:
        raise ValueError(f"{url} cannot be reached ({error}); put it at {path}") from None
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_bytes(content)
        check_paper_embedding(known[name], fresh)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def check_paper_embedding(known: PaperEmbedding, path: Path) -> None:
    """Raise `EmbeddingError` if the file is not the authors'."""
    if (found := hash_file(path)) != known.sha256:
        raise EmbeddingError(
            f"{known.name} has SHA-256 {found[:12]}…, the authors' has {known.sha256[:12]}…; "
            "remove it and fetch it again"
        )


def make_card(
    embedding: Embedding, *, scores: list[dict[str, Any]] | None = None, licence: str = "other"
) -> str:
    """Return a model card: Markdown under the hub's metadata header.

    Parameters
    ----------
    scores : list of dict, optional
        What ``medbudget evaluate --out scores.json`` wrote.
    licence : str
        Of the embedding, as the hub spells it, e.g. ``mit``. The training images' terms decide.
    """
    e = embedding
    named = known_base(e.base_hash or "-")
    row = named or known_base(e.base)
    base = e.base or (row.title if row else "unknown")
    header = [
        "---",
        f"license: {licence}",
        "library_name: medbudget",
        "tags: [textual-inversion, medical, stable-diffusion, synthetic-data]",
    ]
    repo = next((repo for repo, revision in row.ids if revision), "") if row else ""
    if repo or ID.fullmatch(e.base):
        header.append(f"base_model: {repo or e.base.split('@')[0]}")
    name = row.name if row else e.base or "sd20"
    settings = e.record.get("settings", {})
    rows = {
        "token": f"`{e.token}`",
        "vectors": f"{e.vectors.shape[0]} x {e.vectors.shape[1]}",
        "training images": e.data or "not recorded",
        "steps": f"{e.step:,}",
        "base": f"{base} (hash {e.base_hash or 'not recorded'}{f', {named.title}' if named else ''})",
        "mean norm of a vector": f"{float(e.vectors.norm(dim=1).mean()):.1f}",
    }
    for key in ("lr", "batch_size", "schedule", "loss", "init", "latents", "seed"):
        if key in settings:
            rows[key] = str(settings[key])
    lines = [*header, "---", "", f"# {e.token}: a Textual Inversion embedding", ""]
    lines += [
        "**Not for clinical use.** Every image drawn with this embedding is synthetic.", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), "",
        "## Scores", "",
    ]  # fmt: skip
    if scores:
        lines += ["| score | value | 95 % interval | n | notes |", "|---|---|---|---|---|"]
        for score in scores:
            low_high = score.get("interval")
            interval = " to ".join(f"{x:.3g}" for x in low_high) if low_high else ""
            lines.append(
                f"| {score['name']} | {score['value']:.4g} | {interval} | {score['n']} | "
                f"{score.get('note', '')} |"
            )
    else:
        lines.append("None recorded: `medbudget evaluate real made --out scores.json` makes them.")
    lines += [
        "", "## Intended use", "",
        "Research on and teaching about synthetic medical images, with the base named above. An "
        "embedding fits no base of another kind.", "",
        "## Limits", "",
        "- Learned from few images of one class: it shows what these show, with their scanner, "
        "population and labels, and nothing rarer.",
        "- A file this small can still give training images away, most of all after few images or "
        "many steps; whether one case was among them can be tested. Share it as you would share "
        "the images' descriptions, within the terms of the data.",
        "- Distances between image sets are no evidence of clinical value.", "",
        "## Use", "", "```bash",
        f'medbudget sample "{e.token}" --embeddings FILE --base {name} --out made',
        "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


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


_AUTHORS = {
    ("prostate", "healthy"): "prostate_neg",
    ("prostate", "tumour"): "prostate_pos",
    ("histology", "normal"): "pcam_neg",
    ("histology", "metastasis"): "pcam_pos",
    **{
        ("chest", label): f"chexpert_{label}"
        for label in ("healthy", "cardiomegaly", "pleural_effusion", "pneumonia")
    },
}


def load_word(kind: str, label: str, folder: str | os.PathLike[str] = "") -> Embedding:
    """Return the word ``<label>`` for Stable Diffusion 2.0: yours, or the authors' by default.

    Parameters
    ----------
    kind, label : str
        As in `make_phantoms`, e.g. ``"chest", "cardiomegaly"``.
    folder : path
        With your ``chest_cardiomegaly.safetensors``; "" fetches the authors' into
        ``~/.cache/medbudget`` (or ``MEDBUDGET_CACHE``).
    """
    if folder:
        return Embedding.load(Path(folder) / f"{kind}_{label}.safetensors", token=f"<{label}>")
    if (kind, label) not in _AUTHORS:
        known = ", ".join(" ".join(pair) for pair in _AUTHORS)
        raise ValueError(f"the authors released no embedding of {kind} {label}; they have: {known}")
    path = fetch_paper_embedding(_AUTHORS[kind, label], cache_folder() / "embeddings")
    return Embedding.load(path, token=f"<{label}>")


def find_word(kind: str, label: str, base: Base, place: str | os.PathLike[str] = "") -> Embedding:
    """Return the word for a class on a base: yours, the package's for `tiny`, or the authors'.

    Parameters
    ----------
    kind, label, place
        See `load_word`; `place` may also be the embedding's file.
    base : Base
    """
    if place and Path(place).is_file():
        return Embedding.load(place)
    if base.name == "tiny" and not place:
        return load_trained(kind, label, base)
    return load_word(kind, label, place)
