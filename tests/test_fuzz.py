"""Damaged input of every format: a right result or one clear error; never a hang, never a crash."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import load_script

from medbudget import files, results
from medbudget.data import tables
from medbudget.data.folder import prepare_folder
from medbudget.data.tables import read_table
from medbudget.prompts import PromptError, parse_prompt

ROOT = Path(__file__).resolve().parent.parent
INPUTS = 400
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def fuzz():
    return load_script(ROOT / "benchmarks" / "fuzz.py")


@pytest.mark.slow
def test_hundreds_of_damaged_files_do_no_harm(fuzz):
    tally, wrong = fuzz.fuzz(INPUTS, seed=20)
    assert not wrong, "\n".join(wrong[:10])
    assert sum(t[o] for t in tally.values() for o in fuzz.OUTCOMES) == INPUTS
    assert max(t["peak MiB"] for t in tally.values()) < 2000  # 700 of them the libraries
    assert set(tally) == set(fuzz.READERS)
    assert all(t["refused"] > 0 for t in tally.values())
    read = {name for name, t in tally.items() if t["read"]}
    assert read >= set(fuzz.READERS) - {"StyleGAN3 .pkl"}  # its seed holds no networks


def test_the_fuzzer_sees_harm(fuzz, monkeypatch):
    """Errors that are not the library's, crashes and hangs are told apart."""
    import signal

    def other(path):
        raise KeyError("x")

    monkeypatch.setitem(fuzz.READERS, "PNG", other)
    outcome, why = fuzz.try_input("PNG", Path("x"))
    assert outcome == "error" and why.startswith("KeyError")
    monkeypatch.setitem(fuzz.READERS, "PNG", lambda path: int("x"))
    assert fuzz.try_input("PNG", Path("x"))[0] == "error"  # a ValueError, but not of ours
    for number, expected in ((signal.SIGSEGV, "crash"), (signal.SIGPROF, "hang")):
        worker = fuzz.Worker.__new__(fuzz.Worker)
        command = [sys.executable, "-c", f"import os; input(); os.kill(os.getpid(), {number:d})"]
        worker.process = fuzz.subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        assert worker.read("PNG", 0, 0, 5) == [(expected, signal.Signals(number).name)]


def test_preparing_damaged_files_leaves_nothing_half_written(fuzz, tmp_path):
    (tmp_path / "seeds").mkdir()
    seeds = fuzz.make_seeds(tmp_path / "seeds")
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    n = 0
    for name in ("PNG", "JPEG", "DICOM", "MHA", "NIfTI"):
        for i in range(24):
            file, content = seeds[name][i % len(seeds[name])]
            changed = content if i < 2 else fuzz.mutate(rng, content)
            (folder / f"{n:03d}{''.join(Path(file).suffixes)}").write_bytes(changed)
            n += 1
    report = prepare_folder(folder, tmp_path / "out", proportions=[1], size=16)
    assert report.made + len(report.broken) <= n and report.made >= 5 and len(report.broken) > 20
    assert all(reason.strip() for _, reason in report.broken)
    rows = read_table(tmp_path / "out" / "manifest.csv")
    assert len(rows) == report.made
    for row in rows:
        assert files.hash_file(tmp_path / "out" / row["file"]) == row["sha256"]
    known = {"manifest.csv", "settings.json", "contact_sheet.png", *(row["file"] for row in rows)}
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert found == known


# ------------------------------------------------------------------------- text

WORDS = st.sampled_from(
    ["AND", "and", "<a>", "<b>", ":", "0.5", "-1", "*", " ", "1e9", "x", "\n", "nan"]
)
PROMPTS = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=12).map("".join))


@QUICK
@given(PROMPTS)
def test_any_prompt_is_parts_with_finite_weights_or_one_error(text):
    try:
        parts = parse_prompt(text)
    except PromptError as error:
        assert "^" in str(error).splitlines()[-1]
        return
    assert parts and all(np.isfinite(weight) for _, weight in parts)


@QUICK
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_table_is_rows_of_text_or_one_error(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    try:
        rows = read_table(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(v, str) for row in rows for pair in row.items() for v in pair)


@QUICK
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=6,
    )
)
def test_fields_come_back_stripped_of_blanks_alone(tmp_path, rows):
    path = tmp_path / "x.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "class"], *rows])
    if any("\0" in field for row in rows for field in row):
        return  # Python 3.10's csv refuses these
    found = [[row["file"], row["class"]] for row in read_table(path)]
    stripped = [[field.strip(tables.BLANK) for field in row] for row in rows]
    assert found == [row for row in stripped if row != ["", ""]]


def test_the_recorded_run_is_long_and_without_harm(fuzz):
    found = results.load_result("fuzz")
    rows = found["rows"]
    assert found["peak_mib"] < 2000
    assert {row["format"] for row in rows} == set(fuzz.READERS)
    assert sum(row["inputs"] for row in rows) >= 30_000
    assert not any(row[bad] for row in rows for bad in ("error", "hang", "crash"))
    json.dumps(rows)
