"""Tasks of the study of equal budgets: train, draw, attack, score, and count what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medbudget.adapter_files import is_adapter
from medbudget.adapters import Adapter, adapt
from medbudget.embeddings import Embedding
from medbudget.inversion import InversionSettings, compute_image_losses, invert
from medbudget.lora import TuneSettings, tune
from medbudget.metrics import disease_score
from medbudget.metrics.auc import delong
from medbudget.metrics.evaluation import evaluate
from medbudget.metrics.membership import membership_inference
from medbudget.metrics.scores import Score
from medbudget.sampling import sample
from medbudget.studies.drawing import BLOCK, TOKEN, load_task_base
from medbudget.studies.table1 import load_extractors
from medbudget.studies.tasks import Store, Task, kind
from medbudget.stylegan3 import StyleGAN3
from medbudget.stylegan3.model import to_float

# starts of scores' names
SHOWN = ("FD", "FID", "Layout", "Precision", "Recall", "Copied share (pixels)")


def load_trained(path: Path) -> Embedding | Adapter:
    """Read what a task of kind ``trained`` wrote."""
    return Adapter.load(path) if is_adapter(path) else Embedding.load(path)


@kind("trained", ".safetensors", heavy=True, needs=load_task_base)
def _run_trained(task: Task, store: Store) -> Callable[[Path], Any]:
    """Train a word or an adapter; the file tells the time of all steps, and a GPU's peak memory."""
    s, base = task.settings, load_task_base(task, store)
    gpu = base.device.type == "cuda"
    clock = time.monotonic if gpu else time.process_time  # so that other programs do not count
    times: list[float] = []
    options: dict[str, Any] = {
        "token": TOKEN, "checkpoint": store.scratch(task, "checkpoint"), "fast": False,
        "callback": lambda state: times.append(clock()), "data": f"{s['cases']} cases of a study",
    }  # fmt: skip
    cases = store.read_images(task.inputs)[: s["cases"]]
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trained: Any
    if s["adapter"]:
        trained = tune(base, cases, settings=TuneSettings(**s["training"]), **options)
    else:
        trained = invert(base, cases, settings=InversionSettings(**s["training"]), **options)
    step = (times[-1] - times[0]) / max(1, len(times) - 1)
    record = trained.record | {
        "seconds": round(step * trained.step, 2),  # also where it went on from a checkpoint
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }
    return replace(trained, record=record).save


@kind("drawn", ".safetensors", heavy=True, needs=load_task_base)
def _run_drawn(task: Task, store: Store) -> torch.Tensor:
    s, trained = task.settings, load_trained(store.path(task.inputs[0]))
    name = "adapters" if isinstance(trained, Adapter) else "embeddings"
    options: dict[str, Any] = {name: trained, "n": BLOCK, "batch_size": BLOCK}
    return sample(
        load_task_base(task, store), TOKEN, steps=s["steps"], cfg_scale=s["cfg_scale"],
        seed=s["seed"] + BLOCK * s["block"], size=s["size"], **options,
    )  # fmt: skip


@kind("leak", heavy=True)
def _run_leak(task: Task, store: Store) -> dict[str, Any]:
    """Attack what was trained: can its loss, a GAN's critic, tell the cases from other images?"""
    path, s = store.path(task.inputs[0]), task.settings
    sets = [store.read_images([t])[:n] for t, n in zip(task.inputs[1:], s["n"])]
    if task.inputs[0].kind == "stylegan3":
        critic = StyleGAN3.load(path).discriminator
        with torch.inference_mode():
            losses = [
                np.concatenate([-critic(to_float(x)).flatten().numpy() for x in images.split(16)])
                for images in sets
            ]
        score = membership_inference(losses[0], losses[1], name="critic")
    else:
        base, trained = load_task_base(task, store), load_trained(path)
        tuned, word = (
            (adapt(base, [trained]), trained.word) if isinstance(trained, Adapter)
            else (base, trained)
        )  # fmt: skip
        assert word is not None
        losses = [
            (compute_image_losses(tuned, word, images, draws=s["draws"])
            - compute_image_losses(base, "", images, draws=s["draws"])).numpy()
            for images in sets
        ]  # fmt: skip
        score = membership_inference(losses[0], losses[1], name="loss less the base's")
    return {"Membership AUC": score.to_dict()}


@kind("weigh", needs=load_extractors)
def _run_weigh(task: Task, store: Store) -> dict[str, Any]:
    """Score a method: images of either class, real ones, its cases, and what other tasks found."""
    s, (healthy, ill, real, cases) = task.settings, store.read_sets(task)
    scores: dict[str, Any] = {}
    found = evaluate(
        real, ill, features=load_extractors(task, store), floor=False,
        train=cases if s["trained"] else None,
    )  # fmt: skip
    for score in found:
        if score.name.startswith(SHOWN):
            scores[score.name] = score.to_dict()
    if s["kind"]:
        try:
            values = [disease_score(images, s["kind"], s["label"]) for images in (healthy, ill)]
            labels, both = np.repeat([0, 1], [len(v) for v in values]), np.concatenate(values)
            found_auc, n = delong(labels, both), (len(healthy), len(ill))
            scores["Disease AUC"] = Score(
                "Disease AUC", found_auc.value, found_auc.interval, n,
                note="the classes' disease scores; DeLong interval",
            ).to_dict()  # fmt: skip
        except ValueError:  # too far from phantoms for a disease score
            pass
    aucs, *leaks = map(store.read_json, task.inputs[sum(n for n, _ in s["sets"]) :])
    scores |= {f"Classifier {name}": aucs[name] for name in ("AUC", "gain") if name in aucs}
    for leak in leaks:
        scores |= leak
    return scores


@kind("price")
def _run_price(task: Task, store: Store) -> dict[str, Any]:
    """Tell what a method's training took, and what there is to share."""
    path = store.path(task.inputs[0])
    if task.inputs[0].kind == "stylegan3":
        network = StyleGAN3.load(path)
        numbers = sum(p.numel() for p in network.generator.parameters())
        record = {key: network.record[key] for key in ("images_seen", "seconds", "device")}
        return record | {"numbers": numbers, "bytes": 2 * numbers, "peak_bytes": None}
    trained = load_trained(path)
    tensors = trained.tensors.values() if isinstance(trained, Adapter) else [trained.vectors]
    record = {key: trained.record[key] for key in ("seconds", "device", "peak_bytes")}
    seen = trained.step * trained.record["settings"]["batch_size"]
    numbers = sum(tensor.numel() for tensor in tensors)
    return record | {"images_seen": seen, "numbers": numbers, "bytes": path.stat().st_size}
