"""Studies: what depends on what, nothing lost and nothing twice, on every engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from medbudget.studies import (
    Store,
    StudySettings,
    Task,
    count,
    in_order,
    make_study,
    parse_changes,
    run,
    study_settings,
    write_report,
)
from medbudget.studies.report import format_values, read_values
from medbudget.studies.run import parse_shard
from medbudget.studies.tasks import KINDS, ensure

SMALL = StudySettings.preset(
    "tiny", n=20, steps=2, extractors=("layout",), overrides={"steps": 2, "batch_size": 1},
    grid={"sampling steps": (2, 3), "CFG scale": (1, 2), "vectors": (4, 64), "cases": (3, 100)},
)  # fmt: skip


def small(base_hash: str, **changes):
    return make_study("table1", "tiny", base_hash=base_hash, settings=replace(SMALL, **changes))


def counts(tasks) -> dict[str, int]:
    return {kind: total for kind, (_, total) in count(tasks, Store(Path("none"))).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every result."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for kind in ("images", "embedding", "block", "score", "compare")
        for p in sorted((folder / kind).iterdir())
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
        for s in (study_settings("table1", "tiny", n=n) for n in (100, 1000))
    )
    assert few < many and len(many) == 13 * 63


def test_a_changed_setting_recomputes_what_depends_on_it(tiny, finished):
    _, store = finished
    other = small(tiny.hash, grid=SMALL.grid | {"CFG scale": (2, 7)})
    # One new line: two blocks of 16, a score, a comparison.
    lacking = {kind: total - done for kind, (done, total) in count(other.tasks, store).items()}
    assert lacking == {"images": 0, "embedding": 0, "block": 2, "score": 1, "compare": 1}
    longer = small(tiny.hash, overrides={"steps": 3, "batch_size": 1})
    found = count(longer.tasks, store)
    assert found["images"] == (3, 3) and found["embedding"][0] == 0


def test_a_second_run_makes_nothing_and_reports_the_same_bytes(finished, tmp_path):
    study, store = finished
    before = contents(store.folder)
    first = write_report(study, store, tmp_path / "a")
    assert run(study.tasks, store) == 0
    assert contents(store.folder) == before
    second = write_report(study, store, tmp_path / "b")
    for name in ("report.md", "report.html", "figure.png"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    assert not list(store.folder.rglob("*.tmp"))
    assert not list((store.folder / "scratch").iterdir())
    (first.parent / "environment.json").unlink()
    with pytest.raises(FileExistsError, match="is no report of a study"):
        write_report(study, store, first.parent)


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
    path, scratch = store.path(task), store.scratch(task)
    scratch.mkdir(parents=True)
    for name in ("lock", "checkpoint"):
        (scratch / name).touch()  # its owner was killed
    assert ensure(task, store, wait=0.01) == 1 and not scratch.exists()
    scratch.mkdir()  # died just after the result was there, before it tidied up
    assert ensure(task, store, wait=0.01) == 0 and not scratch.exists()

    path.unlink()
    scratch.mkdir()
    with FileLock(scratch / "lock"):
        done = threading.Thread(target=ensure, args=(task, store), kwargs={"wait": 0.01})
        done.start()
        done.join(0.3)
        assert done.is_alive() and not store.has(task)
    done.join(10)
    assert store.has(task) and not scratch.exists()


def test_what_a_study_needs_is_looked_at_before_its_first_task(tiny, tmp_path):
    weights = tmp_path / "own.pth"
    with pytest.raises(FileNotFoundError, match=r"own\.pth"):
        small(tiny.hash, extractors=("layout", f"inception={weights}"))
    weights.write_bytes(b"no weights")
    study = small(tiny.hash, extractors=("layout", f"inception={weights}"))
    with pytest.raises((ValueError, OSError, RuntimeError), match=r"own\.pth"):
        run(study.tasks, study.store(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"extractor .radimagenet.*two conventions"):
        run(small(tiny.hash, extractors=("radimagenet",)).tasks, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="planned with ffffffffffff"):
        run(small("f" * 12).tasks, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_task_that_fails_ends_the_study_and_keeps_what_is_made(tiny, tmp_path, monkeypatch):
    def broken(task, store, path, checkpoint):
        raise ValueError("black images")

    study = small(tiny.hash)
    monkeypatch.setitem(KINDS, "block", replace(KINDS["block"], run=broken))
    with pytest.raises(ValueError, match="black images"):
        run(study.tasks, Store(tmp_path))
    monkeypatch.undo()
    assert count(study.tasks, Store(tmp_path))["embedding"] == (3, 3)


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


def test_inputs_come_first_and_by_level():
    word = Task("embedding", {"n": 0})
    blocks = [Task("block", {"i": i}, (word,)) for i in range(2)]
    score = Task("score", {}, tuple(blocks))
    other = Task("embedding", {"n": 1})
    found = [t.kind for t in in_order([score, other, score])]
    assert found == ["embedding", "embedding", "block", "block", "score"]


def test_settings_are_changed_by_text_and_others_refused():
    changes = parse_changes(["n=7", "overrides.steps=3", "extractors=layout,inception=x.pth"])
    assert changes == {
        "n": 7, "overrides": {"steps": 3}, "extractors": ("layout", "inception=x.pth")
    }  # fmt: skip
    assert parse_changes(["grid.CFG scale=[1, 2.5]"]) == {"grid": {"CFG scale": [1, 2.5]}}
    settings = study_settings("table1", "tiny", grid={"vectors": (8,)}, **changes)
    assert settings.n == 7 and settings.grid["vectors"] == (8,)
    assert settings.grid["cases"] == (5, 10, 50, 100), "other entries stay"
    assert study_settings("stylegan3", "tiny").n == 200
    for wrong in ("n", "m=1", "overrides=1", "n.x=1"):
        with pytest.raises(ValueError, match="is not SETTING=VALUE; settings are base, "):
            parse_changes([wrong])
    with pytest.raises(ValueError, match="n must be a number, got 'many'"):
        parse_changes(["n=many"])
    with pytest.raises(ValueError, match="unknown settings"):
        study_settings("table1", "tiny", m=1)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        study_settings("table1", "tiny", n=1)


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
    for name in ("table1", "figure5", "table2", "interpolation"):
        with pytest.raises(ValueError, match="--data"):
            make_study(name, "paper", base_hash="0")
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
    with pytest.raises(ValueError, match="20 images for train, 100 are needed"):
        make_study("table1", "tiny", base_hash=tiny.hash, sources=sources, settings=SMALL)
    store = study.store(tmp_path / "store")
    assert run(study.tasks, store) == len(in_order(study.tasks))
    next(iter(sources["train"].glob("*.png"))).unlink()  # fewer, and so others
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
