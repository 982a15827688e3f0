"""Studies: what depends on what, nothing lost and nothing twice, on every engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from medbudget import make_phantoms, save_images
from medbudget.files import hash_settings
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
from medbudget.studies.tasks import KINDS, ensure, parse_shard

SMALL = StudySettings.preset(
    "tiny", n=16, cases=8, steps=2, extractors=("layout",), overrides={"steps": 2, "batch_size": 1},
    grid={"CFG scale": (1, 2), "vectors": (4, 64)},
)  # fmt: skip
PHANTOM = {"source": "phantoms", "kind": "prostate", "label": "healthy", "split": "train",
           "n": 1, "size": 64}  # fmt: skip
KEYS = {
    "table1": "75420ae452b7", "table2": "2b11e14bceff", "interpolation": "bc5b5057aa34",
    "stylegan3": "1adeedb9e6fc", "budget": "c21dbe58e65c",
}  # fmt: skip


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


def test_recorded_results_keep_their_names():
    """The keys of the recorded studies: with others, all would have to be made again."""
    found = {}
    for name, changes in (
        ("table1", {}), ("table2", {}), ("interpolation", {}), ("stylegan3", {"gan": {"kimg": 30}}),
        ("budget", {}),
    ):  # fmt: skip
        settings = study_settings(name, "tiny", **changes)
        study = make_study(name, "tiny", base_hash="bef938fb007f", settings=settings)
        found[name] = hash_settings({"keys": sorted(t.key for t in in_order(study.tasks))})
    assert found == KEYS


def test_the_tiny_table1_draws_each_word_once():
    study = make_study("table1", "tiny", base_hash="0" * 12)
    # The final configuration and 3 others a setting: 13 sets of 64 images in 4 blocks; 7 words,
    # which ship with the package: they were learned in the same way.
    assert counts(study.tasks) == {
        "images": 2, "word": 7, "block": 13 * 4, "score": 14, "compare": 12,
    }  # fmt: skip
    assert len(study.rows) == 16
    first = next(r.paper for r in study.rows if r.group == "cases")
    assert first == {"FID": 158, "MFID": 2.55}
    figure5 = make_study("figure5", "tiny", base_hash="0" * 12)
    assert counts(figure5.tasks) == {"images": 1, "word": 7, "block": 13}
    settings = study_settings("table1", "tiny", n=1000)
    many = make_study("table1", "tiny", base_hash="0" * 12, settings=settings)
    few, blocks = ({t.key for t in in_order(s.tasks) if t.kind == "block"} for s in (study, many))
    assert few < blocks and len(blocks) == 13 * 63, "images are shared between small and large n"


@pytest.mark.parametrize(
    "change", [{"size": 128}, {"inversion": "colab"}, {"overrides": {"steps": 5}}]
)
def test_words_that_ship_stand_in_only_for_what_would_be_learned_alike(change):
    settings = study_settings("table1", "tiny", **change)
    study = make_study("table1", "tiny", base_hash="0" * 12, settings=settings)
    assert counts(study.tasks)["embedding"] == 7 and "word" not in counts(study.tasks)


def test_a_changed_setting_recomputes_what_depends_on_it(tiny, finished):
    _, store = finished
    other = small(tiny.hash, grid=SMALL.grid | {"CFG scale": (2, 7)})
    lacking = {kind: total - done for kind, (done, total) in count(other.tasks, store).items()}
    assert lacking == {"images": 0, "embedding": 0, "block": 1, "score": 1, "compare": 1}
    longer = small(tiny.hash, overrides={"steps": 3, "batch_size": 1})
    found = count(longer.tasks, store)
    assert found["images"] == (3, 3) and found["embedding"][0] == 0
    scored = small(tiny.hash, z_scored=True)
    assert count(scored.tasks, store)["score"] == (0, 4)


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


def test_the_report_shows_ours_the_papers_and_what_is_missing(finished, tmp_path):
    study, store = finished
    values = read_values(study, store)
    line = next(r for r in values["rows"] if (r["setting"], r["value"]) == ("CFG scale", 1))
    assert line["paper"]["FID"] == 85 and 0 < line["compare"]["p_value"] <= 1
    score = line["scores"]["Layout distance"]
    assert score["interval"][0] < score["value"] < score["interval"][1]
    floor = values["floor"]["Layout distance"]["value"]
    found = [row["scores"]["Layout distance"]["value"] for row in values["rows"]]
    assert floor < min(found)  # two steps of training are no competitor
    text = (write_report(study, store, tmp_path / "done").parent / "report.md").read_text("utf-8")
    assert "missing" not in text and "base tiny" in text and "phantoms" in text
    page = write_report(study, Store(tmp_path / "empty"), tmp_path / "none").read_text("utf-8")
    assert "results are still missing" in page and "<td>missing</td>" in page


def test_z_scored_distances_stand_beside_the_others(finished, tmp_path):
    """What the paper's script computes: blind to brightness, where the plain distance is not."""
    study, store = finished
    score = study.rows[0].score
    task = Task("score", score.settings | {"z_scored": True}, score.inputs)
    assert ensure(task, store) == 1
    scores = store.read_json(task)
    assert list(scores) == ["Layout distance", "Layout distance, z-scored"]
    assert scores["Layout distance"] == store.read_json(score)["Layout distance"]
    store.path(task).unlink()
    assert study_settings("table1", "paper").z_scored


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


def test_what_a_training_took_is_printed_where_it_is_known():
    details = {"images_seen": 1200, "seconds": 25.4, "bytes": 28_117_960, "device": "cpu"}
    rows = [{"setting": "a", "value": "word", "paper": {}, "details": details},
            {"setting": "a", "value": "none", "paper": {}}]  # fmt: skip
    table = format_values({"rows": rows})[["images seen", "seconds", "kB"]]
    assert table.to_numpy().tolist() == [["1,200", "25", "28,118"], ["–", "–", "–"]]


def test_two_shares_side_by_side_make_everything_once(finished, tmp_path):
    study, store = finished
    shared = Store(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        shares = [pool.submit(run, study.tasks, shared, shard=f"{i}/2") for i in (1, 2)]
        made = [share.result() for share in shares]
    # A share also makes what its own tasks need, but never what the other one has made.
    assert sum(made) == len(in_order(study.tasks)) and min(made) > 0
    assert contents(tmp_path) == contents(store.folder)


def run_small(base_hash, folder):
    torch.set_num_threads(1)
    run(small(base_hash).tasks, Store(folder))


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(tiny, finished, tmp_path, forkserver):
    study, store = finished
    work = forkserver.Process(target=run_small, args=(tiny.hash, tmp_path))
    work.start()
    deadline = time.monotonic() + 240
    while not list((tmp_path / "block").glob("*.safetensors")):
        assert work.exitcode is None and time.monotonic() < deadline
        time.sleep(0.02)
    work.kill()
    work.join()
    made = run(study.tasks, Store(tmp_path))
    assert 0 < made < len(in_order(study.tasks))
    assert contents(tmp_path) == contents(store.folder)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".") or p.suffix == ".ckpt"]


def test_a_result_that_another_makes_is_waited_for_and_what_the_dead_left_is_removed(tmp_path):
    task = Task("images", PHANTOM | {"seed": 0})
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
    with pytest.raises(ValueError, match=r"unknown extractor .radimagenet.*radimagenet-keras"):
        run(small(tiny.hash, extractors=("radimagenet",)).tasks, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="planned with ffffffffffff"):
        run(small("f" * 12).tasks, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_task_that_fails_ends_the_study_and_keeps_what_is_made(tmp_path, monkeypatch):
    def broken(task, store):
        raise ValueError("black images")

    first = Task("images", PHANTOM | {"seed": 0})
    monkeypatch.setitem(KINDS, "block", replace(KINDS["block"], run=broken, needs=None))
    with pytest.raises(ValueError, match="black images"):
        run([Task("block", {}, (first,))], Store(tmp_path))
    assert Store(tmp_path).has(first)


def test_workers_make_the_same_bytes(tmp_path, monkeypatch):
    """Two processes, as on a machine with two GPUs: the number of devices is pretended."""
    tasks = [Task("images", PHANTOM | {"seed": seed}) for seed in range(4)]
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert run(tasks, one) == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert run(tasks, two) == 4
    assert [one.path(t).read_bytes() for t in tasks] == [two.path(t).read_bytes() for t in tasks]


def test_bytes_do_not_depend_on_the_threads_of_the_process(finished, tmp_path):
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
    assert parse_changes(["grid.cases=5,20"]) == {"grid": {"cases": [5, 20]}}
    settings = study_settings("table1", "tiny", grid={"vectors": (8,)}, **changes)
    assert settings.n == 7 and settings.grid["vectors"] == (8,)
    assert settings.grid["cases"] == (5, 10, 50, 100), "other entries stay"
    assert study_settings("stylegan3", "tiny").n == 200
    for wrong in ("n", "m=1", "overrides=1", "n.x=1"):
        with pytest.raises(ValueError, match="is not SETTING=VALUE; settings are base, "):
            parse_changes([wrong])
    with pytest.raises(ValueError, match="n must be a whole number, got 'many'"):
        study_settings("table1", "tiny", **parse_changes(["n=many"]))
    with pytest.raises(ValueError, match="unknown settings"):
        study_settings("table1", "tiny", m=1)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        study_settings("table1", "tiny", n=1)


def test_bad_shards_are_refused():
    for text in ("0/2", "3/2", "2", "a/b", "-1/2", "1/0", ""):
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
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run([], Store(tmp_path), workers=0)
    with pytest.raises(ValueError, match="workers are for the local engine"):
        run([], Store(tmp_path), engine="ray", workers=2)


def test_folders_of_real_images_replace_phantoms_and_are_checked(tiny, tmp_path):
    sources = {}
    for role, split in (("train", "train"), ("reference", "test")):
        save_images(make_phantoms("chest", "healthy", 16, split=split).images, tmp_path / role)
        sources[role] = tmp_path / role
    settings = replace(SMALL, cases=16, grid={})
    study = make_study("table1", "tiny", base_hash=tiny.hash, sources=sources, settings=settings)
    assert study.floor is None and "the images given" in study.about
    with pytest.raises(ValueError, match="16 images for train, 100 are needed"):
        more = replace(SMALL, cases=100)
        make_study("table1", "tiny", base_hash=tiny.hash, sources=sources, settings=more)
    study = make_study("figure5", "tiny", base_hash=tiny.hash, sources=sources, settings=settings)
    store = study.store(tmp_path / "store")
    assert run(study.tasks, store) == 1
    assert len(store.read_images(study.extra)) == 16
    next(iter(sources["reference"].glob("*.png"))).unlink()  # fewer, and so others
    with pytest.raises(ValueError, match=r"folder reference has hash .* was planned with"):
        run(study.tasks, study.store(tmp_path / "other"))


@pytest.mark.slow
def test_ray_loses_a_node_and_makes_every_result_once(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="no Ray here: pip install 'medbudget[ray]'")
    from ray.cluster_utils import Cluster

    tasks = [Task("images", PHANTOM | {"seed": seed, "n": 16}) for seed in range(8)]
    sets = {"sets": [[1, 16], [1, 16]], "extractors": ["layout"]}
    tasks += [Task("score", sets, pair) for pair in pairwise(tasks)]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    store = Store(tmp_path / "ray")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(run, tasks, store, engine="ray", address=cluster.address)
            deadline = time.monotonic() + 240
            while len(list((store.folder / "images").glob("*.safetensors"))) < 2:
                assert not made.done() and time.monotonic() < deadline
                time.sleep(0.02)
            cluster.remove_node(second)
            # what was in flight on the lost node may be made again, and nothing else
            assert len(tasks) - 1 <= made.result() <= len(tasks)
    finally:
        ray.shutdown()
        cluster.shutdown()
    alone = Store(tmp_path / "alone")
    run(tasks, alone)
    assert [store.path(t).read_bytes() for t in tasks] == [
        alone.path(t).read_bytes() for t in tasks
    ]
