"""Membership inference: does a word betray which images it was trained on?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from medbudget.base import Base
from medbudget.embeddings import Embedding
from medbudget.inversion import compute_image_losses
from medbudget.metrics.auc import bootstrap_auc, delong
from medbudget.metrics.frechet import Groups
from medbudget.metrics.image_sets import Source, load_sets
from medbudget.metrics.scores import FEW, Score


def membership_inference(
    member_losses: npt.ArrayLike,
    other_losses: npt.ArrayLike,
    *,
    groups: tuple[Groups, Groups] = (None, None),
    name: str = "loss",
) -> Score:
    """Return how well a model's loss tells its training cases from others: an AUC with interval.

    The attack of Yeom et al. (2018): a case with a low loss is called a member. 0.5 means that
    this attack learns nothing (a stronger one may).

    Losses are ``(n,)``, or ``(n, draws)`` over several draws of noise and time, of which the mean is
    taken; use the same draws for both. `groups` are the patient of every member and of every other
    image: the interval is then over patients. `name` says what the losses are.

    Examples
    --------
    >>> membership_inference([0.1, 0.2, 0.4], [0.3, 0.5, 0.6]).value  # 8 of 9 pairs
    0.8888888888888888
    """
    sets = []
    for which, losses in (("member_losses", member_losses), ("other_losses", other_losses)):
        values = np.asarray(losses, dtype=np.float64)
        if values.ndim not in (1, 2) or values.size == 0:
            raise ValueError(f"{which} must be (n,) or (n, draws), got {values.shape}")
        sets.append(values if values.ndim == 1 else values.mean(1))
    labels, scores = np.repeat([1, 0], [len(s) for s in sets]), -np.concatenate(sets)
    if groups[0] is None and groups[1] is None:
        estimate = delong(labels, scores)
    else:  # an image without a patient is its own
        known = (g if g is not None else range(len(s)) for g, s in zip(groups, sets))
        patients = [(type(who), who) for group in known for who in group]
        estimate = bootstrap_auc(labels, scores, patients=patients)
    return Score(
        name=f"Membership AUC ({name})",
        value=estimate.value,
        interval=estimate.interval,
        n=(len(sets[0]), len(sets[1])),
        note=f"members vs others; 0.5: the loss tells nothing; {estimate.method} interval",
        remark=f"only {few} images" if (few := min(map(len, sets))) < FEW else "",
    )


def membership_test(
    base: Base,
    word: Embedding,
    members: Source,
    others: Source,
    *,
    draws: int = 8,
    seed: int = 0,
) -> list[Score]:
    """Attack a word: who has it, and one image, tries to tell whether it was trained on that image.

    `base` is the one that the word was trained on, which is public. `members` are images that the
    word was trained on, `others` images of the same kind that it was not: tensors of the base's
    size, or folders; of those that `medbudget prepare` made, intervals are over patients. `draws` are
    the times and noises for each image, the same for all.

    Returns the AUC of the loss under the word, and of its difference to the loss without the word,
    which takes away what makes an image easy or hard for every model (`membership_inference`).
    Others that are members raise ValueError.
    """
    base.load_words([word])  # refuses what does not fit this base
    sets = load_sets({"train": members, "other": others}, size=base.size)
    inside, outside = sets["train"], sets["other"]
    trained = set(str(word.record.get("image_hashes", "")).split())
    if shared := sum(digest in {*inside.hashes, *trained} for digest in outside.hashes):
        raise ValueError(
            f"{shared} of the {len(outside)} other images are members: others must be images that "
            "the word was not trained on"
        )
    groups = inside.groups(), outside.groups()
    unknown = sum(digest not in trained for digest in inside.hashes) if trained else 0
    remark = f"{unknown} of {len(inside)} members are not recorded in the word" if unknown else ""
    losses, without = (
        [
            compute_image_losses(base, prompt, s.images, draws=draws, seed=seed)
            for s in sets.values()
        ]
        for prompt in (word, "")
    )
    attacks = {"loss": losses, "difference": [a - b for a, b in zip(losses, without)]}
    scores = [membership_inference(*a, groups=groups, name=name) for name, a in attacks.items()]
    return [
        replace(score, extractor=f"base {base.name}", extractor_hash=base.hash).remarked(remark)
        for score in scores
    ]


def judge_membership(scores: list[Score]) -> str:
    """Say in words whether one of the attacks of `membership_test` succeeds."""
    sharp = [s for s in scores if s.interval and s.interval[0] > 0.5]
    if sharp:
        best = max(sharp, key=lambda score: score.value)
        rough = f" (rough: only {best.smallest} images)" * (best.smallest < FEW)
        return f"the word gives its training images away: {best.name} is {best.value:.2f}{rough}"
    return "this attack cannot tell members from others; a stronger one may"
