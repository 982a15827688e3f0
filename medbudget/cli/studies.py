"""medbudget study: the paper's tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from medbudget.cli.options import Text, Words

app = App(name="study", help="The paper's tables and figures as studies.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Which study.

    Args:
        store: folder of results; shared by all machines
        preset: tiny, colab or paper
        data: ROLE=FOLDER of real images, or several; an unknown role lists those of the study
        changes: SETTING=VALUE in place of the preset's, such as n=100 or gan.kimg=30
    """

    store: Path = Path("studies")
    preset: Text = "tiny"
    data: Words = None
    changes: Annotated[
        list[str] | None, Parameter(name="--set", consume_multiple=False, metavar="TEXT...")
    ] = None

    def plan(self, name: str) -> tuple[Any, Any]:
        """Return the study and its store."""
        from medbudget.loading import load_base
        from medbudget.studies import make_study, parse_changes, parse_sources, study_settings

        settings = study_settings(name, self.preset, **parse_changes(self.changes or []))
        sources = parse_sources(self.data or [])
        base = load_base(settings.base)
        study = make_study(
            name, self.preset, base_hash=base.hash, sources=sources, settings=settings
        )
        return study, study.store(self.store)

    def repeat(self, **options: str) -> str:
        """Return these options as a command line has them, without the folders that data lie in."""
        words = [f"--{key} {value}" for key, value in options.items()]
        for item in self.data or []:
            role, _, path = item.partition("=")
            words.append(f"--data {role}={Path(path).name}")
        words += [f"--set '{item}'" for item in self.changes or []]
        return " ".join([f"--preset {self.preset}", *words])


DEFAULT = Options()


def _add(name: str, doc: str) -> None:
    def command(
        *, options: Options = DEFAULT, engine: Text = "local", workers: int | None = None,
        address: Text | None = None, shard: Text = "1/1",
    ) -> None:  # fmt: skip
        import torch

        from medbudget.results import count_cores
        from medbudget.studies import check_report, run, write_report

        study, store = options.plan(name)
        if engine == "local" and workers is None and not torch.cuda.is_available():
            workers = min(count_cores(), 4)
        folder = options.store / f"{name}-{options.preset}"
        check_report(folder)
        made = run(study.tasks, store, engine=engine, workers=workers, address=address, shard=shard)
        print(f"made {made} results in {options.store}")
        if shard == "1/1":
            print(f"report: {write_report(study, store, folder)}")
        else:
            more = options.repeat(store=str(options.store))
            print(f"when all shards are done: medbudget study report {name} {more}")

    command.__doc__ = f"""{doc}

    Args:
        engine: local, or ray
        workers: processes of engine local; default: GPUs, else cores up to 4
        address: of a Ray cluster
        shard: i/k: the i-th of k shares of the tasks
    """
    app.command(command, name=name)


_add("table1", "Table 1: sampling steps, guidance, vectors and cases.")
_add("figure5", "Figure 5: the same seeds on every line of Table 1.")
_add("table2", "Table 2: classifiers trained on real and synthetic images.")
_add("interpolation", "Figures 2 and 8: images, and a disease score, along each axis from healthy.")
_add("stylegan3", "Section 4.2: StyleGAN3 and Textual Inversion on the same cases.")
_add("budget", "Words, adapters, full tuning and StyleGAN3 at an equal budget.")


@app.command
def status(name: Text, /, *, options: Options = DEFAULT) -> None:
    """Print what is done and what is missing.

    Args:
        name: table1, figure5, table2, interpolation, stylegan3 or budget
    """
    from medbudget.studies import count

    study, store = options.plan(name)
    print(f"{study.name}, preset {study.preset}, base {study.settings.base} {study.base_hash}")
    print(f"{'results':<12}{'done':>6}{'of':>6}")
    for kind, (done, total) in count(study.tasks, store).items():
        print(f"{kind:<12}{done:>6}{total:>6}")


@app.command
def report(
    name: Text, /, *, options: Options = DEFAULT, record: bool = False, images: Path | None = None
) -> None:
    """Write the report of what is done: Markdown, HTML, figure.

    Args:
        name: table1, figure5, table2, interpolation, stylegan3 or budget
        record: also into results/, for the book's chapters
        images: also each line's images as PNG, in folders here; for a reader study
    """
    from medbudget.studies import record_table, save_lines, write_report

    study, store = options.plan(name)
    print(f"report: {write_report(study, store, options.store / f'{name}-{options.preset}')}")
    for path in save_lines(study, store, images) if images else ():
        print(f"images: {path}")
    if record:
        more = options.repeat(store=options.store.name)
        command = f"medbudget study {name} {more}; medbudget study report {name} {more} --record"
        print(f"recorded: {record_table(study, store, command)}")
