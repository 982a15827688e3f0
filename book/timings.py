"""Fill the pages `timings` and `reliability` with what was recorded; book/build.py calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARK = "<!-- {name} -->"
NONE = "not measured yet"
CHAPTERS = "<!-- chapters -->"
MISSING = "```{{note}}\nNot measured yet: there is no record `{name}.json`. {how}\n```"
COLUMNS = ("batch", "ms", "images per s", "peak GiB", "share of ceiling", "note")
# each section of a page: the file that it reads, and what to do where that is missing
SECTIONS = {
    "gpu": "Every figure of a GPU is missing here until someone with one runs "
    "`python benchmarks/gpu.py --out benchmarks/results/gpu.json` (under 8 minutes, no download).",
    "full_size": "`python benchmarks/full_size.py --out benchmarks/results/full_size.json` "
    "makes it: minutes, and about 8 GB of memory.",
    "inversion": "`python benchmarks/inversion.py --record` makes it.",
    "adapters": "`python benchmarks/adapters.py --out benchmarks/results/adapters.json` makes it: "
    "minutes, and 6 GB of memory.",
}
RELIABILITY = {
    "faults": "`python benchmarks/faults.py --record` makes it.",
    "fuzz": "`python benchmarks/fuzz.py --inputs 30000 --record` makes it (5 minutes).",
    "determinism": "`python benchmarks/determinism.py --record` makes it (2 minutes).",
    "soak": "`python benchmarks/soak.py --record` makes it (15 minutes).",
}
PAGES = {"timings": SECTIONS, "reliability": RELIABILITY}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_record(record: dict[str, Any]) -> str:
    """Return a record as Markdown: device, date and versions, then rows."""
    versions = f"{_cell(record['versions'])}, " if "versions" in record else ""
    parts = [
        f"Measured on {record['device']}, {record['date']}, {versions}with `{record['command']}`."
    ]
    values = record.get("values", record)
    rows = values["faults"] if "faults" in values else values["rows"]
    if isinstance(rows, dict):
        parts.append(_table(["measured", "value"], [[k, v] for k, v in rows.items()]))
    elif "matmul ceiling, TFLOP/s" not in record:
        header = list(rows[0])
        body = [[row[name] for name in header] for row in rows]
        counts = {k for k in header if all(isinstance(row[k], int) for row in rows)}
        if counts:
            total = [sum(row[k] for row in rows) if k in counts else "" for k in header]
            body.append(["**all**", *total[1:]])
        parts.append(_table(header, body))
    else:
        ceiling = record["matmul ceiling, TFLOP/s"]
        parts[0] += f" The matrix-multiply ceiling of the same run: {ceiling} TFLOP/s."
        used = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
        body = [[row["name"], *(row.get(c) for c in used)] for row in rows]
        parts.append(_table(["measured", *used], body))
        goals = record["goals"].items()
        body = [[name, found["measured"], found["goal"]] for name, found in goals]
        parts.append(_table(["against the goals", "measured", "goal"], body))
        counted = [list(item) for item in record["counted"].items()]
        if counted:
            parts.append(_table(["counted before the run", "value"], counted))
    return "\n\n".join(parts)


def fill_chapters(page: str, seconds: dict[str, float]) -> str:
    """Put the seconds of each chapter that was run in the place of their mark."""
    if not seconds:
        return page.replace(CHAPTERS, "```{note}\nThis build ran no chapter.\n```")
    from medbudget.results import describe_machine

    rows = [[f"[](../notebooks/{name}.ipynb)", f"{value:.0f}"] for name, value in seconds.items()]
    return page.replace(
        CHAPTERS, f"Run on {describe_machine()}.\n\n" + _table(["chapter", "seconds"], rows)
    )


def fill_readme(text: str, seconds: dict[str, float]) -> str:
    """Put the chapters' times into the column CPU of the README's table, `NONE` where unknown."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        names = re.findall(r"\]\(notebooks/(\w+)\.ipynb\)", line.partition("`")[0])
        if line.startswith("| ") and names:
            cells = line.strip("| ").split(" | ")
            known = [f"{seconds[name]:.0f} s" for name in names if name in seconds]
            cells[3] = ", ".join(known) if len(known) == len(names) else NONE
            lines[i] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


def fill_page(title: str, page: str, *folders: Path) -> str:
    """Put each section's record, or a note that it is missing, in the place of its mark."""
    for name, how in PAGES[title].items():
        files = [folder / f"{name}.json" for folder in folders]
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            text = format_record(json.loads(found.read_text(encoding="utf-8")))
        else:
            text = MISSING.format(name=name, how=how)
        mark = MARK.format(name=name)
        if page.count(mark) != 1:
            raise ValueError(
                f"book/{title}.md must have {mark} once, it has it {page.count(mark)}x"
            )
        page = page.replace(mark, text)
    return page
