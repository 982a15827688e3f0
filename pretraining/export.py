"""Write the trained base into the package, in diffusers' layout, as float16 safetensors.

``python -m pretraining.export --decoder WORK/decoder.ckpt`` replaces the autoencoder alone by that of
`pretraining.decoder`. The base then has a new hash: shipped words are trained again with
``python -m pretraining.words``, recorded results with ``benchmarks/record.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from medbudget.files import write_json
from medbudget.loading import TINY, load_base
from medbudget.runs import load_checkpoint
from medbudget.tiny import GRIDS, N_WORDS
from pretraining import model
from pretraining.decoder import SIZE, build_autoencoder

WEIGHTS = TINY  # the package's


def make_vocabulary(numbers: np.ndarray, count: int, seed: int = 0) -> torch.Tensor:
    """Return `count` k-means centroids ``(count, 6)`` of visual words' numbers."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(seed)
    chosen = numbers[rng.permutation(len(numbers))[: 40 * count]].astype(np.float32)
    means = MiniBatchKMeans(count, batch_size=4096, n_init=1, max_iter=20, random_state=seed)
    return torch.from_numpy(means.fit(chosen).cluster_centers_.astype(np.float32))


def export(work: Path) -> None:
    """Write VAE, U-Net, text encoder (visual words filled in), tokenizer and training record."""
    scale = json.loads((work / "scale.json").read_text(encoding="utf-8"))["scaling_factor"]
    state = torch.load(work / "unet.ckpt", map_location="cpu", weights_only=True)
    vae, unet, maps = model.build_vae(), model.build_unet(), model.WordMap()
    tokenizer = model.build_tokenizer()
    text = model.build_text_encoder(len(tokenizer))
    vae_state = None
    if (work / "vae.ckpt").exists():
        vae_state = torch.load(work / "vae.ckpt", map_location="cpu", weights_only=True)
        vae.load_state_dict(vae_state["ema"]["vae"])
        vae.register_to_config(scaling_factor=scale)
    for name, net in (("unet", unet), ("text", text), ("map", maps)):
        net.load_state_dict(state["ema"][name])
    vocabulary = work / "words.safetensors"
    if state["start"]:  # the words keep their meaning
        vocabulary = WEIGHTS / "words.safetensors"
    if not vocabulary.exists():
        numbers = np.load(work / "numbers.npy", mmap_mode="r")
        sentences = numbers[::8]
        save_file(
            {
                "grain": make_vocabulary(sentences[:, 0], model.N_GRAINS),
                "cells": make_vocabulary(sentences[:, 1:].reshape(-1, 6), model.N_CELLS),
            },
            vocabulary,
        )
    centroids = {key: value.float() for key, value in load_file(vocabulary).items()}
    with torch.no_grad():
        table = text.embeddings.token_embedding.weight
        first = tokenizer.convert_tokens_to_ids("g0000")
        table[first : first + model.N_GRAINS] = maps.grain_map(centroids["grain"])
        first = tokenizer.convert_tokens_to_ids("v0000")
        table[first : first + model.N_CELLS] = maps.cell_map(centroids["cells"])
    WEIGHTS.mkdir(exist_ok=True)
    before: dict[str, Any] = {}
    if (WEIGHTS / "training.json").exists():
        before = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
    trained = {"unet": unet, "text_encoder": text} | ({"vae": vae} if vae_state else {})
    for name, net in trained.items():
        net.half().save_pretrained(WEIGHTS / name, safe_serialization=True)
    tokenizer.save_pretrained(WEIGHTS / "tokenizer")
    model.build_scheduler().save_pretrained(WEIGHTS / "scheduler")
    half = {key: value.half() for key, value in centroids.items()}
    save_file(half, WEIGHTS / "words.safetensors")
    write_json(
        WEIGHTS / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "vae": ["diffusers", "AutoencoderKL"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        },
    )

    def earlier(part: str, found: Any) -> list[dict[str, Any]]:
        return before.get(part, []) if found is None or found["start"] else []

    record = {
        "words": {"n": N_WORDS, "grids": list(GRIDS)},
        "vae": [*earlier("vae", vae_state), *([_summary(vae_state)] if vae_state else [])],
        "unet": [*earlier("unet", state), _summary(state)],
        "curves": {
            "vae": _curve(work / "vae.csv") if vae_state else before["curves"]["vae"],
            "unet": _curve(work / "unet.csv"),
        },
    }
    write_json(WEIGHTS / "training.json", record)
    _tell_size()


def export_decoder(checkpoint: Path, minutes: float | None = None, share: float = 1.0) -> None:
    """Write the averaged autoencoder of a checkpoint of `pretraining.decoder`, and its record.

    Parameters
    ----------
    checkpoint : path
        ``decoder.ckpt``; ``decoder.csv`` beside it is the curve.
    minutes : float, optional
        That it was trained for, if the checkpoint does not say so.
    share : float
        Above 0, at most 1: of its weights, beside those that the package's autoencoder of the same
        size has.

    Raises
    ------
    ValueError
        The share is out of range, or there is nothing of the same size to mix it with; the checkpoint
        was trained around another base than the package's, or it does not say for how long and
        `minutes` are not given.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share above 0 and at most 1 is needed, got {share:g}")
    state = load_checkpoint(checkpoint)
    if minutes is None and "seconds" not in state:
        raise ValueError(f"{checkpoint} does not say how long it was trained: give --minutes")
    around = torch.load(checkpoint, map_location="cpu", weights_only=True)["identity"]
    record = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
    last = record["vae"][-1]
    base = load_base(WEIGHTS, device="cpu")
    if around["base"] not in (base.hash, last.get("around")):
        raise ValueError(
            f"{checkpoint} was trained around the base {around['base']}, the package has {base.hash}: "
            "its latents would mean other images; train a decoder around the package's base"
        )
    size = around.get("size", SIZE)
    if share != 1 and (size != base.size or base.hash != around["base"]):
        raise ValueError(
            f"a share of {share} needs the autoencoder that training began with; the package has one "
            f"of {base.size} px (base {base.hash}), {checkpoint} has {size} px (around {around['base']})"
        )
    new = build_autoencoder(base.vae, size)
    old = new.state_dict()
    new.load_state_dict(
        {k: v if share == 1 else torch.lerp(old[k], v, share) for k, v in state["average"].items()}
    )
    new.half().save_pretrained(WEIGHTS / "vae", safe_serialization=True)
    config = json.loads((WEIGHTS / "vae" / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a folder of this machine
    write_json(WEIGHTS / "vae" / "config.json", config)
    run = {
        "step": state["step"], "batch": around["batch"], "start": True,
        "seconds": state["seconds"] if minutes is None else 60 * minutes,
        "device": state.get("device", "CPU"),
    }  # fmt: skip
    earlier = record["vae"][:-1] if last.get("around") == around["base"] else record["vae"]
    record["vae"] = [*earlier, {**_summary(run), "around": around["base"], "share": share}]
    record["curves"]["vae"] = _curve(checkpoint.with_suffix(".csv"))
    write_json(WEIGHTS / "training.json", record)
    base = load_base(WEIGHTS, device="cpu")
    print(f"base {base.hash}: {base.size} px, latents {base.latent_shape()}")
    _tell_size()


def _tell_size() -> None:
    total = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    print(f"exported {total / 2**20:.1f} MiB to {WEIGHTS}")


def _summary(state: dict[str, Any]) -> dict[str, Any]:
    """Return steps, images seen, seconds and device of a training run."""
    steps, seconds = int(state["step"]), round(state["seconds"])
    images = steps * state["batch"]
    return {"steps": steps, "images": images, "seconds": seconds, "device": state["device"]}


def _curve(path: Path, points: int = 60) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[:: max(1, len(rows) // points)]
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--decoder", type=Path, required=True, help="checkpoint")
    parser.add_argument("--minutes", type=float, help="of its training, if it does not say so")
    parser.add_argument("--share", type=float, default=1.0, help="of the new weights, up to 1")
    options = parser.parse_args()
    export_decoder(options.decoder, options.minutes, options.share)


if __name__ == "__main__":
    main()
