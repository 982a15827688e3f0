"""Write the trained base into the package, in diffusers' layout, as float16 safetensors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from medbudget.files import write_json
from medbudget.loading import TINY
from medbudget.tiny import GRIDS, N_WORDS
from pretraining import model

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
