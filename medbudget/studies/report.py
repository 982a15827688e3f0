"""The report of a study: ours beside the paper's numbers, with intervals, figure and provenance."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from medbudget.files import check_writable, write_json, write_text
from medbudget.images import make_grid, save_images
from medbudget.results import write_result
from medbudget.studies.study import Study
from medbudget.studies.tasks import Store, count

COLUMNS = 8
PRICES = {"images_seen": ("images seen", 1), "seconds": ("seconds", 1), "bytes": ("kB", 1000)}
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{0}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}}
th,td{{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ccc}}
img{{max-width:100%;image-rendering:pixelated}}
</style></head><body><h1>{0}</h1>"""


def read_values(study: Study, store: Store) -> dict[str, Any]:
    """Return ``rows`` and ``floor`` as JSON types: of each row, what is there of scores and test."""

    def read(**tasks: Any) -> dict[str, Any]:
        there = {name: task for name, task in tasks.items() if task and store.has(task)}
        return {name: store.read_json(task) for name, task in there.items()}

    rows = [
        {"setting": row.group, "value": row.value, "paper": dict(row.paper)}
        | read(scores=row.score, compare=row.compare, details=row.details)
        for row in study.rows
    ]
    return {"rows": rows, "floor": {}, **read(floor=study.floor)}


def format_values(
    values: Mapping[str, Any], head: Sequence[str] = ("setting", "value")
) -> pd.DataFrame:
    """Return a table for print of what `read_values` or `record_table` gave.

    Scores with their intervals, p where there are tests, what a training took and the size of its
    file where that is known, the paper's numbers; "missing" where a score is not computed yet.
    """
    rows = values["rows"]
    columns = dict.fromkeys(name for row in rows for name in row.get("scores", {})) or ["score"]
    papers = dict.fromkeys(name for row in rows for name in row["paper"])
    tests = any("compare" in row for row in rows)
    prices = PRICES if any("bytes" in row.get("details", {}) for row in rows) else {}
    lines = []
    for row in rows:
        line = dict(zip(head, (row["setting"], _format_value(row["value"]))))
        scores, details = row.get("scores", {}), row.get("details", {})
        empty = "–" if "scores" in row else "missing"
        line |= {name: _format_score(scores[name]) if name in scores else empty for name in columns}
        if tests:
            line["p"] = f"{row['compare']['p_value']:.3f}" if "compare" in row else "–"
        for key, (name, unit) in prices.items():
            line[name] = f"{details[key] / unit:,.0f}" if key in details else "–"
        line |= {f"{name} (paper)": str(row["paper"].get(name, "–")) for name in papers}
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


def check_done(study: Study, store: Store) -> None:
    """Raise unless all results of a study are there."""
    missing = sum(total - done for done, total in count(study.tasks, store).values())
    if missing:
        raise ValueError(
            f"{missing} results of {study.name} are missing: run the study before you record it"
        )


def record_table(study: Study, store: Store, command: str) -> Path:
    """Write the finished table to the recorded results, for a chapter to show."""
    if study.name == "stylegan3":
        raise ValueError("this study's networks are recorded too: python -m pretraining.rivals")
    check_done(study, store)
    name = "_".join([study.name, study.preset, *sorted(study.sources)])
    values = read_values(study, store)
    return write_result(name, values, command=command, base_hash=study.base_hash)


def save_lines(study: Study, store: Store, folder: Path) -> list[Path]:
    """Write the first `n` images of every finished line as PNG files, a new folder for each line.

    They are named by number alone, as a reader study wants them.
    """
    rows = [row for row in study.rows if row.images and all(map(store.has, row.images))]
    single = len({row.group for row in rows}) == len(rows)
    names = [row.group if single else f"{row.group} {_format_value(row.value)}" for row in rows]
    folders = [folder / name for name in names]
    for path in folders:
        if path.exists():
            raise FileExistsError(f"{path} is there already: choose another place")
    for path, row in zip(folders, rows):
        save_images(store.read_images(row.images)[: study.settings.n], path)
    return folders


def check_report(folder: Path) -> None:
    """Raise unless a report can be written into `folder`: nothing else's is replaced."""
    if (folder / "report.md").exists() and not (folder / "environment.json").exists():
        raise FileExistsError(f"{folder / 'report.md'} is no report of a study: name another place")
    check_writable(folder / "report.md")


def write_report(study: Study, store: Store, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``figure.png`` into `folder`; return the page.

    The same results give the same bytes; versions and machine stand in ``environment.json``.
    """
    check_report(folder)
    title = f"{study.name}, {study.preset}"
    values = read_values(study, store)
    table = format_values(values, study.head)
    if not any(row.score for row in study.rows):
        table = table.drop(columns="score")
    about = f"Study {study.name}, preset {study.preset}. {study.about} In brackets 95 % intervals."
    notes = []
    if study.floor is not None:
        floor = "; ".join(f"{name} {_format_score(s)}" for name, s in values["floor"].items())
        notes.append(f"Real against real (floor): {floor or 'not computed'}.")
    done, total = (sum(numbers) for numbers in zip(*count(study.tasks, store).values()))
    if done < total:
        notes.append(f"{total - done} of {total} results are still missing.")
    notes.append(
        f"Base {study.settings.base} {study.base_hash}; results named by a hash of settings and "
        "inputs. Not for clinical use."
    )
    caption = _draw_figure(study, store, folder)
    cells = [list(map(str, table)), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    figure = [f"![{caption}](figure.png)", caption] if caption else []
    markdown = [f"# {title}", about, lines, *figure, *notes]
    write_text(folder / "report.md", "\n\n".join(markdown) + "\n")
    if caption:
        text = escape(caption)
        image = f'<img src="figure.png" alt="{text}">'
        figure = [f"<figure>{image}<figcaption>{text}</figcaption></figure>"]
    page = [
        HEAD.format(title), f"<p>{escape(about)}</p>", table.to_html(index=False, border=0),
        *figure, *(f"<p>{escape(note)}</p>" for note in notes), "</body></html>\n",
    ]  # fmt: skip
    write_text(folder / "report.html", "\n".join(page))
    versions = {name: version(name) for name in ("medbudget", "torch", "diffusers", "numpy")}
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    write_json(folder / "environment.json", machine | versions)
    return folder / "report.html"


def _draw_figure(study: Study, store: Store, folder: Path) -> str:
    """Write the first images of every line as one picture; return its caption, "" without images."""
    rows = [row for row in study.rows if row.images and store.has(row.images[0])]
    if not rows:
        return ""
    blocks = [store.read_images(row.images[:1]) for row in rows]
    columns = min(COLUMNS, *map(len, blocks))
    grid = make_grid(torch.cat([block[:columns] for block in blocks]), columns=columns)
    save_images(grid[None], folder, names=["figure"])
    names = ", ".join(f"{row.group} {_format_value(row.value)}".strip() for row in rows)
    return f"Synthetic images, the same seeds on every line; from the top: {names}."
