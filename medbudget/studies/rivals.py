"""Section 4.2 of the paper: StyleGAN3 and Textual Inversion on the same cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medbudget.classifier import find_device
from medbudget.embeddings import Embedding
from medbudget.images import load_image, load_images, save_images
from medbudget.metrics.evaluation import evaluate
from medbudget.studies.drawing import Plan
from medbudget.studies.study import Row, Study
from medbudget.studies.table1 import (
    RULES,
    load_extractors,
    name_extractors,
    plan_cases,
    uses_phantoms,
)
from medbudget.studies.tasks import Store, Task, kind, score_sets
from medbudget.stylegan3 import StyleGAN3, StyleGAN3Settings, import_official, train_stylegan3
from medbudget.stylegan3.model import PRETRAINED, WEIGHTS
from medbudget.stylegan3.training import measure_distance

START = "start"  # role of the networks that training begins with; default: those that ship
SEEN = 8  # images of each snapshot
BATCH = 32  # images of one task: of one batch of `StyleGAN3.sample`
TRAINED = "prostate_healthy64"  # name of the recorded study's networks in the package
SNAPSHOTS = WEIGHTS / f"{TRAINED}_snapshots.png"


@kind("stylegan3", ".safetensors", heavy=True, needs=load_extractors)
def _run_stylegan3(task: Task, store: Store) -> Callable[[Path], Any]:
    """Train StyleGAN3; the file also holds 8 images of each snapshot, uint8."""
    s, cases = task.settings, store.read_images(task.inputs)
    (extractor,), folder = load_extractors(task, store), store.scratch(task, "snapshots")

    def keep(state: dict[str, Any]) -> None:
        if state["snapshot"] is not None:
            names = [f"{state['images_seen']:08d}_{i}" for i in range(SEEN)]
            save_images(state["snapshot"].sample(SEEN), folder, names=names)

    start = read_start(store.sources)
    keep({"snapshot": start, "images_seen": 0})
    network = train_stylegan3(
        cases, StyleGAN3Settings(**s["stylegan3"]), start=start, callback=keep,
        checkpoint=store.scratch(task, "checkpoint"), extractor=extractor,
        device=find_device(None).type, data=f"{len(cases)} cases of a study",
    )  # fmt: skip
    return partial(network.save, snapshots=load_images(folder))


@kind("gan_block", ".safetensors", heavy=True)
def _run_gan_block(task: Task, store: Store) -> torch.Tensor:
    network = StyleGAN3.load(store.path(task.inputs[0]), device=find_device(None).type)
    return network.sample(task.settings["n"], seed=task.settings["seed"])


@kind("rival", needs=load_extractors)
def _run_rival(task: Task, store: Store) -> dict[str, Any]:
    """Score a generator, with and without the paper's normalisation, and test it against another."""
    generated, real, *other = store.read_sets(task)
    extractors, rival = load_extractors(task, store), other[0] if other else None
    scores = {}
    for rule, suffix in RULES.items():
        for score in evaluate(
            real, generated, features=extractors, normalize=rule, permutation=rival, floor=False
        ):
            scores[score.name + suffix] = score.to_dict()
    return scores


@kind("cost", needs=load_extractors)
def _run_cost(task: Task, store: Store) -> dict[str, Any]:
    """Tell what a generator's training took; for a word also its distance to the cases."""
    source = store.path(task.inputs[0])
    if task.inputs[0].kind == "stylegan3":
        record = StyleGAN3.load(source).record
        keys = ("images_seen", "seconds", "device", "settings", "history", "start")
        return {key: record[key] for key in keys}
    word = Embedding.load(source)
    cases, images = store.read_images(task.inputs[1:2]), store.read_images(task.inputs[2:])[:100]
    return {
        "images_seen": word.step * word.record["settings"]["batch_size"],
        "seconds": word.record.get("seconds"),
        "device": word.record["device"],
        "settings": word.record["settings"],
        "fd": measure_distance(cases, images, load_extractors(task, store)[0]),
    }


def read_start(sources: Mapping[str, Path]) -> StyleGAN3:
    """Return the networks that training begins with: those given, or those that ship."""
    path = sources.get(START, Path(PRETRAINED))
    return import_official(path) if path.suffix == ".pkl" else StyleGAN3.load(path)


def find_size(p: Plan) -> int:
    """Return the size of the images that the GAN makes, in pixels an edge."""
    return int(read_start(p.sources).generator.architecture.size)


def plan_gan(p: Plan, train: Task, **changes: float) -> Task:
    """Return the task that trains StyleGAN3 on images, with changes to the study's settings."""
    gan = StyleGAN3Settings.preset(p.s.stylegan3, **{**p.s.gan, **changes})
    settings = {"stylegan3": asdict(gan), "start": read_start(p.sources).hash}
    settings |= name_extractors(p, first=True)
    return Task("stylegan3", settings, p.shrink([train], find_size(p)))


def plan_gan_blocks(network: Task, n: int, seed: int = 0) -> tuple[Task, ...]:
    """Return the tasks of `n` images, in the batches of one call of `StyleGAN3.sample`."""
    blocks = [{"seed": seed + i, "n": min(BATCH, n - i)} for i in range(0, n, BATCH)]
    return tuple(Task("gan_block", block, (network,)) for block in blocks)


def make_rivals(p: Plan) -> Study:
    """Section 4.2: train StyleGAN3 and a word on the same cases, draw with both, and compare."""
    s, size = p.s, find_size(p)
    if s.size not in (size, 2 * size):
        raise ValueError(
            f"the networks to start from make {size} px, this study wants {s.size}: for 512 px, "
            f"give an official file with --data {START}=FILE"
        )
    train = plan_cases(p, "train", s.cases)
    network, word = plan_gan(p, train), p.word(train)
    real = p.shrink([plan_cases(p, "reference", s.n)], size)
    made, drawn = plan_gan_blocks(network, s.n), p.shrink(p.blocks([word], n=s.n), size)

    def score(*sets: tuple[Task, ...]) -> Task:
        return score_sets("rival", name_extractors(p), *((own, s.n) for own in sets))

    def cost(*inputs: Task) -> Task:
        return Task("cost", name_extractors(p, first=True), inputs)

    inversion = p.inversion()
    seen = float(inversion.steps * inversion.batch_size)
    some = (*p.shrink([train], size), *drawn[:7])  # the cases, and 100 images
    rows = (
        Row(
            "StyleGAN3", 1000 * network.settings["stylegan3"]["kimg"], score(made, real, drawn),
            images=made, details=cost(network),
        ),
        Row("diffusion", seen, score(drawn, real), images=drawn, details=cost(word, *some)),
    )  # fmt: skip
    about = (
        f"{p.describe(uses_phantoms(p))} StyleGAN3 and a word learned from the same {s.cases} "
        f"cases; n = {s.n} images of each against {s.n} real ones, as they are and z-scored as the "
        "paper's script does. Difference: of StyleGAN3 to diffusion, with a permutation test. "
        "Compare what the scores see with what a reader sees."
    )
    if size != s.size:
        about += (
            f" StyleGAN3 makes {size} px: it was trained on cases averaged down to that, and is "
            f"compared at {size} px with diffusion's {s.size} px averaged down in the same way."
        )
    return Study(rows, about, head=("generator", "images seen"))


def load_snapshots(seen: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the recorded snapshots, ``(8, 3, 64, 64) uint8`` by images seen, as recorded."""
    grid = load_image(SNAPSHOTS)
    edge = grid.shape[2] // SEEN
    rows = grid.unfold(1, edge, edge).unfold(2, edge, edge)  # (3, rows, columns, edge, edge)
    return {n: rows[:, i].transpose(0, 1).contiguous() for i, n in enumerate(seen)}
