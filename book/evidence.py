"""What is known about the use of a word: classifiers, its rival, readers, and membership."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from wording import LEVEL, badge, p_value, pass_holm, read_values, share

PAPER = {"preferred": 36, "pairs": 50, "alone": 0.780, "added": 0.803, "cases": 100}  # 4.1, 4.2
AGREEMENT = 0.95  # a generous guess at how far two classifiers agree: the paper does not say
ADDED = "200 real + 400 synthetic"  # the row of the paper's .803


def span(interval: list[float] | tuple[float, ...], digits: int = 2) -> str:
    low, high = interval
    return f"{share(low, digits)} to {share(high, digits)}"


def paper_numbers() -> dict[str, str]:
    """Return what follows from the paper's own numbers."""
    from medbudget.metrics import detectable_difference, hanley_mcneil
    from medbudget.reader import compute_preference

    pairs = compute_preference(int(PAPER["preferred"]), int(PAPER["pairs"]))
    se = hanley_mcneil(PAPER["alone"], int(PAPER["cases"]), int(PAPER["cases"]))
    detectable = detectable_difference(se * math.sqrt(2 * (1 - AGREEMENT)))
    gain = PAPER["added"] - PAPER["alone"]
    assert pairs.interval is not None
    low, high = pairs.interval
    return {
        "reader.preferred": f"{PAPER['preferred']} of {PAPER['pairs']}",
        "reader.p": p_value(pairs.p_value),
        "reader.interval": f"{low * 100:.0f} to {high * 100:.0f} %",
        "paper.alone": share(PAPER["alone"], 3),
        "paper.added": share(PAPER["added"], 3),
        "paper.gain": share(gain, 3),
        "paper.se": share(se, 3),
        "paper.detectable": share(detectable, 3),
        "paper.agreement": share(AGREEMENT),
        "paper.resolves": "less than" if gain < detectable else "more than",
    }


def judge(test: dict[str, Any], claim: int = 1) -> str:
    """Return the badge of a claim that a difference is above (1) or below (-1) zero."""
    shown = test["p_value"] < LEVEL
    return badge(test["difference"] * claim > 0 if shown else None)


def table2(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what synthetic images did to the classifiers of phantoms."""
    rows = {
        (row["setting"], row["value"]): row for row in read_values("table2_tiny", folders)["rows"]
    }
    tests = {key: row["compare"] for key, row in rows.items() if "compare" in row}
    shown = [test for test in tests.values() if test["p_value"] < LEVEL]
    numbers = {
        "table2.rows": str(len(tests)),
        "table2.better": str(sum(test["difference"] > 0 for test in shown) or "none"),
        "table2.worse": str(sum(test["difference"] < 0 for test in shown) or "none"),
        "table2.holm": str(len(pass_holm({key: test["p_value"] for key, test in tests.items()}))),
        "table2.sd_most": share(
            max(row["scores"]["sd of runs"]["value"] for row in rows.values()), 3
        ),
    }
    for name, key in (
        ("table2", ("prostate", ADDED)), ("table2.half", ("prostate", "200 real + 200 synthetic")),
        ("table2.only", ("prostate", "400 synthetic")), ("chest", ("chest", ADDED)),
        ("table2.ten", ("prostate", "400 synthetic*")), ("histology", ("histology", ADDED)),
        ("table2.both_ten", ("prostate", f"{ADDED}*")),
        ("table2.filtered", ("prostate", f"{ADDED}, filtered")),
    ):  # fmt: skip
        test, scores = tests[key], rows[key]["scores"]
        numbers |= {
            f"{name}.auc": share(scores["AUC"]["value"], 3),
            f"{name}.gain": share(test["difference"], 3),
            f"{name}.interval": span(test["interval"], 3),
            f"{name}.p": p_value(test["p_value"]),
            f"{name}.detectable": share(scores["detectable"]["value"], 3),
            f"{name}.higher": judge(test),
            f"{name}.lower": judge(test, -1),
        }
    alone, both = rows["prostate", "200 real"], rows["prostate", ADDED]
    return numbers | {
        "table2.alone": share(alone["scores"]["AUC"]["value"], 3),
        "table2.sd": share(alone["scores"]["sd of runs"]["value"], 3),
        "table2.reverse": share(alone["scores"]["AUC on synthetic"]["value"], 3),
        "table2.error": share(alone["scores"]["ECE"]["value"]),
        "table2.error_both": share(both["scores"]["ECE"]["value"]),
    }


def xrays(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how classifiers of generated X-rays alone do on patients: 200 of each class."""
    from medbudget.metrics import hanley_mcneil

    rows = [
        row
        for row in read_values("tiny_base", folders)["xrays"]
        if "generated images" in row["name"]
    ]
    numbers = {}
    for name, row in zip(("xrays.auc", "xrays.probe"), rows):
        reach = 1.96 * hanley_mcneil(row["value"], row["n"], row["n"])
        numbers[name] = share(row["value"], 3)
        numbers[f"{name}.interval"] = span((row["value"] - reach, row["value"] + reach))
    return numbers


def privacy(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how well the sharper attack tells training cases from others, by number of cases."""
    from scipy.stats import binomtest

    values = read_values("privacy", folders)
    attacks = [word["difference"][0] for word in values["words"]]
    falls = attacks == sorted(attacks, reverse=True)
    numbers = {"privacy.order": "falls" if falls else "does not fall"}
    for word in values["words"]:
        value, low, high = word["difference"]
        key = f"privacy.{word['cases']}"
        numbers[key] = share(value)
        numbers[f"{key}.interval"] = span((low, high))
        numbers[f"{key}.verdict"] = "betrays" if low > 0.5 else "is not shown to betray"
        copied = round(word["copied"][0] * values["n"])
        p = binomtest(copied, values["n"], 0.01, alternative="greater").pvalue
        numbers[f"{key}.copied"] = f"{copied or 'none'} of {values['n']}"
        numbers[f"{key}.copied.p"] = p_value(p)
        value, *interval = word["loss"]
        numbers[f"{key}.loss"] = f"{share(value)} ({span(interval)})"
    return numbers


def stylegan3(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the distances of the two generators, and what their training took."""
    values = read_values("stylegan3_tiny", folders)
    scores = {
        name: {score["name"]: score for score in found}
        for name, found in values["scores"]["none"].items()
    }
    fd = {name: found["FD (EfficientNet-Lite0)"] for name, found in scores.items()}
    nearer = min(fd, key=lambda name: fd[name]["value"])
    names = {"stylegan3": "StyleGAN3", "diffusion": "diffusion"}
    (note,) = (
        score["note"]
        for found in scores.values()
        for name, score in found.items()
        if name == "FD (EfficientNet-Lite0), difference to the other set"
    )
    p = float(note.split()[2])
    numbers = {
        "stylegan3.nearer": names[nearer],
        "stylegan3.p": p_value(p),
        "stylegan3.badge": badge(nearer == "stylegan3" if p < LEVEL else None),
    }
    for name in names:
        low, high = fd[name]["interval"]
        run = values[name]
        inside = max(scores[name][score]["value"] for score in ("Precision", "Recall"))
        numbers |= {
            f"{name}.fd": f"{fd[name]['value']:.0f}",
            f"{name}.fd.interval": f"{low:.0f} to {high:.0f}",
            f"{name}.images": f"{run['images_seen']:,}",
            f"{name}.minutes": f"{run['seconds'] / 60:.0f}",
            f"{name}.inside": f"at most {share(inside)}" if inside else "0",
        }
    history = values["stylegan3"]["history"]
    within = [h for h in history if h["images"] <= values["diffusion"]["images_seen"]]
    numbers["stylegan3.same_images"] = f"{within[-1]['fd']['value']:.0f}"
    numbers["stylegan3.last"] = f"{history[-1]['fd']['value']:.0f}"
    numbers["diffusion.trained"] = f"{values['diffusion']['fd']['value']:.0f}"
    return numbers
