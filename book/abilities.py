"""What is known about what a word can do: its settings, mixing it with others, painting with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from wording import LEVEL, badge, read_values, verdict

SETTINGS = {
    "sampling steps": "steps", "CFG scale": "guidance", "vectors": "vectors", "cases": "cases",
}  # fmt: skip


def _with_interval(score: dict[str, Any], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in score["interval"])
    return f"{score['value']:.{digits}f} ({low} to {high})"


def table1(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how each setting compares with the final configuration, by FD on tiny.

    A badge is about the direction of the paper's FID, from the value of the final configuration.
    """
    values = read_values("table1_tiny", folders)
    rows = {(SETTINGS[row["setting"]], row["value"]): row for row in values["rows"]}
    final = {group: row for (group, _), row in rows.items() if "compare" not in row}
    tests = {key: row["compare"] for key, row in rows.items() if "compare" in row}
    numbers = {}
    for (group, value), test in tests.items():
        key, difference = f"table1.{group}.{value}", test["difference"]
        numbers[key] = verdict(difference, test["p_value"], above="further away", below="nearer")
        numbers[f"{key}.by"] = f"{abs(difference):.0f}"
        if fid := rows[group, value]["paper"].get("FID"):
            way = (fid - final[group]["paper"]["FID"]) * difference > 0
            numbers[f"{key}.badge"] = badge(way if test["p_value"] < LEVEL else None)
    ordered = sorted(tests, key=lambda key: tests[key]["p_value"])
    passed = [tests[k]["p_value"] <= LEVEL / (len(tests) - i) for i, k in enumerate(ordered)]
    holm = ordered[: (*passed, False).index(False)]
    *names, last = (f"guidance {v}" if g == "guidance" else f"{v} {g}" for g, v in holm)
    for group, value in (("guidance", 1), ("guidance", 5), ("cases", 10), ("vectors", 64)):
        score = rows[group, value]["scores"]["Layout distance"]
        numbers[f"table1.layout.{group}.{value}"] = _with_interval(score, 2)
    first = "FD (EfficientNet-Lite0)"
    moves = sorted(abs(test["difference"]) for test in tests.values())
    return numbers | {
        "table1.others": f"{moves[-2]:.0f}",
        "table1.final": _with_interval(rows["vectors", 64]["scores"][first], 0),
        "table1.floor": f"{values['floor'][first]['value']:.0f}",
        "table1.tests": str(len(tests)),
        "table1.shown": str(sum(test["p_value"] < LEVEL for test in tests.values())),
        "table1.holm": str(len(holm)),
        "table1.holm.names": f"{', '.join(names)} and {last}",
        "table1.holm.opposite": str(
            sum("opposite" in numbers.get(f"table1.{g}.{v}.badge", "") for g, v in holm)
        ),
    }


def _count_steps(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return how many steps of the recorded axes rise, fall, or are not clear."""
    tests = [row["compare"] for row in rows if "compare" in row]
    shown = [test["difference"] > 0 for test in tests if test["p_value"] < LEVEL]
    return {
        "rise": str(sum(shown)),
        "fall": str(len(shown) - sum(shown)),
        "unclear": str(len(tests) - len(shown)),
        "all": str(len(tests)),
    }


def mixing(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what the disease scores of the recorded axes say, at guidance 2 and 5."""
    rows = read_values("interpolation_tiny", folders)["rows"]
    scale = {n: [row for row in rows if row["setting"].endswith(f"CFG {n}")] for n in (2, 5)}
    numbers = {
        f"mixing.{n}.{key}": text
        for n, part in scale.items()
        for key, text in _count_steps(part).items()
    }
    at = {(row["setting"].split(",")[0], row["value"]): row for row in scale[2]}
    for disease in ("tumour", "cardiomegaly", "metastasis"):
        for place, name in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
            score = at[disease, place]["scores"]["disease score"]
            numbers[f"mixing.{disease}.{name}"] = _with_interval(score, 1).replace("-", "−")
    diseases = {disease for disease, _ in at}
    ups = [d for d in diseases if at[d, 1.0]["scores"]["disease score"]["interval"][0]
           > at[d, 0.0]["scores"]["disease score"]["interval"][1]]  # fmt: skip
    down = [d for d, _ in at if any(
        row["compare"]["difference"] < 0 and row["compare"]["p_value"] < LEVEL
        for (name, _), row in at.items() if name == d and "compare" in row)]  # fmt: skip
    first = at["tumour", 0.25]["compare"]
    return numbers | {
        "mixing.axes": str(len(diseases)),
        "mixing.higher": "all" if len(ups) == len(diseases) else str(len(ups)),
        "mixing.never_fall": str(len(diseases - set(down))),
        "mixing.tumour.first": verdict(
            first["difference"], first["p_value"], above="rises", below="falls"
        ),
    }


def wilson(k: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of k in n; k may be a mean of counts."""
    z, p = 1.96, k / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def painting(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how often painted lesions are found, at the paper's guidance and at ours.

    The six masks of a phantom are not independent, so an interval counts phantoms, not masks.
    """
    values = read_values("inpainting", folders)
    rows = {(row["setting"], row["value"]): row for row in values["rows"]}
    final = values["final"]
    ours = rows["cfg_scale", final["cfg_scale"]]
    count = ours["n"] * len(ours["found"])
    numbers = {}
    for name, row in (
        ("paper", rows["cfg_scale", 2.0]), ("ours", ours), ("five", rows["cfg_scale", 5.0]),
        ("nothing", rows["away from", "nothing"]), ("weak", rows["strength", 0.3]),
    ):  # fmt: skip
        low, high = wilson(row["share"] * row["n"], row["n"])
        numbers[f"painting.{name}"] = f"{row['share'] * 100:.0f} %"
        numbers[f"painting.{name}.interval"] = f"{low * 100:.0f} to {high * 100:.0f} %"
        numbers[f"painting.{name}.count"] = f"{round(row['share'] * count)} of {count}"
        numbers[f"painting.{name}.all"] = f"{row['all'] or 'none'} of {row['n']}"
    seams = [row["seam"] for (name, _), row in rows.items() if name == "mask_blur"]
    return numbers | {
        "painting.guidance": f"{final['cfg_scale']:g}",
        "painting.phantoms": str(ours["n"]),
        "painting.masks": str(len(ours["found"])),
        "painting.count": str(count),
        "painting.off": f"{ours['off_colour']:.0f}",
        "painting.off.paper": f"{rows['cfg_scale', 2.0]['off_colour']:.0f}",
        "painting.seam": f"{ours['seam']:.1f}",
        "painting.seam.true": f"{values['true_seam']:.1f}",
        "painting.seam.blurs": f"{max(seams):.1f} to {min(seams):.1f}",
        "painting.small": f"{ours['found']['left 0.07']} of {ours['n']}",
    }
