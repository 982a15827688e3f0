"""Section 4.2 of the paper: StyleGAN3 and Textual Inversion on the same cases.

One folder holds the whole study: the trained networks and their checkpoint, snapshots, a folder of
images of each generator (named by number alone, ready for a reader study) and ``scores.json``.
Run again, it makes only what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medbudget.base import Base, load_base
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.files import check_writable, hash_tensors, hold, write_json
from medbudget.images import find_images, load_image, load_images, make_grid, save_images
from medbudget.inversion import InversionSettings, invert
from medbudget.metrics.evaluation import evaluate
from medbudget.metrics.scores import Score
from medbudget.results import write_result
from medbudget.sampling import sample
from medbudget.studies.tasks import read_source
from medbudget.stylegan3 import StyleGAN3, StyleGAN3Settings, train_stylegan3
from medbudget.stylegan3.training import WEIGHTS, measure_distance
from medbudget.tiny.trained import load_trained

ROLES = ("train", "reference")
SNAPSHOT_IMAGES = 8
TRAINED = "prostate_healthy64"  # name of the recorded study's networks in the package
SNAPSHOTS = WEIGHTS / f"{TRAINED}_snapshots.png"


@dataclass(frozen=True)
class ComparisonSettings:
    """What a preset of the comparison fixes.

    Attributes
    ----------
    base, inversion, stylegan3 : str
        See `load_base`, and the presets of `InversionSettings` and `StyleGAN3Settings`.
    cases, n, size : int
        Images to train on, images to compare, and their edge in pixels.
    steps, cfg_scale : int, float
        Of diffusion.
    extractors : tuple of str
        Features of the distances.
    phantom : tuple of str or None
        Kind and label of phantoms, used where no folders are given; None needs folders.
    overrides : mapping
        Changes to the preset of `StyleGAN3Settings`.
    """

    base: str
    inversion: str
    stylegan3: str
    cases: int
    n: int
    size: int
    steps: int
    cfg_scale: float
    extractors: tuple[str, ...]
    phantom: tuple[str, str] | None
    overrides: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {
    "tiny": ComparisonSettings(
        base="tiny", inversion="tiny", stylegan3="tiny", cases=100, n=200, size=64, steps=25,
        cfg_scale=2.0, extractors=("efficientnet-lite0",), phantom=("prostate", "healthy"),
    ),
    "paper": ComparisonSettings(
        base="sd2", inversion="paper", stylegan3="paper", cases=100, n=1000, size=512, steps=100,
        cfg_scale=2.0, extractors=("inception", "radimagenet"), phantom=None,
    ),
}  # fmt: skip


def read_role(s: ComparisonSettings, sources: Mapping[str, Path], role: str) -> torch.Tensor:
    """Return the real images of a role: ``train``, or the ``reference`` of the distances.

    Raises
    ------
    ValueError
        A preset without phantoms, and no folder for the role.
    """
    n = s.cases if role == "train" else s.n
    if s.phantom is None or sources:
        images = read_source(sources, role, s.size)
        if len(images) < n:
            raise ValueError(f"{len(images)} images for {role}, {n} are needed")
        return images[:n]
    split = {"train": "train", "reference": "test"}[role]
    return make_phantoms(*s.phantom, n, size=s.size, split=split).images


def run_comparison(
    folder: str | os.PathLike[str],
    *,
    preset: str = "tiny",
    settings: ComparisonSettings | None = None,
    sources: Mapping[str, Path] | None = None,
    start: StyleGAN3 | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Train StyleGAN3 and a word on the same cases, generate with both, and compare.

    Parameters
    ----------
    folder : path
        Everything is kept there; an interrupted study goes on.
    preset : {"tiny", "paper"}
    settings : ComparisonSettings, optional
        In place of the preset's.
    sources : mapping of str to path, optional
        Folders ``train`` and ``reference`` of real images.
    start : StyleGAN3, optional
        Networks that training begins with. Default: the shipped ones, 64 px. The paper's are
        those of AFHQv2 at 512 px: see `medbudget.stylegan3.import_official`.

    Returns
    -------
    dict
        JSON types: ``stylegan3`` and ``diffusion`` with seconds, images seen and ``fd``, the
        distance of 100 images to the training cases (StyleGAN3's by snapshot, in its history);
        ``scores`` of both with and without the paper's normalisation; ``settings``.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; allowed are {', '.join(PRESETS)}")
    s = settings or PRESETS[preset]
    unknown = sorted(set(sources or {}) - set(ROLES))
    if unknown:
        raise ValueError(f"no role {unknown[0]!r} in this study; allowed are {', '.join(ROLES)}")
    start = start or StyleGAN3.load()
    if start.generator.architecture.size != s.size:
        raise ValueError(
            f"the networks to start from make {start.generator.architecture.size} px, the preset "
            f"wants {s.size}: for 512 px, give an official file with --start"
        )
    folder = Path(folder)
    check_writable(folder / "study.json")
    with hold(folder):
        return _compare(folder, s, sources or {}, start, device)


def _compare(
    folder: Path, s: ComparisonSettings, sources: Mapping[str, Path], start: StyleGAN3,
    device: str | None,
) -> dict[str, Any]:  # fmt: skip
    train, real = (read_role(s, sources, role) for role in ROLES)
    _check_same(folder / "study.json", s, start, train, real)
    base = load_base(s.base, device=device)
    network = _train(folder, s, train, start, base.device)
    made = {
        "stylegan3": _images(folder / "stylegan3", lambda: network.sample(s.n)),
        "diffusion": _images(folder / "diffusion", lambda: _diffuse(folder, s, base, train)),
    }
    values = {"settings": asdict(s), "stylegan3": _about(network), "diffusion": _word(folder)}
    values["diffusion"]["fd"] = measure_distance(train, made["diffusion"][:100], s.extractors[0])
    values["scores"] = compare(real, made["stylegan3"], made["diffusion"], s.extractors)
    write_json(folder / "scores.json", values)
    return values


def compare(
    real: torch.Tensor,
    stylegan3: torch.Tensor,
    diffusion: torch.Tensor,
    extractors: tuple[str, ...],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Score both generators against the same real images, as JSON.

    ``none`` and ``paper`` name the normalisation; StyleGAN3's scores hold the permutation tests
    of its difference to diffusion.
    """
    scores: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for rule in ("none", "paper"):
        options: dict[str, Any] = {
            "features": list(extractors), "normalize": rule, "floor": False
        }  # fmt: skip
        scores[rule] = {
            "stylegan3": _json(evaluate(real, stylegan3, permutation=diffusion, **options)),
            "diffusion": _json(evaluate(real, diffusion, **options)),
        }
    return scores


def _json(scores: list[Score]) -> list[dict[str, Any]]:
    return [score.to_dict() for score in scores]


def _check_same(
    path: Path, s: ComparisonSettings, start: StyleGAN3, train: torch.Tensor, real: torch.Tensor
) -> None:
    """Refuse a folder that holds another study."""
    me = {"settings": asdict(s), "start": start.hash, "train": hash_tensors({"images": train}),
          "reference": hash_tensors({"images": real})}  # fmt: skip
    me = json.loads(json.dumps(me))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != me:
            differs = ", ".join(key for key in me if found.get(key) != me[key])
            raise ValueError(
                f"{path.parent} holds another study: {differs} differ; choose another folder"
            )
    write_json(path, me)


def _train(
    folder: Path, s: ComparisonSettings, train: torch.Tensor, start: StyleGAN3, device: Any
) -> StyleGAN3:
    path = folder / "stylegan3.safetensors"
    if path.exists():
        return StyleGAN3.load(path, device=device)
    settings = StyleGAN3Settings.preset(s.stylegan3, **s.overrides)
    save_images(start.sample(SNAPSHOT_IMAGES), folder / "snapshots", names=_names(0))

    def keep(state: dict[str, Any]) -> None:
        if (now := state["snapshot"]) is not None:
            names = _names(state["images_seen"])
            save_images(now.sample(SNAPSHOT_IMAGES), folder / "snapshots", names=names)

    network = train_stylegan3(
        train,
        settings,
        start=start,
        checkpoint=folder / "stylegan3.ckpt",
        callback=keep,
        extractor=s.extractors[0],
        device=device,
        data=f"{len(train)} cases of a study",
    )
    network.save(path)
    return StyleGAN3.load(path, device=device)  # in half precision, as whoever runs this again


def _names(seen: int) -> list[str]:
    return [f"{seen:08d}_{i}" for i in range(SNAPSHOT_IMAGES)]


def read_snapshots(folder: str | os.PathLike[str]) -> dict[int, torch.Tensor]:
    """Return the images of every snapshot, ``(8, 3, H, W) uint8``, by images seen."""
    files = find_images(Path(folder) / "snapshots")
    images = load_images(Path(folder) / "snapshots")
    seen = [int(file.stem.split("_")[0]) for file in files]
    return {n: images[[i for i, m in enumerate(seen) if m == n]] for n in sorted(set(seen))}


def _images(folder: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    done = folder.with_suffix(".done")
    if not done.exists():
        save_images(make(), folder)
        done.touch()
    return load_images(folder)


def _diffuse(folder: Path, s: ComparisonSettings, base: Base, train: torch.Tensor) -> torch.Tensor:
    path = folder / "word.safetensors"
    if not path.exists():
        _find_word(folder, s, base, train).save(path)
    word = Embedding.load(path)
    return sample(
        base, word.token, embeddings=[word], n=s.n, steps=s.steps, cfg_scale=s.cfg_scale,
        size=s.size,
    )  # fmt: skip


def _find_word(folder: Path, s: ComparisonSettings, base: Base, train: torch.Tensor) -> Embedding:
    """Return the shipped word if it was trained on these images with these settings, else train."""
    settings = InversionSettings.preset(s.inversion)
    if s.phantom and base.name == "tiny":
        word = load_trained(*s.phantom, base)
        same = word.record["images_hash"] == hash_tensors({"images": train})
        if same and word.record["settings"] == asdict(settings):
            return word
    return invert(base, train, token="<class>", settings=settings, checkpoint=folder / "word.ckpt")


def _about(network: StyleGAN3) -> dict[str, Any]:
    keys = ("images_seen", "seconds", "device", "settings", "history", "start")
    return {key: network.record[key] for key in keys}


def _word(folder: Path) -> dict[str, Any]:
    word = Embedding.load(folder / "word.safetensors")
    settings = word.record["settings"]
    return {
        "images_seen": word.step * settings["batch_size"],
        "seconds": word.record["seconds"],
        "device": word.record["device"],
        "settings": settings,
    }


# ------------------------------------------------------------------------- for the chapter


def record_comparison(folder: str | os.PathLike[str], command: str) -> Path:
    """Keep a finished study of preset ``tiny`` for the book: scores, networks and snapshots.

    Returns
    -------
    Path
        The recorded result; networks and snapshots go into the package.
    """
    folder = Path(folder)
    values = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    found = read_snapshots(folder)
    seen = sorted(found)
    chosen = [seen[round(i * (len(seen) - 1) / 5)] for i in range(6)]
    StyleGAN3.load(folder / "stylegan3.safetensors").save(WEIGHTS / f"{TRAINED}.safetensors")
    grid = make_grid(torch.cat([found[n] for n in chosen]), columns=SNAPSHOT_IMAGES, gap=0)
    save_images(grid[None], SNAPSHOTS.parent, names=[SNAPSHOTS.stem])
    base_hash = load_base(values["settings"]["base"]).hash
    return write_result(
        "stylegan3_tiny", values | {"snapshots": chosen}, command=command, base_hash=base_hash
    )


def load_snapshots(seen: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the recorded snapshots, ``(8, 3, 64, 64) uint8`` by images seen, as recorded."""
    grid = load_image(SNAPSHOTS)
    edge = grid.shape[2] // SNAPSHOT_IMAGES
    rows = grid.unfold(1, edge, edge).unfold(2, edge, edge)  # (3, rows, columns, edge, edge)
    return {n: rows[:, i].transpose(0, 1).contiguous() for i, n in enumerate(seen)}
