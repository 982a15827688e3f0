"""The report of a study: ours beside the paper's numbers, with intervals, figure and provenance."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from medbudget.artifacts import atomic_path, write_result, write_text
from medbudget.images import make_grid, to_pil
from medbudget.studies.engines import plan
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
        found: dict[str, Any] = {"setting": row.group, "value": row.value, "paper": row.paper}
        for name, task in (("scores", row.score), ("compare", row.compare)):
            if (values := read(task)) is not None:
                found[name] = values
        rows.append(found)
    return {"rows": rows, "floor": read(study.floor) or {}}


def read_table(study: Study, store: Store) -> pd.DataFrame:
    """Return one row a line: setting, value, our distances with interval, p, the paper's numbers.

    Lines that are not computed yet have NaN.
    """
    lines = []
    for row in read_values(study, store)["rows"]:
        line = {"setting": row["setting"], "value": row["value"]}
        for name, score in row.get("scores", {}).items():
            line[name] = score["value"]
            line[f"{name}, low"], line[f"{name}, high"] = score["interval"]
        if "compare" in row:
            line["p"] = row["compare"]["p_value"]
        if row["paper"] is not None:
            line["paper FID"], line["paper MFID"] = row["paper"]
        lines.append(line)
    return pd.DataFrame(lines)


def read_floor(study: Study, store: Store) -> dict[str, tuple[float, float, float]]:
    """Return the real-versus-real floor: value, low, high by distance; empty if not computed."""
    scores = read_values(study, store)["floor"]
    return {name: (score["value"], *score["interval"]) for name, score in scores.items()}


def read_rows(study: Study, store: Store) -> dict[str, torch.Tensor]:
    """Return the first images of every line that is there, the same seeds on each."""
    return {
        f"{row.group} {row.value:g}": read_images(store, row.images[:1])[:COLUMNS]
        for row in study.rows
        if store.has(row.images[0])
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


def format_recorded(values: Mapping[str, Any]) -> pd.DataFrame:
    """Return a table recorded by `record_table` for print: ours with intervals, p, the paper's."""
    lines: list[dict[str, str]] = []
    for row in values["rows"]:
        line = {"setting": row["setting"], "value": f"{row['value']:g}"}
        for name, score in row["scores"].items():
            low, high = score["interval"]
            line[name] = f"{score['value']:.3g} [{low:.3g}, {high:.3g}]"
        line["p"] = f"{row['compare']['p_value']:.3f}" if "compare" in row else "–"
        for name, value in zip(("paper FID", "paper MFID"), row["paper"] or ("–", "–")):
            line[name] = str(value)
        lines.append(line)
    return pd.DataFrame(lines).set_index(["setting", "value"])


def _format(table: pd.DataFrame) -> list[list[str]]:
    distances = [str(name) for name in table if f"{name}, low" in table]
    lines = []
    for row in table.to_dict("records"):
        line = [row["setting"], f"{row['value']:g}"]
        for name in distances:
            value, low, high = row[name], row[f"{name}, low"], row[f"{name}, high"]
            line.append("missing" if pd.isna(value) else f"{value:.4g} [{low:.4g}, {high:.4g}]")
        p = row.get("p")
        line.append("–" if p is None or pd.isna(p) else f"{p:.3g}")
        for name in ("paper FID", "paper MFID"):
            value = row.get(name)
            line.append("–" if value is None or pd.isna(value) else f"{value:g}")
        lines.append(line)
    head = ["setting", "value", *distances, "p", "FID (paper)", "MFID (paper)"]
    return [head, *lines]


def write_report(study: Study, store: Store, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``figure.png`` into `folder`; return the page.

    The same results give the same bytes; times and machine stand in ``environment.json`` beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    s = study.settings
    cells = _format(read_table(study, store))
    state = plan(study.tasks, store)
    where = "phantoms" if s.phantom else "the images given"
    kind = "on the tiny base, " if s.base == "tiny" else f"on base {s.base}, "
    intro = (
        f"Study {study.name}, preset {study.preset}: synthetic images {kind}compared with {where}. "
        f"One setting at a time is changed from {s.steps} sampling steps, CFG {s.cfg_scale:g}, "
        f"{s.vectors} vectors and {s.cases} cases; n = {s.n} generated against {s.n} real. "
        f"In brackets 95 % intervals. p: permutation test of {cells[0][2] if len(cells[0]) > 5 else 'FD'} "
        "against the unchanged configuration, images paired by seed. The paper's FID and MFID have "
        "other features, images and n: compare directions, not values."
    )
    floor = "; ".join(
        f"{name} {value:.4g} [{low:.4g}, {high:.4g}]"
        for name, (value, low, high) in read_floor(study, store).items()
    )
    notes = [f"Real against real (floor, n = {s.n}): {floor or 'not computed'}."]
    missing = sum(state.total.values()) - sum(state.done.values())
    if missing:
        notes.append(f"{missing} of {sum(state.total.values())} results are still missing.")
    notes.append(
        f"Base hash {study.base_hash}; results named by a hash of settings and inputs. "
        "Not for clinical use."
    )
    rows = read_rows(study, store)
    if rows:
        grid = make_grid(torch.cat(list(rows.values())), columns=COLUMNS)
        with atomic_path(folder / "figure.png") as temporary, open(temporary, "wb") as file:
            to_pil(grid).save(file, format="PNG")
        lines = ", ".join(rows)
        caption = f"Synthetic images, the same seeds on every line; from the top: {lines}."
        notes.insert(0, caption)

    markdown = [f"# {study.name}, {study.preset}", "", intro, ""]
    markdown += ["| " + " | ".join(line) + " |" for line in cells[:1]]
    markdown += ["|" + "---|" * len(cells[0])]
    markdown += ["| " + " | ".join(line) + " |" for line in cells[1:]]
    markdown += [""] + (["![Synthetic images](figure.png)", ""] if rows else []) + notes
    write_text(folder / "report.md", "\n".join(markdown) + "\n")
    write_text(folder / "report.html", _page(study, intro, cells, notes, bool(rows)))
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("medbudget", "torch", "diffusers", "numpy")},
        "seconds": {t.key: store.seconds(t) for t in in_order(study.tasks) if store.has(t)},
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    return folder / "report.html"


def _page(study: Study, intro: str, cells: list[list[str]], notes: list[str], figure: bool) -> str:
    def line(values: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    table = line(cells[0], "th") + "".join(line(row, "td") for row in cells[1:])
    picture = (
        f'<p><img src="figure.png" alt="{html.escape(notes[0])}" style="image-rendering:pixelated;'
        'width:100%"></p>'
        if figure
        else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{study.name}, {study.preset}</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;"
        "overflow-x:auto}th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ccc}"
        f"</style></head><body><h1>{study.name}, {study.preset}</h1>"
        f"<p>{html.escape(intro)}</p><table>{table}</table>{picture}"
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        + "</body></html>\n"
    )
