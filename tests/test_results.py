"""Recorded results: written whole, refused when stale, and every one of the repository's is fresh."""

import argparse
import datetime
import json
import re
import shlex
from pathlib import Path

import pytest
from scripts import load_script

from medbudget.cli import app
from medbudget.results import (
    RESULT_KEYS,
    StaleResultError,
    load_result,
    results_folder,
    write_result,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "results").glob("*"))


def test_what_is_written_is_read(tmp_path):
    values = {"a": 1.5, "b": [1, 2]}
    path = write_result("x", values, command="python x.py", folder=tmp_path)
    assert load_result("x", folder=tmp_path) == values
    record = json.loads(path.read_text(encoding="utf-8"))
    assert list(record) == ["date", "command", "base_hash", "device", "values"]
    assert record["base_hash"] is None and "cores" in record["device"]
    assert load_result("x", base_hash="any", folder=tmp_path) == values  # needs no base


def test_a_result_of_another_base_is_refused_and_says_what_to_run(tmp_path):
    write_result("x", {}, command="python x.py --now", base_hash="aaa", folder=tmp_path)
    assert load_result("x", base_hash="aaa", folder=tmp_path) == {}
    for other in ("bbb", None):
        with pytest.raises(StaleResultError, match=r"hash aaa.*python x.py --now"):
            load_result("x", base_hash=other, folder=tmp_path)


def test_what_is_absent_is_named(tmp_path):
    write_result("there", {}, command="c", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'absent'.*there are: there"):
        load_result("absent", folder=tmp_path)


def test_a_failed_write_leaves_the_old_result(tmp_path):
    write_result("x", {"a": 1}, command="c", folder=tmp_path)
    with pytest.raises(TypeError):
        write_result("x", {"a": object()}, command="c", folder=tmp_path)
    assert load_result("x", folder=tmp_path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_repository_has_results():
    assert RESULTS and results_folder() == ROOT / "results"


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_every_recorded_result_is_whole_fresh_and_can_be_repeated(path, tiny):
    assert path.suffix == ".json", "only records belong into results/"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(record) == RESULT_KEYS
    assert load_result(path.stem, base_hash=tiny.hash), "no values"  # refuses a stale one
    assert datetime.date.fromisoformat(record["date"]) >= datetime.date(2026, 1, 1)
    assert record["device"]
    assert not re.search(r"/(home|root|work|tmp|mnt|Users)/", path.read_text(encoding="utf-8")), (
        "a machine path"
    )
    for command in record["command"].split(";"):
        words = [w for w in shlex.split(command) if "=" not in w]
        if words[0] == "medbudget":
            assert words[2] in app[words[1]]
            continue
        assert words[0] == "python"
        script = ROOT / words[1] if words[1] != "-m" else ROOT / f"{words[2].replace('.', '/')}.py"
        assert script.is_file(), command


def test_the_documentation_quotes_the_recorded_coverage():
    from medbudget.metrics import frechet_interval

    rows = {}
    for line in (frechet_interval.__doc__ or "").splitlines():
        if found := re.fullmatch(r"\s*((?:slow|fast), \w+) +(\d+) % +(\d+) % +(\d+) %", line):
            rows[found[1]] = [int(found[i]) for i in (2, 3, 4)]
    recorded = load_result("metrics_coverage")
    cases = [case for case, row in recorded.items() if isinstance(row, dict)]
    assert sorted(rows) == sorted(cases) and len(rows) == 4
    for case, quoted in rows.items():
        for way, percent in zip(("influence", "bootstrap", "paper"), quoted):
            assert abs(100 * recorded[case][way]["coverage"] - percent) <= 0.5, (case, way)


def test_recorded_coverage_has_the_directions_that_are_taught():
    recorded = load_result("metrics_coverage")
    for case, row in recorded.items():
        if not isinstance(row, dict):
            continue
        assert row["influence"]["coverage"] > 0.85 and row["bootstrap"]["coverage"] > 0.9, case
        if case.startswith("slow"):
            assert row["paper"]["coverage"] == row["paper_contains_its_own_estimate"] == 0


def test_recorded_distances_fall_with_n():
    recorded = load_result("fd_by_n")
    for extractor in ("efficientnet-lite0", "layout"):
        floor = recorded[extractor]["floor"]
        assert floor["y"] == sorted(floor["y"], reverse=True)
        assert all(a <= v <= b for a, v, b in zip(floor["low"], floor["y"], floor["high"]))


def test_the_bases_bars_are_recorded_and_agree_where_they_overlap(tiny):
    """A phantom with all the noise there is, denoised, is a sample: the same images two ways."""
    bars = load_result("tiny_base", base_hash=tiny.hash)
    assert set(bars) == {
        "autoencoder", "inversion", "trends", "disease", "axis", "xrays", "limits",
    }  # fmt: skip
    values = {row["name"]: row["value"] for rows in bars.values() for row in rows}
    for name in ("prostate tumour", "chest healthy", "histology normal"):
        sampled = values[f"{name}: FD of TI against the floor"]
        assert values[f"{name}: FD after noise of t = 999"] == pytest.approx(sampled, rel=0.01)
        decoded = values[f"{name}: FD of reconstructions"]
        assert values[f"{name}: FD after noise of t = 0"] == pytest.approx(decoded, rel=0.01)


def test_the_command_of_bars_names_the_real_images_that_they_need():
    script = load_script(ROOT / "benchmarks" / "tiny_base.py")
    args = argparse.Namespace(n_prompt=16, seeds=3, out=Path("results/x.json"))

    def command(**names):
        return script.make_command({k: [{"name": v, "n": 200}] for k, v in names.items()}, args)

    end = "--n-prompt 16 --seeds 3 --out results/x.json"
    start = "python benchmarks/tiny_base.py"
    assert command(axis="a", limits="b") == f"{start} axis limits --n 200 {end}"
    assert command(xrays="normal: FD") == f"{start} xrays --n 200 --real FOLDER {end}"
    with_real = command(autoencoder="X-rays normal: PSNR")
    assert with_real == f"{start} autoencoder --n 200 --real FOLDER {end}"
    assert "--real" not in command(autoencoder="chest healthy: PSNR")


def test_every_recorded_fault_was_survived():
    rows = load_result("faults")["faults"]
    assert {(row["command"], row["fault"]) for row in rows} == {
        (command, f"kill -9 at a {kind}")
        for command in (
            "invert", "sample", "inpaint", "prepare", "classify", "study", "stylegan3", "reader",
        )
        for kind in ("random moment", "file operation")
    }  # fmt: skip
    assert all(row["survived"] == row["tried"] > 0 for row in rows)
