"""Claim under test: the fewer cases a word was trained on, the more it tells about each of them.

Words for prostate phantoms with a tumour, trained on 5, 20 and 100 cases. For each: membership
inference by the loss and by its difference to the loss without the word, and the share of
synthetic images that are nearer to a training case than real ones at the 1 % level.

    python benchmarks/privacy.py [--steps 1000] [--others 100] [--draws 16] [--n 50] [--record]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from medbudget import InversionSettings, Score, invert, load_base, make_phantoms, sample
from medbudget.membership import membership_test
from medbudget.metrics import memorisation
from medbudget.results import write_result
from medbudget.tiny import load_trained

CASES = (5, 20, 100)


def triple(score: Score) -> list[float]:
    """Return value and interval."""
    return [score.value, *(score.interval or (score.value, score.value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training, for each word")
    parser.add_argument("--others", type=int, default=100, help="held-out cases, at least 99")
    parser.add_argument("--draws", type=int, default=16, help="noises for the loss of each case")
    parser.add_argument("--n", type=int, default=50, help="synthetic images for each word")
    parser.add_argument("--record", action="store_true", help="write results/privacy.json")
    args = parser.parse_args()
    base = load_base("tiny")
    train = make_phantoms("prostate", "tumour", max(CASES), size=base.size).images
    others = make_phantoms("prostate", "tumour", args.others, size=base.size, split="test").images
    words: list[dict[str, Any]] = []
    for n in CASES:
        settings = InversionSettings.preset("tiny", steps=args.steps)
        word = load_trained("prostate", "tumour", base)  # of 100 cases
        if n != CASES[-1] or word.record["settings"] != asdict(settings):
            word = invert(base, train[:n], token="<word>", settings=settings)
        loss, difference = membership_test(base, word, train[:n], others, draws=args.draws)
        made = sample(base, word.token, embeddings=[word], n=args.n)
        row = {
            "cases": n,
            "steps": args.steps,
            "loss": triple(loss),
            "difference": triple(difference),
            "copied": triple(memorisation(made, train[:n], others).scores()[0]),
        }
        print(row, flush=True)
        words.append(row)
    values = {"others": args.others, "draws": args.draws, "n": args.n, "words": words}
    if args.record:
        command = (
            f"python benchmarks/privacy.py --steps {args.steps} --others {args.others} "
            f"--draws {args.draws} --n {args.n} --record"
        )
        print(f"wrote {write_result('privacy', values, command=command, base_hash=base.hash)}")


if __name__ == "__main__":
    main()
