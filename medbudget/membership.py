"""Attack a word: does its loss betray which images it was trained on?"""

from __future__ import annotations

from dataclasses import replace

from medbudget.base import Base
from medbudget.embeddings import Embedding
from medbudget.metrics.image_sets import Source, load_sets
from medbudget.metrics.membership import membership_inference
from medbudget.metrics.scores import Score
from medbudget.training.inversion import compute_image_losses


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

    `members` are images that the word was trained on, `others` images of the same kind that it was
    not: tensors of the size of its `base`, or folders; of those that `medbudget prepare` made,
    intervals are over patients. `draws` are the times and noises for each image, the same for all.

    Returns the AUC of the loss under the word, and of its difference to the loss without the word,
    which takes away what makes an image easy or hard for every model.
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
