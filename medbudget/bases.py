"""Where the files of a base lie, in the hub's cache or on the hub, and what cannot serve as one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from medbudget.files import read_json
from medbudget.known import ALIASES, BaseError, known_base

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
GIGABYTES = 5.2  # of a base in float32; half as much in float16
ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


# --------------------------------------------------------------------------- files of a folder


def choose_weights(names: Iterable[str], part: str) -> tuple[str, str | None] | None:
    """Return the weights' file of a part, and its variant, out of the names in the part's folder.

    Full precision comes before half (``fp16``), safetensors before ``.bin``.
    """
    names = set(names)
    stems = ("model", "pytorch_model") if part == "text_encoder" else ("diffusion_pytorch_model",)
    for variant in (None, "fp16"):
        for ending in (".safetensors", ".bin"):
            for stem in stems:
                file = f"{stem}{f'.{variant}' if variant else ''}{ending}"
                if file in names or (not variant and f"{file}.index.json" in names):
                    return file, variant
    return None


def list_missing(folder: Path) -> list[str]:
    """Return the parts of a base that a folder in diffusers' layout lacks."""
    missing = []
    for part in PARTS:
        # a link of the hub's cache whose download was broken off leads nowhere
        files = [p for p in (folder / part).glob("*") if p.is_file() and p.stat().st_size]
        names = {p.name for p in files}
        if not names:
            missing.append(part)
        elif part in PARTS[:3]:
            weights = choose_weights(names, part)
            index = f"{weights[0]}.index.json" if weights else ""
            shards: set[str] = set()
            if index in names:
                content = json.loads((folder / part / index).read_text(encoding="utf-8"))
                shards = set(content["weight_map"].values())
            if not weights or not shards <= names:
                missing.append(f"the weights of {part}")
            if "config.json" not in names:
                missing.append(f"{part}/config.json")
        elif part == "scheduler" and "scheduler_config.json" not in names:
            missing.append("scheduler/scheduler_config.json")
        elif part == "tokenizer" and not names & {"tokenizer.json", "vocab.json"}:
            missing.append("tokenizer/vocab.json")
    return missing


_OTHERS = {  # classes of pipelines
    "StableDiffusionXL": "is Stable Diffusion XL: it has two text encoders, for each of which a word "
    "would need vectors of its own",
    "StableDiffusion3": "is Stable Diffusion 3: a transformer with three text encoders, which "
    "predicts a flow instead of noise",
    "Flux": "is Flux: a transformer with other text encoders, which predicts a flow instead of noise",
}
_DISTILLED = (
    "is distilled to few steps: it no longer predicts the noise of every step, which Textual "
    "Inversion and the paper's sampler rest on"
)
_DISTILLED_NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|lcm|hyper-?sd|distill(ed|ation)?)(?![a-z])|LatentConsistency",
    flags=re.IGNORECASE,
)
CHANNELS = {
    9: "is an inpainting model: its U-Net takes 9 channels, of which 5 are a mask and a masked "
    "image. `medbudget inpaint` needs none of that: take the plain base",
    5: "is a depth model: its U-Net takes 5 channels",
    7: "is an upscaler: its U-Net takes 7 channels",
    8: "edits given images (InstructPix2Pix): its U-Net takes 8 channels",
}


def refuse(name: str, reason: str) -> None:
    """Raise `BaseError` if there is a reason why a model cannot serve as a base."""
    if reason:
        raise BaseError(f"{name} {reason}. Bases are Stable Diffusion 1.x and 2.x")


def refuse_others(folder: Path, name: str) -> None:
    """Raise `BaseError` with the true reason if a folder holds no Stable Diffusion 1.x or 2.x.

    Only small files are read: ``model_index.json`` and the configurations. The name counts if it is
    a repository's; a folder may be called what its owner likes.
    """
    index, unet = (read_json(folder / f) for f in ("model_index.json", "unet/config.json"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = str(index.get("_class_name", ""))
    for start, reason in _OTHERS.items():
        refuse(name, reason if kind.startswith(start) else "")
    if unet.get("addition_embed_type") == "text_time" or (folder / "text_encoder_2").is_dir():
        refuse(name, _OTHERS["StableDiffusionXL"])
    origins = [str(c.get("_name_or_path", "")).split("/")[-1] for c in (index, unet)]
    planned = str(scheduler.get("_class_name", "")).removesuffix("Scheduler")
    for word in (kind, "" if Path(name).exists() else name, *origins, planned):
        refuse_distilled(name, word)
    refuse(name, _DISTILLED if unet.get("time_cond_proj_dim") else "")
    if unet.get("mid_block_type", "") is None:
        refuse(name, "is distilled to fewer layers: its U-Net has no middle block")
    if kind and not kind.startswith("StableDiffusion"):
        refuse(name, f"is a {kind}, not a Stable Diffusion")
    latents = read_json(folder / "vae" / "config.json").get("latent_channels", 4)
    if unet.get("in_channels") != latents:
        refuse(name, CHANNELS.get(unet.get("in_channels", 0), ""))


def refuse_distilled(name: str, word: str) -> None:
    """Raise `BaseError` if the name of a file, repository or class says turbo, LCM or the like."""
    refuse(name, _DISTILLED if _DISTILLED_NAMES.search(word) else "")


# --------------------------------------------------------------------------- the hub


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("0", "", "FALSE", "NO", "OFF")


def list_snapshots(repo: str, revision: str = "", *, exactly: bool = False) -> Iterator[Path]:
    """Yield the folders of a repository in the hub's cache: `revision`, main, then the newest.

    With `exactly`, those of `revision` alone: a branch, a tag or (the start of) a commit.
    """
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    folders = [p for p in (root / "snapshots").glob("*") if p.is_dir()]
    folders.sort(key=lambda p: p.stat().st_mtime, reverse=True)

    def resolve(name: str) -> str:
        reference = root / "refs" / name
        return reference.read_text().strip() if name and reference.is_file() else name

    wanted = [resolve(name) for name in (revision, "main") if name]
    matches = [p for w in wanted[: 1 if exactly else 2] for p in folders if p.name.startswith(w)]
    yield from dict.fromkeys(matches if exactly else [*matches, *folders])


def list_ids(name: str) -> tuple[tuple[str, str], ...]:
    """Return the repositories of a known base, or the one that is named, each with its revision."""
    if row := known_base(name):
        return row.ids
    repo, _, revision = name.partition("@")
    return ((repo, revision),)


def list_sources(name: str) -> list[tuple[str, Path | None, str]]:
    """Return each place of a known base or a repository: what it is, its path if whole, a note."""
    found: list[tuple[str, Path | None, str]] = []
    local = os.environ.get("MEDBUDGET_SD2") if ALIASES.get(name, name) == "sd20" else None
    if local:
        if not Path(local).exists():
            raise BaseError(f"MEDBUDGET_SD2 names {local}, which is not a folder or file")
        found.append(("MEDBUDGET_SD2", Path(local), ""))
    for repo, revision in list_ids(name):
        exactly = known_base(name) is None and bool(revision)
        notes = []
        for folder in list_snapshots(repo, revision, exactly=exactly):
            if not (missing := list_missing(folder)):
                found.append((f"{repo} ({folder.name[:12]})", folder, ""))
                break
            notes.append(f"{folder.name[:12]} lacks {', '.join(missing)}")
        else:
            found.append((repo, None, "; ".join(notes) or "not in the cache"))
    return found


def find_base(name: str) -> Path:
    """Return the folder (or file) of a known base or of a hub's repository, fetched if need be.

    Looked at in turn: ``MEDBUDGET_SD2`` (for ``sd20``), the hub's cache with every revision in it,
    the hub. Each source is announced; a broken download goes on where it stopped.
    """
    row = known_base(name)
    title, tried = row.title if row else name, []
    for source, path, note in list_sources(name):
        if path is not None:
            print(f"base {name}: from {source}, {path}")
            return path
        tried.append(f"  {source}: {note}")
    if is_offline():
        tried.append("  the hub: HF_HUB_OFFLINE is set")
    elif reason := _unreachable():
        tried.append(f"  the hub: {reason}")
    else:
        for repo, revision in list_ids(name):
            if row and not revision:
                continue  # removed from the hub
            try:
                return _fetch(name, repo, revision or None)
            except Exception as error:  # the hub's errors have many types: the next source
                if isinstance(error, BaseError) and not row:
                    raise
                reason = str(error).strip().split("\n")[0][:160]
                tried.append(f"  {repo} (hub): {type(error).__name__}: {reason}")
                print(f"base {name}: {tried[-1].strip()}")
    raise BaseError(
        f"the weights of {title} could not be found:\n"
        + "\n".join(tried)
        + "\nWays out: "
        + ("set MEDBUDGET_SD2 to" if row and row.name == "sd20" else "pass as --base the path of")
        + " a folder in diffusers' layout or a checkpoint such as 512-base-ema.ckpt; unset "
        f"HF_HUB_OFFLINE and connect to the internet once ({GIGABYTES} GB); or use --base tiny (in "
        'a chapter: `preset = "tiny"`), which needs nothing. `medbudget doctor` says what fits into '
        "the memory here"
    )


def _unreachable() -> str:
    """Return why the hub cannot be reached, in seconds instead of its client's retries; or ""."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()  # an https address
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return ""


def _fetch(name: str, repo: str, revision: str | None) -> Path:
    """Fetch a base: the small files first, to refuse what is none, then one file of each network."""
    from huggingface_hub import HfApi, snapshot_download

    small = ["model_index.json", "*/*.json", "*/*.txt"]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
    refuse_others(folder, repo)
    files = HfApi().list_repo_files(repo, revision=revision)
    wanted = []
    for part in PARTS[:3]:
        names = [f.removeprefix(f"{part}/") for f in files if f.startswith(f"{part}/")]
        if not (weights := choose_weights(names, part)):
            raise BaseError(f"{repo} lacks the weights of {part} in diffusers' layout")
        stem, ending = weights[0].rsplit(".", 1)
        wanted += [f"{part}/{weights[0]}", f"{part}/{stem}-*.{ending}"]
    print(f"base {name}: fetching {repo}, revision {revision or 'main'} ({GIGABYTES} GB) …")
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*small, *wanted]))
    if missing := list_missing(folder):
        raise BaseError(f"{repo} lacks {', '.join(missing)}")
    return folder
