"""Benchmarks run and record what the book's page reads; full size only where it is asked for."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script

from medbudget import Embedding, make_phantoms
from medbudget.results import write_result

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def timings():
    return load_script(ROOT / "book" / "timings.py")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_and_the_page_shows_it(timings, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    record = load_script(ROOT / "benchmarks" / "gpu.py").main(
        ["--device", "cpu", "--small", "--no-fast", "--out", str(out)]
    )
    rows = {(row["name"], row["batch"]): row for row in record["rows"]}
    floor, ours = rows["TI: floor (networks only)", 1], rows["TI: ours, eager", 1]
    assert ours["images per s"] == pytest.approx(1000 / ours["ms"], rel=0.01)
    assert 0 < floor["share of ceiling"] < 1.5 and ours["peak GiB"] is None
    two = rows["TI: ours, eager", 2]
    assert two["images per s"] == pytest.approx(2000 / two["ms"], rel=0.01)
    goals = record["goals"]
    theirs = rows["TI: diffusers' loop", 1]["ms"]
    assert goals["diffusers' loop / ours"]["measured"] == pytest.approx(
        theirs / ours["ms"], rel=0.01
    )
    minutes = goals["50,000 steps at batch 1, minutes"]["measured"]
    assert minutes == pytest.approx(50_000 * ours["ms"] / 6e4, rel=0.01)
    said = capsys.readouterr().out
    assert "goal: under 15" in said and "TI: diffusers' loop" in said
    page = timings.format_record(json.loads(out.read_text(encoding="utf-8")))
    assert f"| TI: diffusers' loop | 1 | {theirs} |" in page and "matrix-multiply" in page


def test_what_runs_out_of_memory_or_time_is_named_not_dropped(monkeypatch):
    import torch

    gpu = load_script(ROOT / "benchmarks" / "gpu.py")
    bench = gpu.Bench(torch.device("cpu"), 0.01, deadline=float("inf"))

    def short():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert bench.add("a", 8, short) is None
    bench.deadline = 0
    assert bench.add("b", 1, lambda: 1.0) is None
    assert [row["note"] for row in bench.rows] == ["out of memory", "skipped: time was up"]


def test_the_page_shows_every_record_and_says_what_is_missing(timings, tmp_path):
    page = (ROOT / "book" / "timings.md").read_text(encoding="utf-8")
    real = timings.fill_page("timings", page, ROOT / "benchmarks" / "results", ROOT / "results")
    real = timings.fill_chapters(real, {"00_ten_pictures": 41.7})
    assert "diffusers' way, ms per step" in real and "<!--" not in real
    gpu = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))
    assert f"| invert, counted GiB | {gpu['counted']['invert, counted GiB']} |" in real
    assert "| [](../notebooks/00_ten_pictures.ipynb) | 42 |" in real
    assert "ran no chapter" in timings.fill_chapters(page, {})
    empty = timings.fill_page("timings", page, tmp_path)
    assert empty.count("Not measured yet") == 4
    assert "Every figure of a GPU is missing" in empty
    with pytest.raises(ValueError, match="must have <!-- gpu --> once"):
        timings.fill_page("timings", "nothing", tmp_path)


def test_the_page_on_reliability_shows_its_records_and_says_what_is_missing(timings, tmp_path):
    page = (ROOT / "book" / "reliability.md").read_text(encoding="utf-8")
    empty = timings.fill_page("reliability", page, tmp_path)
    assert empty.count("Not measured yet") == 4 and "<!--" not in empty
    fault = {"fault": "kill -9", "command": "invert", "tried": 50, "survived": 49, "note": "x"}
    record = {"date": "2026-11-24", "device": "CPU", "command": "python benchmarks/faults.py"}
    rows = [{"format": "PNG", "inputs": 3, "read": 1}, {"format": "JPEG", "inputs": 4, "read": 2}]
    for name, values in (("faults", {"faults": [fault]}), ("fuzz", {"rows": rows})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, "values": values}))
    filled = timings.fill_page("reliability", page, tmp_path)
    assert filled.count("Not measured yet") == 2
    assert "| kill -9 | invert | 50 | 49 | x |" in filled and "2026-11-24" in filled
    assert "| **all** | 7 | 3 |" in filled  # the tally
    real = timings.fill_page("reliability", page, ROOT / "results")
    assert "NOT met" not in real


def test_a_short_soak_stays_flat(tiny):
    soak = load_script(ROOT / "benchmarks" / "soak.py")
    values = soak.main(["--images", "10", "--steps", "1", "--embeddings", "10"])
    assert len(values["memory_mib"]) == 10
    assert soak.growth(values["memory_mib"])[2] < soak.GOAL
    assert len(set(values["open_files"][2:])) == 1
    assert soak.growth([1.0] * 10 + [2.0] * 90)[2] == 0
    assert soak.growth([float(i) for i in range(100, 200)])[2] > 50


def test_the_readme_has_the_recorded_times_of_the_chapters(timings):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = ROOT / "book" / "chapter_times.json"
    seconds = {}
    if record.is_file():
        seconds = json.loads(record.read_text(encoding="utf-8"))["values"]["seconds"]
        assert set(seconds) <= {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert timings.fill_readme(readme, seconds) == readme, "python book/build.py --fresh --record"
    row = "| a | [00_x](notebooks/00_x.ipynb), [01_y](notebooks/01_y.ipynb) | `c` | ? | ? | s |"
    filled = timings.fill_readme(row, {"00_x": 9.6, "01_y": 61})
    assert filled == row.replace("| ? |", "| 10 s, 61 s |", 1)
    assert "| not measured yet | ? | s |" in timings.fill_readme(row, {"00_x": 9.6})


def test_the_benchmark_of_adapters_runs_small_and_the_page_shows_it(timings, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    adapters = load_script(ROOT / "benchmarks" / "adapters.py")
    out = tmp_path / "adapters.json"
    small = ("--steps", "1", "--rounds", "1", "--batch", "1", "--memory", "small-random")
    rows = adapters.main([*small, "--out", str(out)])
    theirs, ours = rows["diffusers' way, ms per step"], rows["ours, ms per step"]
    assert rows["diffusers' way / ours (goal 1.2)"] == pytest.approx(theirs / ours, abs=0.002)
    networks, both = (value for name, value in rows.items() if "GiB" in name)
    assert 0.005 < networks < both < 0.1
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["command"].startswith("python benchmarks/adapters.py --batch 1 --steps 1")
    assert f"| ours, ms per step | {ours} |" in timings.format_record(record)


def test_the_memory_of_a_step_is_that_of_the_tensors_alive(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from memory import MemoryCounter

    weight = torch.ones(256, 256, requires_grad=True)
    with MemoryCounter() as counter:
        counter.add(weight)
        hidden = torch.ones(4, 256) @ weight  # its input is kept for the gradient
        assert counter.now == 4 * (256 * 256 + 2 * 4 * 256)
        del hidden
        assert counter.now == 4 * 256 * 256
    assert counter.peak == 4 * (256 * 256 + 2 * 4 * 256)


def test_recorded_benchmarks_name_device_date_and_versions():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["date"] and record["device"] and record["rows"]
        assert record.get("versions") or record["torch"]
        assert record["command"].startswith(f"python benchmarks/{path.stem}.py")


@pytest.mark.slow
def test_stable_diffusion_2_at_full_size():
    if not os.environ.get("MEDBUDGET_FULL_SIZE"):
        pytest.skip("takes 8 GB and minutes: set MEDBUDGET_FULL_SIZE=1")
    rows = load_script(ROOT / "benchmarks" / "full_size.py").main([])
    assert all(0 < loss < 100 for loss in rows["losses"]) and len(rows["losses"]) == 2
    assert rows["image"]["shape"] == [1, 3, 512, 512] and rows["image"]["std"] > 0
    assert rows["peak after sampling, GiB"] < 12


def test_the_full_size_run_works_in_small(capsys):
    rows = load_script(ROOT / "benchmarks" / "full_size.py").main(["--base", "small-random"])
    assert len(rows["losses"]) == 2 and rows["image"]["shape"] == [1, 3, 64, 64]
    assert rows["peak after loading, GiB"] <= rows["peak after sampling, GiB"] < 8


def test_stale_results_are_found_and_their_commands_split(tmp_path):
    record = load_script(ROOT / "benchmarks" / "record.py")
    for name, base_hash in (
        ("privacy", "old"),
        ("tiny_base", "old"),
        ("new", "now"),
        ("fuzz", None),
    ):
        write_result(name, {}, command="x", base_hash=base_hash, folder=tmp_path)
    assert record.find_stale(tmp_path, "now") == ["tiny_base", "privacy"]
    study = "medbudget study table1 --store s; medbudget study report table1 --store s --record"
    tool = str(Path(sys.executable).parent / "medbudget")
    assert record.split_command(study, real=None, store=Path("kept")) == [
        [tool, "study", "table1", "--store", "kept"],
        [tool, "study", "report", "table1", "--store", "kept", "--record"],
    ]
    bars = "python benchmarks/tiny_base.py xrays --real FOLDER"
    with pytest.raises(ValueError, match="needs --real: name the folder"):
        record.split_command(bars, real=None, store=tmp_path)
    script = [sys.executable, "benchmarks/tiny_base.py", "xrays", "--real", "images"]
    script += ["--store", str(tmp_path)]
    given = {"real": Path("images"), "store": tmp_path}
    assert record.split_command(bars, **given) == [script]
    assert record.split_command(bars, **given, go_on=True) == [[*script, "--go-on"]]
    xrays = "medbudget study budget --store s --data own=xrays"
    with pytest.raises(ValueError, match="needs --real: name the folder"):
        record.split_command(xrays, real=None, store=tmp_path)
    prepare, study = record.split_command(xrays, real=Path("images"), store=Path("kept"))
    assert prepare[1:4] == ["prepare", "folder", "images"] and prepare[-1] == "kept_data/xrays"
    assert study[1:] == ["study", "budget", "--store", "kept", "--data", "own=kept_data/xrays"]


def test_a_failed_recording_says_so_and_runs_no_further(tmp_path, capsys):
    record = load_script(ROOT / "benchmarks" / "record.py")
    parts = [
        [sys.executable, "-c", code]
        for code in ("print(1, flush=True)", "raise SystemExit(3)", "print(2)")
    ]
    lanes = record.Lanes(tmp_path)
    assert not lanes.run("x", parts)
    assert (tmp_path / "x.log").read_text() == "1\n"
    assert "x: failed with 3" in capsys.readouterr().out
    assert lanes.run("x", parts[:1])
    assert "x: recorded" in capsys.readouterr().out


def test_a_stopped_recording_ends_its_commands_and_begins_no_other(tmp_path, capsys):
    record = load_script(ROOT / "benchmarks" / "record.py")
    lanes = record.Lanes(tmp_path)
    sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.begun").write_text("command")
    with ThreadPoolExecutor(1) as pool:
        both = [pool.submit(lanes.run, name, [sleep, sleep]) for name in ("a", "b")]
        while not (tmp_path / "a.log").exists() or not (tmp_path / "a.log").read_text():
            time.sleep(0.01)
        lanes.stop(15, None)
        assert [future.result(timeout=30) for future in both] == [False, False]
    said = capsys.readouterr().out
    assert "a: failed with -15" in said and "b: stopped" in said
    assert (tmp_path / "a.log").read_text() == "1\n" and (tmp_path / "b.log").read_text() == ""
    assert len(list(tmp_path.glob("*.begun"))) == 2, "both are named when it goes on"
    assert record.in_order(["privacy", "tiny_base", "privacy"]) == ["tiny_base", "privacy"]


def test_bars_draw_nothing_twice(tiny, tmp_path):
    script = load_script(ROOT / "benchmarks" / "tiny_base.py")
    word = Embedding(torch.randn(2, tiny.width), "<a>")
    script.STORE[:] = [tmp_path]
    first = script.draw(tiny, "<a>", 2, [word], steps=2)
    same = script.draw(tiny, "<b>", 2, [replace(word, token="<b>")], steps=2, seed=0)
    (file,) = (tmp_path / "images").iterdir()
    assert first.equal(same) and first.equal(
        script.sample(tiny, "<a>", embeddings=word, n=2, steps=2)
    )
    script.draw(tiny, "<a>", 2, [replace(word, vectors=2 * word.vectors)], steps=2)
    script.draw(tiny, "red ground", 2, steps=2)
    assert len(list((tmp_path / "images").iterdir())) == 3 and file.exists()


def test_bars_go_on_after_those_that_the_same_recording_wrote(tmp_path, monkeypatch, capsys):
    """Rows of an earlier recording on the same base are of other phantoms, perhaps: made anew."""
    script = load_script(ROOT / "benchmarks" / "tiny_base.py")
    runs = []

    def measure(name):
        def bar(base, args):
            runs.append(name)
            if name == "b" and len(runs) == 4:
                raise KeyboardInterrupt
            yield {"name": name, "value": len(runs)}

        return bar

    monkeypatch.setattr(script, "BARS", {name: measure(name) for name in "ab"})

    def run(*options):
        given = ["tiny_base.py", "--out", str(tmp_path / "x.json"), *options]
        monkeypatch.setattr(sys, "argv", given)
        script.main()

    store = ("--store", str(tmp_path / "store"))
    run(*store)
    with pytest.raises(KeyboardInterrupt):
        run(*store)  # recorded again, and interrupted in the second bar
    run(*store, "--go-on")
    assert runs == ["a", "b", "a", "b", "b"]
    values = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["values"]
    assert {name: rows[0]["value"] for name, rows in values.items()} == {"a": 3, "b": 5}
    record = load_script(ROOT / "benchmarks" / "record.py")
    record.begin(tmp_path, "store", "command")
    assert not list((tmp_path / "store").glob("*.recorded"))
    assert (tmp_path / "store.begun").read_text() == "command"
    with pytest.raises(SystemExit):
        run("--go-on")
    assert "needs the --out and the --store" in capsys.readouterr().err


def test_a_recording_refuses_other_phantoms_words_and_scores(tiny, tmp_path, monkeypatch):
    record = load_script(ROOT / "benchmarks" / "record.py")
    monkeypatch.setattr(record, "SPECS", (("prostate", "healthy", 64, 5),))
    monkeypatch.setattr(record, "CASES", 5)
    record.check_words(tiny)

    def draw(kind, label, n, **options):
        return make_phantoms(kind, label, n, **options | {"seed": 1})

    monkeypatch.setattr(record, "make_phantoms", draw)
    with pytest.raises(ValueError, match=r"64vectors_5cases.* other phantoms.*pretraining.words"):
        record.check_words(tiny)
    blank = SimpleNamespace(images=torch.zeros(24, 3, 8, 8))
    monkeypatch.setattr(record, "make_phantoms", lambda *args, **options: blank)
    monkeypatch.setattr(record, "KINDS", {"chest": ("healthy", "pneumonia")})
    monkeypatch.setattr(record, "disease_score", lambda images, *_: images[:, 0, 0, 0].numpy())
    with pytest.raises(ValueError, match=r"of pneumonia tells chest .*AUC of 0.50"):
        record.check_diseases()
    (tmp_path / "normal").mkdir()
    with pytest.raises(ValueError, match="has no pneumonia"):
        record.check_real(tmp_path)


def test_a_closed_terminal_stops_a_recording_unless_it_was_told_to_go_on(tmp_path):
    record = load_script(ROOT / "benchmarks" / "record.py")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    lanes = record.Lanes(tmp_path)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        lanes.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        lanes.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert lanes.stopped
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
