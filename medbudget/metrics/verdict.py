"""A verdict in words on the scores of `evaluate`, above the five numbers that it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from medbudget.metrics.scores import FEW, FLOOR, HALVED, Score, format_table

FAR = 2.0  # times the floor


def judge(scores: Sequence[Score]) -> str:
    """Return what the scores of `evaluate` say, in words: how near, how copied, how sure.

    The distance is judged by its floor: near it where the two intervals overlap, above it where
    they do not, far from it at twice the floor or more.

    Examples
    --------
    >>> fd, floor = ((f"FD (X){end}", value) for end, value in (("", 171.0), (FLOOR, 77.0)))
    >>> print(judge([Score(name, v, (v - 9, v + 9), 100, "X") for name, v in (fd, floor)]))
    far from the real images: FD (X) is 2.2 times its floor; copies: not checked (name the training images)
    """
    by_name = {score.name: score for score in scores}
    floor = next((score for score in scores if score.name.endswith(FLOOR)), None)
    parts = ["no floor, so no verdict on the distance"]
    if floor is not None:
        parts = [_judge_distance(by_name[floor.name.removesuffix(FLOOR)], floor)]
    few = ("only ", "rests on ", HALVED)
    remarks = scores[0].remark.split("; ") if scores else []
    if leaks := [remark for remark in remarks if remark and not remark.startswith(few)]:
        parts.insert(0, f"no test of the generator: {'; '.join(leaks)}")
    copied = next((s for s in scores if s.name.startswith("Copied share")), None)
    return "; ".join([*parts, _judge_copies(copied)])


def _judge_distance(score: Score, floor: Score) -> str:
    n = score.smallest
    low = score.interval[0] if score.interval else score.value
    high = floor.interval[1] if floor.interval else floor.value
    times = score.value / floor.value if floor.value > 0 else float("inf")
    what = f"{score.name} is {times:.1f} times its floor"
    if floor.value <= 0:
        what = f"{score.name} is {score.value:.4g} and its floor 0"
    if low > high:
        word = "far from the real images" if times >= FAR else "above the floor"
        return f"{word}: {what}" + f" (rough: only {n} images)" * (n < FEW)
    if n < FEW:
        return f"cannot be told: only {n} images; {what}"
    return f"near the floor: at n = {n} the distance does not tell them from real images ({what})"


def _judge_copies(copied: Score | None) -> str:
    if copied is None:
        return "copies: not checked (name the training images)"
    n = copied.smallest
    found = round(copied.value * n)
    if "rests on" in copied.remark:
        return f"copies: {found} of {n} flagged, but this {copied.remark}"
    if copied.interval and copied.interval[0] > 0.01:
        return f"copies: {found} of {n} are nearer to training images than chance explains"
    return f"copies: none beyond chance ({found} of {n} flagged)"


def summarize(scores: Sequence[Score]) -> str:
    """Return the verdict and the five numbers that matter most, each with its remark.

    They are the first extractor's distance and floor, precision, recall, and the share of copies
    (without training images the layout distance); differences to another set come on top.
    """
    first = scores[0].name
    wanted = [first, first + FLOOR, "Precision", "Recall", "Copied share (pixels)"]
    if not any(score.name == wanted[-1] for score in scores):
        wanted.append("Layout distance")
    shown: dict[str, Score] = {}
    for score in scores:
        if score.name in wanted or ", difference to" in score.name:
            shown.setdefault(score.name, score)
    return f"verdict: {judge(scores)}\n{format_table(list(shown.values()), notes=False)}"
