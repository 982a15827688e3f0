"""Keep a finished study of Section 4.2 (preset tiny) for the book: scores, networks, snapshots.

``medbudget study stylegan3 --store DIR --set gan.kimg=30``, then
``python -m pretraining.rivals --store DIR --set gan.kimg=30``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from medbudget import load_base
from medbudget.images import make_grid, save_images
from medbudget.results import write_result
from medbudget.studies import Store, Study, make_study, parse_changes, study_settings
from medbudget.studies.report import check_done
from medbudget.studies.rivals import SEEN, SNAPSHOTS, TRAINED
from medbudget.studies.table1 import RULES
from medbudget.stylegan3.model import WEIGHTS, StyleGAN3


def read_snapshots(study: Study, store: Store) -> dict[int, torch.Tensor]:
    """Return the images of every snapshot, ``(8, 3, H, W) uint8``, by images seen."""
    cost = study.rows[0].details
    assert cost is not None
    images = load_file(store.path(cost.inputs[0]))["snapshots"].split(SEEN)
    seen = [0, *(line["images"] for line in store.read_json(cost)["history"])]
    return dict(zip(seen, images))


def record_rivals(study: Study, store: Store, command: str) -> Path:
    """Write scores into results/, networks and six snapshots into the package."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", dest="changes")
    args = parser.parse_args()
    settings = study_settings("stylegan3", "tiny", **parse_changes(args.changes))
    base_hash = load_base("tiny").hash
    study = make_study("stylegan3", "tiny", base_hash=base_hash, settings=settings)
    options = f"--store {args.store.name} --set {' '.join(args.changes)}"
    command = f"medbudget study stylegan3 {options}; python -m pretraining.rivals {options}"
    print(f"recorded: {record_rivals(study, study.store(args.store), command)}")


if __name__ == "__main__":
    main()
