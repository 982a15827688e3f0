"""The report of a study: ours beside the paper's numbers, with intervals, figure and provenance."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from medbudget.files import atomic_path, write_text
from medbudget.images import make_grid, to_pil
from medbudget.results import write_result
from medbudget.studies.planning import plan
from medbudget.studies.tables import Study
from medbudget.studies.tasks import Store, Task, in_order, read_images

COLUMNS = 8


def read_values(study: Study, store: Store) -> dict[str, Any]:
    """Return ``rows`` and ``floor`` as JSON types: of each row, what is there of scores and test."""

    def read(task: Task | None) -> dict[str, Any] | None:
        if task is None or not store.has(task):
            return None
        found: dict[str, Any] = json.loads(store.path(task).read_text(encoding="utf-8"))
        return found

    rows = []
    for row in study.rows:
        found: dict[str, Any] = {"setting": row.group, "value": row.value, "paper": dict(row.paper)}
        for name, task in (
            ("scores", row.score),
            ("compare", row.compare),
            ("details", row.details),
        ):
            if (values := read(task)) is not None:
                found[name] = values
        rows.append(found)
    return {"rows": rows, "floor": read(study.floor) or {}}


def format_values(
    values: Mapping[str, Any], head: Sequence[str] = ("setting", "value")
) -> pd.DataFrame:
    """Return a table for print of what `read_values` or `record_table` gave.

    Scores with their intervals, p where there are tests, the paper's numbers; "missing" where a
    score is not computed yet.
    """
    columns = [name for row in values["rows"] for name in row.get("scores", {})]
    papers = [name for row in values["rows"] for name in row["paper"]]
    tests = any("compare" in row for row in values["rows"])
    lines: list[dict[str, str]] = []
    for row in values["rows"]:
        line = dict(zip(head, (row["setting"], _format_value(row["value"]))))
        for name in dict.fromkeys(columns or ["score"]):
            score = row.get("scores", {}).get(name)
            line[name] = (
                _format_score(score) if score else "missing" if "scores" not in row else "–"
            )
        if tests:
            line["p"] = f"{row['compare']['p_value']:.3f}" if "compare" in row else "–"
        for name in dict.fromkeys(papers):
            line[f"{name} (paper)"] = str(row["paper"].get(name, "–"))
        lines.append(line)
    return pd.DataFrame(lines)


def _format_value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _format_score(score: Mapping[str, Any]) -> str:
    """Value and interval, both with the same number of decimals."""
    numbers = [score["value"], *(score["interval"] or ())]
    size = max(abs(number) for number in numbers)
    decimals = 1 if size >= 100 else 2 if size >= 1 else 3
    value, *interval = (f"{number:.{decimals}f}" for number in numbers)
    return f"{value} [{', '.join(interval)}]" if interval else value


def read_rows(study: Study, store: Store) -> dict[str, torch.Tensor]:
    """Return the first images of every line that is there, the same seeds on each."""
    return {
        f"{row.group} {_format_value(row.value)}": read_images(store, row.images[:1])[:COLUMNS]
        for row in study.rows
        if row.images and store.has(row.images[0])
    }


def record_table(study: Study, store: Store, command: str) -> Path:
    """Write the finished table to the recorded results, for a chapter to show.

    Raises
    ------
    ValueError
        Results are missing.
    """
    missing = [task for task in in_order(study.tasks) if not store.has(task)]
    if missing:
        raise ValueError(
            f"{len(missing)} results of {study.name} are missing: run the study before you record it"
        )
    values = read_values(study, store)
    name = f"{study.name}_{study.preset}"
    return write_result(name, values, command=command, base_hash=study.base_hash)


def write_report(study: Study, store: Store, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``figure.png`` into `folder`; return the page.

    The same results give the same bytes; times and machine stand in ``environment.json`` beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = read_values(study, store)
    table = format_values(values, study.head)
    cells = [list(table.columns), *table.to_numpy().tolist()]
    state = plan(study.tasks, store)
    intro = f"Study {study.name}, preset {study.preset}. {study.about} In brackets 95 % intervals."
    notes = []
    if study.floor is not None:
        floor = "; ".join(f"{name} {_format_score(s)}" for name, s in values["floor"].items())
        notes.append(f"Real against real (floor): {floor or 'not computed'}.")
    missing = sum(state.total.values()) - sum(state.done.values())
    if missing:
        notes.append(f"{missing} of {sum(state.total.values())} results are still missing.")
    notes.append(
        f"Base {study.base} {study.base_hash}; results named by a hash of settings and inputs. "
        "Not for clinical use."
    )
    rows = read_rows(study, store)
    figure = ""
    if rows:
        grid = make_grid(torch.cat(list(rows.values())), columns=COLUMNS)
        with atomic_path(folder / "figure.png") as temporary, open(temporary, "wb") as file:
            to_pil(grid).save(file, format="PNG")
        caption = "Synthetic images, the same seeds on every line"
        notes.insert(0, f"{caption}; from the top: {', '.join(rows)}.")
        edge = next(iter(rows.values())).shape[-2]
        figure = _figure(list(rows), f"{caption}.", f"{grid.shape[-1]}/{edge}")

    markdown = [f"# {study.name}, {study.preset}", "", intro, ""]
    markdown += ["| " + " | ".join(line) + " |" for line in cells[:1]]
    markdown += ["|" + "---|" * len(cells[0])]
    markdown += ["| " + " | ".join(line) + " |" for line in cells[1:]]
    markdown += [""] + (["![Synthetic images](figure.png)", ""] if rows else []) + notes
    write_text(folder / "report.md", "\n".join(markdown) + "\n")
    write_text(
        folder / "report.html", _page(study, intro, cells, figure, notes[1:] if rows else notes)
    )
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("medbudget", "torch", "diffusers", "numpy")},
        "seconds": {t.key: store.seconds(t) for t in in_order(study.tasks) if store.has(t)},
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    return folder / "report.html"


def _figure(labels: Sequence[str], caption: str, shape: str) -> str:
    """One line of ``figure.png`` beside each label: the image is cut by its place in it."""
    lines = []
    for i, label in enumerate(labels):
        place = 100 * i / max(1, len(labels) - 1)
        say = html.escape(label)
        lines.append(
            f'<tr><td>{say}</td><td><img src="figure.png" alt="Synthetic images, {say}." '
            f'style="aspect-ratio:{shape};object-position:0 {place:.4f}%"></td></tr>'
        )
    return f"<table class=figure><caption>{caption}</caption>{''.join(lines)}</table>"


def _page(study: Study, intro: str, cells: list[list[str]], figure: str, notes: list[str]) -> str:
    def line(values: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    table = line(cells[0], "th") + "".join(line(row, "td") for row in cells[1:])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{study.name}, {study.preset}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;"
        "overflow-x:auto}th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ccc}"
        "img{width:48rem;max-width:70vw;object-fit:cover;image-rendering:pixelated;display:block}"
        ".figure{margin-top:2rem}.figure td{padding:.1rem .6rem .1rem 0;border:0}"
        "caption{text-align:left;padding-bottom:.5rem}"
        f"</style></head><body><h1>{study.name}, {study.preset}</h1>"
        f"<p>{html.escape(intro)}</p><table>{table}</table>{figure}"
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        + "</body></html>\n"
    )
