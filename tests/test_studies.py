"""Studies: what depends on what, nothing lost and nothing twice, on every engine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medbudget.files import hold, lock_file
from medbudget.studies import (
    PRESETS,
    Store,
    Task,
    clean,
    make_study,
    measure_speed,
    plan,
    run,
    simulate,
    write_report,
)
from medbudget.studies.engines import parse_shard
from medbudget.studies.live import _bars, format_left, format_line, format_time
from medbudget.studies.planning import Speed
from medbudget.studies.report import format_values, read_values
from medbudget.studies.tables import StudySettings
from medbudget.studies.tasks import cut_sets, ensure, in_order

SMALL = StudySettings(
    base="tiny", inversion="tiny", n=20, steps=2, size=64,
    grid={"sampling steps": (2, 3), "CFG scale": (1, 2), "vectors": (4, 64), "cases": (3, 100)},
    extractors=("layout",), phantom=("prostate", "healthy"), overrides={"steps": 2, "batch_size": 1},
)  # fmt: skip


def small(base_hash: str, **changes):
    return make_study("table1", "tiny", base_hash=base_hash, settings=replace(SMALL, **changes))


def counts(tasks) -> dict[str, int]:
    found: dict[str, int] = {}
    for task in in_order(tasks):
        found[task.kind] = found.get(task.kind, 0) + 1
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every result, without what tells how long it took."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for kind in ("images", "embedding", "block", "score", "compare")
        for p in sorted((folder / kind).iterdir())
        if not p.name.endswith(".about.json")
    }


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("study"))
    study = small(tiny.hash)
    assert run(study.tasks, store) == len(in_order(study.tasks))
    return study, store


def test_the_tiny_table1_trains_each_word_once():
    study = make_study("table1", "tiny", base_hash="0" * 12)
    # The final configuration and 3 others a setting: 13 sets of 64 images in 4 blocks; 7 words.
    assert counts(study.tasks) == {
        "images": 3, "embedding": 7, "block": 13 * 4, "score": 14, "compare": 12,
    }  # fmt: skip
    assert len(study.rows) == 16
    first = next(r.paper for r in study.rows if r.group == "cases")
    assert first == {"FID": 158, "MFID": 2.55}


def test_figure5_needs_the_first_block_of_each_line_and_no_score():
    study = make_study("figure5", "tiny", base_hash="0" * 12)
    assert counts(study.tasks) == {"images": 2, "embedding": 7, "block": 13}


def test_images_are_shared_between_small_and_large_n():
    few, many = (
        {
            t.key
            for t in in_order(make_study("table1", "tiny", base_hash="0", settings=s).tasks)
            if t.kind == "block"
        }
        for s in (replace(PRESETS["tiny"], n=100), replace(PRESETS["tiny"], n=1000))
    )
    assert few < many and len(many) == 13 * 63


def test_a_changed_setting_recomputes_what_depends_on_it(tiny, finished):
    _, store = finished
    other = small(tiny.hash, grid=SMALL.grid | {"CFG scale": (2, 7)})
    # One new line: two blocks of 16, a score, a comparison.
    missing = plan(other.tasks, store)
    lacking = {k: missing.total[k] - missing.done[k] for k in missing.total}
    assert lacking == {"images": 0, "embedding": 0, "block": 2, "score": 1, "compare": 1}
    longer = small(tiny.hash, overrides={"steps": 3, "batch_size": 1})
    missing = plan(longer.tasks, store)
    assert missing.done["images"] == 3 and missing.done["embedding"] == 0
    assert missing.seconds["embedding"] is None  # no measured speed of these to go by
    again = plan(other.tasks, store).seconds
    assert again["block"] is not None and again["block"] > 0 and again["embedding"] == 0


def test_a_second_run_makes_nothing_and_reports_the_same_bytes(finished, tmp_path):
    study, store = finished
    before = contents(store.folder)
    first = write_report(study, store, tmp_path / "a")
    assert run(study.tasks, store) == 0
    assert contents(store.folder) == before
    second = write_report(study, store, tmp_path / "b")
    for name in ("report.md", "report.html", "figure.png"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    assert not list(store.folder.rglob("*.tmp")) and not list(store.folder.rglob("*.claim"))
    assert not list((store.folder / "scratch").iterdir())


def test_the_report_shows_ours_the_papers_and_what_is_missing(tiny, finished, tmp_path):
    study, store = finished
    values = read_values(study, store)
    line = next(r for r in values["rows"] if (r["setting"], r["value"]) == ("CFG scale", 1))
    assert line["paper"]["FID"] == 85 and 0 < line["compare"]["p_value"] <= 1
    score = line["scores"]["Layout distance"]
    assert score["interval"][0] < score["value"] < score["interval"][1]
    floor = values["floor"]["Layout distance"]["value"]
    found = [row["scores"]["Layout distance"]["value"] for row in values["rows"]]
    assert floor < min(found)  # two steps of training are no competitor
    text = (write_report(study, store, tmp_path / "done").parent / "report.md").read_text(
        encoding="utf-8"
    )
    assert "missing" not in text and "tiny base" in text and "phantoms" in text
    empty = Store(tmp_path / "empty")
    page = write_report(study, empty, tmp_path / "none")
    assert "results are still missing" in page.read_text(
        encoding="utf-8"
    ) and "missing" in page.read_text(encoding="utf-8")


def test_values_are_printed_with_intervals_tests_and_the_papers_numbers():
    score = {"value": 0.12345, "interval": [0.1, 0.2]}
    rows = [
        {"setting": "a", "value": 2.0, "paper": {"FID": 85}, "scores": {"FD": score}},
        {"setting": "b", "value": "long", "paper": {}, "compare": {"p_value": 0.01},
         "scores": {"FD": {"value": 217.53, "interval": [208.868, 226.2]}}},
        {"setting": "c", "value": 1, "paper": {"AUC": ".8"}},
    ]  # fmt: skip
    table = format_values({"rows": rows}, ("what", "how"))
    assert list(table) == ["what", "how", "FD", "p", "FID (paper)", "AUC (paper)"]
    assert table.to_numpy().tolist() == [
        ["a", "2", "0.123 [0.100, 0.200]", "–", "85", "–"],
        ["b", "long", "217.5 [208.9, 226.2]", "0.010", "–", "–"],
        ["c", "1", "missing", "–", "–", ".8"],
    ]


def test_two_shares_side_by_side_make_everything_once(tiny, finished, tmp_path):
    study, store = finished
    script = (
        "import sys; from test_studies import small; from medbudget.studies import *;"
        "from pathlib import Path; import torch; torch.set_num_threads(1);"
        "print(run(small(sys.argv[1]).tasks, Store(Path(sys.argv[2])), shard=sys.argv[3]))"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, tiny.hash, tmp_path / "shared"]
    shares = [
        subprocess.Popen(
            [*command, f"{i}/2"], cwd=here, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        for i in (1, 2)
    ]
    made = [int(share.communicate(timeout=300)[0].strip().splitlines()[-1]) for share in shares]
    # A share also makes what its own tasks need, but never what the other one has made.
    assert sum(made) == len(in_order(study.tasks)) and min(made) > 0
    assert contents(tmp_path / "shared") == contents(store.folder)


def test_killed_and_started_again_gives_the_same_bytes(tiny, finished, tmp_path):
    study, store = finished
    script = (
        "import sys; from test_studies import small; from medbudget.studies import *;"
        "from pathlib import Path; import torch; torch.set_num_threads(1);"
        "run(small(sys.argv[1]).tasks, Store(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", script, tiny.hash, tmp_path / "killed"]
    work = subprocess.Popen(command, cwd=Path(__file__).parent)
    blocks = tmp_path / "killed" / "block"
    deadline = time.monotonic() + 240
    while not (blocks.is_dir() and len(list(blocks.glob("*.safetensors"))) >= 3):
        assert work.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(work.pid, signal.SIGKILL)
    work.wait()
    rest = Store(tmp_path / "killed")
    made = run(study.tasks, rest)
    assert 0 < made < len(in_order(study.tasks))
    assert contents(rest.folder) == contents(store.folder)
    left = [p for p in rest.folder.rglob("*") if p.name.startswith(".") or p.suffix == ".ckpt"]
    assert not left


def test_a_result_that_another_makes_is_waited_for_and_what_the_dead_left_is_removed(tmp_path):
    task = Task("images", {"source": "phantoms", "kind": "prostate", "label": "healthy",
                           "split": "train", "seed": 0, "n": 1, "size": 64})  # fmt: skip
    store = Store(tmp_path)
    path = store.path(task)
    path.parent.mkdir()
    lock_file(path).write_text('{"pid": 1, "host": "gone"}')  # its owner is dead: at once
    assert ensure(task, store, wait=0.01) and not lock_file(path).exists()
    lock_file(path).touch()  # died just after the result was there, before it tidied up
    checkpoint = tmp_path / "scratch" / f"{task.key}.ckpt"
    checkpoint.touch()
    assert ensure(task, store) == 0
    assert not lock_file(path).exists() and not checkpoint.exists()

    path.unlink()
    with hold(path):
        done = threading.Thread(target=ensure, args=(task, store), kwargs={"wait": 0.01})
        done.start()
        done.join(0.3)
        assert done.is_alive() and not store.has(task)
    done.join(10)
    assert store.has(task) and not lock_file(path).exists()


def test_unused_results_are_found_and_only_deleted_on_request(tiny, finished, tmp_path):
    study, store = finished
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.folder, copy.folder)
    assert clean(study.tasks, copy) == {}
    fewer = small(tiny.hash, grid={"CFG scale": (1, 2)})
    found = clean(fewer.tasks, copy)
    kinds = {path.parent.name for path in found}
    assert {"block", "embedding", "score", "compare"} == kinds and all(p.exists() for p in found)
    clean(fewer.tasks, copy, delete=True)
    assert not any(p.exists() for p in found)
    assert run(fewer.tasks, copy) == 0


def test_another_base_than_planned_is_refused(tmp_path):
    study = small("f" * 12)
    with pytest.raises(ValueError, match="planned with ffffffffffff"):
        run(study.tasks, Store(tmp_path))


def test_a_trial_estimates_before_anything_is_done(tiny, tmp_path):
    study = small(tiny.hash)
    store = Store(tmp_path / "new")
    before = plan(study.tasks, store)
    assert before.all_seconds is None and before.bytes is None
    assert before.needs["embedding"] == ["images"] and before.needs["images"] == []
    assert set(before.needs["score"]) == {"images", "block"}
    measure_speed(study.tasks, store)
    assert [p.name for p in store.folder.iterdir()] == ["speed.json"]  # nothing else is kept
    found = plan(study.tasks, store)
    assert found.all_seconds > 0 and sum(found.done.values()) == 0
    assert {one.source for one in found.speed.values()} == {"small trial"}
    # blocks of 16 RGB images of 64 px are most of it, beside three sets of up to 100 images
    blocks = found.total["block"] * 16 * 3 * 64 * 64
    assert blocks < found.bytes < 1.6 * blocks
    longer = plan(small(tiny.hash, overrides={"steps": 400, "batch_size": 1}).tasks, store)
    assert longer.seconds["embedding"] > 5 * found.seconds["embedding"]


def test_speed_is_fixed_and_by_cost():
    task = Task("block", {"steps": 10, "cfg_scale": 2.0})
    assert Speed(1.0, 0.5, 0, "").seconds(task) == 11  # two passes a step
    assert Speed(1.0, 0.5, 0, "").seconds(Task("block", {"steps": 10, "cfg_scale": 1})) == 6
    sets = Task(
        "score", {"sets": [[4, 64], [1, 64]]}, tuple(Task("block", {"i": i}) for i in range(5))
    )
    small = cut_sets(sets, 2)
    assert small.settings["sets"] == [[2, 32], [1, 32]]
    assert [t.settings["i"] for t in small.inputs] == [0, 1, 4]


def test_progress_tells_counts_and_time_left(finished, tmp_path):
    study, store = finished
    assert (
        format_time(89) == "89 s"
        and format_time(720) == "12 min"
        and format_time(36000) == "10.0 h"
    )
    none = format_line(study.tasks, Store(tmp_path), 1)
    assert "embedding 0/3 · block 0/10" in none and none.endswith("time left not known yet")
    assert "about 0 s left" in format_line(study.tasks, store, 1)
    found = replace(plan(study.tasks, store), seconds={"embedding": 600.0, "compare": None})
    assert format_left(found, 2) == "at least 5 min left"
    assert format_left(replace(found, seconds={"embedding": 600.0}), 1) == "about 10 min left"


def test_progress_in_a_terminal_is_a_bar_for_each_kind(finished, monkeypatch, capsys):
    study, store = finished
    monkeypatch.setattr("medbudget.progress.is_off", lambda: False)
    over = threading.Event()
    over.set()
    _bars(study.tasks, store, 1, over)
    shown = capsys.readouterr().err
    for kind, total in counts(study.tasks).items():
        assert re.search(rf"{kind} *: 100%.*{total}/{total} ", shown)
    assert "study: about 0 s left" in shown


def test_progress_in_a_log_is_lines_and_no_bars(tiny, finished, tmp_path):
    study, store = finished
    shutil.copytree(store.folder, tmp_path / "log")
    Store(tmp_path / "log").path(study.rows[0].score).unlink()
    script = (
        "import sys; from test_studies import small; from medbudget.studies import *;"
        "from pathlib import Path; run(small(sys.argv[1]).tasks, Store(Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny.hash, tmp_path / "log"], cwd=Path(__file__).parent,
        env={**os.environ, "TQDM_DISABLE": "0"}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 0 and "\r" not in done.stderr
    assert all(re.match(r"\d\d:\d\d:\d\d images 3/3", line) for line in lines)
    assert "score 6/6" in lines[-1] and lines[-1].endswith("about 0 s left")


def test_workers_make_the_same_bytes(tiny, finished, tmp_path, monkeypatch):
    """Two processes, as on a machine with two GPUs: the number of devices is pretended."""
    study, store = finished
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    two = Store(tmp_path / "two")
    assert run(study.tasks, two) == len(in_order(study.tasks))
    assert contents(two.folder) == contents(store.folder)


def test_bytes_do_not_depend_on_the_threads_of_the_process(tiny, finished, tmp_path):
    study, store = finished
    word = next(t for t in in_order(study.tasks) if t.kind == "embedding")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run([word], Store(tmp_path))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert Store(tmp_path).path(word).read_bytes() == store.path(word).read_bytes()


def test_simulated_ends_are_those_worked_out_by_hand():
    word = Task("embedding", {"n": 0})
    blocks = [Task("block", {"i": i}, (word,)) for i in range(5)]
    score = Task("score", {}, tuple(blocks))
    lengths = {"embedding": 10.0, "block": 2.0, "score": 1.0}
    for workers, end in ((1, 21), (2, 10 + 6 + 1), (5, 13), (100, 13)):
        assert simulate([score], lambda t: lengths[t.kind], workers) == (end, 21)
    two = [Task("embedding", {"n": 1}), Task("embedding", {"n": 2})]
    assert simulate(two, lambda t: float(t.settings["n"]), 2) == (2, 3)
    with pytest.raises(ValueError, match="at least one"):
        simulate(two, lambda t: 1.0, 0)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/0", ""])
def test_bad_shards_are_refused(text):
    with pytest.raises(ValueError, match="i/k"):
        parse_shard(text)


def test_unknown_names_list_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="table1"):
        make_study("table9", "tiny", base_hash="0")
    with pytest.raises(ValueError, match="colab"):
        make_study("table1", "small", base_hash="0")
    with pytest.raises(ValueError, match="no folder 'test'; its roles are train, reference"):
        make_study("table1", "tiny", base_hash="0", sources={"test": tmp_path})
    with pytest.raises(ValueError, match="--data"):
        make_study("table1", "paper", base_hash="0")
    with pytest.raises(ValueError, match="local, ray"):
        run([], Store(tmp_path), engine="slurm")
    with pytest.raises(ValueError, match="at least one worker"):
        run([], Store(tmp_path), workers=0)
    with pytest.raises(ValueError, match="workers are for the local engine"):
        run([], Store(tmp_path), engine="ray", workers=2)


def test_folders_of_real_images_replace_phantoms_and_are_checked(tiny, tmp_path):
    from medbudget import make_phantoms, save_images

    sources = {}
    for role, split in (("train", "train"), ("reference", "test")):
        save_images(make_phantoms("chest", "healthy", 20, split=split).images, tmp_path / role)
        sources[role] = tmp_path / role
    settings = replace(SMALL, cases=20, grid={"CFG scale": (1, 2)})
    study = make_study(
        "table1", "tiny", base_hash=tiny.hash, sources=sources, settings=settings
    )  # fmt: skip
    assert study.floor is None
    store = Store(tmp_path / "store", sources)
    assert run(study.tasks, store) == len(in_order(study.tasks))
    next(iter(sources["train"].glob("*.png"))).unlink()
    with pytest.raises(ValueError, match="not those that the study was planned with"):
        run(study.tasks, Store(tmp_path / "other", sources))


@pytest.mark.slow
def test_ray_loses_a_node_and_its_driver_and_makes_every_result_once(
    tiny, finished, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="no Ray here: pip install 'medbudget[ray]'")
    from ray.cluster_utils import Cluster

    _, store = finished
    grid = {"CFG scale": (1, 2), "vectors": (4, 64)}
    study = small(tiny.hash, grid=grid)
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    target = Store(tmp_path / "ray")
    script = (
        "import sys; from test_studies import small; from medbudget.studies import *;"
        "from pathlib import Path;"
        "print('made', run(small(sys.argv[1], grid=GRID).tasks, Store(Path(sys.argv[2])),"
        " engine='ray', address=sys.argv[3]))".replace("GRID", repr(grid))
    )

    def blocks() -> int:
        return len(list((target.folder / "block").glob("*.safetensors")))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        second = cluster.add_node(num_cpus=1, num_gpus=1)  # as if each had a GPU
        command = [sys.executable, "-c", script, tiny.hash, target.folder, cluster.address]

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")

        def wait_for(count: int, driver: subprocess.Popen[str]) -> None:
            deadline = time.monotonic() + 240
            while blocks() < count:
                assert driver.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)

        driver = start()
        wait_for(1, driver)
        cluster.remove_node(second)
        wait_for(3, driver)
        driver.kill()
        driver.wait()
        before = {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in map(target.path, in_order(study.tasks))
            if path.exists()
        }
        output = start().communicate(timeout=300)[0]
        made = int(output.split("made")[-1])
        total = len(in_order(study.tasks))
        # one node, so one task was in flight; Ray may have let it end or not
        assert total - len(before) - 1 <= made <= total - len(before) < total
        for path, was in before.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == was, f"{path} was made twice"
        for task in in_order(study.tasks):
            assert target.path(task).read_bytes() == store.path(task).read_bytes()
    finally:
        cluster.shutdown()
