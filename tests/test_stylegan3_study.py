"""Section 4.2 as a study: tasks like the others, and what the chapter reads of them."""

import json
from dataclasses import replace

import pytest
import torch

from medbudget import make_phantoms
from medbudget.images import find_images, load_images, save_images
from medbudget.reader import ReaderStudy
from medbudget.results import load_result, results_folder
from medbudget.studies import (
    count,
    in_order,
    make_study,
    record_table,
    rivals,
    run,
    save_lines,
    study_settings,
    write_report,
)
from medbudget.stylegan3 import TINY, StyleGAN3, make_stylegan3
from medbudget.tiny import load_trained
from pretraining import rivals as recording

QUICK = study_settings(
    "stylegan3", "tiny", n=4, steps=1, extractors=("layout",),
    gan={"kimg": 0.016, "snapshot_kimg": 0.008},
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    make_stylegan3(replace(TINY, channel_max=8, channel_base=256)).save(path)
    return path


def plan(tiny, start, **changes):
    return make_study(
        "stylegan3", "tiny", base_hash=tiny.hash, sources={"start": start},
        settings=replace(QUICK, **changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, start, tmp_path_factory):
    study = plan(tiny, start)
    store = study.store(tmp_path_factory.mktemp("study"))
    assert run(study.tasks, store) == len(in_order(study.tasks))
    return study, store


def test_costs_are_counted_in_images_and_seconds(finished, tiny):
    study, store = finished
    gan, word = (store.read_json(row.details) for row in study.rows)
    assert gan["images_seen"] == 16 and gan["seconds"] > 0
    assert [line["images"] for line in gan["history"]] == [8, 16]
    assert word["images_seen"] == 8000, "the shipped word: 1000 steps of 8"
    assert word["seconds"] == load_trained("prostate", "healthy", tiny).record["seconds"]
    assert word["fd"]["extractor"] == gan["history"][0]["fd"]["extractor"] == "layout"


def test_both_are_scored_on_the_same_images_with_and_without_normalisation(finished):
    study, store = finished
    gan, diffusion = (store.read_json(row.score) for row in study.rows)
    for scores in (gan, diffusion):
        plain, z = (scores[f"Layout distance{suffix}"] for suffix in ("", ", z-scored"))
        assert plain["n"] == 4 and (plain["normalisation"], z["normalisation"]) == ("none", "paper")
        assert plain["value"] != z["value"]
    assert any("p = " in score["note"] for score in gan.values())
    assert not any("p = " in score["note"] for score in diffusion.values())


def test_images_of_blocks_are_those_of_one_call(finished):
    study, store = finished
    row = study.rows[0]
    network = StyleGAN3.load(store.path(row.details.inputs[0]))
    assert torch.equal(store.read_images(row.images), network.sample(4))
    # 70 images: batches of 32, 32 and 6, as one call of sample makes them
    sizes = [t.settings["n"] for t in rivals.plan_gan_blocks(row.details.inputs[0], 70)]
    assert sizes == [32, 32, 6]


def test_images_of_both_are_written_for_a_reader_study(finished, tmp_path, medbudget):
    study, store = finished
    folders = save_lines(study, store, tmp_path)
    assert [path.name for path in folders] == ["StyleGAN3", "diffusion"]
    for path, row in zip(folders, study.rows):
        assert [p.name for p in find_images(path)] == [f"{i:05d}.png" for i in range(4)]
        assert torch.equal(load_images(path), store.read_images(row.images)[:4])
    ReaderStudy.create(*folders, tmp_path / "study", n_pairs=4)
    with pytest.raises(FileExistsError, match="StyleGAN3 is there already"):
        save_lines(study, store, tmp_path)
    assert save_lines(study, study.store(tmp_path / "none"), tmp_path) == []
    command = ("study", "report", "stylegan3", "--store", tmp_path / "s", "--images", tmp_path)
    assert medbudget(*command)[0] == 0, "nothing is finished there, so nothing is written"


def test_status_and_report_know_the_study(finished, tmp_path, medbudget, start):
    study, store = finished
    assert run(study.tasks, store) == 0
    assert count(study.tasks, store)["stylegan3"] == (1, 1)
    text = (write_report(study, store, tmp_path).parent / "report.md").read_text("utf-8")
    assert "| StyleGAN3 | 16 |" in text and "| diffusion | 8000 |" in text and "z-scored" in text
    code, said, _ = medbudget("study", "status", "stylegan3", "--store", tmp_path / "none")
    assert code == 0 and "gan_block        0     7" in said


def test_other_settings_or_networks_are_another_study(finished, tiny, start, tmp_path):
    _, store = finished
    found = count(plan(tiny, start, cfg_scale=3.0).tasks, store)
    assert found["stylegan3"] == (1, 1) and found["block"] == (0, 1)
    make_stylegan3(replace(TINY, channel_max=8, channel_base=256), seed=1).save(tmp_path / "x")
    assert count(plan(tiny, tmp_path / "x").tasks, store)["stylegan3"] == (0, 1)


def test_images_twice_the_size_are_averaged_down_for_both(tiny, start, tmp_path):
    study = plan(tiny, start, size=128, cases=4, overrides={"steps": 1})  # no word of 128 px
    store = study.store(tmp_path)
    gan, diffusion = study.rows
    run(diffusion.images, store)
    (drawn,) = diffusion.images
    whole = store.read_images(drawn.inputs).float()
    halved = torch.stack([whole[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    assert torch.equal(store.read_images([drawn]), halved.round().byte())
    assert halved.shape[-1] == 64 and len(halved) == 16
    cases = gan.details.inputs[0].inputs[0]
    assert (cases.kind, cases.settings, cases.inputs[0].settings["size"]) == (
        "shrunk", {"size": 64}, 128,
    )  # fmt: skip
    assert "compared at 64 px with diffusion's 128 px" in study.about
    assert "averaged" not in plan(tiny, start, size=64).about
    with pytest.raises(ValueError, match="make 64 px, this study wants 192"):
        plan(tiny, start, size=192)


def test_what_does_not_fit_is_refused_before_anything_is_made(tiny, start, tmp_path):
    with pytest.raises(ValueError, match=r"make 64 px, this study wants 512: .*--data start=FILE"):
        make_study("stylegan3", "paper", base_hash="0", sources={"train": tmp_path})
    with pytest.raises(ValueError, match="takes no folder 'test'"):
        make_study("stylegan3", "tiny", base_hash="0", sources={"test": tmp_path})
    images = make_phantoms("prostate", "healthy", 5, seed=9).images
    for role in ("train", "reference"):
        save_images(images, tmp_path / role)
    sources = {"start": start, "train": tmp_path / "train", "reference": tmp_path / "reference"}
    with pytest.raises(ValueError, match="5 images for train, 6 are needed"):
        make_study(
            "stylegan3", "tiny", base_hash="0", sources=sources, settings=replace(QUICK, cases=6)
        )
    study = make_study(
        "stylegan3", "tiny", base_hash="0", sources=sources, settings=replace(QUICK, cases=5)
    )
    assert "the images given" in study.about


def test_a_finished_study_is_recorded_as_the_chapter_reads_it(finished, tmp_path, monkeypatch):
    study, store = finished
    with pytest.raises(ValueError, match=r"python -m pretraining\.rivals"):
        record_table(study, store, "command")
    with pytest.raises(ValueError, match="results of stylegan3 are missing"):
        recording.record_rivals(study, study.store(tmp_path / "none"), "command")
    shots = recording.read_snapshots(study, store)
    assert list(shots) == [0, 8, 16] and not torch.equal(shots[0], shots[16])
    monkeypatch.setattr(recording, "WEIGHTS", tmp_path)
    monkeypatch.setattr(recording, "SNAPSHOTS", tmp_path / "s.png")
    monkeypatch.setattr(rivals, "SNAPSHOTS", tmp_path / "s.png")
    monkeypatch.setattr(
        recording, "write_result", lambda name, values, **more: json.loads(json.dumps(values))
    )
    values = recording.record_rivals(study, store, "command")
    assert values["snapshots"] == [0, 0, 8, 8, 16, 16]
    assert torch.equal(rivals.load_snapshots([0, 1, 8, 9, 16, 17])[17], shots[16])
    recorded = json.loads((results_folder() / "stylegan3_tiny.json").read_text("utf-8"))["values"]
    assert set(values) == set(recorded)
    for name in ("stylegan3", "diffusion"):
        assert set(values[name]) == set(recorded[name])
    for rule in ("none", "paper"):
        assert set(values["scores"][rule]) == set(recorded["scores"][rule])


def test_command_line_refuses_with_one_line(medbudget, tmp_path):
    code, _, error = medbudget("study", "stylegan3", "--data", "x", "--store", tmp_path / "s")
    assert code == 1 and "ROLE=FOLDER" in error
    (tmp_path / "x.pkl").write_bytes(b"no")
    code, _, error = medbudget("study", "stylegan3", "--data", f"start={tmp_path / 'x.pkl'}")
    assert code == 1 and "x.pkl is refused" in error


def test_shipped_snapshots_fit_the_record(tiny):
    recorded = load_result("stylegan3_tiny", base_hash=tiny.hash)
    shots = rivals.load_snapshots(recorded["snapshots"])
    assert max(shots) == recorded["stylegan3"]["images_seen"] and 0 in shots
    assert load_images(rivals.SNAPSHOTS).shape[2] == 64 * len(shots)
