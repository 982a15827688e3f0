"""Section 4.2 of the paper: StyleGAN3 and Textual Inversion on the same cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from medbudget.embeddings import Embedding
from medbudget.files import write_json
from medbudget.images import load_image, load_images, make_grid, save_images
from medbudget.inversion import InversionSettings
from medbudget.metrics.evaluation import evaluate
from medbudget.results import write_result
from medbudget.studies.drawing import plan_blocks, plan_shipped_word
from medbudget.studies.report import check_done
from medbudget.studies.study import Row, Study, StudySettings
from medbudget.studies.table1 import (
    describe,
    get_extractor,
    name_extractor,
    name_extractors,
    need_extractors,
    plan_cases,
)
from medbudget.studies.tasks import Store, Task, kind, write_images
from medbudget.stylegan3 import StyleGAN3, StyleGAN3Settings, import_official, train_stylegan3
from medbudget.stylegan3.model import PRETRAINED, WEIGHTS
from medbudget.stylegan3.training import measure_distance

START = "start"  # role of the networks that training begins with; default: those that ship
SEEN = 8  # images of each snapshot
BATCH = 32  # images of one task
RULES = {"none": "", "paper": ", z-scored"}  # normalisations, and what they add to a score's name
TRAINED = "prostate_healthy64"  # name of the recorded study's networks in the package
SNAPSHOTS = WEIGHTS / f"{TRAINED}_snapshots.png"

# ------------------------------------------------------------------------------- what tasks do


@kind("stylegan3", ".safetensors", heavy=True, needs=need_extractors)
def _run_stylegan3(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Train StyleGAN3; the file also holds 8 images of each snapshot, uint8."""
    s, cases = task.settings, store.read_images(task.inputs)
    start = read_start(store.sources)
    folder = checkpoint.with_name("snapshots")
    save_images(start.sample(SEEN), folder, names=_names(0))

    def keep(state: dict[str, Any]) -> None:
        if (snapshot := state["snapshot"]) is not None:
            save_images(snapshot.sample(SEEN), folder, names=_names(state["images_seen"]))

    network = train_stylegan3(
        cases, StyleGAN3Settings(**s["stylegan3"]), start=start, checkpoint=checkpoint,
        callback=keep, extractor=get_extractor(s["extractor"], store.sources.get(s["extractor"])),
        device="cuda" if torch.cuda.is_available() else "cpu", data=f"{len(cases)} cases of a study",
    )  # fmt: skip
    network.save(path, snapshots=load_images(folder))


def _names(seen: int) -> list[str]:
    return [f"{seen:08d}_{i}" for i in range(SEEN)]


@kind("gan_block", ".safetensors", heavy=True)
def _run_gan_block(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = StyleGAN3.load(store.path(task.inputs[0]), device=device)
    write_images(path, network.sample(task.settings["n"], seed=task.settings["seed"]))


@kind("rival", ".json", needs=need_extractors)
def _run_rival(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Score a generator, with and without the paper's normalisation, and test it against another."""
    generated, real, *other = store.read_sets(task)
    names = task.settings["extractors"]
    scores = {
        score.name + suffix: score.to_dict()
        for rule, suffix in RULES.items()
        for score in evaluate(
            real, generated, permutation=other[0] if other else None, normalize=rule, floor=False,
            features=[get_extractor(name, store.sources.get(name)) for name in names],
        )
    }  # fmt: skip
    write_json(path, scores)


@kind("cost", ".json", needs=need_extractors)
def _run_cost(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Tell what a generator's training took; for a word also its distance to the cases."""
    source = store.path(task.inputs[0])
    if task.inputs[0].kind == "stylegan3":
        record = StyleGAN3.load(source).record
        keys = ("images_seen", "seconds", "device", "settings", "history", "start")
        write_json(path, {key: record[key] for key in keys})
        return
    word, name = Embedding.load(source), task.settings["extractor"]
    cases, images = store.read_images(task.inputs[1:2]), store.read_images(task.inputs[2:])[:100]
    extractor = get_extractor(name, store.sources.get(name))
    values = {
        "images_seen": word.step * word.record["settings"]["batch_size"],
        "seconds": word.record.get("seconds"),
        "device": word.record["device"],
        "settings": word.record["settings"],
        "fd": measure_distance(cases, images, extractor),
    }
    write_json(path, values)


# ------------------------------------------------------------------------------- their planning


def read_start(sources: Mapping[str, Path]) -> StyleGAN3:
    """Return the networks that training begins with: those given, or those that ship."""
    path = sources.get(START, Path(PRETRAINED))
    return import_official(path) if path.suffix == ".pkl" else StyleGAN3.load(path)


def plan_gan_blocks(network: Task, n: int) -> tuple[Task, ...]:
    """Return the tasks of `n` images, in the batches of one call of `StyleGAN3.sample`."""
    firsts = range(0, n, BATCH)
    return tuple(Task("gan_block", {"seed": i, "n": min(BATCH, n - i)}, (network,)) for i in firsts)


def make_rivals(s: StudySettings, base_hash: str, sources: Mapping[str, Path]) -> Study:
    """Section 4.2: train StyleGAN3 and a word on the same cases, draw with both, and compare."""
    start = read_start(sources)
    if (size := start.generator.architecture.size) != s.size:
        raise ValueError(
            f"the networks to start from make {size} px, this study wants {s.size}: for 512 px, "
            f"give an official file with --data {START}=FILE"
        )
    train = plan_cases(s, sources, "train", s.cases)
    real = plan_cases(s, sources, "reference", s.n)
    settings = {
        "stylegan3": asdict(StyleGAN3Settings.preset(s.stylegan3, **s.gan)), "start": start.hash,
        **name_extractor(s, sources),
    }  # fmt: skip
    network = Task("stylegan3", settings, (train,))
    word = plan_shipped_word(s, base_hash, train)
    images = {
        "StyleGAN3": plan_gan_blocks(network, s.n),
        "diffusion": plan_blocks(s, base_hash, [word], n=s.n),
    }
    inversion = InversionSettings.preset(s.inversion, **s.overrides)
    seen = {
        "StyleGAN3": 1000 * settings["stylegan3"]["kimg"],
        "diffusion": float(inversion.steps * inversion.batch_size),
    }
    rows = []
    for name, own in images.items():
        sets = [[len(own), s.n], [1, s.n]]
        inputs = [*own, real]
        cost = Task("cost", name_extractor(s, sources), (word, train, *own[:7]))  # 100 images
        if name == "StyleGAN3":
            sets.append([len(images["diffusion"]), s.n])
            inputs += images["diffusion"]
            cost = Task("cost", name_extractor(s, sources), (network,))
        score = Task("rival", {"sets": sets} | name_extractors(s, sources), tuple(inputs))
        rows.append(Row(name, seen[name], score, images=own, details=cost))
    about = (
        f"{describe(s, sources)} StyleGAN3 and a word learned from the same {s.cases} cases; n = "
        f"{s.n} images of each against {s.n} real ones, as they are and z-scored as the paper's "
        "script does. Difference: of StyleGAN3 to diffusion, with a permutation test. Compare "
        "what the scores see with what a reader sees."
    )
    return Study(tuple(rows), about, head=("generator", "images seen"))


# ------------------------------------------------------------------------------- for the chapter


def read_snapshots(study: Study, store: Store) -> dict[int, torch.Tensor]:
    """Return the images of every snapshot, ``(8, 3, H, W) uint8``, by images seen."""
    cost = study.rows[0].details
    assert cost is not None
    images = load_file(store.path(cost.inputs[0]))["snapshots"].split(SEEN)
    seen = [0, *(line["images"] for line in store.read_json(cost)["history"])]
    return dict(zip(seen, images))


def record_rivals(study: Study, store: Store, command: str) -> Path:
    """Keep a finished study of preset ``tiny`` for the book: scores, networks and snapshots.

    Returns
    -------
    Path
        The recorded result; networks and snapshots go into the package.
    """
    check_done(study, store)
    gan, diffusion = study.rows
    assert gan.score and gan.details and diffusion.score and diffusion.details
    snapshots = read_snapshots(study, store)
    seen = sorted(snapshots)
    chosen = [seen[round(i * (len(seen) - 1) / 5)] for i in range(6)]
    StyleGAN3.load(store.path(gan.details.inputs[0])).save(WEIGHTS / f"{TRAINED}.safetensors")
    grid = make_grid(torch.cat([snapshots[n] for n in chosen]), columns=SEEN, gap=0)
    save_images(grid[None], SNAPSHOTS.parent, names=[SNAPSHOTS.stem])
    scores: dict[str, dict[str, list[Any]]] = {rule: {} for rule in RULES}
    for name, task in (("stylegan3", gan.score), ("diffusion", diffusion.score)):
        for score in store.read_json(task).values():
            scores[score["normalisation"]].setdefault(name, []).append(score)
    values = {
        "settings": json.loads(json.dumps(asdict(study.settings))),
        "stylegan3": store.read_json(gan.details),
        "diffusion": store.read_json(diffusion.details),
        "scores": scores,
        "snapshots": chosen,
    }
    return write_result("stylegan3_tiny", values, command=command, base_hash=study.base_hash)


def load_snapshots(seen: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the recorded snapshots, ``(8, 3, 64, 64) uint8`` by images seen, as recorded."""
    grid = load_image(SNAPSHOTS)
    edge = grid.shape[2] // SEEN
    rows = grid.unfold(1, edge, edge).unfold(2, edge, edge)  # (3, rows, columns, edge, edge)
    return {n: rows[:, i].transpose(0, 1).contiguous() for i, n in enumerate(seen)}
