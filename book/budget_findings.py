"""Is a word enough? What the study of equal budgets found, for the sentences of its chapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from wording import LEVEL, badge, p_value, pass_holm, read_values, share, verdict

FD = "FD (EfficientNet-Lite0)"
INSIDE = ("Recall",)
METHODS = {
    "word 1": "word1", "word 8": "word8", "word 64": "word64", "LoRA 4": "lora4",
    "LoRA 16": "lora16", "LoRA 16 + word 8": "both", "full tuning": "full", "StyleGAN3": "gan",
}  # fmt: skip
LADDER = ("word1", "word8", "word64", "lora4", "lora16", "full")  # from the fewest numbers trained
ADAPTERS = ("lora4", "lora16", "both")
TUNED = (*ADAPTERS, "full")
Cells = Mapping[tuple[str, int, bool], Mapping[str, Any]]  # method, cases, equal images


def budget(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what the study found on real chest X-rays, and on each kind of phantoms, on tiny."""
    numbers = tell_study("budget", read_values("budget_tiny_own", folders)["rows"])
    kinds: dict[str, list[Any]] = {}
    for row in read_values("budget_tiny", folders)["rows"]:
        kinds.setdefault(row["setting"].split(",")[0], []).append(row)
    for kind, rows in kinds.items():
        numbers |= tell_study(f"budget.{kind}", rows)
    return numbers


def read_cells(rows: Iterable[Mapping[str, Any]]) -> tuple[Cells, Mapping[str, Any]]:
    """Return the rows by method, cases and rule, and the row of images that no model made."""
    cells, real = {}, None
    for row in rows:
        _, what, *rest = row["setting"].split(", ")
        if row["value"] in METHODS:
            cells[METHODS[row["value"]], int(what.split()[0]), bool(rest)] = row
        else:
            real = row
    assert real is not None
    return cells, real


def tell_study(head: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return numbers and verdicts of each row, and what all of them show together."""
    cells, real = read_cells(rows)
    inside = [row["scores"][name]["value"] for row in cells.values() for name in INSIDE]
    numbers = {
        f"{head}.inside": "0 for all" if not any(inside) else f"at most {share(max(inside))}",
        f"{head}.floor": f"{real['scores'][FD]['value']:.0f}",
        f"{head}.auc": with_interval(real["scores"]["Classifier AUC"]),
    }
    for (method, cases, equal), row in cells.items():
        at = f"{head}.{method}.{cases}" + (".equal" if equal else "")
        numbers |= {f"{at}.{name}": text for name, text in tell_row(row).items()}
    numbers |= {f"{head}.{k}": text for k, text in tell_distances(cells).items()}
    numbers |= {f"{head}.{k}": text for k, text in tell_gains(cells).items()}
    return numbers | {f"{head}.{k}": text for k, text in tell_leaks(cells).items()}


def with_interval(score: Mapping[str, Any], show: Callable[[float], str] = share) -> str:
    low, high = map(show, score["interval"])
    return f"{show(score['value'])} ({low} to {high})"


def tell_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of one row."""
    scores, details = row["scores"], row["details"]
    leak, copied = scores["Membership AUC"], scores["Copied share (pixels)"]
    size = details["bytes"] / 1000
    drawn = copied["n"] if isinstance(copied["n"], int) else copied["n"][0]
    suspects = round(copied["value"] * drawn)
    told = {
        "fd": f"{scores[FD]['value']:.0f}",
        "fd.interval": "{:.0f} to {:.0f}".format(*scores[FD]["interval"]),
        "leak": share(leak["value"]),
        "leak.interval": "{} to {}".format(*map(share, leak["interval"])),
        "copied": f"{suspects or 'none'} of {drawn}",
        "copied.p": p_value(binomtest(suspects, drawn, 0.01, alternative="greater").pvalue),
        "auc": with_interval(scores["Classifier AUC"]),
        "bytes": f"{size / 1000:.0f} MB" if size >= 9500 else f"{size:.0f} kB",
        "seconds": f"{details['seconds']:.0f}",
    }
    if test := row.get("compare"):
        told["p"] = p_value(test["p_value"])
        told["test"] = verdict(
            test["difference"], test["p_value"], above="further away", below="nearer"
        )
    if gain := scores.get("Classifier gain"):
        told["gain"] = verdict(gain["value"], read_p(gain), above="better", below="worse")
    return told


def read_p(score: Mapping[str, Any]) -> float:
    return float(score["note"].removeprefix("p = ").split(";")[0])


def tell_distances(cells: Cells) -> dict[str, str]:
    """Return how many tests of the distance show something, before and after Holm's correction."""
    tests = {key: row["compare"] for key, row in cells.items() if "compare" in row}
    shown = {key for key, test in tests.items() if test["p_value"] < LEVEL}
    kept = set(pass_holm({key: test["p_value"] for key, test in tests.items()}))
    most = max(cases for _, cases, _ in cells)
    nearer = {key for key in kept if tests[key]["difference"] < 0}

    def count(methods: Iterable[str], keys: Iterable[Any]) -> str:
        wanted = [key for key in keys if key[0] in methods and not key[2]]
        every = [key for key in tests if key[0] in methods and not key[2]]
        return f"{len(wanted) or 'none'} of {len(every)}"

    def judge(methods: Iterable[str], agreeing: set[Any]) -> str:
        """Judge a claim of others at equal time by all tests of it, or say how many agree."""
        own = {key for key in tests if key[0] in methods and not key[2]}
        if own & agreeing and not own <= agreeing and not own & (kept - agreeing):
            return badge(None, f"agrees in {len(own & agreeing)} of {len(own)}")
        return badge(True if own <= agreeing else False if own <= kept - agreeing else None)

    values = {key: row["scores"][FD]["value"] for key, row in cells.items() if not key[2]}
    closest = {
        min(METHODS, key=lambda name, n=n: values[METHODS[name], n, False])
        for n in {cases for _, cases, _ in values}
    }
    return {
        "closest": " or ".join(sorted(closest)),  # by number of cases
        "tests": str(len(tests)),
        "shown": str(len(shown)),
        "holm": str(len(kept)),
        "adapters.nearer": count(ADAPTERS, nearer),
        "full.nearer": count(("full",), nearer),
        "gan.further": count(("gan",), kept - nearer),
        "small.further": count(("word1", "word8"), kept - nearer),
        "tuned.nearer": count(TUNED, nearer),
        "last.nearer": str(
            sum(n == most and m in TUNED and not e for m, n, e in nearer) or "none"
        ),  # with the largest number of cases
        "badge": judge(TUNED, nearer),
        "small.badge": judge(("word1", "word8"), kept - nearer),
    }


def tell_gains(cells: Cells) -> dict[str, str]:
    """Return how many classifiers of a method's images beat those of the word of 64 vectors."""
    gains = {
        key: row["scores"]["Classifier gain"]
        for key, row in cells.items()
        if "Classifier gain" in row["scores"]
    }
    ps = {key: read_p(gain) for key, gain in gains.items()}
    shown = [key for key in gains if ps[key] < LEVEL]
    kept = pass_holm(ps)
    return {
        "gains": str(len(gains)),
        "gains.better": str(sum(gains[key]["value"] > 0 for key in shown) or "none"),
        "gains.worse": str(sum(gains[key]["value"] < 0 for key in shown) or "none"),
        "gains.holm": str(len(kept) or "none"),
    }


def tell_leaks(cells: Cells) -> dict[str, str]:
    """Return what the attacks on membership say: in order of what is trained, and by cases."""
    counts = sorted({cases for _, cases, equal in cells if not equal})
    leaks = {key: row["scores"]["Membership AUC"] for key, row in cells.items() if not key[2]}
    told = {}
    steps = []
    for cases in counts:
        row = [leaks[method, cases, False] for method in LADDER]
        steps += pairwise(row)
        word, full = leaks["word64", cases, False], leaks["full", cases, False]
        apart = word["interval"][1] < full["interval"][0]
        told[f"apart.{cases}"] = "do not overlap" if apart else "overlap"
        betrays = [m for m in METHODS.values() if leaks[m, cases, False]["interval"][0] > 0.5]
        told[f"leaky.{cases}"] = f"{len(betrays)} of {len(METHODS)}"
    rises = sum(a["value"] <= b["value"] for a, b in steps)
    apart = sum(a["interval"][1] < b["interval"][0] for a, b in steps)
    return told | {"leak.order": f"{rises} of {len(steps)}", "leak.apart": str(apart or "none")}
