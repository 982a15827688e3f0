"""medbudget study: the paper's tables and figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, Parameter

from medbudget.cli.options import Text, Words

app = App(name="study", help="The paper's tables and figures as studies.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Which study.

    Parameters
    ----------
    store
        folder of results; shared by all machines
    preset
        tiny, colab or paper
    data
        ROLE=FOLDER of real images; of table1: train, reference, floor; of table2: prostate, chest,
        histology as prepare writes them (tiny without --data: phantoms)
    """

    store: Path = Path("studies")
    preset: Text = "tiny"
    data: Words = None


DEFAULT = Options()


def _plan(name: str, o: Options) -> tuple[Any, Any]:
    return _plan_study(name, o.preset, o.store, o.data)


def _plan_study(name: str, preset: str, store: Path, data: list[str] | None) -> tuple[Any, Any]:
    from medbudget import load_base
    from medbudget.studies import Store, make_study
    from medbudget.studies.catalogue import find_recipe

    recipe = find_recipe(name, preset)
    sources = {}
    for item in data or []:
        role, equals, folder = item.partition("=")
        if not equals:
            raise ValueError(
                f"--data {item!r} is not ROLE=FOLDER; roles of {name}: "
                f"{', '.join(recipe.roles) or 'none'}"
            )
        sources[role] = Path(folder)
    base = load_base(recipe.presets[preset].base)
    study = make_study(name, preset, base_hash=base.hash, sources=sources)
    return study, Store(store, sources)


def _print_plan(study: Any, store: Any, found: Any) -> None:
    from medbudget.studies import simulate
    from medbudget.studies.live import format_time
    from medbudget.studies.planning import TRIAL

    print(f"{study.name}, preset {study.preset}, base {study.base} {study.base_hash}")
    print(f"{'tasks':<12}{'done':>6}{'of':>6}   {'made from':<18}{'the rest':<10}measured by")
    for kind, total in found.total.items():
        seconds, speed = found.seconds[kind], found.speed.get(kind)
        left = "unknown" if seconds is None else format_time(seconds)
        needs = ", ".join(found.needs[kind]) or "–"
        source = speed.source if speed else ""
        print(f"{kind:<12}{found.done[kind]:>6}{total:>6}   {needs:<18}{left:<10}{source}")
    if found.all_seconds is None:
        print("the rest is unknown until one of each kind is done; --dry-run tries a small one")
    elif found.all_seconds:
        ends = {
            workers: simulate(
                study.tasks,
                lambda task: 0.0 if store.has(task) else found.speed[task.kind].seconds(task),
                workers,
            )[0]
            for workers in (1, 2, 8)
        }
        print(
            "estimated: "
            + ", ".join(
                f"{format_time(end)} on {n} worker{'s'[: n - 1]}" for n, end in ends.items()
            )
        )
    if any(speed.source == TRIAL for speed in found.speed.values()):
        print("small trials are timed on one core; while other programs run, they are too slow")
    if found.bytes:
        print(f"estimated: {found.bytes / 2**20:.1f} MiB of disk for what is missing")


def _run_study(
    name: str, store: Path, preset: str, data: list[str] | None, engine: str,
    workers: int | None, address: str | None, shard: str, dry_run: bool,
) -> None:  # fmt: skip
    import torch

    from medbudget.results import count_cores
    from medbudget.studies import measure_speed, plan, run, write_report

    study, results = _plan_study(name, preset, store, data)
    if dry_run:
        if None in plan(study.tasks, results).seconds.values():
            print("timing a small task of each kind …", file=sys.stderr)
            measure_speed(study.tasks, results)
        _print_plan(study, results, plan(study.tasks, results))
        return
    if engine == "local" and workers is None and not torch.cuda.is_available():
        workers = min(count_cores(), 4)
    made = run(study.tasks, results, engine=engine, workers=workers, address=address, shard=shard)
    print(f"made {made} results in {store}")
    if shard == "1/1":
        print(f"report: {write_report(study, results, store / f'{name}-{preset}')}")
    else:
        options = "".join(f" --data {item}" for item in data or [])
        print(
            "when all shards are done: "
            f"medbudget study report {name} --preset {preset} --store {store}{options}"
        )


def _add(name: str, doc: str) -> None:
    def command(
        *, options: Options = DEFAULT, engine: Text = "local", workers: int | None = None,
        address: Text | None = None, shard: Text = "1/1", dry_run: bool = False,
    ) -> None:  # fmt: skip
        o = options
        _run_study(name, o.store, o.preset, o.data, engine, workers, address, shard, dry_run)

    command.__doc__ = f"""{doc}

    Parameters
    ----------
    engine
        local, or ray
    workers
        processes of engine local; default: GPUs, else cores up to 4
    address
        of a Ray cluster
    shard
        i/k: the i-th of k shares of the tasks
    dry_run
        print the plan, and what it will take
    """
    app.command(command, name=name)


_add("table1", "Table 1: sampling steps, guidance, vectors and cases.")
_add("figure5", "Figure 5: the same seeds on every line of Table 1.")
_add("table2", "Table 2: classifiers trained on real and synthetic images.")
_add("interpolation", "Figures 2 and 8: a disease score along each axis from healthy.")


@app.command
def stylegan3(
    *, store: Path = Path("studies/stylegan3"), preset: Text = "tiny", data: Words = None,
    start: Path | None = None, kimg: float | None = None, record: bool = False,
    device: Text | None = None,
) -> None:  # fmt: skip
    """Section 4.2: StyleGAN3 and Textual Inversion on the same cases.

    Parameters
    ----------
    store
        folder of results
    preset
        tiny or paper
    data
        ROLE=FOLDER of real images, for train and reference
    start
        networks to fine-tune: *.safetensors, or an official .pkl; paper: AFHQv2
    kimg
        thousands of images seen; paper: 100
    record
        also into results/ and the package, for the book
    device
        cpu or cuda; default: cuda if there is one
    """
    from dataclasses import replace

    from medbudget.studies import stylegan3 as study
    from medbudget.stylegan3 import StyleGAN3, import_official

    if preset not in study.PRESETS:
        raise ValueError(f"unknown preset {preset!r}; allowed are {', '.join(study.PRESETS)}")
    if record and (preset != "tiny" or data or start):
        raise ValueError("--record keeps preset tiny on phantoms from the shipped networks only")
    sources = {}
    for item in data or []:
        role, equals, folder = item.partition("=")
        if not equals:
            raise ValueError(
                f"--data {item!r} is not ROLE=FOLDER with a role of {', '.join(study.ROLES)}"
            )
        sources[role] = Path(folder)
    settings = study.PRESETS[preset]
    if kimg is not None:
        settings = replace(settings, overrides={"kimg": kimg})
    networks = None
    if start is not None:
        read = import_official if start.suffix == ".pkl" else StyleGAN3.load
        networks = read(start)
    values = study.run_comparison(
        store, preset=preset, settings=settings, sources=sources, start=networks, device=device
    )
    for name in ("stylegan3", "diffusion"):
        about = values[name]
        print(f"{name}: {about['images_seen']} images seen in {about['seconds'] / 60:.1f} min")
        for score in values["scores"]["none"][name]:
            print(f"  {score['name']}: {score['value']:.4g}")
    print(f"images and scores in {store}")
    if record:
        options = f" --kimg {kimg:g}" if kimg is not None else ""
        command = f"medbudget study stylegan3 --store {store.name} --preset tiny{options} --record"
        print(f"recorded: {study.record_comparison(store, command)}")


@app.command
def status(name: Text, /, *, options: Options = DEFAULT) -> None:
    """Print what is done, what is missing and how long that will take.

    Parameters
    ----------
    name
        table1, figure5, table2 or interpolation
    """
    from medbudget.studies import plan

    study, results = _plan(name, options)
    _print_plan(study, results, plan(study.tasks, results))


@app.command
def report(name: Text, /, *, options: Options = DEFAULT, record: bool = False) -> None:
    """Write the report of what is done: Markdown, HTML, figure.

    Parameters
    ----------
    name
        table1, figure5, table2 or interpolation
    record
        also into results/, for the book's chapters
    """
    from medbudget.studies import record_table, write_report

    study, results = _plan(name, options)
    o = options
    print(f"report: {write_report(study, results, o.store / f'{name}-{o.preset}')}")
    if record:
        more = f"--preset {o.preset} --store {o.store.name}"
        command = f"medbudget study {name} {more}; medbudget study report {name} {more} --record"
        print(f"recorded: {record_table(study, results, command)}")


@app.command
def clean(name: Text, /, *, options: Options = DEFAULT, yes: bool = False) -> None:
    """Delete results in the store that this study does not use, and abandoned scratch files.

    Parameters
    ----------
    name
        table1, figure5, table2 or interpolation
    yes
        delete; else only say what
    """
    from medbudget.studies import clean as run

    study, results = _plan(name, options)
    files = run(study.tasks, results, delete=yes)
    size = sum(files.values()) / 2**20
    print(f"{'deleted' if yes else 'would delete'} {len(files)} files, {size:.1f} MiB")
    if files and not yes:
        print("add --yes to delete them")
