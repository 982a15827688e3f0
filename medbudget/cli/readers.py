"""medbudget reader-study: pairs, answers, analysis."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from medbudget.cli.options import Overwrite, Paths, Text, check_free, write_scores

app = App(
    name="reader-study", help="Which of two images looks better? A blinded study with readers."
)


@app.command
def create(
    a: Path, b: Path, /, *, out: Path, seed: int | None = None, key: Path | None = None,
    n_pairs: int = 50, repeats: float = 0.1, question: Text | None = None,
) -> None:  # fmt: skip
    """Make blinded pairs of two folders' images, and the key in another file.

    Args:
        a: folder of images: the source that should win
        b: folder of images of the other source
        out: the study's folder, for readers
        seed: default: a random one, kept in the key; tell no reader: it gives it away
        key: key file; default OUT.key.json
        n_pairs: paper: 50
        repeats: share of the pairs that is asked twice
        question: default: Which image looks more like a real one?
    """
    from medbudget.reader import QUESTION, ReaderStudy, compute_power, default_key

    study = ReaderStudy.create(
        a, b, out, seed=seed, n_pairs=n_pairs, repeats=repeats, question=question or QUESTION,
        key=key,
    )  # fmt: skip
    print(f"wrote {out}: study {study.id}, {len(study.pairs)} questions on {n_pairs} pairs")
    print(f"wrote {key or default_key(out)}: the key; keep it from the readers")
    found = ", ".join(f"{p:.0%}: {compute_power(n_pairs, p):.0%}" for p in (0.6, 0.7, 0.8))
    print(f"chance of finding a true preference of {found}")


@app.command
def export(study: Path, /, *, out: Path, overwrite: Overwrite = False) -> None:
    """Write the study as one page that works offline in a browser, without Python.

    Args:
        study: the study's folder
        out: HTML file
    """
    from medbudget.reader import ReaderStudy

    ReaderStudy.load(study).export(out, overwrite=overwrite)
    size = out.stat().st_size / 2**20
    print(f"wrote {out} ({size:.1f} MiB): send it to readers, without the key")


@app.command
def analyse(
    study: Path, /, *, key: Path | None = None, answers: Paths = None, out: Path | None = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Import answers, open the key, test preference, sides and agreement.

    Args:
        study: the study's folder
        key: key file; default STUDY.key.json
        answers: file that a reader's page saved; repeatable; imported first
        out: also write the scores as JSON
    """
    from medbudget.metrics import format_table
    from medbudget.reader import ReaderStudy, required_pairs

    check_free(out, overwrite)
    loaded = ReaderStudy.load(study)
    for file in answers or []:
        reading = loaded.import_answers(file)
        print(f"{reading.name}: {len(reading.answers())} answers")
    scores = loaded.analyse(key)
    print(format_table(scores))
    first = scores[0]
    for name, share in zip(("as found", "lower limit"), (first.value, *(first.interval or ())[:1])):
        try:
            n = required_pairs(share)
        except ValueError as error:
            print(f"next study, {name}: {error}")
        else:
            print(f"next study, {name}: {n} pairs show {share:.1%} with a power of 80%")
    write_scores(scores, out)
