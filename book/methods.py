"""What is known about the method itself: the autoencoder, words, and how far distances can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wording import badge, read_values

DISTANCES = {"FD": "fd", "layout": "layout"}
MFID_INTERVAL, MFID_AT_3 = (1.34, 5.32), 4.51  # the paper's: of guidance 2 (2.87), and guidance 3


def extent(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Write the range of some numbers, or the one that they all are."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return (low if low == high else f"{low} to {high}") + unit


def autoencoder(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how far images are off after the autoencoder, in gray levels (root mean square)."""
    kinds: dict[str, list[float]] = {}
    for row in read_values("tiny_base", folders)["autoencoder"]:
        if row["name"].endswith("PSNR, dB"):
            off = 255 / 10 ** (row["value"] / 20)
            kinds.setdefault(row["name"].split()[0], []).append(off)
    return {f"autoencoder.{kind}": extent(off) for kind, off in kinds.items()}


def words(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how far images of learned words and of plain ones are from phantoms, by class."""
    rows = read_values("tiny_base", folders)["inversion"]
    numbers: dict[str, str] = {}
    nearer: dict[str, list[bool]] = {}
    for distance, key in DISTANCES.items():
        learned: dict[str, list[float]] = {}
        plain: dict[str, list[float]] = {}
        for row in rows:
            name, _, what = row["name"].partition(f": {distance} of TI ")
            if "plain words" in what:
                learned.setdefault(name.split()[0], []).append(row["value"])
                plain.setdefault(name.split()[0], []).append(row["beside"])
        pairs = [pair for kind in learned for pair in zip(learned[kind], plain[kind])]
        numbers[f"words.{key}.classes"] = str(len(pairs))
        numbers[f"words.{key}.nearer"] = str(sum(a < b for a, b in pairs))
        digits = 0 if key == "fd" else 1
        for kind in learned:
            numbers[f"words.{key}.{kind}"] = extent(learned[kind], digits)
            numbers[f"words.{key}.{kind}.plain"] = extent(plain[kind], digits)
            nearer.setdefault(kind, []).extend(a < b for a, b in zip(learned[kind], plain[kind]))
    for kind, votes in nearer.items():  # no evidence where the two distances contradict each other
        numbers[f"words.{kind}.badge"] = badge(votes[0] if len(set(votes)) == 1 else None)
    inside = [row["value"] for row in rows if row["name"].endswith(("precision", "recall"))]
    numbers["words.inside"] = extent(inside, 0 if not any(inside) else 2)
    return numbers


def distances(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how the Fréchet and the kernel distance of two classes change with n."""
    record = read_values("fd_by_n", folders)
    fd, kernel = record["efficientnet-lite0"], record["kernel"]
    sizes = fd["floor"]["x"]
    numbers = {}
    for name, curve in fd.items():
        for n, value, low, high in zip(*(curve[key] for key in ("x", "y", "low", "high"))):
            numbers[f"fd.{name}.{n}"] = f"{value:.1f}"
            numbers[f"fd.{name}.{n}.interval"] = f"{low:.1f} to {high:.1f}"
    bounds = {
        (name, side): [y + side * 1.96 * se for y, se in zip(curve["y"], curve["se"])]
        for name, curve in kernel.items()
        for side in (-1, 1)
    }
    numbers["fd.apart"] = apart(sizes, fd["floor"]["high"], fd["tumour"]["low"])
    numbers["kernel.apart"] = apart(sizes, bounds["floor", 1], bounds["tumour", -1])
    numbers["kernel.tumour"] = extent(kernel["tumour"]["y"], 3)
    numbers["kernel.floor"] = extent(kernel["floor"]["y"], 3).replace("-", "−")
    return numbers


def apart(sizes: Sequence[int], highs: Sequence[float], lows: Sequence[float]) -> str:
    """Return the first n from which on one interval ends below the start of the other."""
    overlaps = [high >= low for high, low in zip(highs, lows)]
    last = max((i for i, overlap in enumerate(overlaps) if overlap), default=-1)
    return str(sizes[last + 1]) if last + 1 < len(sizes) else f"more than {sizes[-1]}"


def coverage(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how often each kind of 95 % interval contains the expected distance, in percent."""
    record = read_values("metrics_coverage", folders)
    within = MFID_INTERVAL[0] <= MFID_AT_3 <= MFID_INTERVAL[1]
    numbers = {
        "coverage.trials": str(record["trials"]),
        "paper.mfid.badge": badge(None if within else True),
    }
    for way in ("influence", "bootstrap", "paper"):
        for fall in ("slow", "fast"):
            shares = [
                100 * row[way]["coverage"]
                for case, row in record.items()
                if case.startswith(f"{fall}, ")
            ]
            numbers[f"coverage.{way}.{fall}"] = extent(shares, 1, " %").replace(".0", "")
    return numbers
