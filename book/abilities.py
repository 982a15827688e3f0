"""What is known about what a word can do: its settings, mixing it with others, painting with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from wording import LEVEL, badge, enumerate_words, pass_holm, read_values, verdict

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
    holm = pass_holm({key: test["p_value"] for key, test in tests.items()})
    names = [f"guidance {v}" if g == "guidance" else f"{v} {g}" for g, v in holm]
    for group, value in (("guidance", 1), ("guidance", 5), ("cases", 10), ("vectors", 64)):
        score = rows[group, value]["scores"]["Layout distance"]
        numbers[f"table1.layout.{group}.{value}"] = _with_interval(score, 2)
    first = "FD (EfficientNet-Lite0)"
    badges = [numbers[key] for key in numbers if key.endswith(".badge")]
    return numbers | {
        "table1.judged": str(len(badges)),
        "table1.agree": str(sum("agrees" in one for one in badges)),
        "table1.final": _with_interval(rows["vectors", 64]["scores"][first], 0),
        "table1.floor": f"{values['floor'][first]['value']:.0f}",
        "table1.tests": str(len(tests)),
        "table1.shown": str(sum(test["p_value"] < LEVEL for test in tests.values())),
        "table1.holm": str(len(holm)),
        "table1.holm.names": enumerate_words(names),
        "table1.holm.opposite": str(
            sum("opposite" in numbers.get(f"table1.{g}.{v}.badge", "") for g, v in holm)
        ),
    }


def mixing(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what the disease scores of the recorded axes say, at guidance 2 and 5."""
    rows = read_values("interpolation_tiny", folders)["rows"]
    numbers = {}
    still = []  # places of the steps that do not rise
    for scale in (2, 5):
        part = [row for row in rows if row["setting"].endswith(f"CFG {scale}")]
        steps = [row for row in part if "compare" in row]
        shown = [row["compare"] for row in steps if row["compare"]["p_value"] < LEVEL]
        rises = [row for row in steps if _rises(row["compare"])]
        still += [row["value"] for row in steps if row not in rises]
        numbers |= {
            f"mixing.{scale}.rise": str(len(rises)),
            f"mixing.{scale}.fall": str(len(shown) - len(rises)),
            f"mixing.{scale}.unclear": str(len(steps) - len(shown)),
            f"mixing.{scale}.all": str(len(steps)),
        }
    axes: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        disease, scale = row["setting"].split(", CFG ")
        if scale == "2":
            axes.setdefault(disease, {})[row["value"]] = row
    ends = [axes["tumour"][x]["scores"]["disease score"] for x in (0.0, 1.0)]
    higher = {}  # axes on which a step rises and none falls
    for disease, axis in axes.items():
        tests = [row["compare"] for row in axis.values() if "compare" in row]
        higher[disease] = any(map(_rises, tests)) and not any(_rises(test, -1) for test in tests)
    first = axes["tumour"][0.25]["compare"]
    (strong,) = (
        row["compare"] for row in rows if (row["setting"], row["value"]) == ("tumour, CFG 5", 0.25)
    )
    start, end = (_with_interval(score, 1).replace("-", "−") for score in ends)
    return numbers | {
        "mixing.early": str(sum(place <= 0.5 for place in still)),
        "mixing.rest": str(len(still)),
        "mixing.axes": str(len(axes)),
        "mixing.higher": "all" if all(higher.values()) else f"{sum(higher.values())} of",
        "mixing.badge": badge(all(higher.values())),
        "mixing.tumour.start": start,
        "mixing.tumour.end": end,
        **{
            f"mixing.tumour.{name}": verdict(
                test["difference"], test["p_value"], above="rises", below="falls"
            )
            for name, test in (("first", first), ("first5", strong))
        },
        "mixing.tumour.badge": badge(higher["tumour"]),
    }


def _rises(test: dict[str, Any], way: int = 1) -> bool:
    return bool(test["p_value"] < LEVEL and test["difference"] * way > 0)


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
        ("paper", rows["cfg_scale", 2.0]), ("ours", ours), ("six", rows["cfg_scale", 6.0]),
        ("nothing", rows["away from", "nothing"]), ("weak", rows["strength", 0.3]),
    ):  # fmt: skip
        low, high = wilson(row["share"] * row["n"], row["n"])
        numbers[f"painting.{name}"] = f"{row['share'] * 100:.0f} %"
        numbers[f"painting.{name}.interval"] = f"{low * 100:.0f} to {high * 100:.0f} %"
        numbers[f"painting.{name}.count"] = f"{round(row['share'] * count)} of {count}"
        numbers[f"painting.{name}.all"] = f"{row['all'] or 'none'} of {row['n']}"
    others = [
        abs(row["share"] - ours["share"]) * count
        for (name, _), row in rows.items()
        if name in ("content", "steps", "mask_blur")
    ]
    low, _ = wilson(ours["share"] * ours["n"], ours["n"])
    weak = rows["cfg_scale", 2.0]
    apart = low > wilson(weak["share"] * weak["n"], weak["n"])[1]
    return numbers | {
        "painting.guidance": f"{final['cfg_scale']:g}",
        "painting.phantoms": str(ours["n"]),
        "painting.masks": str(len(ours["found"])),
        "painting.count": str(count),
        "painting.off": f"{ours['off_colour']:.0f}",
        "painting.off.paper": f"{rows['cfg_scale', 2.0]['off_colour']:.0f}",
        "painting.seam": f"{ours['seam']:.1f}",
        "painting.off.six": f"{rows['cfg_scale', 6.0]['off_colour']:.0f}",
        "painting.true": f"{values['true_found'] * 100:.0f} %",
        "painting.seam.true": f"{values['true_seam']:.1f}",
        "painting.seam.six": f"{rows['cfg_scale', 6.0]['seam']:.1f}",
        "painting.seam.sharp": f"{rows['mask_blur', 0.0]['seam']:.1f}",
        "painting.seam.soft": f"{rows['mask_blur', 8.0]['seam']:.1f}",
        "painting.small": f"{ours['found']['left 0.07']} of {ours['n']}",
        "painting.apart": "do not overlap" if apart else "overlap",
        "painting.rest": f"{max(others):.0f}",
        "painting.badge": badge(True if low > 0.5 else None),  # in most of the trials
    }
