"""medbudget evaluate, membership and classify: score images, words, and what they are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from medbudget.cli.options import (
    BaseOptions,
    File,
    Machine,
    Overwrite,
    Seed,
    Text,
    Words,
    check_free,
    write_scores,
)

DEFAULT = Machine()
BASE = BaseOptions()


def evaluate(
    real: Path, synthetic: Path, /, *, train: Path | None = None, features: Words = None,
    permutation: Path | None = None, paired: bool = False, repeats: int = 1000,
    normalize: Text = "none", interval: Text = "influence",
    floor: Annotated[bool, Parameter(negative="--no-floor")] = True, size: int | None = None,
    verbose: bool = False, out: Path | None = None, overwrite: Overwrite = False, seed: Seed = 0,
    machine: Machine = DEFAULT,
) -> None:  # fmt: skip
    """Score generated images against real ones: a verdict, and the numbers it rests on.

    Args:
        real: folder of real images, best of patients that were not trained on
        synthetic: folder of generated images
        train: folder of training images: adds memorisation
        features: extractor, or NAME=WEIGHTS; repeatable; default efficientnet-lite0
        permutation: folder of another generator's images: adds a test
        paired: pair both generators' files by recorded seed, or by number in their names
        repeats: permutations
        normalize: none, or paper (each image z-scored)
        interval: influence, bootstrap or paper
        floor: real versus real beside every distance
        size: longest edge of all images, padded to squares; default: that of the synthetic images
        verbose: all scores, with their notes
        out: also write all scores as JSON
    """
    from medbudget.metrics import evaluate as run
    from medbudget.metrics import format_table, judge, summarize

    if paired and permutation is None:
        raise ValueError("--paired is about --permutation: name the other generator's folder")
    check_free(out, overwrite)
    scores = run(
        real, synthetic, features=features or "efficientnet-lite0", train=train,
        permutation=permutation, paired=paired, size=size, normalize=normalize, interval=interval,
        floor=floor, repeats=repeats, seed=seed, device=machine.prepare(), progress=True,
    )  # fmt: skip
    if verbose:
        print(f"verdict: {judge(scores)}\n{format_table(scores)}")
    else:
        print(f"{summarize(scores)}\nall scores and notes: --verbose, or --out scores.json")
    write_scores(scores, out)


def membership(
    word: File, members: Path, others: Path, /, *, draws: int = 8, out: Path | None = None,
    overwrite: Overwrite = False, seed: Seed = 0, base: BaseOptions = BASE,
) -> None:  # fmt: skip
    """Test whether an embedding betrays which images it was trained on.

    Args:
        members: folder of images that it was trained on
        others: folder of images of the same kind that it was not trained on
        draws: noises for the loss of each image
        out: also write the scores as JSON
    """
    from medbudget.embeddings import Embedding
    from medbudget.membership import membership_test
    from medbudget.metrics import format_table, judge_membership

    check_free(out, overwrite)
    loaded = base.load()
    scores = membership_test(loaded, Embedding.load(word), members, others, draws=draws, seed=seed)
    print(f"verdict: {judge_membership(scores)}\n{format_table(scores)}")
    write_scores(scores, out)


def classify(
    train: Path, val: Path, test: Path, /, *, synthetic: Path | None = None, runs: int = 10,
    out: Path = Path("classified"), preset: Text | None = None, positive: Text | None = None,
    size: int | None = None, steps: int | None = None, lr: float | None = None,
    precision: Text | None = None, weights: Text | None = None, seed: int = 0,
    overwrite: bool = False, machine: Machine = DEFAULT,
) -> None:  # fmt: skip
    """Train classifiers on real and on real + synthetic images; compare them on a test set.

    Args:
        train: folder with a folder of images for each class
        val: the same classes, or PatchCamelyon's …_valid_x.h5: chooses the best step
        test: the same classes, or PatchCamelyon's …_test_x.h5: scored once by each run
        synthetic: the same classes: is training with these better?
        runs: trainings that differ in their seed; paper: 10
        out: folder for runs and scores; goes on there
        preset: tiny, modern or paper; default: tiny on a CPU, else modern
        positive: the class whose probability is scored; default: the diseased one, or the second by
            name
        size: bring all images to this size first; else they must agree
        steps: batches of training; paper: 6250
        lr: learning rate; paper: 0.0001
        precision: auto, float32, bfloat16 or float16; auto: half on a GPU
        weights: imagenet, none, or a file of the network's weights
        seed: of the first run; the next ones have the next seeds
        overwrite: replace the scores of another comparison
    """
    from medbudget.classifier import choose_settings
    from medbudget.studies.comparison import classify as run

    device = machine.prepare()
    changes = {"steps": steps, "lr": lr, "precision": precision, "weights": weights}
    comparison = run(
        train, val, test, synthetic, out=out, runs=runs, positive=positive, size=size,
        settings=choose_settings(preset, device, seed=seed, **changes), device=device,
        overwrite=overwrite,
    )  # fmt: skip
    print(comparison)
