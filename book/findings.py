"""Put measured numbers into the book's sentences: ``{{ name }}`` in a page, replaced by the build.

Each number is read from a recorded result, or computed from the paper's by the library, so that no
sentence can go stale; a verdict is a word chosen by the test that it reports. A chapter is also read
without a build, so its marks hold their number: ``<!-- name -->.66<!-- / -->``.
``python book/findings.py`` prints all names with their values; ``--write`` brings the chapters up
to date, also where ``{{ name }}`` was written.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "results", ROOT / "benchmarks" / "results")
MARK = re.compile(r"\{\{ ([\w.]+) \}\}|<!-- ([\w.]+) -->(?:(?!<!--).)*<!-- / -->")
LEVEL = 0.05  # of every test in the book
PAPER = {"preferred": 36, "pairs": 50, "alone": 0.780, "added": 0.803, "cases": 100}  # 4.1, 4.2
AGREEMENT = 0.95  # a generous guess at how far two classifiers agree: the paper does not say


def read_values(name: str, folders: Iterable[Path] = FOLDERS) -> Any:
    """Return the values of one recorded result."""
    for folder in folders:
        path = folder / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            return record.get("values", record)
    raise FileNotFoundError(f"no recorded result {name}.json in {', '.join(map(str, folders))}")


def share(value: float, digits: int = 2) -> str:
    """Write a number between -1 and 1 as the paper does, without the leading zero."""
    sign = "−" if value < 0 else ""
    text = f"{abs(value):.{digits}f}"
    return sign + (text[1:] if text.startswith("0.") else text)


def p_value(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {share(value, 3 if value < 0.1 else 2)}"


def verdict(difference: float, p: float, *, above: str, below: str) -> str:
    """Return `above` or `below` where a test shows a difference, else that it shows none."""
    if p >= LEVEL:
        return f"not told apart ({p_value(p)})"
    return f"{above if difference > 0 else below} ({p_value(p)})"


def read_numbers(folders: Iterable[Path] = FOLDERS) -> dict[str, str]:
    """Return every number that a page may name, as the text that stands in its place."""
    folders = tuple(folders)
    numbers = paper_numbers()
    for part in (table1, table2, privacy, tiny, stylegan3, painting, machines):
        numbers |= part(folders)
    return numbers


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


def table1(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how each setting compares with the final configuration, by FD on tiny."""
    numbers = {}
    names = {
        "sampling steps": "steps",
        "CFG scale": "guidance",
        "vectors": "vectors",
        "cases": "cases",
    }
    for row in read_values("table1_tiny", folders)["rows"]:
        if test := row.get("compare"):
            key = f"table1.{names[row['setting']]}.{row['value']}"
            numbers[key] = verdict(
                test["difference"], test["p_value"], above="further away", below="nearer"
            )
    return numbers


def table2(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return what synthetic images did to the classifiers of phantoms."""
    rows = [row for row in read_values("table2_tiny", folders)["rows"] if "compare" in row]
    shown = [row["compare"] for row in rows if row["compare"]["p_value"] < LEVEL]
    (both,) = (r for r in rows if (r["setting"], r["value"]) == ("prostate", ADDED))
    low, high = both["compare"]["interval"]
    return {
        "table2.rows": str(len(rows)),
        "table2.better": str(sum(test["difference"] > 0 for test in shown) or "none"),
        "table2.worse": str(sum(test["difference"] < 0 for test in shown) or "none"),
        "table2.gain": share(both["compare"]["difference"], 3),
        "table2.interval": f"{share(low, 3)} to {share(high, 3)}",
        "table2.p": p_value(both["compare"]["p_value"]),
        "table2.detectable": share(both["scores"]["detectable"]["value"], 3),
    }


ADDED = "200 real + 400 synthetic"  # the row of the paper's .803


def privacy(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how well the sharper attack tells training cases from others, by number of cases."""
    numbers = {}
    for word in read_values("privacy", folders)["words"]:
        value, low, high = word["difference"]
        key = f"privacy.{word['cases']}"
        numbers[key] = share(value)
        numbers[f"{key}.interval"] = f"{share(low)} to {share(high)}"
        numbers[f"{key}.verdict"] = "betrays" if low > 0.5 else "is not shown to betray"
    return numbers


def tiny(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how many of its bars the embedded base meets, and what transfers to patients."""
    parts = read_values("tiny_base", folders)
    bars = [row["met"] for rows in parts.values() for row in rows if "met" in row]
    floor = [
        row["ratio"]
        for row in parts["inversion"]
        if row["name"].endswith("FD of TI against the floor")
    ]
    network, probe = (row["value"] for row in parts["xrays"] if "generated images" in row["name"])
    return {
        "tiny.bars": str(len(bars)),
        "tiny.met": str(sum(bars)),
        "tiny.missed": str(len(bars) - sum(bars)),
        "tiny.floor": f"{min(floor):.0f} to {max(floor):.0f}",
        "xrays.auc": share(network, 3),
        "xrays.probe": share(probe, 3),
    }


def stylegan3(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the distances of the two generators."""
    values = read_values("stylegan3_tiny", folders)
    scores = {
        name: {score["name"]: score for score in found}
        for name, found in values["scores"]["none"].items()
    }
    fd = {name: found["FD (EfficientNet-Lite0)"]["value"] for name, found in scores.items()}
    nearer = min(fd, key=lambda name: fd[name])
    return {
        "stylegan3.fd": f"{fd['stylegan3']:.0f}",
        "diffusion.fd": f"{fd['diffusion']:.0f}",
        "stylegan3.nearer": {"stylegan3": "StyleGAN3", "diffusion": "diffusion"}[nearer],
    }


def painting(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return how often painted lesions are found, at the paper's guidance and at ours."""
    values = read_values("inpainting", folders)
    rows = {row["value"]: row for row in values["rows"] if row["setting"] == "cfg_scale"}
    ours = values["final"]["cfg_scale"]
    return {
        "painting.paper": f"{rows[2.0]['share'] * 100:.0f} %",
        "painting.ours": f"{rows[ours]['share'] * 100:.0f} %",
        "painting.guidance": f"{ours:g}",
        "painting.off": f"{rows[ours]['off_colour']:.0f}",
    }


def machines(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return times, and what the trials of reliability counted."""
    gpu = read_values("gpu", folders)
    ms = {
        row["name"]: row["ms"]
        for row in gpu["rows"]
        if row["name"].startswith("TI") and row["batch"] == 1
    }
    ours, theirs = ms["TI: ours, eager"], ms["TI: diffusers' loop"]
    images = gpu["goals"]["diffusers' pipeline / ours"]["measured"]
    cpu = read_values("inversion", folders)["rows"]["diffusers' way / ours (goal 1.3)"]
    rows = read_values("fuzz", folders)["rows"]
    kills = [
        row for row in read_values("faults", folders)["faults"] if row["fault"].startswith("kill")
    ]
    soak = read_values("soak", folders)["rows"]
    stopped = sum(row[kind] for row in rows for kind in ("error", "hang", "crash"))
    return {
        "stylegan3.memory": str(read_values("stylegan3_memory", folders)["gib"]),
        "gpu.device": gpu["device"].replace("NVIDIA ", ""),
        "gpu.minutes": f"{gpu['goals']['50,000 steps at batch 1, minutes']['measured']:.1f}",
        "gpu.step": f"{ms['TI: ours, fast (compiled, CUDA graph)']:.0f}",
        "gpu.eager": f"{ours:.0f}",
        "gpu.diffusers": f"{theirs:.0f}",
        "gpu.like": f"{theirs / ours:.2f}",
        "gpu.sampling": f"{abs(1 - images) * 100:.0f} % {'slower' if images < 1 else 'faster'}",
        "cpu.ratio": f"{cpu:.2f}",
        "fuzz.files": f"{sum(row['inputs'] for row in rows):,}",
        "fuzz.refused": f"{sum(row['refused'] for row in rows):,}",
        "fuzz.stopped": str(stopped or "none"),
        "kills.tried": str(sum(row["tried"] for row in kills)),
        "kills.survived": str(sum(row["survived"] for row in kills)),
        "soak.growth": f"{soak['growth, % (goal: below 5)']:g} %",
    }


def badge(agrees: bool | None) -> str:
    """Return a verdict on the paper's claim: True agrees, False is opposite, None shows nothing."""
    kind, text = {
        True: ("agrees", "agrees with the paper"),
        False: ("opposite", "opposite to the paper"),
        None: ("none", "no evidence"),
    }[agrees]
    return f'<span class="verdict {kind}">{text}</span>'


def find_names(text: str) -> set[str]:
    """Return the names of all numbers that a page names."""
    return {match[1] or match[2] for match in MARK.finditer(text)}


def fill_numbers(text: str, numbers: Mapping[str, str], page: str, *, keep: bool = False) -> str:
    """Replace every mark of a page by its number, within the mark if the mark should be kept.

    Raises
    ------
    ValueError
        The page names a number that no recorded result gives.
    """
    if unknown := sorted(find_names(text) - set(numbers)):
        raise ValueError(
            f"{page} names {', '.join(unknown)}, which book/findings.py does not read; "
            f"it has: {', '.join(numbers)}"
        )

    def fill(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        value = numbers[name]
        if page.endswith(".ipynb"):  # stands within a string of JSON
            value = json.dumps(value, ensure_ascii=False)[1:-1]
        return f"<!-- {name} -->{value}<!-- / -->" if keep else value

    return MARK.sub(fill, text)


if __name__ == "__main__":
    found = read_numbers()
    if "--write" in sys.argv:
        for chapter in sorted((ROOT / "notebooks").glob("*.ipynb")):
            content = chapter.read_text(encoding="utf-8")
            filled = fill_numbers(content, found, chapter.name, keep=True)
            if filled != content:
                chapter.write_text(filled, encoding="utf-8")
                print(f"brought up to date: {chapter.name}")
    else:
        for key, value in found.items():
            print(f"{key:<24}{value}")
